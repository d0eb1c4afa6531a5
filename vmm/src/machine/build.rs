//! Making a machine: the same steps for a cold boot and for adoption.
//!
//! ```text
//! Blank::new   VM, controllers, vCPUs, CPUID, interrupt lines, threads, memory slots   (brownout)
//!    │
//!    ├── boot()  kernel into fresh RAM, vCPU 0 at its entry, fresh devices
//!    └── load()  everything from saved state                                           (blackout)
//! ```
//!
//! Until its guest is ours a blank machine writes no byte of guest RAM.

mod error;
mod load;

use std::sync::Arc;
use std::sync::mpsc::Sender;
use std::time::Duration;

use kvm_bindings::{KVM_CAP_PRE_FAULT_MEMORY, kvm_cpuid_entry2};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use stillpoint_control::clock::Policy;
use stillpoint_control::spec::MachineSpec;
use stillpoint_guest_abi::{power as power_abi, probe as probe_abi};

use super::Machine;
use super::vcpus::{self, Promise};
use crate::boot::acpi::Platform;
use crate::boot::{self, BootError, Images, cpuid};
use crate::bus::{Bus, Space};
use crate::console::buffer::Buffer;
use crate::devices::Device;
use crate::devices::power::{BUTTON_GSI, Power};
use crate::devices::probe::Probe;
use crate::devices::serial::{COM1, COM1_GSI, SerialPort};
use crate::devices::virtio::backend::{Backend, Plug};
use crate::devices::virtio::mmio::VirtioMmio;
use crate::devices::virtio::slot::{Place, Slot};
use crate::devices::vmclock::VmClock;
use crate::event::Event;
use crate::irq::{IrqError, Line};
use crate::memory::{self, GuestRam};
use crate::vcpu::{Surroundings, VcpuSet};
use crate::{irq, raw};

pub use error::BuildError;
pub(super) use error::kvm;
pub use load::Loaded;

/// Where Intel hosts keep an identity map and a TSS of their own: below 4 GiB, in the hole.
const KVM_IDENTITY_MAP: u64 = memory::KVM_PRIVATE.start;
const KVM_TSS: usize = KVM_IDENTITY_MAP as usize + 0x1000;

/// For one step of [`Blank::pre_fault`].
const PRE_FAULT_PATIENCE: Duration = Duration::from_secs(10);

/// A machine without a guest.
#[derive(Debug)]
pub struct Blank {
    vcpus: VcpuSet,
    lines: Lines,
    /// Places of virtio devices, with threads of their own that wait for them.
    slots: Vec<(Slot, Backend)>,
    buffer: Buffer,
    events: Sender<Event>,
    vm: VmFd,
    ram: Arc<GuestRam>,
    spec: MachineSpec,
    cpuid: Vec<kvm_cpuid_entry2>,
    tsc_khz: u32,
    tsc_offset: Option<i64>,
}

/// Interrupt lines of devices; the devices themselves come with the guest.
#[derive(Debug)]
struct Lines {
    serial: Line,
    power: Line,
}

impl Blank {
    /// Makes one. `prepare` has the vCPU fds before their threads do.
    pub fn new(
        spec: &MachineSpec,
        ram: &Arc<GuestRam>,
        events: &Sender<Event>,
        plugs: Vec<Plug>,
        promise: Promise,
        prepare: impl FnOnce(&[VcpuFd]) -> Result<(), BuildError>,
    ) -> Result<Self, BuildError> {
        let kvm_fd = Kvm::new().map_err(|source| BuildError::NoKvm { source })?;
        let vm = kvm_fd
            .create_vm()
            .map_err(kvm("create a virtual machine"))?;
        vm.set_tss_address(KVM_TSS)
            .map_err(kvm("set the TSS address"))?;
        vm.set_identity_map_address(KVM_IDENTITY_MAP)
            .map_err(kvm("set the identity map"))?;
        irq::create(&vm)?;
        if !promise.cpuid.as_deref().is_some_and(cpuid::has_counters) {
            vcpus::withhold_counters(&vm);
        }
        let (vcpus, cpuid, tsc_khz) = vcpus::make(&kvm_fd, &vm, spec, promise)?;
        prepare(&vcpus)?;
        let tsc_offset = vcpus.first().and_then(|first| raw::tsc_offset(first).ok());
        let lines = Lines {
            serial: Line::new(&vm, COM1_GSI)?,
            power: Line::new(&vm, BUTTON_GSI)?,
        };
        let slots = plugs.into_iter().map(|plug| {
            let slot = Slot::new(&vm, plug.name, plug.place, plug.kicks, ram.map())?;
            Ok::<_, IrqError>((slot, plug.backend))
        });
        let slots = slots.collect::<Result<_, _>>()?;
        let around = Surroundings {
            memory: ram.map().clone(),
            events: events.clone(),
        };
        // Before the threads prime their vCPUs: a KVM with shadow paging has no root to load
        // without a memory slot. Priming runs no guest instruction, so it writes nothing there.
        ram.register(&vm)?;
        let vcpus = VcpuSet::start(vcpus, &around)?;
        Ok(Self {
            vcpus,
            lines,
            slots,
            buffer: Buffer::new()?,
            events: events.clone(),
            vm,
            ram: Arc::clone(ram),
            spec: spec.clone(),
            cpuid,
            tsc_khz,
            tsc_offset,
        })
    }

