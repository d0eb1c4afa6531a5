//! Address to device. Two address spaces: port I/O and memory-mapped I/O.
//!
//! Built once, before any vCPU runs, and never changed: every vCPU thread shares it without a
//! lock. An address that no device claims reads as all ones and swallows writes, as on a PC.

use std::sync::Arc;

use crate::devices::Device;

/// An address space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Space {
    /// x86 ports.
    Pio,
    /// Guest-physical memory.
    Mmio,
}

#[derive(Debug)]
struct Window {
    space: Space,
    base: u64,
    len: u64,
    device: Arc<dyn Device>,
}

/// All windows of a machine.
#[derive(Debug, Default)]
pub struct Bus {
    windows: Vec<Window>,
}

impl Bus {
    /// Puts a device at `base`; windows must not overlap, which is a mistake in our own layout.
    pub fn attach(&mut self, space: Space, base: u64, len: u64, device: Arc<dyn Device>) {
        debug_assert!(
            self.windows
                .iter()
                .all(|w| w.space != space || base + len <= w.base || w.base + w.len <= base),
            "window of {} overlaps another",
            device.name()
        );
        self.windows.push(Window {
            space,
            base,
            len,
            device,
        });
    }

    fn find(&self, space: Space, address: u64, len: usize) -> Option<(&dyn Device, u64)> {
        let end = address.checked_add(len as u64)?;
        self.windows
            .iter()
            .find(|w| w.space == space && w.base <= address && end <= w.base + w.len)
            .map(|w| (&*w.device, address - w.base))
    }

    /// A read of `data.len()` bytes by the guest.
    pub fn read(&self, space: Space, address: u64, data: &mut [u8]) {
        data.fill(0xff);
        if let Some((device, offset)) = self.find(space, address, data.len()) {
            device.read(offset, data);
        }
    }

    /// A write by the guest.
    pub fn write(&self, space: Space, address: u64, data: &[u8]) {
        if let Some((device, offset)) = self.find(space, address, data.len()) {
            device.write(offset, data);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::probe::Probe;

    #[test]
    fn unclaimed_addresses_read_as_ones() {
        let mut bus = Bus::default();
        bus.attach(Space::Mmio, 0x1000, 0x1000, Arc::new(Probe::default()));
        let mut data = [0; 4];
        bus.read(Space::Pio, 0x1000, &mut data);
        assert_eq!(data, [0xff; 4], "the other space");
        bus.read(Space::Mmio, 0x1ffe, &mut data);
        assert_eq!(data, [0xff; 4], "across the end of a window");
        bus.read(Space::Mmio, u64::MAX - 1, &mut data);
        assert_eq!(data, [0xff; 4], "at the end of everything");
        bus.read(Space::Mmio, 0x1000, &mut data);
        assert_eq!(&data, b"SPRB");
    }
}
