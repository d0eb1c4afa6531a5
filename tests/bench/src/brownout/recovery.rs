//! Whether a report's `recovery` is what the guest lost, by the guest's own notes.
//!
//! The guest's work is to write all of its RAM again and again, and it notes its TSC at the end of each pass. In the two passes
//! from the swap on it comes by each page once, so what they take more than two others, less the blackout, is
//! what the guest lost after it. The report tells the same of a count of the guest's work that was looked at from beside.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::Context;
use serde::Serialize;
use stillpoint_control::report::SwapReport;
use stillpoint_tests::console::Console;
use stillpoint_tests::guest::{Gap, Pulse};
use stillpoint_tests::patience::wait_for;
use stillpoint_tests::releases::Release;
use stillpoint_tests::vm::{Recipe, Vm};

use super::{BESIDE_MIB, PATIENCE};
use crate::environment;
use crate::run::progress;

/// How often the guest's notes are read: many times in a pass.
const GLANCE: Duration = Duration::from_micros(200);
/// Passes before a swap, by which others are judged.
const STEADY: usize = 8;
/// Passes in which every page is come by since the swap: the rest of the one it fell into, and the next.
const AFTER: u64 = 2;

/// What swaps cost the guest after its pause, ns.
#[derive(Debug, Default, Serialize)]
pub(crate) struct Recoveries {
    /// By the reports.
    pub(crate) told: Vec<u64>,
    /// By the guest.
    pub(crate) noted: Vec<u64>,
    /// Swaps whose report gave no end of the slow time: it looks for 2 s.
    pub(crate) not_seen: usize,
    /// Swaps around whose pause the guest's notes were not seen.
    pub(crate) not_noted: usize,
}

/// The end of a pass: which, and the guest's TSC.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Pass {
    number: u64,
    ended: u64,
}

/// So many swaps with page tables filled beforehand, and so many without, in turns.
pub(super) fn measure(count: u32, touched_mib: u64) -> anyhow::Result<[Recoveries; 2]> {
    let mut recipe = Recipe::pulse(1, &format!("ram=0M touch={touched_mib}M"));
    recipe.memory_mib = touched_mib + BESIDE_MIB;
    let mut vm = Vm::boot(&recipe)?;
    vm.pulse.wait_touched(PATIENCE)?;
    Console::open(&vm)?.type_line("touch always")?;
    let mut all: [Recoveries; 2] = Default::default();
    let khz = environment::tsc_khz();
    for number in 0..count {
        progress("what reports say of it", number, count);
        let releases = [Release::Current, Release::Faulty("spoil=populate")];
        for (to, of) in releases.into_iter().zip(&mut all) {
            let Watched {
                report,
                gaps,
                passes,
            } = watched(&mut vm, to)?;
            let told = report.recovery.iter().find(|one| one.of == "guest");
            let told = told.filter(|told| told.until_ns.is_some());
            match (told, noted(&report, gaps, &passes, khz)) {
                (None, _) => of.not_seen += 1,
                (Some(_), None) => of.not_noted += 1,
                (Some(told), Some(noted)) => {
                    of.noted.push(noted);
                    of.told.push(u64::try_from(told.lost.as_nanos())?);
                }
            }
        }
    }
    progress("what reports say of it", count, count);
    vm.power_off()?;
    Ok(all)
}

/// What was seen of a swap.
struct Watched {
    report: SwapReport,
    /// The guest's own log of gaps, when the report was made.
    gaps: Vec<Gap>,
    passes: Vec<Pass>,
}

/// Swaps beside somebody who notes the ends of passes, until the report knows of the recovery and the passes are over.
fn watched(vm: &mut Vm, to: Release) -> anyhow::Result<Watched> {
    let pulse = Arc::clone(&vm.pulse);
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let watching = scope.spawn(|| watch(&pulse, &over));
        let mut swap = || {
            await_passes(&vm.pulse, STEADY as u64)?;
            let swap = vm.must_move(to)?.swap;
            // At once: a busy host makes so many others that they push out the pause.
            let gaps = vm.pulse.gaps(0)?;
            let report = vm.report_of_recovery(&swap)?;
            await_passes(&vm.pulse, AFTER)?;
            anyhow::Ok((report, gaps))
        };
        let swapped = swap();
        over.store(true, Ordering::Relaxed);
        let passes = watching.join().ok().context("the watch panicked")??;
        let (report, gaps) = swapped?;
        Ok(Watched {
            report,
            gaps,
            passes,
        })
    })
}

