//! What lies at the reset vector: the one piece of firmware that a running kernel calls.
//!
//! Linux on a hardware-reduced machine does not use the ACPI reset register by itself. It means to
//! reboot by EFI, and where there is none it goes to real mode and jumps to F000:FFF0
//! (arch/x86/kernel/reboot.c, `reboot_init` and `BOOT_EFI`; arch/x86/realmode/rm/reboot.S). So a
//! few instructions wait there, which write the reset register.

use stillpoint_guest_abi::power;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use crate::memory::Memory;

/// F000:FFF0.
pub(super) const VECTOR: GuestAddress = GuestAddress(0xf_fff0);

const REGISTER: [u8; 2] = (power::PORT + power::RESET_REGISTER).to_le_bytes();

/// 16-bit code.
#[rustfmt::skip]
const CODE: [u8; 10] = [
    0xba, REGISTER[0], REGISTER[1], // mov dx, the register
    0xb0, power::ACPI_RESET,        // mov al, the value
    0xee,                           // out dx, al
    0xfa,                           // cli
    0xf4,                           // hlt
    0xeb, 0xfc,                     // jmp to the cli
];

const _: () = assert!(CODE.len() <= 16, "up to 1 MiB, where kernels are loaded to");

/// Writes it.
pub(super) fn write(memory: &Memory) -> Result<(), GuestMemoryError> {
    memory.write_slice(&CODE, VECTOR)
}
