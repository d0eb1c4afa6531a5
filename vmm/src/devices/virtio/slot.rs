//! A device's place in a machine: its window and line, its kicks, and its thread.
//!
//! A place is made while the guest still runs elsewhere; the device moves in when its state is
//! there. So threads, interrupt lines and kicks cost nothing of the blackout.

use kvm_ioctls::VmFd;

use super::queue::Interrupt;
use super::worker::Worker;
use crate::irq::{Gsi, IrqError, Kick, Line};
use crate::memory::Memory;

/// First window; each device has a page.
const BASE: u32 = 0xd000_1000;
/// From one window to the next.
const STRIDE: u32 = 0x1000;
/// First line. 4 is COM1's and 5 the power button's.
const FIRST_GSI: u32 = 6;
/// Offset of `QueueNotify` (virtio 1.2, 4.2.2).
pub(super) const QUEUE_NOTIFY: u64 = 0x50;

/// Where a device lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// First guest-physical address of its registers, in the hole below 4 GiB.
    pub base: u32,
    /// Its interrupt line, edge-triggered.
    pub gsi: Gsi,
}

impl Place {
    /// Bytes of registers.
    pub const LEN: u32 = 0x200;

    /// Of the device with this number, in the order of the machine's spec: disks, network
    /// interfaces, vsock, entropy.
    pub fn nth(number: usize) -> Self {
        // At most `spec::MAX_DEVICES`: an I/O APIC has 24 pins.
        let number = number as u32;
        Self {
            base: BASE + number * STRIDE,
            gsi: Gsi(FIRST_GSI + number),
        }
    }
}

/// A place without a device.
#[derive(Debug)]
pub struct Slot {
    pub(super) name: String,
    pub(super) place: Place,
    pub(super) kicks: Vec<Kick>,
    pub(super) worker: Worker,
}

impl Slot {
    /// Makes it: `kicks` are heard by this machine too from now on.
    pub fn new(
        vm: &VmFd,
        name: String,
        place: Place,
        kicks: Vec<Kick>,
        memory: &Memory,
    ) -> Result<Self, IrqError> {
        let line = Line::new(vm, place.gsi)?;
        for (queue, kick) in (0u32..).zip(&kicks) {
            kick.connect(vm, u64::from(place.base) + QUEUE_NOTIFY, queue)?;
        }
        let worker = Worker::start(&name, &kicks, Interrupt::new(line), memory.clone())?;
        Ok(Self {
            name,
            place,
            kicks,
            worker,
        })
    }

    /// Name of the device that belongs here.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// A place in no machine, for tests of devices.
    #[cfg(test)]
    pub fn loose(name: &str, queues: usize, memory: &Memory) -> Self {
        let kicks = (0..queues).map(|_| Kick::new().expect("kick")).collect();
        Self::loose_with(name, kicks, Line::loose(), memory)
    }

    /// The same with these kicks and this line.
    #[cfg(test)]
    pub fn loose_with(name: &str, kicks: Vec<Kick>, line: Line, memory: &Memory) -> Self {
        let interrupt = Interrupt::new(line);
        let worker = Worker::start(name, &kicks, interrupt, memory.clone()).expect("thread");
        Self {
            name: name.to_owned(),
            place: Place::nth(0),
            kicks,
            worker,
        }
    }
}
