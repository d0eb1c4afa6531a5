//! The guest's clock across a swap: policy *advance*, exact to nanoseconds.
//!
//! Guest TSC: the successor writes the same TSC offset and reads it back; nothing else enters.
//! kvmclock: KVM steps it by whatever `KVM_SET_CLOCK` adds between our computing a value and KVM
//! using it, a microsecond or two. [`align`] closes that loop: set, read back where the clock
//! came to lie on the line of before, correct the bias, again, until it lies within a few
//! nanoseconds. `KVM_CLOCK_REALTIME` is not used: it brings in the slew of the host's wall clock.
//!
//! Order (each has its reason in arch/x86/kvm/x86.c):
//! 1. All TSC writes come before the loop: each starts a new TSC generation, and the masterclock
//!    update that follows would step kvmclock again.
//! 2. [`settle_masterclock`] once right after vCPU 0 exists, before the others: then later vCPUs
//!    of the same TSC raise no masterclock update of their own, which would otherwise step the
//!    whole machine's clock at *their* first entry, maybe hours later.
//! 3. The system-time MSR after the loop, the wall-clock MSR last: KVM rewrites guest memory with
//!    an epoch computed from the clock as it is at that moment.

use std::time::{Duration, Instant};

use kvm_bindings::{KVM_CLOCK_HOST_TSC, KVM_CLOCK_REALTIME, KVM_CLOCK_TSC_STABLE, kvm_clock_data};
use kvm_ioctls::VmFd;
use stillpoint_state::sections::Clock as ClockSection;
use vm_memory::{Bytes, GuestAddress};

use crate::memory::Memory;

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
    fn ns_between(self, from: u64, to: u64) -> i64 {
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

/// Reads the machine's kvmclock. `tsc_khz` is the rate KVM computes it with.
pub fn save(vm: &VmFd, tsc_khz: u32) -> Result<ClockSection, kvm_ioctls::Error> {
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
        hold: false,
    })
}

/// Whether the flags say that kvmclock is the masterclock's.
pub fn is_master(flags: u32) -> bool {
    let wanted = KVM_CLOCK_TSC_STABLE | KVM_CLOCK_HOST_TSC;
    flags & wanted == wanted
}

/// See the module's point 2. Call it when vCPU 0 exists and no other.
pub fn settle_masterclock(vm: &VmFd) -> Result<(), kvm_ioctls::Error> {
    vm.set_clock(&kvm_clock_data::default())
}

/// How the loop ended.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Alignment {
    /// How far kvmclock lies off the line of before, ns; `None` where it could not be read back.
    pub error_ns: Option<i64>,
    /// Times the clock was set.
    pub tries: u32,
    /// How long it took.
    pub took: Duration,
    /// Whether the masterclock is on.
    pub master: bool,
}

/// The most tries; more than a hundred were never needed where this was measured.
const MAX_TRIES: u32 = 200;

/// What is good enough after so many tries, ns. The last value set is the one in force, so the
/// loop may only stop at a try that is good, and it grows less choosy as its time goes on.
fn tolerance(tries: u32) -> i64 {
    match tries {
        0..40 => 4,
        40..100 => 8,
        100..160 => 20,
        _ => 45,
    }
}

/// Sets kvmclock so that it lies on the line of `from`: clock(t) = from.clock + ns(t - t0).
/// After all vCPUs exist and all their TSC offsets are written.
pub fn align(vm: &VmFd, from: &ClockSection) -> Result<Alignment, kvm_ioctls::Error> {
    let began = Instant::now();
    let scale = Scale::of_khz(from.tsc_khz);
    let line = |tsc: u64| {
        let passed = scale.ns_between(from.host_tsc, tsc);
        from.clock.saturating_add_signed(passed)
    };
    let mut bias = 0i64;
    for tries in 1..=MAX_TRIES {
        let clock = line(host_tsc()).saturating_add_signed(-bias);
        vm.set_clock(&kvm_clock_data {
            clock,
            ..Default::default()
        })?;
        let now = vm.get_clock()?;
        if now.flags & KVM_CLOCK_HOST_TSC == 0 {
            // No masterclock: each vCPU's clock is KVM's own affair; one try is all there is.
            return Ok(Alignment {
                error_ns: None,
                tries,
                took: began.elapsed(),
                master: false,
            });
        }
        let error = now.clock.wrapping_sub(line(now.host_tsc)).cast_signed();
        if error.abs() <= tolerance(tries) || tries == MAX_TRIES {
            return Ok(Alignment {
                error_ns: Some(error),
                tries,
                took: began.elapsed(),
                master: is_master(now.flags),
            });
        }
        // The delay inside KVM_SET_CLOCK jitters around a mean; find the mean, then wait for luck.
        bias += if tries <= 8 { error / 2 } else { error / 10 };
    }
    Ok(Alignment::default())
}

