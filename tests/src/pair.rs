//! Two bare-metal guests under one daemon, for what is done to a host with all its guests.

use anyhow::ensure;

use crate::daemon::Daemon;
use crate::guest::Pulse;
use crate::releases;

/// Their names.
pub const GUESTS: [&str; 2] = ["web-1", "web-2"];

/// Boots them, with two vCPUs each; gives their notes.
pub fn boot(daemon: &Daemon) -> anyhow::Result<Vec<Pulse>> {
    let kernel = releases::pulse()?.display().to_string();
    let machine = ["--cpus", "2", "--memory", "64M", "--kernel", &kernel];
    let cmdline = ["--cmdline", "pulse ram=16M duty=30"];
    let mut pulses = Vec::new();
    for name in GUESTS {
        daemon.must(&[&["run", name], &machine[..], &cmdline[..]].concat())?;
        let pulse = daemon.pulse(name)?;
        pulse.wait_online(2)?;
        pulses.push(pulse);
    }
    Ok(pulses)
}

/// They go on, whole.
pub fn are_well(pulses: &[Pulse]) -> anyhow::Result<()> {
    for pulse in pulses {
        let seen = pulse.wait_progress(&[0, 1], 20)?;
        ensure!(seen.faults().is_empty(), "{:#?}", seen.faults());
        pulse.ran_once()?;
    }
    Ok(())
}