    /// Fills KVM's own page tables for every page that the guest's RAM holds already, where this kernel can: what the guest
    /// touches after the swap costs it no exit then. `go_on` is asked between steps. Gives the bytes filled.
    pub fn pre_fault(&self, mut go_on: impl FnMut() -> bool) -> u64 {
        if self.vm.check_extension_raw(KVM_CAP_PRE_FAULT_MEMORY.into()) <= 0 {
            return 0;
        }
        let mut done = 0;
        self.ram.each_held(|range| {
            // A KVM that has the call may still have no second level to fill; then the guest does, by faults.
            let goes = go_on() && self.vcpus.pre_fault(&range, PRE_FAULT_PATIENCE).is_ok();
            if goes {
                done += range.end - range.start;
            }
            goes
        });
        done
    }

    /// Puts the guest's devices in their places.
    fn with_devices(
        self,
        make: impl FnOnce(Wiring<'_>) -> Result<Parts, BuildError>,
    ) -> Result<Machine, BuildError> {
        let Parts {
            serial,
            power,
            probe,
            virtio,
            vmclock,
        } = make(Wiring {
            lines: self.lines,
            buffer: &self.buffer,
            events: self.events,
            slots: self.slots,
        })?;
        let mut bus = Bus::default();
        bus.attach(Space::Pio, COM1, 8, Arc::clone(&serial) as Arc<dyn Device>);
        let ports = u64::from(power_abi::PORTS);
        bus.attach(
            Space::Pio,
            power_abi::PORT.into(),
            ports,
            Arc::clone(&power) as Arc<dyn Device>,
        );
        let registers = Arc::clone(&probe) as Arc<dyn Device>;
        bus.attach(
            Space::Mmio,
            probe_abi::MMIO_BASE,
            probe_abi::MMIO_SIZE,
            registers,
        );
        let mut devices = vec![
            Arc::clone(&serial) as _,
            Arc::clone(&power) as _,
            Arc::clone(&probe) as _,
        ];
        devices.extend(vmclock.iter().map(|clock| Arc::clone(clock) as _));
        for device in &virtio {
            let registers = Arc::clone(device) as Arc<dyn Device>;
            let base = device.place().base.into();
            bus.attach(Space::Mmio, base, Place::LEN.into(), registers);
            devices.push(Arc::clone(device) as _);
        }
        Ok(Machine {
            vcpus: self.vcpus,
            console: None,
            buffer: self.buffer,
            devices,
            virtio,
            serial,
            power,
            probe,
            vmclock,
            bus: Arc::new(bus),
            vm: self.vm,
            ram: self.ram,
            spec: self.spec,
            cpuid: self.cpuid,
            tsc_khz: self.tsc_khz,
            tsc_offset: self.tsc_offset,
            entry: std::sync::OnceLock::new(),
        })
    }
}

/// What devices are connected to.
struct Wiring<'b> {
    lines: Lines,
    buffer: &'b Buffer,
    events: Sender<Event>,
    slots: Vec<(Slot, Backend)>,
}

struct Parts {
    serial: Arc<SerialPort>,
    power: Arc<Power>,
    probe: Arc<Probe>,
    virtio: Vec<Arc<VirtioMmio>>,
    vmclock: Option<Arc<VmClock>>,
}

impl Machine {
    /// Boots a guest in fresh RAM.
    pub fn boot(
        spec: &MachineSpec,
        ram: &Arc<GuestRam>,
        images: &mut Images,
        plugs: Vec<Plug>,
        events: &Sender<Event>,
    ) -> Result<Self, BuildError> {
        let platform = Platform {
            vcpus: spec.cpus,
            virtio: plugs.iter().map(|plug| plug.place).collect(),
            vmclock: spec.clock.vmclock,
        };
        let entry = boot::load(images, ram, &platform)?;
        let promise = Promise {
            hold: spec.clock.policy == Policy::Hold,
            ..Promise::default()
        };
        let blank = Blank::new(spec, ram, events, plugs, promise, |vcpus| {
            for vcpu in vcpus {
                boot::leave_msrs(vcpu);
            }
            Ok(entry.apply(&vcpus[0])?)
        })?;
        irq::mask_pics(&blank.vm)?;
        blank.with_devices(|wiring| {
            let Lines { serial, power } = wiring.lines;
            let virtio = wiring.slots.into_iter();
            let virtio = virtio.map(|(slot, backend)| VirtioMmio::new(slot, backend.fresh()));
            let vmclock = spec.clock.vmclock.then(|| VmClock::new(ram.map()));
            let vmclock = vmclock.transpose().map_err(BootError::from)?;
            Ok(Parts {
                vmclock: vmclock.map(Arc::new),
                virtio: virtio.map(Arc::new).collect(),
                serial: Arc::new(SerialPort::new(serial, wiring.buffer.output())),
                power: Arc::new(Power::new(power, wiring.events)),
                probe: Arc::new(Probe::default()),
            })
        })
    }
}
