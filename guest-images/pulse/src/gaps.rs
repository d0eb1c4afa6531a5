//! Gaps in this vCPU's own TSC readings: time in which it did not run.

use core::sync::atomic::{Ordering::Relaxed, Ordering::Release};

use stillpoint_guest_abi::probe::{RING, Record};
use stillpoint_guest_abi::pulse::Report;

use crate::pages::{self, add, field};
use crate::{options, tsc};

/// The log of one vCPU.
pub(crate) struct Gaps {
    record: *mut Record,
    report: *mut Report,
    threshold: u64,
    last: u64,
}

impl Gaps {
    /// Begins with a reading of now.
    pub(crate) fn new(vcpu: usize) -> Self {
        let record = pages::record(vcpu);
        let threshold = tsc::cycles(options::get().gap_us);
        field!(record.threshold).store(threshold, Relaxed);
        Self {
            record,
            report: pages::report(vcpu),
            threshold,
            last: tsc::read(),
        }
    }

    /// Reads the TSC, logs the gap since the last reading if it is long, and returns the reading. What was done
    /// since then was a piece of work.
    pub(crate) fn tick(&mut self) -> u64 {
        let now = tsc::read();
        let record = self.record;
        add(field!(record.work), 1);
        if now < self.last {
            let report = self.report;
            add(field!(report.tsc_backwards), 1);
        } else if now - self.last > self.threshold {
            self.log(self.last, now);
        }
        self.resume(now);
        now
    }

    /// Goes on from `since`: nothing before it counts as a gap. Used after a halt, with the time
    /// at which it should have ended, and after something we know to be slow.
    pub(crate) fn resume(&mut self, since: u64) {
        let record = self.record;
        self.last = since;
        field!(record.last).store(since, Relaxed);
    }

    /// The entry first, then the count: a reader who sees the count sees the entry.
    fn log(&self, start: u64, end: u64) {
        let record = self.record;
        let count = field!(record.count).load(Relaxed);
        let slot = (count % RING as u64) as usize;
        field!(record.ring[slot].start).store(start, Relaxed);
        field!(record.ring[slot].end).store(end, Relaxed);
        let (low, high) = (field!(record.largest.start), field!(record.largest.end));
        // Saturating: `forget` may have zeroed half of the pair.
        let largest = high.load(Relaxed).saturating_sub(low.load(Relaxed));
        if end - start > largest {
            low.store(start, Relaxed);
            high.store(end, Relaxed);
        }
        field!(record.count).store(count + 1, Release);
    }
}

/// Clears the largest gap of a vCPU; the ring and the count stay.
pub(crate) fn forget(vcpu: usize) {
    let record = pages::record(vcpu);
    field!(record.largest.end).store(0, Relaxed);
    field!(record.largest.start).store(0, Relaxed);
}
