//! Power: how a guest ends or begins anew, and how it is asked to.
//!
//! Eight I/O ports. A guest without ACPI writes [`POWER_OFF`] or [`RESET`] to the first as one
//! 32-bit access. The others are what the ACPI tables of the machine name, a byte wide each: the
//! sleep registers and the reset register of hardware-reduced ACPI (ACPI 6.5, 4.8.3.7 and 4.8.3.6),
//! and the event register behind the generic event device (5.6.9). Every other value and access
//! size is ignored; reads of what can't be read give 0.

/// First port.
pub const PORT: u16 = 0x600;
/// Width of the port window.
pub const PORTS: u16 = 8;

/// Offset, W, u32: power off or reset.
pub const CONTROL: u16 = 0;
/// Value for [`CONTROL`]: power off.
pub const POWER_OFF: u32 = 0x5;
/// Value for [`CONTROL`]: reset.
pub const RESET: u32 = 0x6;

/// Offset, W, u8: sleep control. [`SLEEP_ENABLE`] with [`SLEEP_TYPE_OFF`] powers off.
pub const SLEEP_CONTROL: u16 = 4;
/// Offset, u8: sleep status. The machine knows no sleep to wake from: always 0.
pub const SLEEP_STATUS: u16 = 5;
/// Offset, W, u8: [`ACPI_RESET`] resets.
pub const RESET_REGISTER: u16 = 6;
/// Offset, R, u8: what has happened since the last read, which clears it.
pub const EVENTS: u16 = 7;

/// Bit of [`SLEEP_CONTROL`]: enter the state whose type is written with it.
pub const SLEEP_ENABLE: u8 = 1 << 5;
/// Where the three bits of the sleep type begin.
pub const SLEEP_TYPE_SHIFT: u8 = 2;
/// Type of S5, soft off; what `\_S5` says.
pub const SLEEP_TYPE_OFF: u8 = 5;
/// Value for [`RESET_REGISTER`].
pub const ACPI_RESET: u8 = 1;
/// Bit of [`EVENTS`]: the power button was pressed.
pub const BUTTON_PRESSED: u8 = 1 << 0;
/// Bit of [`EVENTS`]: the page of the vmclock device has changed.
pub const CLOCK_CHANGED: u8 = 1 << 1;
