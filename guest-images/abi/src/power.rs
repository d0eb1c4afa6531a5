//! The power register: how a guest without ACPI says that it is done.
//!
//! One 32-bit I/O port. The VMM powers the machine off, or resets it, when the matching value is
//! written as one 32-bit access; it ignores every other value and access size. Reads return 0.

/// I/O port of the register; four ports wide.
pub const PORT: u16 = 0x600;
/// Width of the port window.
pub const PORTS: u16 = 4;
/// W, u32: power off.
pub const POWER_OFF: u32 = 0x5;
/// W, u32: reset.
pub const RESET: u32 = 0x6;
