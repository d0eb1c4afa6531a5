//! A guest's TSC against the time of day.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::Context;
use stillpoint_tests::guest::Pulse;

use crate::ours::pause;

/// Readings of the guest's TSC beside the time of day, of which the best is used.
const READINGS: usize = 20;

/// What a guest's TSC read, or would have read, at the epoch.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Epoch {
    zero: i128,
    tsc_khz: u64,
}

impl Epoch {
    /// Of a guest that reads its TSC all the time. A vCPU's latest reading is a little old, so the largest difference
    /// of some counts.
    pub(crate) fn of(pulse: &Pulse, tsc_khz: u64) -> anyhow::Result<Self> {
        let mut epoch = Self { zero: 0, tsc_khz };
        let mut best = i128::MIN;
        for _ in 0..READINGS {
            let now = SystemTime::now().duration_since(UNIX_EPOCH)?;
            let last = pulse.look()?.last_tsc;
            let last = last.into_iter().max().context("no vCPU")?;
            best = best.max(i128::from(last) - epoch.cycles(now));
            pause(1);
        }
        epoch.zero = best;
        Ok(epoch)
    }

    /// The TSC at this time of day.
    pub(crate) fn tsc(&self, time: Duration) -> i128 {
        self.zero + self.cycles(time)
    }

    /// How long after this time of day the TSC read that.
    pub(crate) fn since(&self, time: Duration, tsc: u64) -> Duration {
        let cycles = u128::try_from(i128::from(tsc) - self.tsc(time)).unwrap_or(0);
        let ns = cycles * 1_000_000 / u128::from(self.tsc_khz.max(1));
        Duration::from_nanos(u64::try_from(ns).unwrap_or(u64::MAX))
    }

    fn cycles(&self, time: Duration) -> i128 {
        let ns = i128::try_from(time.as_nanos()).unwrap_or(i128::MAX);
        ns * i128::from(self.tsc_khz) / 1_000_000
    }
}
