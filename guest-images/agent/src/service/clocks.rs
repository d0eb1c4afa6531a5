//! How the guest's clocks stand to each other, and to its TSC.

use std::convert::Infallible;
use std::fs::File;
use std::io;
use std::os::fd::AsFd;

use rustix::time::{ClockId, DynamicClockId, Timespec, clock_gettime, clock_gettime_dynamic};
use stillpoint_agent::protocol::{Clocks, Reading};

use super::{kernel, tsc};

/// Readings of one clock, of which the tightest is told: between others the thread was held up.
const ROUNDS: u32 = 64;
/// What the kernel calls the clock of its host (drivers/ptp/ptp_kvm_common.c).
const PTP_KVM: &str = "KVM virtual PTP";

/// Reads every clock.
pub(super) fn read() -> Clocks {
    Clocks {
        clocksource: kernel::clocksource(),
        realtime: tightest(ClockId::Realtime),
        monotonic: tightest(ClockId::Monotonic),
        monotonic_raw: tightest(ClockId::MonotonicRaw),
        boottime: tightest(ClockId::Boottime),
        ptp_kvm: ptp_kvm().ok().flatten(),
    }
}

/// The host's clock, if the kernel has a way to it.
fn ptp_kvm() -> io::Result<Option<Reading>> {
    for entry in std::fs::read_dir("/sys/class/ptp")? {
        let entry = entry?;
        let name = std::fs::read_to_string(entry.path().join("clock_name"))?;
        if name.trim() == PTP_KVM {
            let file = File::open(std::path::Path::new("/dev").join(entry.file_name()))?;
            // A clock is its device's open file (Documentation/driver-api/ptp.rst).
            let clock = || DynamicClockId::Dynamic(file.as_fd());
            let read = || clock_gettime_dynamic(clock()).map_err(io::Error::from);
            return Ok(Some(tightest_of(read)?));
        }
    }
    Ok(None)
}

/// Nanoseconds of a clock's reading.
pub(super) fn nanos(time: Timespec) -> u64 {
    let seconds = u64::try_from(time.tv_sec).unwrap_or_default();
    let rest = u64::try_from(time.tv_nsec).unwrap_or_default();
    seconds.saturating_mul(1_000_000_000).saturating_add(rest)
}

fn tightest(clock: ClockId) -> Reading {
    let Ok(best) = tightest_of(|| Ok::<_, Infallible>(clock_gettime(clock)));
    best
}

fn tightest_of<E>(read: impl Fn() -> Result<Timespec, E>) -> Result<Reading, E> {
    let mut best = bracketed(&read)?;
    for _ in 1..ROUNDS {
        let reading = bracketed(&read)?;
        if width(&reading) < width(&best) {
            best = reading;
        }
    }
    Ok(best)
}

fn bracketed<E>(read: impl Fn() -> Result<Timespec, E>) -> Result<Reading, E> {
    let tsc_before = tsc::now();
    let time = read()?;
    let tsc_after = tsc::now();
    Ok(Reading {
        ns: nanos(time),
        tsc_before,
        tsc_after,
    })
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
