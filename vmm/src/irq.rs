//! Interrupts: the in-kernel controllers, and lines into them.
//!
//! A device raises its interrupt through an irqfd of its own. An irqfd's eventfd is never shared
//! between two virtual machines (recent kernels refuse it, older ones split its events), so a
//! successor makes new ones, and after a swap every device raises again what its guest has not
//! acknowledged. That also covers an edge which KVM's irqfd work item had not yet delivered when
//! the I/O APIC was read: a spurious interrupt is allowed, a lost one is not.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_PIT_SPEAKER_DUMMY,
    kvm_irqchip, kvm_pit_config, kvm_pit_state2,
};
use kvm_ioctls::{IoEventAddress, VmFd};
use rustix::event::{EventfdFlags, eventfd};
use stillpoint_state::sections::Irqchip as IrqchipSection;
use stillpoint_state::{Section, StateError};
use vmm_sys_util::eventfd::EventFd;

use crate::raw;

/// An interrupt line number of the machine (I/O APIC pin).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gsi(pub u32);

/// Why an interrupt controller or line failed.
#[derive(Debug, thiserror::Error)]
pub enum IrqError {
    /// KVM refused.
    #[error("KVM refused to {what}: {source}")]
    Kvm {
        /// What was to be done.
        what: &'static str,
        /// Why not.
        source: kvm_ioctls::Error,
    },
    /// No eventfd to be had.
    #[error("cannot make an interrupt line: {0}")]
    EventFd(#[from] std::io::Error),
    /// The saved state is not of this kind.
    #[error(transparent)]
    State(#[from] StateError),
}

fn kvm(what: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> IrqError {
    move |source| IrqError::Kvm { what, source }
}

/// A line from one device into the controllers.
#[derive(Debug)]
pub struct Line(EventFd);

impl Line {
    /// A line on `gsi` of this machine.
    pub fn new(vm: &VmFd, gsi: Gsi) -> Result<Self, IrqError> {
        let event = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
        vm.register_irqfd(&event, gsi.0)
            .map_err(kvm("connect an interrupt line"))?;
        Ok(Self(event))
    }

    /// A line that leads nowhere, for tests of devices.
    #[cfg(any(test, feature = "fuzzing"))]
    pub fn loose() -> Self {
        Self(EventFd::new(libc::EFD_NONBLOCK).expect("eventfd"))
    }

    /// A line that leads into this eventfd, for tests of devices.
    #[cfg(test)]
    pub fn loose_into(event: OwnedFd) -> Self {
        Self(raw::event_fd(event))
    }

    /// How often the loose line was raised since the last call.
    #[cfg(test)]
    pub fn raised(&self) -> u64 {
        self.0.read().unwrap_or(0)
    }

    /// Raises the interrupt (an edge).
    pub fn raise(&self) -> std::io::Result<()> {
        self.0.write(1)
    }
}

/// A kick: the guest's write to a queue's notification register, as an eventfd (ioeventfd).
///
/// Unlike a line it is shared by predecessor and successor: both machines write to one counter,
/// and only the process whose device is at work listens.
#[derive(Debug)]
pub struct Kick(OwnedFd);

impl Kick {
    /// A new one.
    pub fn new() -> Result<Self, IrqError> {
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        let fd = eventfd(0, flags).map_err(std::io::Error::from)?;
        Ok(Self(fd))
    }

    /// One that a predecessor made.
    pub fn adopt(fd: OwnedFd) -> Self {
        Self(fd)
    }

    /// Has this machine write to it when its guest writes `queue` to `address` as 32 bits.
    pub fn connect(&self, vm: &VmFd, address: u64, queue: u32) -> Result<(), IrqError> {
        let event = raw::event_fd(self.0.try_clone()?);
        vm.register_ioevent(&event, &IoEventAddress::Mmio(address), queue)
            .map_err(kvm("connect a queue's notification"))
    }

    /// As the guest does it, from a vCPU's exit: where KVM could not do so by itself.
    pub fn ring(&self) {
        // Fails only if it was written 2^64 times and never read.
        let _ = rustix::io::write(&self.0, &1u64.to_ne_bytes());
    }
}

impl AsFd for Kick {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Creates PICs, I/O APIC, local APICs and PIT in the kernel; before any vCPU is made.
pub fn create(vm: &VmFd) -> Result<(), IrqError> {
    vm.create_irq_chip()
        .map_err(kvm("create the interrupt controllers"))?;
    // Speaker: port 0x61 is answered in the kernel, which Linux's PIT calibration wants.
    let pit = kvm_pit_config {
        flags: KVM_PIT_SPEAKER_DUMMY,
        ..Default::default()
    };
    vm.create_pit2(pit).map_err(kvm("create the PIT"))
}

/// Masks every line of the two PICs, as firmware leaves them. A kernel that goes by the I/O APIC
/// alone (hardware-reduced ACPI) never touches them; unmasked and not set up, they would put the
/// first interrupt of a device before vCPU 0 as one of the processor's exceptions.
pub fn mask_pics(vm: &VmFd) -> Result<(), IrqError> {
    /// `imr` of `struct kvm_pic_state` within `struct kvm_irqchip`.
    const MASK: usize = 8 + 2;
    for chip_id in [KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE] {
        let mut bytes = chip(vm, chip_id)?;
        bytes[MASK] = 0xff;
        vm.set_irqchip(&raw::from_bytes(IrqchipSection::NAME, &bytes)?)
            .map_err(kvm("mask the interrupt controllers"))?;
    }
    Ok(())
}

fn chip(vm: &VmFd, chip_id: u32) -> Result<Vec<u8>, IrqError> {
    let mut state = kvm_irqchip {
        chip_id,
        ..Default::default()
    };
    vm.get_irqchip(&mut state)
        .map_err(kvm("save an interrupt controller"))?;
    Ok(raw::bytes_of(&state).to_vec())
}

/// Saves what all vCPUs share. Every vCPU is parked and every device quiet.
pub fn save(vm: &VmFd) -> Result<IrqchipSection, IrqError> {
    Ok(IrqchipSection {
        pic_master: chip(vm, KVM_IRQCHIP_PIC_MASTER)?,
        pic_slave: chip(vm, KVM_IRQCHIP_PIC_SLAVE)?,
        ioapic: chip(vm, KVM_IRQCHIP_IOAPIC)?,
        pit: raw::bytes_of(&vm.get_pit2().map_err(kvm("save the PIT"))?).to_vec(),
    })
}

/// Loads it into a machine that has never run. After the freeze: a loaded PIT ticks on, and
/// raises IRQ 0 in a machine that never ran.
pub fn load(vm: &VmFd, section: &IrqchipSection) -> Result<(), IrqError> {
    for bytes in [&section.pic_master, &section.pic_slave, &section.ioapic] {
        let state: kvm_irqchip = raw::from_bytes(IrqchipSection::NAME, bytes)?;
        vm.set_irqchip(&state)
            .map_err(kvm("load an interrupt controller"))?;
    }
    let pit: kvm_pit_state2 = raw::from_bytes(IrqchipSection::NAME, &section.pit)?;
    vm.set_pit2(&pit).map_err(kvm("load the PIT"))
}
