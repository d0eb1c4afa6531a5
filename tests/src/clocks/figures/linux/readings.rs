//! A Linux guest's clocks on the line that its own TSC draws.
//!
//! The agent reads each clock between two readings of the TSC. Two such readings before a pause give
//! the rate; what a reading after it is off the line is what the pause did. Nothing of the host
//! enters, so whatever becomes of the host's clocks meanwhile doesn't either.

use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use stillpoint_agent::protocol::{Clocks, Reading};

use crate::linux::Linux;

/// Between the two readings that give the rate.
const APART: Duration = Duration::from_secs(2);
/// A reading whose bracket is wider says nothing.
const WIDEST: u64 = 1_000_000;

/// Where the guest's clocks were, and how fast they went.
#[derive(Clone, Copy, Debug)]
pub(super) struct Line {
    realtime: Reading,
    monotonic: Reading,
    /// Nanoseconds of `CLOCK_MONOTONIC` a cycle.
    rate: f64,
    /// The reading was taken between these.
    asked: Instant,
    answered: Instant,
}

/// What a pause did to the guest's clocks.
#[derive(Clone, Copy, Debug)]
pub(super) struct Moved {
    /// `CLOCK_REALTIME` off its line, ns.
    pub(super) realtime: i64,
    /// `CLOCK_MONOTONIC` off its line, ns.
    pub(super) monotonic: i64,
    /// How much less `CLOCK_MONOTONIC` went on than this machine's, at the least and at the most: an
    /// answer takes its time.
    pub(super) left_out: (Duration, Duration),
}

fn middle(reading: &Reading) -> anyhow::Result<u64> {
    let width = reading.tsc_after.checked_sub(reading.tsc_before);
    let width = width.filter(|&w| w < WIDEST);
    let width = width.with_context(|| format!("a reading held up: {reading:?}"))?;
    Ok(reading.tsc_before + width / 2)
}

fn read(guest: &Linux<'_>) -> anyhow::Result<Clocks> {
    Ok(guest.agent()?.clocks()?)
}

impl Line {
    /// As they go now.
    pub(super) fn of(guest: &Linux<'_>) -> anyhow::Result<Self> {
        let first = read(guest)?.monotonic;
        std::thread::sleep(APART);
        let asked = Instant::now();
        let Clocks {
            realtime,
            monotonic,
            ..
        } = read(guest)?;
        let (ns, tsc) = (
            monotonic.ns.checked_sub(first.ns),
            middle(&monotonic)?.checked_sub(middle(&first)?),
        );
        let (ns, tsc) = ns.zip(tsc).context("the clock went backwards")?;
        ensure!(tsc > 0, "the TSC stands still");
        #[allow(clippy::cast_precision_loss)] // Of some 2^33 each, in 53 bits.
        let rate = ns as f64 / tsc as f64;
        Ok(Self {
            realtime,
            monotonic,
            rate,
            asked,
            answered: Instant::now(),
        })
    }

    /// What has become of them since.
    pub(super) fn moved(&self, guest: &Linux<'_>) -> anyhow::Result<Moved> {
        let asked = Instant::now();
        let now = read(guest)?;
        let most = self.asked.elapsed();
        let least = asked - self.answered;
        let passed = now.monotonic.ns.saturating_sub(self.monotonic.ns);
        let passed = Duration::from_nanos(passed);
        Ok(Moved {
            realtime: self.off(&self.realtime, &now.realtime)?,
            monotonic: self.off(&self.monotonic, &now.monotonic)?,
            left_out: (least.saturating_sub(passed), most.saturating_sub(passed)),
        })
    }

    /// How much more the second reading says than the first, of two clocks of the same time; `None` if one
    /// of them was held up.
    pub(super) fn apart(&self, one: &Reading, other: &Reading) -> Option<i64> {
        let (from, to) = (middle(one).ok()?, middle(other).ok()?);
        let cycles = to.wrapping_sub(from).cast_signed();
        #[allow(clippy::cast_precision_loss, clippy::cast_possible_truncation)]
        // Milliseconds of nanoseconds.
        let between = (cycles as f64 * self.rate) as i64;
        Some(other.ns.wrapping_sub(one.ns).cast_signed() - between)
    }

    fn off(&self, before: &Reading, now: &Reading) -> anyhow::Result<i64> {
        let cycles = middle(now)?.checked_sub(middle(before)?);
        let cycles = cycles.context("the TSC went backwards")?;
        #[allow(clippy::cast_precision_loss, clippy::cast_possible_truncation)]
        // Minutes of nanoseconds: 2^37, in 53 bits.
        let due = (cycles as f64 * self.rate) as i64;
        let went = now.ns.wrapping_sub(before.ns).cast_signed();
        Ok(went - due)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_pause_did_is_what_is_off_the_line() {
        let reading = |ns, tsc: u64| Reading {
            ns,
            tsc_before: tsc - 10,
            tsc_after: tsc + 10,
        };
        let line = Line {
            realtime: reading(5_000, 2_000),
            monotonic: reading(1_000, 2_000),
            rate: 0.5,
            asked: Instant::now(),
            answered: Instant::now(),
        };
        let off = line.off(&line.realtime, &reading(6_007, 4_000));
        assert_eq!(off.expect("a reading"), 7);
        // Read 1000 cycles, so 500 ns, before the other.
        let apart = line.apart(&reading(9_000, 3_000), &reading(8_493, 2_000));
        assert_eq!(apart, Some(-7));
        let held_up = Reading {
            tsc_after: 1 << 40,
            ..reading(6_000, 4_000)
        };
        line.off(&line.realtime, &held_up).expect_err("too wide");
    }
}
