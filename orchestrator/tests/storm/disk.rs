//! A disk that is slow to say that it has written: every fsync and fdatasync of a process takes longer.
//!
//! strace holds the process up at these calls, and lets it go on when it ends, however it ends. What the process
//! waits for then is what it waits for with a worn-out disk, or one that it shares with others.

use std::process::{Child, Command, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};

use crate::daemon::until;

/// A process whose disk is slow, until this is dropped.
pub(crate) struct SlowDisk {
    strace: Child,
}

impl SlowDisk {
    /// `None` where there is no strace, or it may not.
    pub(super) fn of(pid: u32, by: Duration) -> Option<Self> {
        let calls = "fsync,fdatasync";
        let strace = Command::new("strace")
            .args(["-f", "-q", "-e", &format!("trace={calls}"), "-e"])
            .arg(format!("inject={calls}:delay_exit={}", by.as_micros()))
            .args(["-o", "/dev/null", "-p", &pid.to_string()])
            .stdin(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .ok()?;
        let mut slow = Self { strace };
        let mut ended = false;
        until("strace has the process", || {
            ended = slow.strace.try_wait().is_ok_and(|end| end.is_some());
            ended || tracer(pid).is_some_and(|tracer| tracer == slow.strace.id())
        });
        (!ended).then_some(slow)
    }
}

fn tracer(pid: u32) -> Option<u32> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("TracerPid:"));
    line?.trim().parse().ok()
}

impl Drop for SlowDisk {
    fn drop(&mut self) {
        // Told to end it lets go of whom it holds up.
        let _ = kill_process(Pid::from_child(&self.strace), Signal::TERM);
        let _ = self.strace.wait();
    }
}
