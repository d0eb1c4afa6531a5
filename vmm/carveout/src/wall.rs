//! The host's wall clock across a kexec. The next kernel begins with whole seconds from the RTC, right
//! to a second or so; but the TSC counts on. Two readings of both before the jump give a line, and the
//! TSC says where on it the host is after it.
//!
//! Setting the clock is a call that takes its time, so it is done in a loop that measures itself.
#![allow(unsafe_code)] // One RDTSC.

use std::time::Duration;

use rustix::time::{ClockId, Timespec, clock_gettime, clock_settime};
use serde::{Deserialize, Serialize};

/// Readings of which the tightest counts.
const READINGS: usize = 200;
/// The most tries of setting the clock.
const TRIES: usize = 40;
/// The RTC has whole seconds, and kernels add half a one; beyond this the TSC was not what it was.
pub const RTC_SLACK: Duration = Duration::from_secs(3);

/// TSC and wall clock at one moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Point {
    /// The TSC.
    pub tsc: u64,
    /// `CLOCK_REALTIME`, ns since the Unix epoch.
    pub real_ns: i64,
    /// Cycles between the two readings of the TSC around it.
    pub width: u64,
}

/// What is carried along.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Carried {
    /// Some time before.
    pub early: Point,
    /// Right before the jump.
    pub late: Point,
}

/// What became of the host's wall clock.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Corrected {
    /// What the new kernel's clock was off, ns.
    pub off_ns: i64,
    /// What is left of it, ns.
    pub left_ns: i64,
    /// What that can't be told better than, ns.
    pub uncertain_ns: u64,
    /// From the last reading before the jump.
    pub away_ns: u64,
}

/// Why the wall clock is as the new kernel made it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Lost {
    /// It counts less than before.
    #[error("the TSC was reset on the way: it was {before}, and is {now}")]
    Reset {
        /// Before the jump.
        before: u64,
        /// Now.
        now: u64,
    },
    /// It and the RTC tell different stories.
    #[error("by the TSC {by_tsc:?} passed, by the RTC {by_rtc:?}: one of them was disturbed")]
    Disturbed {
        /// By the TSC.
        by_tsc: Duration,
        /// By the new kernel's clock, which it has from the RTC.
        by_rtc: Duration,
    },
    /// The readings don't make a line.
    #[error("the readings before the jump make no line")]
    NoLine,
    /// It could not be set.
    #[error("setting the clock: {0}")]
    Set(rustix::io::Errno),
}

/// Reads the TSC.
pub fn tsc() -> u64 {
    // SAFETY: RDTSC reads a counter; every x86-64 processor has it.
    unsafe { std::arch::x86_64::_rdtsc() }
}

fn real_ns() -> i64 {
    let Timespec { tv_sec, tv_nsec } = clock_gettime(ClockId::Realtime);
    tv_sec.saturating_mul(1_000_000_000).saturating_add(tv_nsec)
}

/// The tightest of some readings.
pub fn now() -> Point {
    let reading = || {
        let before = tsc();
        let real_ns = real_ns();
        let width = tsc().wrapping_sub(before);
        Point {
            tsc: before.wrapping_add(width / 2),
            real_ns,
            width,
        }
    };
    let more = (1..READINGS).map(|_| reading());
    more.fold(reading(), |best, next| match next.width < best.width {
        true => next,
        false => best,
    })
}

impl Carried {
    /// Cycles and nanoseconds between the two points.
    fn slope(&self) -> Option<(i128, i128)> {
        let cycles = i128::from(self.late.tsc) - i128::from(self.early.tsc);
        let ns = i128::from(self.late.real_ns) - i128::from(self.early.real_ns);
        (cycles > 0 && ns > 0).then_some((cycles, ns))
    }

    /// What the wall clock is at this TSC, by the line through both points.
    pub fn real_ns_at(&self, tsc: u64) -> Option<i64> {
        let (cycles, ns) = self.slope()?;
        let passed = (i128::from(tsc) - i128::from(self.late.tsc)) * ns / cycles;
        i64::try_from(i128::from(self.late.real_ns) + passed).ok()
    }

