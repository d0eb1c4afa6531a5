//! A rehearsal, driven as the daemon does it.

use std::os::fd::OwnedFd;
use std::process::{Child, ExitStatus};

use stillpoint_control::message::Request;
use stillpoint_control::rehearsal::Rehearsal;

use crate::patience::{PATIENCE, wait_end};
use crate::releases::Release;
use crate::start::wait_ready;
use crate::vm::Vm;

/// A process that waits for something to rehearse.
#[derive(Debug)]
pub struct Stage {
    child: Child,
    socket: Option<OwnedFd>,
}

impl Stage {
    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Waits until it has ended by itself.
    pub fn wait_end(&mut self) -> anyhow::Result<ExitStatus> {
        wait_end(&mut self.child, "the rehearsal's end")
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Vm {
    /// Starts the process of another release that is to rehearse with this guest.
    pub fn start_stage(&mut self, to: Release) -> anyhow::Result<Stage> {
        let (reader, stage) = self.start_beside(to, "rehearse", |child, socket| {
            let socket = Some(socket);
            Ok(Stage { child, socket })
        })?;
        wait_ready(reader, "the rehearsal", &self.dir.path().join("vmm.log"))?;
        Ok(stage)
    }

    /// Rehearses with it.
    pub fn rehearse_with(&self, stage: &mut Stage, peek: bool) -> anyhow::Result<Rehearsal> {
        let request = Request::Rehearse {
            peek,
            budget_ns: None,
            patience: PATIENCE,
            clock: None,
        };
        let socket = stage.socket.take();
        let socket = socket.ok_or_else(|| anyhow::anyhow!("a second rehearsal with it"))?;
        Ok(self.client()?.rehearse(&request, socket)?)
    }

    /// Rehearses a swap to this release, and waits until its process has ended.
    pub fn rehearse(&mut self, to: Release, peek: bool) -> anyhow::Result<Rehearsal> {
        let mut stage = self.start_stage(to)?;
        let told = self.rehearse_with(&mut stage, peek)?;
        stage.wait_end()?;
        Ok(told)
    }
}
