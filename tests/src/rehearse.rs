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
        self.start_stage_as(to, &["rehearse"])
    }

    fn start_stage_as(&mut self, to: Release, verb: &[&str]) -> anyhow::Result<Stage> {
        let (reader, stage) = self.start_beside(to, verb, |child, socket| {
            let socket = Some(socket);
            Ok(Stage { child, socket })
        })?;
        wait_ready(reader, "the rehearsal", &self.dir.path().join("vmm.log"))?;
        Ok(stage)
    }

    /// Rehearses with it.
    pub fn rehearse_with(&self, stage: &mut Stage, peek: bool) -> anyhow::Result<Rehearsal> {
        self.rehearse_as(stage, peek, None)
    }

    fn rehearse_as(
        &self,
        stage: &mut Stage,
        peek: bool,
        nonce: Option<String>,
    ) -> anyhow::Result<Rehearsal> {
        let request = Request::Rehearse {
            peek,
            budget_ns: None,
            patience: PATIENCE,
            clock: None,
            nonce,
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
    /// Rehearses a jump of the host after which this release would revive the guest. The record is stored by
    /// `stored_by`, and looked at by `looked_at_by`.
    pub fn rehearse_jump(
        &mut self,
        by: Release,
        (stored_by, looked_at_by): (&str, &str),
    ) -> anyhow::Result<Rehearsal> {
        let mut stage = self.start_stage_as(by, &["rehearse", "--nonce", looked_at_by])?;
        let told = self.rehearse_as(&mut stage, true, Some(stored_by.to_owned()))?;
        stage.wait_end()?;
        Ok(told)
    }
}