    /// Whether the line may be followed to `now`, which is by the clock that the new kernel made.
    fn judge(&self, now: Point) -> Result<i64, Lost> {
        if now.tsc < self.late.tsc {
            let (before, now) = (self.late.tsc, now.tsc);
            return Err(Lost::Reset { before, now });
        }
        let due = self.real_ns_at(now.tsc).ok_or(Lost::NoLine)?;
        let since =
            |ns: i64| Duration::from_nanos(u64::try_from(ns - self.late.real_ns).unwrap_or(0));
        let (by_tsc, by_rtc) = (since(due), since(now.real_ns));
        if by_tsc.abs_diff(by_rtc) > RTC_SLACK {
            return Err(Lost::Disturbed { by_tsc, by_rtc });
        }
        Ok(due)
    }

    /// Sets the host's wall clock by it.
    pub fn correct(&self) -> Result<Corrected, Lost> {
        let first = now();
        let due = self.judge(first)?;
        let off = |point: Point| {
            self.real_ns_at(point.tsc)
                .map_or(i64::MAX, |due| point.real_ns - due)
        };
        let mut delay = 0;
        let mut left = off(first);
        for _ in 0..TRIES {
            let target = self
                .real_ns_at(tsc())
                .ok_or(Lost::NoLine)?
                .saturating_add(delay);
            clock_settime(ClockId::Realtime, timespec(target)).map_err(Lost::Set)?;
            let point = now();
            left = off(point);
            if left.unsigned_abs() <= self.ns(point.width) {
                break;
            }
            delay -= left / 2;
        }
        let last = now();
        Ok(Corrected {
            off_ns: first.real_ns - due,
            left_ns: left,
            uncertain_ns: self.ns(last.width / 2 + self.late.width / 2),
            away_ns: u64::try_from(due - self.late.real_ns).unwrap_or(0),
        })
    }

    fn ns(&self, cycles: u64) -> u64 {
        let ns = self
            .slope()
            .map_or(0, |(all, ns)| i128::from(cycles) * ns / all);
        u64::try_from(ns).unwrap_or(u64::MAX)
    }
}

fn timespec(ns: i64) -> Timespec {
    Timespec {
        tv_sec: ns.div_euclid(1_000_000_000),
        tv_nsec: ns.rem_euclid(1_000_000_000),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const S: i64 = 1_000_000_000;

    fn point(tsc: u64, real_ns: i64) -> Point {
        Point {
            tsc,
            real_ns,
            width: 20,
        }
    }

    fn carried() -> Carried {
        Carried {
            early: point(1_000, 5 * S),
            late: point(1_000 + 20_000_000_000, 15 * S),
        }
    }

    #[test]
    fn the_line_goes_on_behind_the_jump() {
        let carried = carried();
        assert_eq!(carried.real_ns_at(1_000), Some(5 * S));
        assert_eq!(carried.real_ns_at(1_000 + 30_000_000_000), Some(20 * S));
        let due = carried.judge(point(1_000 + 30_000_000_000, 21 * S));
        assert_eq!(due, Ok(20 * S), "an RTC of whole seconds is no disturbance");
    }

    #[test]
    fn a_tsc_that_is_not_what_it_was_is_not_followed() {
        let reset = carried().judge(point(900, 21 * S)).expect_err("reset");
        assert!(matches!(reset, Lost::Reset { .. }), "{reset}");
        let slept = carried().judge(point(1_000 + 22_000_000_000, 60 * S));
        let slept = slept.expect_err("it stood still");
        assert!(matches!(slept, Lost::Disturbed { .. }), "{slept}");
        let flat = Carried {
            late: carried().early,
            ..carried()
        };
        assert_eq!(flat.judge(point(2_000, 6 * S)), Err(Lost::NoLine));
    }

    #[test]
    fn readings_of_this_host_make_a_line() {
        let early = now();
        std::thread::sleep(Duration::from_millis(20));
        let carried = Carried { early, late: now() };
        let (cycles, ns) = carried.slope().expect("time passed");
        assert!(cycles > 0 && ns > 0);
        let at = now();
        let due = carried.real_ns_at(at.tsc).expect("a line");
        // A line through 20 ms is good to what a reading is; a clock that is stepped meanwhile is not
        // this test's.
        assert!((at.real_ns - due).abs() < S, "{due} for {at:?}");
    }
}
