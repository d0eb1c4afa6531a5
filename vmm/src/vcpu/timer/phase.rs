//! The phase of a periodic timer, carried over as exactly as it can be read.
//!
//! KVM keeps the moment of the next tick in its host's time. It shows that moment as a count that is left
//! while it is asked, and takes it as a count that is left while it is told. Three things come between:
//! * A thread may lose its core, or a call take long, between a count and the TSC that goes with it. So a
//!   count is read between two readings of the TSC, and one whose bracket is wider than others' is not used.
//! * A tick that is due, and whose host timer has not fired yet, is shown as a count of 0 (lapic.c,
//!   `apic_get_tmcct`), which says nothing of how long it has been due; loaded, it would start a whole
//!   period (`set_target_expiration`). Hosts' timers are late where hosts are busy, so it is waited for.
//! * A tick that fires after the vCPU was settled is in no register. So a count is used only if none fired
//!   since the reading before the settling.
//!
//! How long KVM takes to start a count that it is given is found out by reading it back, as for kvmclock.

use kvm_ioctls::VcpuFd;
use rustix::thread::nanosleep;
use rustix::time::Timespec;

use super::{CURRENT_COUNT, INITIAL_COUNT, Lapic, SavedLapic, read};
use crate::clock::{self, Scale};
use crate::vcpu::error::VcpuError;
use crate::vcpu::settle::settle;

/// How long a tick that is due may take to fire, in readings; what sleeps between them.
const OVERDUE: u32 = 100;
const GLANCE_NS: i64 = 20_000;
/// Readings, or loadings, after which what there is is taken.
const TRIES: u32 = 24;
/// A bracket of so many cycles is never too wide: a few microseconds.
const NARROW: u64 = 10_000;
/// One of so many was held up, unless a host takes as long each time.
const HELD_UP: u64 = 100_000;
const EACH_TIME: u32 = 8;
/// How far the phase may be off beside what a bracket leaves open, ns, by the try.
const fn slack(tries: u32) -> u64 {
    match tries {
        0..8 => 300,
        8..16 => 1_000,
        _ => 5_000,
    }
}

/// A local APIC, read between two readings of the TSC.
#[derive(Clone, Copy, Debug)]
struct Reading {
    lapic: Lapic,
    began: u64,
    ended: u64,
}

impl Reading {
    fn take(fd: &VcpuFd) -> Result<Self, VcpuError> {
        let began = clock::host_tsc();
        let lapic = read(fd)?;
        Ok(Self {
            lapic,
            began,
            ended: clock::host_tsc(),
        })
    }

    fn count(&self) -> u32 {
        self.lapic.register(CURRENT_COUNT)
    }

    fn width(&self) -> u64 {
        self.ended.saturating_sub(self.began)
    }

    fn middle(&self) -> u64 {
        self.began + self.width() / 2
    }
}

/// The narrowest bracket so far: what one is that was not disturbed.
#[derive(Debug)]
struct Narrowest(u64);

impl Narrowest {
    /// Whether this one was not held up, as far as can be told after so many.
    fn admits(&mut self, reading: &Reading, tries: u32) -> bool {
        let width = reading.width();
        self.0 = self.0.min(width);
        let as_others = width <= NARROW.max(self.0.saturating_mul(2));
        as_others && (width <= HELD_UP || tries >= EACH_TIME)
    }
}

/// Reads a periodic timer. The vCPU is parked, its kick pending.
pub(super) fn save(fd: &mut VcpuFd) -> Result<SavedLapic, VcpuError> {
    let mut narrowest = Narrowest(u64::MAX);
    let mut before = Reading::take(fd)?;
    let (mut tries, mut overdue) = (0, 0);
    narrowest.admits(&before, tries);
    loop {
        settle(fd)?;
        let mut now = Reading::take(fd)?;
        let none_fired = (1..=before.count()).contains(&now.count());
        let enough = tries >= TRIES && now.count() != 0;
        if (narrowest.admits(&now, tries) && none_fired) || enough || overdue >= OVERDUE {
            // Of a period so short that one always does, or a tick that is late beyond all patience.
            if !none_fired {
                now.lapic.pend_timer_interrupt();
            }
            return Ok(SavedLapic {
                lapic: now.lapic,
                deadline: None,
                host_tsc: now.middle(),
                settled: true,
            });
        }
        if now.count() == 0 {
            overdue += 1;
            let _ = nanosleep(&Timespec {
                tv_sec: 0,
                tv_nsec: GLANCE_NS,
            });
        }
        tries += 1;
        before = now;
    }
}

/// Loads a periodic timer that was read `from.host_tsc`, so that its ticks are where they would have been;
/// `held` cycles since then are none of the guest's time.
pub(in crate::vcpu) fn load(
    fd: &VcpuFd,
    lapic: Lapic,
    from: Moment,
    held: u64,
) -> Result<(), VcpuError> {
    let passed = |tsc: u64| from.passed_ns(tsc, held);
    let tell = |passed_ns: u64| {
        let mut moved = lapic;
        moved.advance(passed_ns);
        fd.set_lapic(&moved.0)
            .map_err(VcpuError::kvm("load the local APIC"))
    };
    approach(lapic, clock::host_tsc, passed, tell, || Reading::take(fd))
}

/// When a local APIC was read.
#[derive(Clone, Copy, Debug)]
pub(in crate::vcpu) struct Moment {
    pub(in crate::vcpu) host_tsc: u64,
    pub(in crate::vcpu) tsc_khz: u32,
}

impl Moment {
    /// Nanoseconds of the guest's time from then to a host TSC.
    pub(in crate::vcpu) fn passed_ns(&self, tsc: u64, held: u64) -> u64 {
        let cycles = tsc.saturating_sub(self.host_tsc).saturating_sub(held);
        Scale::of_khz(self.tsc_khz).ns(cycles)
    }
}

