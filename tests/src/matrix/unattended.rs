//! A successor that hangs with the guest standing still, and no daemon: the predecessor's own deadline ends
//! it.

use std::time::Instant;

use anyhow::{Context, ensure};
use stillpoint_control::ownership::Owner;
use stillpoint_control::report::{Outcome, SwapReport};

use super::Host;
use super::acts::is_stopped;
use super::host::{GUEST, SHORT, stops_at};
use super::rounds::over;
use crate::patience::{PATIENCE, wait_for};

/// Brings it about, and waits until the guest goes on. Gives the predecessor's report, which it was asked
/// for before there was a daemon again; the next daemon's record must say the same.
pub fn unattended(host: &mut Host) -> anyhow::Result<SwapReport> {
    let hangs = stops_at("load");
    host.has(&hangs)?;
    host.ready("good")?;
    let before = host.record()?["id"].clone();
    let mut asked = host.swap(&hangs, SHORT)?;
    wait_for("the successor to have the state", PATIENCE, || {
        let record = host.record()?;
        let pid = record["successor"]["pid"].as_u64();
        let pid = pid.filter(|_| record["id"] != before);
        let stands = |pid: u64| u32::try_from(pid).is_ok_and(is_stopped);
        Ok(pid.is_some_and(stands).then_some(()))
    })?;
    host.daemon.kill()?;
    let _ = asked.kill();
    let _ = asked.wait();
    host.goes_on()?;
    let word = host.word()?.read()?;
    ensure!(matches!(word, Owner::Held(_)), "the word says {word:?}");
    let report = wait_for("the predecessor's report", PATIENCE, || {
        let report = host.daemon.vmm(GUEST)?.last_report()?;
        Ok(report.filter(|report| report.outcome == Outcome::Kept))
    })?;
    host.daemon.restart()?;
    let outcome = over(host, Instant::now() + PATIENCE)?.context("it does not end")?;
    ensure!(outcome == "kept", "the next daemon records `{outcome}`");
    host.is_whole()?;
    Ok(report)
}
