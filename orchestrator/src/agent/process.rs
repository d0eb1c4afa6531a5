//! One process, held by its pidfd.
//!
//! A pidfd names one process for ever; a pid may be used again. So it is opened first, and the
//! start time compared afterwards: if both fit, all later acts hit that very process.

use std::os::fd::{AsFd, OwnedFd};
use std::process::Child;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::process::{Pid, PidfdFlags, Signal, WaitId, WaitIdOptions};
use stillpoint_control::message::ProcessId;
use tokio::io::unix::AsyncFd;

use super::pidfd;

/// Which start of the kernel this is; empty where the kernel doesn't say.
pub fn boot_id() -> String {
    ProcessId::of(std::process::id()).map_or_else(String::new, |us| us.boot_id)
}

/// How a process ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Exit {
    /// With this code.
    Code(i32),
    /// By this signal.
    Signal(i32),
    /// It was not our child, so its status went to someone else.
    Unknown,
}

impl std::fmt::Display for Exit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Code(code) => write!(f, "exited with code {code}"),
            Self::Signal(signal) => write!(f, "was killed by signal {signal}"),
            Self::Unknown => f.write_str("ended while no daemon was its parent"),
        }
    }
}

/// Why a process could not be held.
#[derive(Debug, thiserror::Error)]
pub enum HoldError {
    /// There is no such process, or another one has its pid.
    #[error("process {0} is gone")]
    Gone(u32),
    /// The kernel refuses.
    #[error("cannot hold process {pid}: {source}")]
    Pidfd {
        /// Its pid.
        pid: u32,
        /// Why not.
        source: std::io::Error,
    },
}

/// A process that is held.
#[derive(Debug)]
pub struct Process {
    id: ProcessId,
    pidfd: AsyncFd<OwnedFd>,
}

impl Process {
    /// Holds the process that was started as `child`.
    pub fn of_child(child: &Child) -> Result<Self, HoldError> {
        let pid = child.id();
        let id = ProcessId::of(pid).ok_or(HoldError::Gone(pid))?;
        Self::open(&id)
    }

    /// Holds the very process `id`, if it lives.
    pub fn open(id: &ProcessId) -> Result<Self, HoldError> {
        let gone = || HoldError::Gone(id.pid);
        let failed = |source| HoldError::Pidfd {
            pid: id.pid,
            source,
        };
        let raw = i32::try_from(id.pid).ok().and_then(Pid::from_raw);
        let pid = raw.ok_or_else(gone)?;
        let pidfd = match rustix::process::pidfd_open(pid, PidfdFlags::empty()) {
            Ok(pidfd) => pidfd,
            Err(rustix::io::Errno::SRCH) => return Err(gone()),
            Err(errno) => return Err(failed(errno.into())),
        };
        if ProcessId::of(id.pid).as_ref() != Some(id) {
            return Err(gone());
        }
        let process = Self {
            id: id.clone(),
            pidfd: pidfd::watch(pidfd).map_err(failed)?,
        };
        // A zombie that nobody reaped still has its /proc entry, but is as dead as any.
        if process.is_alive() {
            Ok(process)
        } else {
            Err(gone())
        }
    }

    /// Which process it is.
    pub fn id(&self) -> &ProcessId {
        &self.id
    }

    /// Whether it lives.
    pub fn is_alive(&self) -> bool {
        let mut fds = [PollFd::new(self.pidfd.get_ref(), PollFlags::IN)];
        let now = Timespec::default();
        !matches!(rustix::event::poll(&mut fds, Some(&now)), Ok(ready) if ready > 0)
    }

    /// Returns when it has ended.
    pub async fn ended(&self) {
        while self.is_alive() {
            if let Ok(mut ready) = self.pidfd.readable().await {
                ready.clear_ready();
            }
        }
    }

    /// Whether it ended within `patience`.
    pub async fn ends_within(&self, patience: Duration) -> bool {
        tokio::time::timeout(patience, self.ended()).await.is_ok()
    }

    /// Kills it; it is dead and reaped afterwards.
    pub async fn kill(&self) -> Exit {
        // The only failure is that it is dead already.
        let _ = rustix::process::pidfd_send_signal(self.pidfd.get_ref(), Signal::KILL);
        self.ended().await;
        self.exit()
    }

    /// How it ended, to be asked once after it did. Reaps a child of ours.
    pub fn exit(&self) -> Exit {
        let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG;
        match rustix::process::waitid(WaitId::PidFd(self.pidfd.get_ref().as_fd()), options) {
            Ok(Some(status)) => match (status.exit_status(), status.terminating_signal()) {
                (Some(code), _) => Exit::Code(code),
                (None, Some(signal)) => Exit::Signal(signal),
                (None, None) => Exit::Unknown,
            },
            // Not a child of this daemon, or asked before it ended.
            Ok(None) | Err(_) => Exit::Unknown,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    #[allow(clippy::zombie_processes)] // Reaped through its pidfd, which is what is tested.
    async fn a_child_is_watched_killed_and_reaped() {
        let child = std::process::Command::new("sleep")
            .arg("1000")
            .spawn()
            .expect("sleep");
        let process = Process::of_child(&child).expect("held");
        assert!(process.is_alive());
        assert!(!process.ends_within(Duration::from_millis(20)).await);
        let id = process.id().clone();
        assert_eq!(process.kill().await, Exit::Signal(9));
        assert!(!process.is_alive());
        assert!(matches!(Process::open(&id), Err(HoldError::Gone(_))));
    }

    #[tokio::test]
    async fn a_recycled_pid_is_another_process() {
        let me = ProcessId::of(std::process::id()).expect("own id");
        let other = ProcessId {
            start_ticks: me.start_ticks + 1,
            ..me
        };
        assert!(matches!(Process::open(&other), Err(HoldError::Gone(_))));
    }
}
