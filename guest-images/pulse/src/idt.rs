//! The interrupt descriptor table; `boot.s` loads it before it is filled.

use core::cell::UnsafeCell;

use stillpoint_guest_abi::virtio::SLOTS;

/// Vector of the local APIC's timer.
pub(crate) const TIMER: u8 = 0x40;
/// Vector of the IPI that ends a halt.
pub(crate) const WAKE: u8 = 0x41;
/// Vector of the first virtio device; the others follow.
pub(crate) const DEVICES: u8 = 0x50;
const DEVICES_END: u8 = DEVICES + SLOTS as u8;
/// Vector of spurious interrupts.
pub(crate) const SPURIOUS: u8 = 0xff;
const INVALID_OPCODE: u8 = 6;

const INTERRUPT_GATE: u64 = 0x8e00;
const KERNEL_CODE: u64 = 0x08;
/// Bytes from one entry of `exception_entries` to the next.
const EXCEPTION_STRIDE: u64 = 16;
/// The same for `device_entries`.
const DEVICE_STRIDE: u64 = 64;

#[repr(C, align(4096))]
struct Table(UnsafeCell<[[u64; 2]; 256]>);

// SAFETY: written once, by the BSP, before any other vCPU runs.
unsafe impl Sync for Table {}

#[unsafe(no_mangle)]
static IDT: Table = Table(UnsafeCell::new([[0; 2]; 256]));

unsafe extern "C" {
    fn exception_entries();
    fn timer_entry();
    fn device_entries();
    fn wake_entry();
    fn stray_entry();
    fn spurious_entry();
    fn gate_entry();
}

/// Fills every entry. Called once, with interrupts masked.
pub(crate) fn fill() {
    let exceptions = exception_entries as *const () as u64;
    let devices = device_entries as *const () as u64;
    for vector in 0..=255u8 {
        let entry = match vector {
            INVALID_OPCODE => gate_entry as *const () as u64,
            0..32 => exceptions + u64::from(vector) * EXCEPTION_STRIDE,
            TIMER => timer_entry as *const () as u64,
            WAKE => wake_entry as *const () as u64,
            DEVICES..DEVICES_END => devices + u64::from(vector - DEVICES) * DEVICE_STRIDE,
            SPURIOUS => spurious_entry as *const () as u64,
            _ => stray_entry as *const () as u64,
        };
        let low =
            (entry & 0xffff) | (KERNEL_CODE << 16) | (INTERRUPT_GATE << 32) | (entry >> 16 << 48);
        // SAFETY: only the BSP is running, and it holds no reference into the table.
        unsafe { (*IDT.0.get())[usize::from(vector)] = [low, entry >> 32] };
    }
}
