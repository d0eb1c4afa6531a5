//! How the guest's clocks stand to each other, and to its TSC.

use rustix::time::{ClockId, Timespec, clock_gettime};
use stillpoint_agent::protocol::{Clocks, Reading};

use super::{kernel, tsc};

/// Readings of one clock, of which the tightest is told: between others the thread was held up.
const ROUNDS: u32 = 64;

/// Reads every clock.
pub(super) fn read() -> Clocks {
    Clocks {
        clocksource: kernel::clocksource(),
        realtime: tightest(ClockId::Realtime),
        monotonic: tightest(ClockId::Monotonic),
        monotonic_raw: tightest(ClockId::MonotonicRaw),
        boottime: tightest(ClockId::Boottime),
    }
}

/// Nanoseconds of a clock's reading.
pub(super) fn nanos(time: Timespec) -> u64 {
    let seconds = u64::try_from(time.tv_sec).unwrap_or_default();
    let rest = u64::try_from(time.tv_nsec).unwrap_or_default();
    seconds.saturating_mul(1_000_000_000).saturating_add(rest)
}

fn tightest(clock: ClockId) -> Reading {
    let mut best = once(clock);
    for _ in 1..ROUNDS {
        let reading = once(clock);
        if width(&reading) < width(&best) {
            best = reading;
        }
    }
    best
}

fn once(clock: ClockId) -> Reading {
    let tsc_before = tsc::now();
    let time = clock_gettime(clock);
    let tsc_after = tsc::now();
    Reading {
        ns: nanos(time),
        tsc_before,
        tsc_after,
    }
}

fn width(reading: &Reading) -> u64 {
    // Backwards is the widest: two CPUs' TSCs that differ.
    reading
        .tsc_after
        .checked_sub(reading.tsc_before)
        .unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn readings_are_bracketed_and_go_forward() {
        let first = read();
        let second = read();
        for (a, b) in [
            (first.realtime, second.realtime),
            (first.monotonic, second.monotonic),
            (first.monotonic_raw, second.monotonic_raw),
            (first.boottime, second.boottime),
        ] {
            assert!(
                a.tsc_before < a.tsc_after && a.tsc_after < b.tsc_before,
                "{a:?} {b:?}"
            );
            assert!(a.ns > 0 && a.ns <= b.ns, "{a:?} {b:?}");
        }
    }
}
