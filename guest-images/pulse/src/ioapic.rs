//! The I/O APIC, by MMIO from ring 3: which vCPU gets the interrupt of which line.

use core::sync::atomic::{AtomicBool, Ordering::Acquire, Ordering::Release};

const SELECT: *mut u32 = 0xfec0_0000 as *mut u32;
const WINDOW: *mut u32 = 0xfec0_0010 as *mut u32;
/// First of the two registers of line 0.
const REDIRECTION: u32 = 0x10;
const MASKED: u32 = 1 << 16;

/// The registers are reached in two steps, which belong together.
static BUSY: AtomicBool = AtomicBool::new(false);

/// Sends a line's interrupts, edge-triggered and active high, to one vCPU.
pub(crate) fn route(line: u32, vector: u8, apic_id: u32) {
    // Masked until it is whole.
    let (low, high) = (REDIRECTION + 2 * line, REDIRECTION + 2 * line + 1);
    write(&[
        (low, MASKED),
        (high, apic_id << 24),
        (low, u32::from(vector)),
    ]);
}

/// Lets a line's interrupts get lost.
pub(crate) fn mask(line: u32) {
    write(&[(REDIRECTION + 2 * line, MASKED)]);
}

fn write(values: &[(u32, u32)]) {
    while BUSY.swap(true, Acquire) {
        core::hint::spin_loop();
    }
    for (register, value) in values {
        // SAFETY: the page is mapped uncached for ring 3, and is the I/O APIC's.
        unsafe {
            SELECT.write_volatile(*register);
            WINDOW.write_volatile(*value);
        }
    }
    BUSY.store(false, Release);
}