/// A vCPU's `pvclock_vcpu_time_info` (Documentation/virt/kvm/x86/msr.rst), as the guest reads it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Page {
    /// Even when at rest; KVM raises it by two with each update.
    pub version: u32,
    tsc_timestamp: u64,
    system_time: u64,
    scale: Scale,
}

impl Page {
    /// Reads it from guest RAM; `None` while KVM writes it, or outside RAM.
    pub fn read(memory: &Memory, at: GuestAddress) -> Option<Self> {
        let bytes: [u8; 32] = memory.read_obj(at).ok()?;
        let word = |at: usize| {
            bytes[at..]
                .first_chunk()
                .copied()
                .map(u64::from_le_bytes)
                .unwrap_or_default()
        };
        let half = |at: usize| {
            bytes[at..]
                .first_chunk()
                .copied()
                .map(u32::from_le_bytes)
                .unwrap_or_default()
        };
        let page = Self {
            version: half(0),
            tsc_timestamp: word(8),
            system_time: word(16),
            scale: Scale {
                mul: half(24),
                shift: i8::from_le_bytes([bytes[28]]),
            },
        };
        let sane = page.version & 1 == 0 && page.scale.shift.unsigned_abs() < 64;
        (sane && memory.read_obj::<u32>(at).ok() == Some(page.version)).then_some(page)
    }

    /// The clock this page gives at a guest TSC, ns.
    pub fn at(&self, guest_tsc: u64) -> u64 {
        let passed = self.scale.ns_between(self.tsc_timestamp, guest_tsc);
        self.system_time.saturating_add_signed(passed)
    }

    /// How much later this page's clock is than `before`'s at one guest TSC, ns.
    pub fn error_to(&self, before: &Self, guest_tsc: u64) -> i64 {
        self.at(guest_tsc)
            .wrapping_sub(before.at(guest_tsc))
            .cast_signed()
    }
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

    fn page_in(memory: &Memory, version: u32, system_time: u64) {
        let mut bytes = [0u8; 32];
        bytes[..4].copy_from_slice(&version.to_le_bytes());
        bytes[8..16].copy_from_slice(&1_000u64.to_le_bytes());
        bytes[16..24].copy_from_slice(&system_time.to_le_bytes());
        let Scale { mul, shift } = Scale::of_khz(2_000_000);
        bytes[24..28].copy_from_slice(&mul.to_le_bytes());
        bytes[28] = shift.to_le_bytes()[0];
        memory.write_obj(bytes, GuestAddress(64)).expect("write");
    }

    #[test]
    fn pages_are_compared_at_one_tsc() {
        let memory = Memory::from_ranges(&[(GuestAddress(0), 4096)]).expect("memory");
        page_in(&memory, 2, 500);
        let before = Page::read(&memory, GuestAddress(64)).expect("page");
        assert!(before.at(3_000).abs_diff(1_500) <= 1);
        page_in(&memory, 4, 507);
        let after = Page::read(&memory, GuestAddress(64)).expect("page");
        assert_eq!(after.error_to(&before, 9_000), 7);
        page_in(&memory, 5, 507);
        assert_eq!(Page::read(&memory, GuestAddress(64)), None, "being written");
        assert_eq!(Page::read(&memory, GuestAddress(4090)), None, "outside RAM");
    }
}
