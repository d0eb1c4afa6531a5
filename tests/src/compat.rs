//! Both ways between releases: a guest with all kinds of devices goes from one to the other and back,
//! and is judged after each hop. And what can't be read is refused by its name.

use std::fmt;
use std::time::Duration;

use anyhow::{Context, ensure};
use stillpoint_control::report::{Outcome, SwapReport};
use stillpoint_state::Unclaimed;
use stillpoint_state::contents::Contents;

use crate::furnished::Furnished;
use crate::releases::Release;
use crate::saved::state_of;
use crate::swap::Terms;
use crate::vm::{Recipe, Vm};

/// One hop of a guest.
#[derive(Clone, Debug)]
pub struct Hop {
    /// Release that had it.
    pub from: Release,
    /// Release that was to have it.
    pub to: Release,
    /// The guest, in a word.
    pub guest: &'static str,
    /// Format of the state; 0 if none was saved.
    pub format: u32,
    /// Its bytes.
    pub bytes: u64,
    /// How long the guest stood still.
    pub blackout: Duration,
    /// `moved`, or by which name it was refused.
    pub outcome: String,
}

impl Hop {
    fn of(from: Release, to: Release, guest: &'static str, report: &SwapReport) -> Self {
        Self {
            from,
            to,
            guest,
            format: report.state_format,
            bytes: report.state_bytes,
            blackout: report.blackout.host,
            outcome: report
                .reason
                .clone()
                .unwrap_or_else(|| report.outcome.to_string()),
        }
    }

    /// The head of a table of hops.
    pub const HEAD: &'static str =
        "FROM              TO         GUEST    FORMAT  STATE     BLACKOUT   OUTCOME";
}

impl fmt::Display for Hop {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let format = match self.format {
            0 => "-".to_owned(),
            format => format.to_string(),
        };
        let blackout = format!("{:.2} ms", self.blackout.as_secs_f64() * 1e3);
        write!(
            f,
            "{:<17} {:<10} {:<8} {format:<7} {:<9} {blackout:<10} {}",
            self.from.name(),
            self.to.name(),
            self.guest,
            self.bytes,
            self.outcome
        )
    }
}

/// A guest with all kinds of devices that `older` boots: to `newer`, back, and there again.
pub fn furnished_to_and_fro(
    older: Release,
    newer: Release,
    wired: bool,
) -> anyhow::Result<Vec<Hop>> {
    let mut guest = Furnished::boot(older, wired)?;
    let mut hops = Vec::new();
    for (from, to) in [(older, newer), (newer, older), (older, newer)] {
        guest.send()?;
        let report = guest.vm.must_move(to)?;
        let about = || format!("{} to {}\n{}", from.name(), to.name(), guest_log(&report));
        guest.came_through().with_context(about)?;
        hops.push(Hop::of(from, to, "devices", &report));
    }
    guest.end()?;
    Ok(hops)
}

/// The same of a guest without virtio devices, which every format carries.
pub fn plain_to_and_fro(older: Release, newer: Release) -> anyhow::Result<Vec<Hop>> {
    let mut vm = Vm::up(&Recipe {
        release: older,
        ..Recipe::pulse(2, "ram=8M duty=50")
    })?;
    let mut hops = Vec::new();
    for (from, to) in [(older, newer), (newer, older), (older, newer)] {
        let report = vm.must_move(to)?;
        vm.is_well()?;
        hops.push(Hop::of(from, to, "plain", &report));
    }
    vm.power_off()?;
    Ok(hops)
}

fn guest_log(report: &SwapReport) -> String {
    format!("{:#?}", report.phases)
}

/// A release that writes what this one can't read: refused by these names, twice, and the guest is
/// where it was. `paused`: only the state shows it, so the guest stands still for as long as the report
/// says.
pub fn refused_by_name(how: &'static str, names: &[&str], paused: bool) -> anyhow::Result<Hop> {
    let odd = Release::Odd(how);
    let mut guest = Furnished::boot(odd, false)?;
    let mut refused = Vec::new();
    for _ in 0..2 {
        guest.send()?;
        let report = guest.vm.swap(Release::Current, &Terms::default())?;
        must_be_refused(&report, names, paused)?;
        guest.stayed()?;
        refused.push(Hop::of(odd, Release::Current, "devices", &report));
    }
    guest.end()?;
    refused.pop().context("two of them")
}

fn must_be_refused(report: &SwapReport, names: &[&str], paused: bool) -> anyhow::Result<()> {
    ensure!(report.outcome == Outcome::Kept, "{report:#?}");
    let reason = report.reason.clone().unwrap_or_default();
    for name in names {
        ensure!(reason.contains(name), "no {name} in: {reason}");
    }
    let stood = report.phases.iter().any(|phase| phase.in_blackout);
    ensure!(stood == paused, "{:#?}", report.phases);
    let blackout = report.blackout.host;
    ensure!(
        (blackout > Duration::ZERO) == paused && blackout < report.budget,
        "it stood still for {blackout:?}"
    );
    Ok(())
}

/// What a release says before the freeze that its state will hold is what it holds.
pub fn contents_are_as_announced(vm: &Vm, format: u32) -> anyhow::Result<()> {
    let saved = state_of(vm, format)?;
    let announced = saved.offer.contents.iter().find(|c| c.format == format);
    let announced: &Contents = announced.context("nothing was announced")?;
    let found = Unclaimed::decode(&saved.bytes)?;
    let kinds = found.list();
    for (name, instance, version) in &kinds {
        let same = announced.sections.iter().any(|section| {
            let each = section.instance == *instance || name == "vcpu";
            section.name == *name && each && section.version <= *version
        });
        ensure!(
            same,
            "{name}/{instance} version {version} was not announced: {announced:?}"
        );
    }
    for section in &announced.sections {
        let there = kinds.iter().any(|(name, instance, _)| {
            *name == section.name && (*instance == section.instance || name == "vcpu")
        });
        ensure!(there, "{section:?} is not in the state: {kinds:?}");
    }
    Ok(())
}
