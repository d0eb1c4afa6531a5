//! The time stamp counter and its frequency.

use core::arch::x86_64::{_mm_lfence, _rdtsc};
use core::sync::atomic::{AtomicU64, Ordering::Relaxed};

use crate::{apic, clock, gate};

static KHZ: AtomicU64 = AtomicU64::new(0);

/// Reads the TSC, in program order with the loads around it.
pub(crate) fn read() -> u64 {
    // SAFETY: both instructions are in every x86-64 processor.
    unsafe {
        _mm_lfence();
        let now = _rdtsc();
        _mm_lfence();
        now
    }
}

/// Moves this vCPU's TSC, as firmware or another operating system may have done to one of them.
pub(crate) fn move_by(cycles: u64) {
    const IA32_TSC_ADJUST: u32 = 0x3b;
    if cycles != 0 {
        gate::wrmsr(IA32_TSC_ADJUST, cycles);
    }
}

/// Cycles in `us` microseconds.
pub(crate) fn cycles(us: u64) -> u64 {
    us * KHZ.load(Relaxed) / 1000
}

/// Microseconds in `cycles`.
pub(crate) fn micros(cycles: u64) -> u64 {
    cycles * 1000 / KHZ.load(Relaxed).max(1)
}

/// The frequency in kHz.
pub(crate) fn khz() -> u64 {
    KHZ.load(Relaxed)
}

/// Finds the frequency: the hypervisor's timing leaf, the processor's own leaves, the scale KVM
/// gives for its clock, or at last the local APIC timer (which in KVM counts nanoseconds).
pub(crate) fn calibrate() {
    let khz = from_hypervisor()
        .or_else(from_processor)
        .or_else(clock::tsc_khz)
        .unwrap_or_else(apic::measure_tsc_khz);
    KHZ.store(khz.max(1), Relaxed);
}

fn from_hypervisor() -> Option<u64> {
    let base = clock::hypervisor_leaf()?;
    let top = gate::cpuid(base, 0)[0];
    let khz = (top >= base + 0x10).then(|| gate::cpuid(base + 0x10, 0)[0])?;
    (khz != 0).then_some(khz.into())
}

fn from_processor() -> Option<u64> {
    let top = gate::cpuid(0, 0)[0];
    if top >= 0x15 {
        let [denominator, numerator, crystal, _] = gate::cpuid(0x15, 0).map(u64::from);
        if denominator != 0 && numerator != 0 && crystal != 0 {
            return Some(crystal * numerator / denominator / 1000);
        }
    }
    let mhz = if top >= 0x16 {
        gate::cpuid(0x16, 0)[0] & 0xffff
    } else {
        0
    };
    (mhz != 0).then_some(u64::from(mhz) * 1000)
}
