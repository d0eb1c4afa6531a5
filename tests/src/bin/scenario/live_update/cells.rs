//! What else is for a host with live update what it is for one with a carve-out, and has the same outcome: the daemon dies
//! when guests are preserved and stored, and before the host jumps.

use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

use anyhow::ensure;
use serde_json::Value;
use stillpoint_control::message::GuestState;
use stillpoint_tests::daemon::Daemon;
use stillpoint_tests::patience::{PATIENCE, wait_for};

use super::PULSES;
use crate::held::Held;
use crate::kernel::goes_on;
use crate::stages;

/// More than these guests touch meanwhile, in blocks of 512 bytes: 2 MiB.
const A_FEW: u64 = 4096;

/// What the guests' memory takes of the host's, in blocks of 512 bytes.
fn blocks(daemon: &Daemon) -> anyhow::Result<u64> {
    let mut sum = 0;
    for name in PULSES {
        let fds = format!("/proc/{}/fd", daemon.vmm_pid(name)?);
        for fd in std::fs::read_dir(fds)? {
            let path = fd?.path();
            // One that is closed meanwhile is none of a guest's memory.
            let is_memfd = |to: PathBuf| to.to_string_lossy().contains("memfd:");
            if std::fs::read_link(&path).is_ok_and(is_memfd) {
                sum += std::fs::metadata(&path).map_or(0, |facts| facts.blocks());
            }
        }
    }
    Ok(sum)
}

/// The next daemon has all guests run on; jumps that come can preserve them again.
pub(super) fn daemon_dies(
    daemon: &mut Daemon,
    into: &str,
    before: &mut [Value],
) -> anyhow::Result<()> {
    let first = daemon.vmm(PULSES[0])?;
    let is_still = || Ok(first.describe()?.state == GuestState::Frozen);
    // Each VMM is asked for its memory before the first is preserved, which shows: its holes are filled, and that takes seconds.
    let filled = blocks(daemon)?;
    let preserves = || Ok(blocks(daemon)? > filled + A_FEW);
    let held = Held::begin(daemon, into, PULSES[1], preserves, is_still)?;
    daemon.kill()?;
    held.go_on()?;
    daemon.restart()?;
    held.end()?;
    let swap = wait_for("the swap to be over", PATIENCE, || {
        let swap = stages::last_swap(daemon)?;
        Ok((swap["state"] == "failed").then_some(swap))
    })?;
    let why = swap["reason"].as_str().unwrap_or_default();
    ensure!(
        why.contains("the daemon ended in the middle of it"),
        "{swap:#}"
    );
    for (name, before) in PULSES.iter().zip(before) {
        *before = goes_on(daemon, name, before)?;
    }
    println!("scenario: the daemon died when a guest was stored, and the next one has both run on");
    Ok(())
}
