//! What ring 3 asks of the ring-0 code in `traps.s`, by an invalid instruction.

use core::arch::asm;

/// In RAX, it tells a call from a bug.
const GATE: u32 = 0x5055_4c00;
const HALT: u32 = 0;
const WRMSR: u32 = 1;
const CPUID: u32 = 2;
const INTERRUPTS: u32 = 3;

fn call(what: u32, a: u64, b: u64, c: u64) -> u64 {
    let result: u64;
    // SAFETY: the gate keeps every register but those named here, and runs on its own stack.
    unsafe {
        asm!("ud2", inlateout("rax") u64::from(GATE + what) => result, in("rdi") a, in("rsi") b,
            inlateout("rdx") c => _, lateout("rcx") _, lateout("r8") _);
    }
    result
}

/// Halts with interrupts on until one comes; not at all if `*word` is no longer `seen`.
pub(crate) fn halt_if(word: *const u64, seen: u64) {
    call(HALT, word as u64, seen, 0);
}

/// Writes an MSR.
pub(crate) fn wrmsr(msr: u32, value: u64) {
    call(WRMSR, msr.into(), value, 0);
}

/// CPUID as ring 0 sees it: in ring 3 a software KVM may let the host's through.
pub(crate) fn cpuid(leaf: u32, subleaf: u32) -> [u32; 4] {
    let mut out = [0u32; 4];
    call(CPUID, leaf.into(), subleaf.into(), (&raw mut out) as u64);
    out
}

/// Turns interrupts on or off in ring 3.
pub(crate) fn set_interrupts(on: bool) {
    call(INTERRUPTS, on.into(), 0, 0);
}
