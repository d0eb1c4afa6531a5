//! The crossing as a table.

use std::fmt::Write;

use super::cell::{Outcome, Taken, worst_unqueued};
use crate::environment::Facts;
use crate::sample::Sample;
use crate::stats::{self, Summary};

/// A gap of nobody's making may be this part of a swap's, or the guest's figure says nothing of the swap.
const MOST_NOISE: f64 = 0.1;

/// All of it; of `of` machines.
pub(crate) fn render(taken: &[Taken], of: usize, facts: &Facts) -> String {
    let mut text = String::new();
    // Writing to a string does not fail.
    let _ = write_all(&mut text, taken, of, facts);
    text
}

fn write_all(to: &mut String, taken: &[Taken], of: usize, facts: &Facts) -> std::fmt::Result {
    writeln!(
        to,
        "<!-- Written by `make bench-full`. -->\n\n{} of {of} machines. {} cores, {}, kernel {}, {}. ms; the guest's figure is left out where its \
         vCPUs see gaps of a tenth of it or more without any swap.\n",
        taken.len(),
        facts.cores,
        facts.cpu,
        facts.kernel,
        facts.kvm
    )?;
    writeln!(
        to,
        "| machine | n | host's median | worst | worst vCPU's, less its waits for a core | guest's median | worst | no swap | load |\n|---|--:|--:|--:|--:|--:|--:|--:|--:|"
    )?;
    for taken in taken {
        let title = taken.cell.title();
        match &taken.outcome {
            Outcome::LeftOut(why) => writeln!(to, "| {title} | | {why} | | | | | | |")?,
            Outcome::Measured {
                swaps,
                none,
                faults,
            } => {
                row(to, &title, swaps, none, taken.load)?;
                for fault in faults {
                    writeln!(to, "| | | the guest complains: {fault} | | | | | | |")?;
                }
            }
        }
    }
    Ok(())
}

fn row(
    to: &mut String,
    title: &str,
    swaps: &[Sample],
    none: &[Sample],
    load: f64,
) -> std::fmt::Result {
    let of = |samples: &[Sample], what: fn(&Sample) -> u64| {
        stats::summary(&samples.iter().map(what).collect::<Vec<_>>())
    };
    let host = of(swaps, |sample| sample.host_ns);
    // A guest that was asleep all through a swap saw nothing of it.
    let seen: Vec<Sample> = swaps
        .iter()
        .filter(|sample| sample.guest() > 0)
        .cloned()
        .collect();
    let guest = of(&seen, Sample::guest);
    let none = of(none, Sample::guest);
    let noise = none.as_ref().map_or(0.0, |none| none.p50);
    let guest = guest.filter(|guest| noise <= guest.p50 * MOST_NOISE);
    let two = |of: Option<Summary>| match of {
        Some(of) => format!("{:.2} | {:.2}", of.p50, of.max),
        None => " | ".into(),
    };
    let worst = worst_unqueued(swaps)
        .map(|ms| format!("{ms:.2}"))
        .unwrap_or_default();
    let n = swaps.len();
    writeln!(
        to,
        "| {title} | {n} | {} | {worst} | {} | {noise:.2} | {load:.1} |",
        two(host),
        two(guest)
    )
}
