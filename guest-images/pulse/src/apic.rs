//! The local APIC in xAPIC mode, by MMIO from ring 3.

use core::ptr::copy_nonoverlapping;

use crate::{gate, idt, tsc};

const BASE: u64 = 0xfee0_0000;
const SPURIOUS: u64 = 0xf0;
const ICR_LOW: u64 = 0x300;
const ICR_HIGH: u64 = 0x310;
const LVT_TIMER: u64 = 0x320;
const LVT_LINT0: u64 = 0x350;
const LVT_LINT1: u64 = 0x360;
const LVT_ERROR: u64 = 0x370;
const INITIAL_COUNT: u64 = 0x380;
const CURRENT_COUNT: u64 = 0x390;
const DIVIDE: u64 = 0x3e0;
const ID: u64 = 0x20;

const ENABLE: u32 = 0x100;
const MASKED: u32 = 1 << 16;
const PERIODIC: u32 = 1 << 17;
const TSC_DEADLINE: u32 = 1 << 18;
const DIVIDE_BY_1: u32 = 0xb;
const ICR_INIT: u32 = 0x4500;
const ICR_STARTUP: u32 = 0x4600;
const ICR_FIXED: u32 = 0x4000;
const ICR_PENDING: u32 = 1 << 12;

const MSR_TSC_DEADLINE: u32 = 0x6e0;
const CPUID1_ECX_DEADLINE: u32 = 1 << 24;
/// KVM's APIC bus cycle is 1 ns.
const KVM_BUS_KHZ: u64 = 1_000_000;
/// Where an AP starts: page 8.
const TRAMPOLINE: u64 = 0x8000;

unsafe extern "C" {
    static trampoline: u8;
    static trampoline_end: u8;
}

fn read(register: u64) -> u32 {
    // SAFETY: the page is mapped uncached for ring 3, and is the local APIC's.
    unsafe { ((BASE + register) as *const u32).read_volatile() }
}

fn write(register: u64, value: u32) {
    // SAFETY: as for `read`.
    unsafe { ((BASE + register) as *mut u32).write_volatile(value) }
}

/// vCPUs by CPUID leaf 1.
pub(crate) fn count() -> usize {
    (gate::cpuid(1, 0)[1] >> 16 & 0xff) as usize
}

/// Whether the timer has a TSC-deadline mode.
pub(crate) fn has_deadline() -> bool {
    gate::cpuid(1, 0)[2] & CPUID1_ECX_DEADLINE != 0
}

/// Our id.
pub(crate) fn id() -> u32 {
    read(ID) >> 24
}

/// Enables our local APIC, its own interrupts masked; legacy interrupts have no way in.
pub(crate) fn init() {
    write(SPURIOUS, ENABLE | u32::from(idt::SPURIOUS));
    for lvt in [LVT_TIMER, LVT_LINT0, LVT_LINT1, LVT_ERROR] {
        write(lvt, MASKED);
    }
    write(DIVIDE, DIVIDE_BY_1);
}

/// Cycles of the timer's bus in `us`.
pub(crate) fn bus_cycles(us: u64) -> u32 {
    (us * KVM_BUS_KHZ / 1000) as u32
}

/// Puts the timer into one-shot mode and starts it.
pub(crate) fn arm_oneshot(us: u64) {
    write(LVT_TIMER, u32::from(idt::TIMER));
    write(INITIAL_COUNT, bus_cycles(us));
}

/// Puts the timer into periodic mode and starts it.
pub(crate) fn arm_periodic(us: u64) {
    write(LVT_TIMER, u32::from(idt::TIMER) | PERIODIC);
    write(INITIAL_COUNT, bus_cycles(us));
}

/// Nanoseconds to the timer's next tick.
pub(crate) fn left_ns() -> u64 {
    u64::from(read(CURRENT_COUNT)) * 1_000_000 / KVM_BUS_KHZ
}

/// Puts the timer into TSC-deadline mode and arms it.
pub(crate) fn arm_deadline(at: u64) {
    write(LVT_TIMER, u32::from(idt::TIMER) | TSC_DEADLINE);
    gate::wrmsr(MSR_TSC_DEADLINE, at);
}

/// Sends INIT and, after it, a start-up IPI. KVM needs no pauses between them.
pub(crate) fn start(apic_id: usize) {
    // SAFETY: page 8 is RAM that nothing else uses by now; the symbols bound the code.
    unsafe {
        let from = &raw const trampoline;
        let len = (&raw const trampoline_end) as usize - from as usize;
        copy_nonoverlapping(from, TRAMPOLINE as *mut u8, len);
    }
    send(apic_id, ICR_INIT);
    send(apic_id, ICR_STARTUP | (TRAMPOLINE >> 12) as u32);
}

/// Ends a vCPU's halt.
pub(crate) fn wake(apic_id: usize) {
    send(apic_id, ICR_FIXED | u32::from(idt::WAKE));
}

fn send(apic_id: usize, command: u32) {
    write(ICR_HIGH, (apic_id as u32) << 24);
    write(ICR_LOW, command);
    while read(ICR_LOW) & ICR_PENDING != 0 {
        core::hint::spin_loop();
    }
}

/// The TSC's frequency by the timer, for machines that tell it in no other way.
pub(crate) fn measure_tsc_khz() -> u64 {
    const MS: u32 = KVM_BUS_KHZ as u32;
    write(INITIAL_COUNT, u32::MAX);
    let (start_count, start) = (read(CURRENT_COUNT), tsc::read());
    loop {
        let (count, now) = (read(CURRENT_COUNT), tsc::read());
        let passed = start_count.wrapping_sub(count);
        if passed >= 10 * MS {
            write(INITIAL_COUNT, 0);
            return (now - start) * KVM_BUS_KHZ / u64::from(passed);
        }
    }
}
