//! The phase of a periodic timer.

use std::time::Duration;

use super::{Figure, percentile, worst};
use crate::clocks::Watched;
use crate::patience::{PATIENCE, wait_for};
use crate::releases::Release;
use crate::swap::Terms;

/// How far the phase may move in a swap.
const PHASE: Duration = Duration::from_micros(100);
/// pulse's periodic timer.
const PERIOD_US: u64 = 2000;
/// Ticks that agree on a phase within `CLOSE_US`, and the most that are looked at.
const AGREEING: usize = 10;
const CLOSE_US: u64 = 20;
const MOST: usize = 300;
/// What makes a pause longer than some periods.
const OVERDUE: &str = "loaded=slow:9";

/// The phase of a periodic timer over `count` swaps, of which every tenth is so long that ticks fall
/// into it.
pub fn periodic(count: usize, mut progress: impl FnMut(usize)) -> anyhow::Result<Vec<Figure>> {
    let mut guest = Watched::up(1, "timers=periodic ram=4M")?;
    let period = guest.page(0)?.cycles(PERIOD_US);
    let base = guest.last_tick(0)?;
    let close = guest.page(0)?.cycles(CLOSE_US);
    let phase = |guest: &Watched| -> anyhow::Result<u64> {
        let mut phases = Vec::new();
        let mut last = 0;
        loop {
            last = wait_for("a periodic tick", PATIENCE, || {
                Ok(Some(guest.last_tick(0)?).filter(|&tick| tick != last))
            })?;
            phases.push(last.wrapping_sub(base) % period);
            let (agreeing, phase) = most_agreed(&phases, period, close);
            if agreeing >= AGREEING || phases.len() >= MOST {
                return Ok(phase);
            }
        }
    };
    let moved = |from: u64, to: u64| around(period, from, to);
    let per_us = guest.page(0)?.cycles(1).cast_signed();
    let mut shifts = Vec::new();
    let mut quiet = Vec::new();
    let mut before = phase(&guest)?;
    for swap in 0..count {
        let control = before;
        before = phase(&guest)?;
        quiet.push(moved(control, before) / per_us);
        let to = match swap % 10 {
            9 => Release::Faulty(OVERDUE),
            even if even % 2 == 0 => Release::Compat,
            _ => Release::Current,
        };
        guest.must_move(to, &Terms::default())?;
        let after = phase(&guest)?;
        shifts.push(moved(before, after) / per_us);
        before = after;
        progress(swap + 1);
    }
    guest.is_well()?;
    guest.vm.power_off()?;
    let sizes = shifts.iter().map(|shift: &i64| shift.abs()).collect();
    let median = percentile(sizes, 50);
    let (shift, noise) = (worst(shifts.into_iter()), worst(quiet.into_iter()));
    let bound = i64::try_from(PHASE.as_micros())? + noise.abs();
    Ok(vec![Figure::new(
        &format!("periodic timer's phase, {count} swaps"),
        format!("moves at most {PHASE:?} and what it does without a swap"),
        format!("worst {shift} µs, median {median} µs; without a swap {noise} µs"),
        shift.abs() <= bound,
    )])
}

/// The phase from which on the most ticks follow within `close`, and how many. Ticks are late by what
/// the vCPU waited for its core, by anything; those on time are together.
fn most_agreed(phases: &[u64], period: u64, close: u64) -> (usize, u64) {
    let after = |from: u64| {
        let near = |phase: &&u64| (period + **phase - from) % period <= close;
        (phases.iter().filter(near).count(), from)
    };
    let counted = phases.iter().map(|&phase| after(phase));
    counted.max_by_key(|found| found.0).unwrap_or_default()
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
    use super::*;

    #[test]
    fn late_ticks_do_not_count_and_phases_go_around() {
        let phases = [990, 5, 0, 400, 2, 700, 998];
        assert_eq!(most_agreed(&phases, 1000, 10), (4, 998));
        assert_eq!(most_agreed(&phases, 1000, 20), (5, 990));
        assert_eq!(around(1000, 998, 3), 5);
        assert_eq!(around(1000, 3, 998), -5);
        assert_eq!(around(1000, 100, 600), 500);
    }
}
