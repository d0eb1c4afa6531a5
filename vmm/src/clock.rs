//! The guest's clock across a swap, exact to nanoseconds.
//!
//! Two policies. *advance*: the guest's clocks include the pause; its TSC offset stays the same.
//! *hold*: they leave it out, from the reading of the clock in the predecessor to a moment shortly
//! before the first entry in the successor; every TSC offset is less by that much, and kvmclock
//! keeps its exact relation to the guest's TSC. Wall-clock time is corrected afterwards
//! ([`crate::handover::correct`]).
//!
//! | module | what it holds |
//! |---|---|
//! | [`align`] | kvmclock, set in a loop that measures itself |
//! | [`page`] | the clock as the guest computes it, to see that it is right |
//! | [`wall`] | the wall clock structure, which KVM rewrites |
//! | [`steal`] | what vCPUs waited for |
//!
//! kvmclock: KVM steps it by whatever `KVM_SET_CLOCK` adds between our computing a value and KVM
//! using it, a microsecond or two; hence the loop. `KVM_CLOCK_REALTIME` is not used: it brings in
//! the slew of the host's wall clock.
//!
//! Order (each has its reason in arch/x86/kvm/x86.c):
//! 1. All TSC writes come before the loop: each starts a new TSC generation, and the masterclock
//!    update that follows would step kvmclock again.
//! 2. [`settle_masterclock`] once right after vCPU 0 exists, before the others: then later vCPUs
//!    of the same TSC raise no masterclock update of their own, which would otherwise step the
//!    whole machine's clock at *their* first entry, maybe hours later.
//! 3. What is asked of a vCPU all the same (kernels before 6.7 ask at every creation; every TSC write
//!    does) is taken up at once, when it is primed and right after the write, and not at the vCPU's
//!    first entry ([`crate::vcpu`], `take_up_requests`).
//! 4. The system-time MSR after the loop, the wall-clock MSR last: KVM rewrites guest memory with
//!    an epoch computed from the clock as it is at that moment.

pub mod align;
pub mod page;
pub mod steal;
pub mod wall;

use std::time::Duration;

use kvm_bindings::{KVM_CLOCK_HOST_TSC, KVM_CLOCK_REALTIME, KVM_CLOCK_TSC_STABLE, kvm_clock_data};
use kvm_ioctls::VmFd;
use stillpoint_control::clock::Policy;
use stillpoint_state::sections::Clock as ClockSection;

use crate::faults::{self, Spoilt};

/// Reads the host's TSC.
#[allow(unsafe_code)]
pub fn host_tsc() -> u64 {
    // SAFETY: RDTSC reads a counter; every x86-64 processor has it.
    unsafe { std::arch::x86_64::_rdtsc() }
}

/// KVM's 32.32 fixed-point rate from TSC cycles to nanoseconds (`kvm_get_time_scale`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Scale {
    mul: u32,
    shift: i8,
}

impl Scale {
    /// For a TSC of `khz`; computed as KVM does, so that it rounds as KVM does.
    pub fn of_khz(khz: u32) -> Self {
        const NS: u64 = 1_000_000_000;
        let mut base = u64::from(khz.max(1)) * 1000;
        let mut shift = 0i8;
        while base > NS * 2 || base >> 32 != 0 {
            base >>= 1;
            shift -= 1;
        }
        while base <= NS {
            base <<= 1;
            shift += 1;
        }
        let mul = u32::try_from((NS << 32) / base).unwrap_or(u32::MAX);
        Self { mul, shift }
    }

    /// Nanoseconds in `cycles`.
    pub fn ns(self, cycles: u64) -> u64 {
        let shifted = if self.shift < 0 {
            u128::from(cycles >> -self.shift)
        } else {
            u128::from(cycles) << self.shift
        };
        u64::try_from((shifted * u128::from(self.mul)) >> 32).unwrap_or(u64::MAX)
    }

    /// Signed: a second reading may lie before the first.
    pub(crate) fn ns_between(self, from: u64, to: u64) -> i64 {
        let between = |a: u64, b: u64| i64::try_from(self.ns(b - a)).unwrap_or(i64::MAX);
        if to >= from {
            between(from, to)
        } else {
            -between(to, from)
        }
    }
}

/// `cycles` of a TSC of `khz` as a duration.
pub fn duration(cycles: u64, khz: u32) -> Duration {
    Duration::from_nanos(Scale::of_khz(khz).ns(cycles))
}

/// Reads the machine's kvmclock. `tsc_khz` is the rate KVM computes it with; `policy` says what the
/// pause that begins here is to be to the guest.
pub fn save(vm: &VmFd, tsc_khz: u32, policy: Policy) -> Result<ClockSection, kvm_ioctls::Error> {
    let before = host_tsc();
    let data = vm.get_clock()?;
    // Without a masterclock KVM gives no TSC; one read next to the call is right to microseconds.
    let host_tsc = if data.flags & KVM_CLOCK_HOST_TSC != 0 {
        data.host_tsc
    } else {
        before
    };
    Ok(ClockSection {
        clock: data.clock,
        flags: data.flags,
        realtime: if data.flags & KVM_CLOCK_REALTIME != 0 {
            data.realtime
        } else {
            0
        },
        host_tsc,
        tsc_khz,
        hold: policy == Policy::Hold,
    })
}

/// Whether the flags say that kvmclock is the masterclock's.
pub fn is_master(flags: u32) -> bool {
    let wanted = KVM_CLOCK_TSC_STABLE | KVM_CLOCK_HOST_TSC;
    flags & wanted == wanted
}

/// See the module's point 2. Call it when vCPU 0 exists and no other.
pub fn settle_masterclock(vm: &VmFd) -> Result<(), kvm_ioctls::Error> {
    if faults::is_spoilt(Spoilt::Latecomers) {
        return Ok(());
    }
    vm.set_clock(&kvm_clock_data::default())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_scale_is_the_kernels() {
        // 2,445,430 kHz: mul and shift as this rate's pvclock page shows them.
        let scale = Scale::of_khz(2_445_430);
        assert_eq!(scale.shift, -1);
        assert_eq!(
            scale.ns(2_445_430_000).abs_diff(1_000_000_000),
            1,
            "a second, rounded down"
        );
        for khz in [100_000, 999_999, 1_000_000, 2_000_000, 2_000_001, 5_300_000] {
            let second = Scale::of_khz(khz).ns(u64::from(khz) * 1000);
            assert!(second.abs_diff(1_000_000_000) <= 3, "{khz}: {second}");
        }
    }

    #[test]
    fn years_of_cycles_do_not_overflow() {
        let year = 2_500_000_000u64 * 86_400 * 365;
        let ns = Scale::of_khz(2_500_000).ns(year * 100);
        let century = 86_400u64 * 365 * 100 * 1_000_000_000;
        assert!(ns.abs_diff(century) < century >> 30, "32 bits of rate");
        // 2 ns, less what the shift and the rate round down, as in KVM.
        assert_eq!(Scale::of_khz(2_500_000).ns_between(10, 5), -1);
    }
}
