//! Promises about clocks, measured: each with its bound beside it.

mod apart;
mod controls;
mod latecomers;
mod linux;
mod pauses;
mod periodic;
mod swaps;

use anyhow::{Context, ensure};
use serde::{Deserialize, Serialize};
use stillpoint_control::report::{ClockReceipt, SwapReport};

use super::Seen;
pub use apart::apart;
pub use controls::controls;
pub use latecomers::latecomers;
pub use linux::{Part, Plan, linux, ptp};
pub use pauses::{Pause, hold, long_pause};
pub use periodic::periodic;
pub use swaps::{Swaps, swaps};

/// The bound of kvmclock's discontinuity in each swap, ns.
const DISCONTINUITY_NS: u64 = 12;

/// The bound of a part that could not be carried out.
const CARRIED_OUT: &str = "measured";

/// Whether a bound was kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// It was.
    Kept,
    /// It was not.
    Broken,
    /// It could not be measured here; the note says why.
    Skipped,
}

/// A promise, measured.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Figure {
    /// What was measured, on what.
    pub name: String,
    /// What it must be.
    pub bound: String,
    /// What it was.
    pub measured: String,
    /// Whether that is good.
    pub verdict: Verdict,
}

impl Figure {
    fn new(name: &str, bound: impl Into<String>, measured: impl Into<String>, good: bool) -> Self {
        Self {
            name: name.to_owned(),
            bound: bound.into(),
            measured: measured.into(),
            verdict: match good {
                true => Verdict::Kept,
                false => Verdict::Broken,
            },
        }
    }

    /// Whether it stands for a part that could not be carried out.
    pub fn is_missing(&self) -> bool {
        self.verdict == Verdict::Broken && self.bound == CARRIED_OUT
    }

    /// One that can't be measured here.
    pub fn skipped(name: &str, bound: &str, why: &str) -> Self {
        Self {
            name: name.to_owned(),
            bound: bound.to_owned(),
            measured: why.to_owned(),
            verdict: Verdict::Skipped,
        }
    }
}

/// What a part showed. One that could not be carried out is a promise that was not kept.
pub fn or_broken(name: &str, part: anyhow::Result<Vec<Figure>>) -> Vec<Figure> {
    part.unwrap_or_else(|error| {
        eprintln!("{name}: {error:#}");
        vec![Figure {
            name: name.to_owned(),
            bound: CARRIED_OUT.into(),
            measured: format!("{error:#}").replace('\n', "; "),
            verdict: Verdict::Broken,
        }]
    })
}

/// Insists that no bound is broken.
pub fn must_keep(figures: &[Figure]) -> anyhow::Result<()> {
    let broken = |figure: &&Figure| figure.verdict == Verdict::Broken;
    let broken: Vec<_> = figures.iter().filter(broken).collect();
    ensure!(broken.is_empty(), "{broken:#?}");
    Ok(())
}

fn receipt_of(report: &SwapReport) -> anyhow::Result<&ClockReceipt> {
    let receipt = report.clock.as_ref();
    receipt.context("the report says nothing of the clock")
}

fn receipts(seen: &[Seen]) -> Vec<&ClockReceipt> {
    seen.iter()
        .filter_map(|s| s.report.clock.as_ref())
        .collect()
}

fn worst(errors: impl Iterator<Item = i64>) -> i64 {
    errors.max_by_key(|e| e.unsigned_abs()).unwrap_or(0)
}

fn percentile<T: Ord + Copy + Default>(mut values: Vec<T>, percent: usize) -> T {
    values.sort_unstable();
    let at = (values.len() * percent).div_ceil(100).saturating_sub(1);
    values.get(at).copied().unwrap_or_default()
}
