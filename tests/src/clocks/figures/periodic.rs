//! The phase of a periodic timer.

use std::time::Duration;

use anyhow::ensure;
use stillpoint_control::report::Outcome;

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
const MOST: usize = 1000;
/// What makes a pause longer than some periods.
const OVERDUE: &str = "loaded=slow:9";

/// The phase of a periodic timer over `count` swaps, of which every tenth is so long that ticks fall
/// into it.
pub fn periodic(count: usize, mut progress: impl FnMut(usize)) -> anyhow::Result<Vec<Figure>> {
    let mut guest = Watched::up(1, "timers=periodic ram=4M")?;
    let period = guest.page(0)?.cycles(PERIOD_US);
    // Phases lie around the middle of a period then, and never at its edge.
    let base = guest.last_tick(0)?.wrapping_sub(period / 2);
    let close = guest.page(0)?.cycles(CLOSE_US);
    let phase = |guest: &Watched| -> anyhow::Result<i64> {
        let mut phases = Vec::new();
        let mut last = 0;
        while phases.len() < MOST {
            last = wait_for("a periodic tick", PATIENCE, || {
                Ok(Some(guest.last_tick(0)?).filter(|&tick| tick != last))
            })?;
            phases.push(last.wrapping_sub(base) % period);
            // Ticks are late by what the vCPU waited for its core, never early. The first of those
            // that others come close to are on time.
            let least = phases.iter().min().copied().unwrap_or_default();
            let on_time = phases.iter().filter(|&&phase| phase - least <= close);
            if on_time.count() >= AGREEING {
                break;
            }
        }
        let least = phases.into_iter().min().unwrap_or_default();
        Ok(least.cast_signed())
    };
    let per_us = guest.page(0)?.cycles(1).cast_signed();
    let mut shifts = Vec::new();
    let mut quiet = Vec::new();
    let mut before = phase(&guest)?;
    for swap in 0..count {
        let control = before;
        before = phase(&guest)?;
        quiet.push((before - control) / per_us);
        let to = match swap % 10 {
            9 => Release::Faulty(OVERDUE),
            even if even % 2 == 0 => Release::Compat,
            _ => Release::Current,
        };
        let seen = guest.swap(to, &Terms::default())?;
        ensure!(
            seen.report.outcome == Outcome::Moved,
            "{:?}",
            seen.report.reason
        );
        let after = phase(&guest)?;
        shifts.push((after - before) / per_us);
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