/// Tells KVM the count again and again, until what it makes of it is right. KVM starts each anew, and forgets
/// what the one before it had fired (`cancel_apic_timer`).
fn approach(
    lapic: Lapic,
    tsc: impl Fn() -> u64,
    passed: impl Fn(u64) -> u64,
    mut tell: impl FnMut(u64) -> Result<(), VcpuError>,
    mut read_back: impl FnMut() -> Result<Reading, VcpuError>,
) -> Result<(), VcpuError> {
    let mut narrowest = Narrowest(u64::MAX);
    narrowest.admits(&read_back()?, 0);
    // From the reading of the TSC until KVM starts the count, ns: the least that it ever was, as who is held
    // up only takes longer.
    let mut delay: Option<i64> = None;
    for tries in 0..=TRIES {
        let allowed = delay.unwrap_or(0);
        tell(passed(tsc()).saturating_add_signed(allowed))?;
        let reading = read_back()?;
        if !narrowest.admits(&reading, tries) || reading.count() == 0 {
            continue;
        }
        let late = lateness(&lapic, passed(reading.middle()), reading.count());
        let open = passed(reading.ended).saturating_sub(passed(reading.began)) / 2;
        if late.unsigned_abs() <= open + slack(tries) {
            return Ok(());
        }
        let took = allowed + late;
        delay = Some(delay.map_or(took, |least| least.min(took)));
    }
    Ok(())
}

/// How much later a timer's next tick is than it is to be, ns, if it has `count` left when `passed` of the
/// guest's time has gone since `lapic` was read: the shorter way around its period.
fn lateness(lapic: &Lapic, passed_ns: u64, count: u32) -> i64 {
    let ns = |count: u32| u64::from(count) * lapic.divisor();
    let period = ns(lapic.register(INITIAL_COUNT)).max(1);
    let due = ns(lapic.register(CURRENT_COUNT)) % period;
    let wanted = (due + period - passed_ns % period) % period;
    match (ns(count) % period + period - wanted) % period {
        late if late <= period / 2 => late.cast_signed(),
        late => late.cast_signed() - period.cast_signed(),
    }
}

#[cfg(test)]
mod tests {
    use super::super::LVT_TIMER;
    use super::*;
    use std::cell::Cell;

    const KHZ: u32 = 1_000_000;
    const PERIOD: u32 = 2_000_000;

    fn periodic(left: u32) -> Lapic {
        let mut lapic = Lapic(kvm_bindings::kvm_lapic_state::default());
        lapic.set(LVT_TIMER, 0x30 | 1 << 17);
        lapic.set(super::super::DIVIDE, 0xb);
        lapic.set(INITIAL_COUNT, PERIOD);
        lapic.set(CURRENT_COUNT, left);
        lapic
    }

    #[test]
    fn lateness_goes_the_shorter_way_around() {
        let lapic = periodic(1_000);
        assert_eq!(lateness(&lapic, 400, 600), 0);
        assert_eq!(lateness(&lapic, 400, 650), 50);
        assert_eq!(lateness(&lapic, 400, 500), -100);
        // A tick went by: what is left is nearly a period.
        assert_eq!(lateness(&lapic, 1_500, PERIOD - 500), 0);
        assert_eq!(lateness(&lapic, 1_500, 20), 520);
        assert_eq!(lateness(&lapic, 900, PERIOD - 10), -110);
    }

    /// How late the next tick is in the end, of a KVM that starts a count `takes(try)` cycles after it is
    /// told, and takes 200 to be asked.
    fn off_by(takes: impl Fn(u64) -> u64) -> i64 {
        let lapic = periodic(700_000);
        let from = Moment {
            host_tsc: 1_000_000,
            tsc_khz: KHZ,
        };
        let (tsc, calls) = (Cell::new(1_500_000), Cell::new(0));
        let started = Cell::new((0u64, 0u32));
        let passed = |tsc: u64| from.passed_ns(tsc, 0);
        let tell = |passed_ns: u64| {
            let mut moved = lapic;
            moved.advance(passed_ns);
            tsc.set(tsc.get() + takes(calls.get()));
            calls.set(calls.get() + 1);
            started.set((tsc.get(), moved.register(CURRENT_COUNT)));
            Ok(())
        };
        let read_back = || {
            let (began, (at, left)) = (tsc.get(), started.get());
            tsc.set(began + 200);
            let gone = (began + 100 - at) % u64::from(PERIOD);
            let count = (u64::from(left) + u64::from(PERIOD) - gone) % u64::from(PERIOD);
            let mut read = lapic;
            read.set(
                CURRENT_COUNT,
                u32::try_from(count).expect("less than a period"),
            );
            Ok(Reading {
                lapic: read,
                began,
                ended: began + 200,
            })
        };
        approach(lapic, || tsc.get(), passed, tell, read_back).expect("no KVM");
        let (at, left) = started.get();
        lateness(&lapic, passed(at), left)
    }

    #[test]
    fn a_kvm_that_is_slow_to_start_is_found_out() {
        for slow in [0, 300, 5_000, 900_000] {
            assert!(off_by(|_| slow).abs() <= 400, "{slow}");
        }
    }

    #[test]
    fn what_was_held_up_is_told_again() {
        for every in [2, 3, 5] {
            let held_up = |call: u64| 1_000 + u64::from(call.is_multiple_of(every)) * 800_000;
            assert!(off_by(held_up).abs() <= 400, "each {every}th");
        }
        // One that jitters is waited for.
        let jitter = |call: u64| 2_000 + call.wrapping_mul(7_919) % 1_000;
        assert!(off_by(jitter).abs() <= 1_100, "jitter");
    }
}