fn watch(pulse: &Pulse, over: &AtomicBool) -> anyhow::Result<Vec<Pass>> {
    let mut passes: Vec<Pass> = Vec::new();
    while !over.load(Ordering::Relaxed) {
        let globals = pulse.look()?.globals;
        let pass = Pass {
            number: globals.touch_passes,
            ended: globals.touch_ended,
        };
        match passes.last_mut() {
            Some(last) if last.number == pass.number => *last = pass,
            _ => passes.push(pass),
        }
        std::thread::sleep(GLANCE);
    }
    Ok(passes)
}

fn await_passes(pulse: &Pulse, count: u64) -> anyhow::Result<()> {
    let passes = || anyhow::Ok(pulse.look()?.globals.touch_passes);
    // The one that goes on may have begun before.
    let from = passes()?;
    wait_for("passes over the guest's RAM", PATIENCE, || {
        Ok((passes()? > from + count).then_some(()))
    })
}

/// What the guest lost from its pause on, ns; `None` if pause and passes around it were not all seen.
fn noted(report: &SwapReport, gaps: Vec<Gap>, passes: &[Pass], khz: u64) -> Option<u64> {
    let blackout = report.blackout.guest_ns.first().copied().flatten()?;
    let cycles = |ns: u64| ns as f64 * khz as f64 / 1e6;
    // Of the gaps in the guest's own log, the one that the report tells of: among those since the swap was asked for, as a
    // busy host makes others as long.
    let wanted = cycles(blackout);
    let asked = passes.get(STEADY - 1).map_or(0, |pass| pass.ended);
    let (_, lost) = gaps
        .into_iter()
        .filter(|gap| gap.start >= asked)
        .filter_map(|gap| {
            let off = (gap.end.saturating_sub(gap.start) as f64 - wanted).abs() as u64;
            Some((off, lost(passes, gap.start)?))
        })
        .min_by_key(|(off, _)| *off)?;
    Some((lost as f64 * 1e6 / khz as f64 - blackout as f64).max(0.0) as u64)
}

/// Cycles that the passes from the one on that was under way at `pause` took more than as many before.
fn lost(passes: &[Pass], pause: u64) -> Option<u64> {
    let first = passes.iter().rposition(|pass| pass.ended <= pause)?;
    let began = passes[first];
    let ended = passes.iter().find(|p| p.number >= began.number + AFTER)?;
    let steady = passes[..=first].windows(2).filter_map(|pair| {
        let [one, next] = pair else { return None };
        Some(next.ended.checked_sub(one.ended)? / (next.number - one.number))
    });
    // Of before the swap was asked for: while it is made ready for the guest has less of the machine.
    let mut steady: Vec<u64> = steady.take(STEADY).collect();
    steady.sort_unstable();
    let steady = steady.get(steady.len() / 2)?;
    Some((ended.ended - began.ended).saturating_sub(steady * (ended.number - began.number)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn passes(took: &[u64]) -> Vec<Pass> {
        let ends = took.iter().scan(1000, |end, took| {
            *end += took;
            Some(*end)
        });
        let pass = |(ended, number)| Pass { number, ended };
        ends.zip(7..).map(pass).collect()
    }

    #[test]
    fn what_two_passes_took_more_than_those_before() {
        let seen = passes(&[10, 10, 12, 10, 10, 40, 25, 10, 300]);
        let pause = seen[4].ended + 3;
        assert_eq!(lost(&seen, pause), Some(45));
    }

    #[test]
    fn passes_beside_the_preparations_are_no_measure() {
        let mut took = vec![10; STEADY + 1];
        took.extend([17; 2 * STEADY]);
        let swap = took.len();
        took.extend([40, 25, 10]);
        let seen = passes(&took);
        assert_eq!(lost(&seen, seen[swap - 1].ended + 3), Some(45));
    }

    #[test]
    fn a_guest_that_lost_nothing() {
        let seen = passes(&[10; 9]);
        assert_eq!(lost(&seen, seen[5].ended), Some(0));
    }

    #[test]
    fn passes_that_nobody_saw_the_end_of_count_with_those_after() {
        let mut seen = passes(&[10, 10, 10, 10, 10, 40, 25, 10, 10]);
        let pause = seen[4].ended + 3;
        seen.remove(6);
        assert_eq!(lost(&seen, pause), Some(45));
    }

    #[test]
    fn without_passes_on_both_sides_there_is_nothing_to_say() {
        let seen = passes(&[10; 9]);
        assert_eq!(lost(&seen, 5), None);
        assert_eq!(lost(&seen, seen[8].ended), None);
    }
}
