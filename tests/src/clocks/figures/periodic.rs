//! The phase of a periodic timer.
//!
//! The guest reads what is left of its timer's count, between two readings of its TSC. That gives the
//! moment of the next tick as KVM has it, to half of what lies between the two, whatever the vCPU waits
//! for: its ticks themselves come late where it waits for its core, and all alike where it waits for its
//! host's scheduler.
//!
//! KVM itself begins a period anew when its host was late for a tick by more than a period (lapic.c,
//! `advance_periodic_target_expiration`, in newer kernels). A host that is overloaded, or that is itself a
//! guest which is not run for a while, is. So the period is long, and what happens in as long a time without
//! a swap is counted beside.

use std::time::{Duration, Instant};

use stillpoint_guest_abi::pulse::Count;

use super::{Figure, percentile, worst};
use crate::clocks::Watched;
use crate::patience::{PATIENCE, wait_for};
use crate::releases::Release;
use crate::swap::Terms;

/// How far the phase may move in a swap, beside what its readings leave open.
const PHASE: Duration = Duration::from_micros(20);
/// The same on an emulated host, where one call of KVM takes longer than that.
const PHASE_EMULATED: Duration = Duration::from_micros(100);
/// pulse's periodic timer.
const PERIOD_US: u64 = 10_000;
const CMDLINE: &str = "timers=periodic period_us=10000 ram=4M";
/// Readings of which the narrowest is used.
const READINGS: usize = 20;
/// What makes a pause longer than some periods.
const OVERDUE: &str = "loaded=slow:35";
/// What may be beyond beside twice what is without a swap: one, and one in a hundred.
const STRAY: usize = 100;

/// Where the ticks are: cycles from `base` to one of them, less whole periods, and how far off that
/// may be.
#[derive(Clone, Copy, Debug)]
struct Phase {
    at: u64,
    open: u64,
}

/// By how much it has moved from one to another, and how far off that may be, ns.
#[derive(Clone, Copy, Debug)]
struct Shift {
    by: i64,
    open: u64,
}

impl Shift {
    /// Whether it is more than that, whatever its readings leave open.
    fn is_beyond(&self, most: Duration) -> bool {
        let most = u64::try_from(most.as_nanos()).unwrap_or(u64::MAX);
        self.by.unsigned_abs() > most.saturating_add(self.open)
    }
}

/// A periodic timer that is watched, in cycles.
#[derive(Clone, Copy, Debug)]
struct Timer {
    period: u64,
    base: u64,
}

impl Timer {
    /// Where its ticks are now.
    fn phase(&self, guest: &Watched) -> anyhow::Result<Phase> {
        // The first may be from before whatever was done last.
        let mut last = next_after(guest, Count::default())?;
        let mut narrowest: Option<Count> = None;
        let width = |count: &Count| count.after - count.before;
        for _ in 0..READINGS {
            last = next_after(guest, last)?;
            narrowest = narrowest.into_iter().chain([last]).min_by_key(width);
        }
        let read = narrowest.unwrap_or_default();
        let open = width(&read) / 2;
        let left = self.cycles(read.left_ns);
        let next = (read.before + open + left).wrapping_sub(self.base);
        Ok(Phase {
            at: next % self.period,
            open,
        })
    }

    fn cycles(&self, ns: u64) -> u64 {
        scaled(ns, self.period, PERIOD_US * 1000)
    }

    fn shift(&self, from: Phase, to: Phase) -> Shift {
        let ns = |cycles: u64| scaled(cycles, PERIOD_US * 1000, self.period);
        let by = around(self.period, from.at, to.at);
        let size = ns(by.unsigned_abs()).cast_signed();
        Shift {
            by: size * by.signum(),
            open: ns(from.open + to.open),
        }
    }
}

fn scaled(value: u64, by: u64, over: u64) -> u64 {
    let scaled = u128::from(value) * u128::from(by) / u128::from(over.max(1));
    u64::try_from(scaled).unwrap_or(u64::MAX)
}

/// The first whole reading of a count that runs and is another than `last`.
fn next_after(guest: &Watched, last: Count) -> anyhow::Result<Count> {
    let look = || -> anyhow::Result<Option<Count>> {
        let report = guest.vm.pulse.look()?;
        Ok(report.vcpus.first().map(|vcpu| vcpu.count))
    };
    wait_for("a reading of a periodic timer", PATIENCE, || {
        let (count, again) = (look()?, look()?);
        let runs = |count: &Count| count.after > count.before && count.left_ns != 0;
        Ok(count.filter(|now| runs(now) && *now != last && count == again))
    })
}

