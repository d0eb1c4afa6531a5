//! What is done to a process, from outside, and how that is undone.

use std::path::Path;
use std::time::Duration;

use anyhow::Context;
use rustix::process::{Pid, Resource, Rlimit, Signal, getrlimit, kill_process, prlimit};

use crate::patience::{PATIENCE, wait_for};

/// How long one that hangs does: longer than the daemon is patient.
pub(super) const HANG: Duration = Duration::from_secs(8);
/// How long one that is slow is.
pub(super) const SLOW: Duration = Duration::from_millis(50);

fn pid(number: u32) -> anyhow::Result<Pid> {
    let raw = i32::try_from(number).ok().and_then(Pid::from_raw);
    raw.context("a pid")
}

/// Sends a signal; to one that is gone it is none.
pub(super) fn signal(number: u32, signal: Signal) -> anyhow::Result<()> {
    match kill_process(pid(number)?, signal) {
        Ok(()) | Err(rustix::io::Errno::SRCH) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}

/// The letter that stands for what the process does; none if it is gone or waits for its parent.
pub(super) fn state(number: u32) -> Option<char> {
    let stat = std::fs::read_to_string(format!("/proc/{number}/stat")).ok()?;
    let letter = stat.rsplit_once(") ")?.1.chars().next()?;
    (letter != 'Z' && letter != 'X').then_some(letter)
}

/// It stands still at its point.
pub(super) fn is_stopped(number: u32) -> bool {
    state(number) == Some('T')
}

/// A process of which every thread stands still, until this is dropped.
#[derive(Debug)]
pub(super) struct Still(u32);

/// Stops it, and waits until the last of its threads stands still.
pub(super) fn stand_still(number: u32) -> anyhow::Result<Still> {
    signal(number, Signal::STOP)?;
    let still = Still(number);
    wait_for("all threads to stand still", PATIENCE, || {
        let mut threads = std::fs::read_dir(format!("/proc/{number}/task"))?.flatten();
        let stands = |thread: std::fs::DirEntry| {
            let stat = std::fs::read_to_string(thread.path().join("stat")).unwrap_or_default();
            stat.rsplit_once(") ")
                .is_none_or(|(_, rest)| rest.starts_with('T'))
        };
        Ok(threads.all(stands).then_some(()))
    })?;
    Ok(still)
}

impl Drop for Still {
    fn drop(&mut self) {
        // One that is gone needs none.
        let _ = signal(self.0, Signal::CONT);
    }
}

/// From here on it gets no more of this than it has.
pub(super) fn exhaust(number: u32, resource: Resource) -> anyhow::Result<()> {
    let current = match resource {
        Resource::As => {
            let status = std::fs::read_to_string(format!("/proc/{number}/statm"))?;
            let pages: u64 = status.split(' ').next().context("statm")?.parse()?;
            pages * 4096
        }
        // Those that are free below the highest stay so: few, and some are in real life as well.
        _ => {
            let open = std::fs::read_dir(format!("/proc/{number}/fd"))?.flatten();
            let numbers = open.filter_map(|fd| fd.file_name().to_str()?.parse::<u64>().ok());
            numbers.max().unwrap_or(0) + 1
        }
    };
    limit(number, resource, Some(current))
}

/// As it was.
pub(super) fn restore(number: u32, resource: Resource) -> anyhow::Result<()> {
    let ours = getrlimit(resource).current;
    match limit(number, resource, ours) {
        Err(error) if error.downcast_ref() == Some(&rustix::io::Errno::SRCH) => Ok(()),
        limited => limited,
    }
}

fn limit(number: u32, resource: Resource, current: Option<u64>) -> anyhow::Result<()> {
    let maximum = getrlimit(resource).maximum;
    let new = Rlimit { current, maximum };
    Ok(prlimit(Some(pid(number)?), resource, new).map(drop)?)
}

/// What is left to be filled at last.
const LEFT: u64 = 16 << 20;

/// Fills a filesystem: first almost, then to the last byte. Dropping it makes room again.
#[derive(Debug)]
pub(super) struct Full {
    file: tempfile::NamedTempFile,
    len: u64,
}

impl Full {
    /// There is room for what a swap writes down, and not for much more.
    pub(super) fn almost(dir: &Path) -> anyhow::Result<Self> {
        let free = rustix::fs::statvfs(dir)?;
        let free = free.f_bavail * free.f_frsize;
        let file = tempfile::NamedTempFile::new_in(dir)?;
        let mut full = Self { file, len: 0 };
        full.fill(free.saturating_sub(LEFT));
        Ok(full)
    }

    /// There is none.
    pub(super) fn fill_to_the_last_byte(&mut self) {
        let mut size = LEFT;
        while size >= 4096 {
            if !self.fill(size) {
                size /= 2;
            }
        }
    }

    fn fill(&mut self, size: u64) -> bool {
        let flags = rustix::fs::FallocateFlags::empty();
        let filled = size > 0 && rustix::fs::fallocate(&self.file, flags, self.len, size).is_ok();
        self.len += if filled { size } else { 0 };
        filled
    }

    pub(super) fn end(self) -> anyhow::Result<()> {
        Ok(self.file.close()?)
    }
}
