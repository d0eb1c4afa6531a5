//! What else is for a host with live update what it is for one with a carve-out, and has the same outcome: the daemon dies
//! when guests are preserved and stored, and before the host jumps.

use std::time::Duration;

use anyhow::ensure;
use serde_json::Value;
use stillpoint_control::message::GuestState;
use stillpoint_tests::daemon::Daemon;
use stillpoint_tests::patience::{PATIENCE, wait_for};

use super::PULSES;
use crate::held::Held;
use crate::kernel::goes_on;
use crate::stages;

/// Long enough for every VMM to have answered, and a small part of what preserving takes.
const ASKED: Duration = Duration::from_millis(300);

/// The next daemon has all guests run on; jumps that come can preserve them again.
pub(super) fn daemon_dies(
    daemon: &mut Daemon,
    into: &str,
    before: &mut [Value],
) -> anyhow::Result<()> {
    let first = daemon.vmm(PULSES[0])?;
    let is_still = || Ok(first.describe()?.state == GuestState::Frozen);
    // Each VMM is asked for its memory when preserving begins, which then takes seconds: each hole is filled.
    let preserves = || {
        let is_so = stages::last_swap(daemon).is_ok_and(|swap| swap["step"] == "preserve");
        if is_so {
            std::thread::sleep(ASKED);
        }
        Ok(is_so)
    };
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