/// The phase of a periodic timer over `count` swaps, of which every tenth is so long that ticks fall
/// into it.
pub fn periodic(
    count: usize,
    emulated: bool,
    mut progress: impl FnMut(usize),
) -> anyhow::Result<Vec<Figure>> {
    let most = if emulated { PHASE_EMULATED } else { PHASE };
    let mut guest = Watched::up(1, CMDLINE)?;
    let timer = Timer {
        period: guest.page(0)?.cycles(PERIOD_US),
        base: next_after(&guest, Count::default())?.before,
    };
    let (mut shifts, mut quiet) = (Vec::new(), Vec::new());
    let mut before = timer.phase(&guest)?;
    let mut took = Duration::ZERO;
    for swap in 0..count {
        let control = before;
        std::thread::sleep(took);
        before = timer.phase(&guest)?;
        quiet.push(timer.shift(control, before));
        let to = match swap % 10 {
            9 => Release::Faulty(OVERDUE),
            even if even % 2 == 0 => Release::Compat,
            _ => Release::Current,
        };
        let began = Instant::now();
        let seen = guest.must_move(to, &Terms::default())?;
        took = began.elapsed();
        let after = timer.phase(&guest)?;
        let shift = timer.shift(before, after);
        if shift.is_beyond(most) {
            eprintln!("swap {swap} to {to:?}: {shift:?}; {:?}", seen.report.phases);
        }
        shifts.push(shift);
        before = after;
        progress(swap + 1);
    }
    guest.is_well()?;
    guest.vm.power_off()?;
    let name = format!("periodic timer's phase, {count} swaps");
    Ok(vec![judge(&name, most, &shifts, &quiet)])
}

fn judge(name: &str, most: Duration, swaps: &[Shift], quiet: &[Shift]) -> Figure {
    let beyond = |shifts: &[Shift]| shifts.iter().filter(|shift| shift.is_beyond(most)).count();
    let (beyond, without) = (beyond(swaps), beyond(quiet));
    let told = |shifts: &[Shift]| {
        let sizes: Vec<_> = shifts.iter().map(|shift| shift.by.unsigned_abs()).collect();
        let (median, p99) = (percentile(sizes.clone(), 50), percentile(sizes, 99));
        let worst = worst(shifts.iter().map(|shift| shift.by));
        format!("worst {worst} ns, p99 {p99} ns, median {median} ns")
    };
    let open = percentile(swaps.iter().map(|shift| shift.open).collect(), 50);
    Figure::new(
        name,
        format!(
            "moves by at most {most:?} and what its readings leave open, but as without a swap"
        ),
        format!(
            "{beyond} beyond, {}; without a swap {without} beyond, {}; open {open} ns",
            told(swaps),
            told(quiet)
        ),
        !swaps.is_empty() && beyond <= 2 * without + swaps.len() / STRAY + 1,
    )
}

/// From one phase to another, the shorter way around.
fn around(period: u64, from: u64, to: u64) -> i64 {
    match (period + to - from) % period {
        on if on <= period / 2 => on.cast_signed(),
        on => on.cast_signed() - period.cast_signed(),
    }
}

#[cfg(test)]
mod tests {
    use super::super::Verdict;
    use super::*;

    #[test]
    fn phases_go_around() {
        assert_eq!(around(1000, 998, 3), 5);
        assert_eq!(around(1000, 3, 998), -5);
        assert_eq!(around(1000, 100, 600), 500);
    }

    #[test]
    fn one_that_moved_is_beyond_what_its_readings_leave_open() {
        let shifts = |by| vec![Shift { by, open: 5_000 }; 5];
        let verdict = |by| judge("", PHASE, &shifts(by), &shifts(0)).verdict;
        assert_eq!(verdict(-24_999), Verdict::Kept);
        assert_eq!(verdict(-25_001), Verdict::Broken);
        // As without a swap.
        assert_eq!(
            judge("", PHASE, &shifts(90_000), &shifts(90_000)).verdict,
            Verdict::Kept
        );
        // Two cycles a nanosecond.
        let timer = Timer {
            period: PERIOD_US * 2_000,
            base: 0,
        };
        let at = |at| Phase { at, open: 500 };
        let shift = timer.shift(at(timer.period - 1_000), at(1_000));
        assert_eq!((shift.by, shift.open), (1_000, 500));
    }
}
