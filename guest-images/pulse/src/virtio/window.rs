//! The registers of a device, by MMIO from ring 3.

use stillpoint_guest_abi::virtio::{MMIO_BASE, MMIO_STRIDE};

/// One device's.
#[derive(Clone, Copy)]
pub(super) struct Window(u64);

macro_rules! access {
    ($read:ident, $write:ident, $int:ty) => {
        /// Reads a register, or a piece of one.
        pub(super) fn $read(self, offset: u64) -> $int {
            // SAFETY: the page is mapped uncached for ring 3; without a device it reads as ones.
            unsafe { ((self.0 + offset) as *const $int).read_volatile() }
        }

        /// Writes it.
        pub(super) fn $write(self, offset: u64, value: $int) {
            // SAFETY: as for reading. What a device does with it is its affair, within the memory
            // whose addresses it has got from us.
            unsafe { ((self.0 + offset) as *mut $int).write_volatile(value) }
        }
    };
}

impl Window {
    /// The registers of a slot.
    pub(super) fn of(slot: usize) -> Self {
        Self(MMIO_BASE + slot as u64 * MMIO_STRIDE)
    }

    access!(read8, write8, u8);
    access!(read16, write16, u16);
    access!(read32, write32, u32);
    access!(read64, write64, u64);

    /// Writes an address, which has two registers.
    pub(super) fn write_address(self, offset: u64, address: u64) {
        self.write32(offset, address as u32);
        self.write32(offset + 4, (address >> 32) as u32);
    }
}
