//! Waiting for something to become true, with an end to it.

use std::process::{Child, ExitStatus};
use std::time::{Duration, Instant};

use anyhow::bail;
use rustix::time::Timespec;

/// How long anything that should be quick may take on a busy machine.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Between two looks.
const GLANCE: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 1_000_000,
};

/// Looks again and again until there is something; `what` names it in the error.
pub fn wait_for<T>(
    what: &str,
    patience: Duration,
    mut look: impl FnMut() -> anyhow::Result<Option<T>>,
) -> anyhow::Result<T> {
    let deadline = Instant::now() + patience;
    loop {
        if let Some(found) = look()? {
            return Ok(found);
        }
        if Instant::now() > deadline {
            bail!("waited {patience:?} for {what}");
        }
        let _ = rustix::thread::nanosleep(&GLANCE);
    }
}

/// Waits until a process has ended.
pub fn wait_end(child: &mut Child, what: &str) -> anyhow::Result<ExitStatus> {
    wait_for(what, PATIENCE, || Ok(child.try_wait()?))
}
