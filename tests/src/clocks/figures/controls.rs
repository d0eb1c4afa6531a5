//! Negative controls: builds that leave out one measure each.

use anyhow::ensure;
use stillpoint_control::report::Outcome;

use super::Figure;
use crate::clocks::{Seen, Watched};
use crate::releases::Release;
use crate::swap::{CLOCK_BOUND_NS, Terms};

/// Swaps to builds that leave out one measure each: the checks must see it.
pub fn controls() -> anyhow::Result<Vec<Figure>> {
    let spoilt = |how| -> anyhow::Result<Seen> {
        let mut guest = Watched::up(2, "ram=4M")?;
        let seen = guest.swap(Release::Faulty(how), &Terms::default())?;
        ensure!(
            seen.report.outcome == Outcome::Moved,
            "{:?}",
            seen.report.reason
        );
        Ok(seen)
    };
    let error = |seen: &Seen| {
        let clock = seen.report.clock.as_ref();
        clock.and_then(|c| c.kvmclock_error_ns).unwrap_or(0)
    };
    let warned = |seen: &Seen, word: &str| seen.report.warnings.iter().any(|w| w.contains(word));
    let mut figures = Vec::new();
    for (name, how) in [
        ("control: kvmclock set once", "spoil=loop"),
        ("control: kvmclock set 1 ms off", "spoil=clock"),
    ] {
        let seen = spoilt(how)?;
        let (error, warned) = (error(&seen), warned(&seen, "kvmclock is off"));
        let caught = error.unsigned_abs() > CLOCK_BOUND_NS && warned;
        figures.push(Figure::new(name, "caught", format!("{error} ns"), caught));
    }
    let seen = spoilt("spoil=watchdogs")?;
    let silent = seen.told.iter().all(|&told| !told);
    let text = format!("vCPUs told: {:?}", seen.told);
    figures.push(Figure::new(
        "control: no KVMCLOCK_CTRL",
        "caught",
        text,
        silent,
    ));
    let seen = spoilt("spoil=offset")?;
    let clock = seen.report.clock.as_ref();
    let deltas = clock
        .map(|c| c.tsc_offset_delta.clone())
        .unwrap_or_default();
    let name = "control: TSC offset 1000 cycles off";
    figures.push(match deltas.iter().all(|&delta| delta == 0) {
        // It says yes and stays where it is: nothing was skewed.
        true => Figure::skipped(name, "caught", "this KVM ignores TSC offsets"),
        false => {
            let caught = warned(&seen, "TSC");
            Figure::new(name, "caught", format!("{deltas:?} cycles"), caught)
        }
    });
    Ok(figures)
}
