//! A rehearsal, driven as the daemon does it.

use std::os::fd::{AsRawFd, OwnedFd};
use std::process::{Child, ExitStatus};

use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use stillpoint_control::message::Request;
use stillpoint_control::rehearsal::Rehearsal;

use crate::patience::{PATIENCE, wait_end};
use crate::releases::Release;
use crate::start::{command, start, wait_ready};
use crate::vm::{Vm, binary};

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
        let flags = SocketFlags::CLOEXEC;
        let (socket, theirs) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
        let (reader, writer) = std::io::pipe()?;
        let writer = OwnedFd::from(writer);
        let log = self.dir.path().join("vmm.log");
        let binary = binary(to, self.manner.uid, self.dir.path())?;
        let mut command = command(&binary, &log, self.manner)?;
        command.args(to.arguments()).arg("rehearse");
        command
            .arg("--handover-fd")
            .arg(theirs.as_raw_fd().to_string());
        command
            .arg("--ready-fd")
            .arg(writer.as_raw_fd().to_string());
        let stage = Stage {
            child: start(&mut command, &[&theirs, &writer])?,
            socket: Some(socket),
        };
        drop((theirs, writer));
        wait_ready(reader, "the rehearsal", &log)?;
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
