//! How fast a stream went, and for how long it stood still.

use std::time::Instant;

use rustix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};

/// An hour of intervals; what comes later is added to the last one.
const MAX_INTERVALS: usize = 36_000;

/// Measures as it goes.
pub(crate) struct Pace {
    begun: Instant,
    latest: Instant,
    told: PaceReport,
}

/// What was measured.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct PaceReport {
    /// Bytes in all.
    pub(crate) bytes: u64,
    /// Time in all.
    pub(crate) seconds: f64,
    /// Their quotient.
    pub(crate) mib_per_second: f64,
    /// The longest time without anything.
    pub(crate) longest_stall_ms: f64,
    /// When that began, since the stream began.
    pub(crate) longest_stall_at_ms: f64,
    /// When the stream began, in `CLOCK_MONOTONIC`.
    pub(crate) begun_monotonic_ns: u64,
    /// Bytes of each 100 ms.
    pub(crate) bytes_per_100_ms: Vec<u64>,
}

impl Pace {
    /// Begins now.
    pub(crate) fn begin() -> Self {
        let now = clock_gettime(ClockId::Monotonic);
        let seconds = u64::try_from(now.tv_sec).unwrap_or_default();
        let nanos = u64::try_from(now.tv_nsec).unwrap_or_default();
        let begun = Instant::now();
        Self {
            begun,
            latest: begun,
            told: PaceReport {
                begun_monotonic_ns: seconds * 1_000_000_000 + nanos,
                ..PaceReport::default()
            },
        }
    }

    /// Something went through.
    pub(crate) fn add(&mut self, bytes: usize) {
        let now = Instant::now();
        let stall = (now - self.latest).as_secs_f64() * 1e3;
        if stall > self.told.longest_stall_ms {
            self.told.longest_stall_ms = stall;
            self.told.longest_stall_at_ms = (self.latest - self.begun).as_secs_f64() * 1e3;
        }
        self.latest = now;
        let interval = usize::try_from((now - self.begun).as_millis() / 100).unwrap_or(usize::MAX);
        let interval = interval.min(MAX_INTERVALS - 1);
        let intervals = &mut self.told.bytes_per_100_ms;
        if intervals.len() <= interval {
            intervals.resize(interval + 1, 0);
        }
        intervals[interval] += bytes as u64;
        self.told.bytes += bytes as u64;
    }

    /// Ends now.
    pub(crate) fn end(mut self) -> PaceReport {
        let seconds = self.begun.elapsed().as_secs_f64();
        self.told.seconds = seconds;
        // Floats hold counts of bytes exactly up to 2^53.
        self.told.mib_per_second = self.told.bytes as f64 / seconds.max(1e-9) / (1 << 20) as f64;
        self.told
    }
}
