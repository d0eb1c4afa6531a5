//! The RAM pattern: every word says where it is and in which pass it was written.

use core::sync::atomic::Ordering::Relaxed;

use stillpoint_guest_abi::pulse::Report;

use crate::gaps::Gaps;
use crate::options;
use crate::pages::{self, add, field};

const PAGE: u64 = 4096;
/// Pages walked in a loop, at most.
const SLICE: u64 = 16;

/// One vCPU's share of the pattern.
pub(crate) struct Pattern {
    report: *mut Report,
    start: u64,
    end: u64,
    at: u64,
    pass: u64,
    sum: u64,
    expected: u64,
}

/// What the word at `address` holds after `pass`.
fn value(address: u64, pass: u64) -> u64 {
    (address ^ pass.rotate_left(40)).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ pass
}

impl Pattern {
    /// The share of `vcpu`; nothing is touched yet.
    pub(crate) fn new(vcpu: usize) -> Self {
        let globals = pages::globals();
        let base = field!(globals.pattern_base).load(Relaxed);
        let all = field!(globals.pattern_len).load(Relaxed) / PAGE;
        let (vcpu, cpus) = (vcpu as u64, options::get().cpus as u64);
        let start = base + all * vcpu / cpus * PAGE;
        let end = base + all * (vcpu + 1) / cpus * PAGE;
        let report = pages::report(vcpu as usize);
        Self {
            report,
            start,
            end,
            at: start,
            pass: 0,
            sum: 0,
            expected: 0,
        }
    }

    /// Checks and rewrites the next few pages; looks at the TSC after each, since a page may
    /// take a fault.
    pub(crate) fn walk(&mut self, gaps: &mut Gaps) {
        for _ in 0..SLICE {
            if self.at == self.end {
                self.finish_pass();
                return;
            }
            self.page();
            gaps.tick();
        }
    }

    fn page(&mut self) {
        let mut errors = 0;
        for address in (self.at..self.at + PAGE).step_by(8) {
            let word = address as *mut u64;
            // SAFETY: the page lies in RAM that the memory map gave and no one else uses.
            unsafe {
                if self.pass > 0 {
                    let (found, due) = (word.read_volatile(), value(address, self.pass - 1));
                    errors += u64::from(found != due);
                    self.sum = self.sum.wrapping_add(found);
                    self.expected = self.expected.wrapping_add(due);
                }
                word.write_volatile(value(address, self.pass));
            }
        }
        let report = self.report;
        add(field!(report.ram_errors), errors);
        self.at += PAGE;
    }

    fn finish_pass(&mut self) {
        let report = self.report;
        if self.start == self.end {
            return;
        }
        field!(report.ram_checksum).store(self.sum, Relaxed);
        field!(report.ram_expected).store(self.expected, Relaxed);
        let wrong = u64::from(self.sum != self.expected);
        add(field!(report.ram_sums_wrong), wrong);
        add(field!(report.ram_passes), 1);
        (self.sum, self.expected, self.at) = (0, 0, self.start);
        self.pass += 1;
    }
}
