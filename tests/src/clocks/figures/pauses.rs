//! Long pauses, and pauses that are held.

use std::time::Duration;

use anyhow::ensure;
use stillpoint_control::clock::{ClockSpec, Correction, Policy};
use stillpoint_control::report::Outcome;

use super::{DISCONTINUITY_NS, Figure, receipts};
use crate::clocks::Watched;
use crate::releases::Release;
use crate::swap::Terms;
use crate::vm::{Recipe, Vm};

/// What a guest may see beside a pause, on a host with others.
const SCHEDULING: Duration = Duration::from_millis(25);

/// A pause that ends when the guest has stood still for so long, whatever loading took: so it is as long
/// on a busy machine as on another, and is not called off there. A part of it lies before the loading,
/// which must make up for it: a third of the budget, as what follows is expected to take as long again. Most
/// lies between give-up and take, and the end after the take, when no budget calls a swap off any more; but
/// not much of it, or the daemon would take the successor for one that hangs (5 s until it asks, 10 s more
/// until it is in doubt).
#[derive(Clone, Copy, Debug)]
pub struct Pause {
    /// What makes it.
    pub fault: &'static str,
    /// How long it is at the least.
    pub least: Duration,
}

impl Pause {
    /// As long as the longest budget.
    pub const LONG: Self = Self {
        fault: "load=slow:10000,take=until:27000,taken=until:30000",
        least: Duration::from_secs(30),
    };
    /// For a run in short.
    pub const SHORT: Self = Self {
        fault: "load=slow:500,take=until:1500,taken=until:2000",
        least: Duration::from_secs(2),
    };
}

/// A pause, within the longest budget or just beyond.
pub fn long_pause(pause: Pause) -> anyhow::Result<Vec<Figure>> {
    let Pause { fault, least } = pause;
    let mut guest = Watched::up(2, "ram=4M")?;
    let terms = Terms::budget(stillpoint_control::spec::MAX_BUDGET);
    let before = guest.page(0)?;
    let seen = guest.swap(Release::Faulty(fault), &terms)?;
    ensure!(
        seen.report.outcome == Outcome::Moved,
        "{:?}",
        seen.report.reason
    );
    let continued = guest.page(0)?.error_to(&before);
    guest.is_well()?;
    guest.vm.power_off()?;
    let pause = receipts(&[seen])
        .first()
        .map_or(Duration::ZERO, |clock| clock.pause);
    Ok(vec![Figure::new(
        &format!("a pause of {pause:.1?}"),
        format!("clock within {DISCONTINUITY_NS} ns, timers once"),
        format!("{continued} ns"),
        continued.unsigned_abs() <= DISCONTINUITY_NS && pause >= least,
    )])
}

/// Policy *hold*: on a host that can't move a guest's TSC it is refused, and says so; on others
/// the guest's clocks leave out the pause.
pub fn hold() -> anyhow::Result<Vec<Figure>> {
    let recipe = Recipe::pulse(2, "ram=4M");
    let clock = ClockSpec {
        correction: Some(Correction::Ptp),
        ..ClockSpec::default()
    };
    let mut guest = Watched {
        vm: Vm::up(&Recipe { clock, ..recipe })?,
    };
    let terms = Terms {
        clock: Some(Policy::Hold),
        ..Terms::default()
    };
    let before = guest.page(0)?;
    let seen = guest.swap(Release::Faulty("load=slow:500"), &terms)?;
    let after = guest.page(0)?;
    guest.is_well()?;
    guest.vm.power_off()?;
    let report = &seen.report;
    if report.outcome == Outcome::Kept {
        let why = report.reason.clone().unwrap_or_default();
        let clear = why.contains("hold") && why.contains("ignores TSC offsets");
        return Ok(vec![
            Figure::new("hold where TSC offsets are ignored", "refused", why, clear),
            Figure::skipped(
                "hold: the pause left out",
                "kvmclock exact, pause unseen",
                "this KVM ignores TSC offsets",
            ),
        ]);
    }
    let receipt = report.clock.clone().unwrap_or_default();
    let gap = report.blackout.guest_worst().unwrap_or_default();
    let error = after.error_to(&before);
    // What is not held is the freeze before the clock was read, and the entry; and a vCPU that waits
    // for its core sees that too.
    let most = SCHEDULING + report.blackout.host.saturating_sub(receipt.held);
    let good = receipt.policy == Policy::Hold
        && receipt.held >= Duration::from_millis(500)
        && gap <= most
        && error.unsigned_abs() <= DISCONTINUITY_NS;
    let held = receipt.held;
    let measured = format!("{held:?} left out, the guest saw {gap:?}; kvmclock {error} ns");
    let bound = format!("seen at most {most:?}; kvmclock within {DISCONTINUITY_NS} ns");
    Ok(vec![Figure::new(
        "hold: the pause left out",
        bound,
        measured,
        good,
    )])
}
