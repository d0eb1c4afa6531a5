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

use std::sync::Arc;
use std::sync::mpsc::Sender;
use std::time::Duration;

use kvm_bindings::kvm_cpuid_entry2;
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use stillpoint_control::clock::Policy;
use stillpoint_control::spec::MachineSpec;
use stillpoint_guest_abi::{power as power_abi, probe as probe_abi};
use stillpoint_state::sections::{Clock, Irqchip, Vcpu};
use stillpoint_state::{StateError, Unclaimed};

use super::Machine;
use super::vcpus::{self, Promise};
use crate::boot::acpi::Platform;
use crate::boot::{self, BootError, Images, cpuid};
use crate::bus::{Bus, Space};
use crate::clock::align::{self, Alignment};
use crate::console::buffer::Buffer;
use crate::devices::Device;
use crate::devices::power::{BUTTON_GSI, Power};
use crate::devices::probe::Probe;
use crate::devices::serial::{COM1, COM1_GSI, SerialPort};
use crate::devices::virtio::backend::{Backend, BackendError, Plug};
use crate::devices::virtio::mmio::VirtioMmio;
use crate::devices::virtio::slot::{Place, Slot};
use crate::devices::vmclock::VmClock;
use crate::event::Event;
use crate::faults::{self, Spoilt};
use crate::handover::lend::Borrowed;
use crate::irq::{IrqError, Line};
use crate::memory::{self, GuestRam, MemoryError};
use crate::vcpu::state::{LoadedVcpu, Pause};
use crate::vcpu::{Surroundings, VcpuSet, VcpusError, msrs};
use crate::{clock, irq, raw};

/// Where Intel hosts keep an identity map and a TSS of their own: below 4 GiB, in the hole.
const KVM_IDENTITY_MAP: u64 = memory::KVM_PRIVATE.start;
const KVM_TSS: usize = KVM_IDENTITY_MAP as usize + 0x1000;

/// Why a machine could not be made.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// /dev/kvm.
    #[error(
        "cannot open /dev/kvm: {source}; {} (`stillpoint doctor` shows what this host lacks)",
        kvm_remedy(source)
    )]
    NoKvm {
        /// Why not.
        source: kvm_ioctls::Error,
    },
    /// KVM refused.
    #[error("KVM refused to {what}: {source}")]
    Kvm {
        /// What was to be done.
        what: &'static str,
        /// Why not.
        source: kvm_ioctls::Error,
    },
    /// RAM.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The kernel to boot.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// Interrupts.
    #[error(transparent)]
    Irq(#[from] IrqError),
    /// vCPU threads.
    #[error(transparent)]
    Vcpus(#[from] VcpusError),
    /// Saved state that doesn't fit.
    #[error(transparent)]
    State(#[from] StateError),
    /// What a device is made of.
    #[error(transparent)]
    Backend(#[from] BackendError),
    /// The clock's policy can't be kept here.
    #[error(
        "clock policy hold: this host's KVM ignores TSC offsets (its guests read the host's TSC), \
         so a guest's clocks can't leave out a pause; use the policy advance, or a host whose \
         KVM is hardware"
    )]
    Hold,
    /// Nor can a clock that was saved without the TSC it goes with.
    #[error(
        "clock policy hold: KVM's masterclock went off before the freeze, so how long the pause was \
         is not known exactly; use the policy advance"
    )]
    HoldWithoutMasterclock,
    /// Something of the host's.
    #[error("cannot make the console: {0}")]
    Console(#[from] std::io::Error),
}

fn kvm_remedy(error: &kvm_ioctls::Error) -> &'static str {
    match error.errno() {
        libc::ENOENT => "load the kvm_intel or kvm_amd module, or enable nested virtualization",
        libc::EACCES | libc::EPERM => "give this user the right to it, as a rule by its group",
        libc::ENODEV | libc::ENXIO => "enable virtualization in the firmware",
        _ => "look at the kernel's log",
    }
}

pub(super) fn kvm(what: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> BuildError {
    move |source| BuildError::Kvm { what, source }
}

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

/// What loading showed.
#[derive(Clone, Debug, Default)]
pub struct Loaded {
    /// Each vCPU.
    pub vcpus: Vec<LoadedVcpu>,
    /// kvmclock.
    pub clock: Alignment,
    /// The clock as it was saved.
    pub saved_clock: Clock,
    /// The pause, as far as it goes into the guest's clocks.
    pub pause: Pause,
    /// TSC offset of vCPU 0 before it.
    pub tsc_offset_before: Option<i64>,
    /// `MSR_KVM_SYSTEM_TIME` of each vCPU: where its pvclock page is.
    pub system_time: Vec<u64>,
    /// `MSR_KVM_WALL_CLOCK`: where the wall clock structure is; 0 if there is none.
    pub wall_clock: u64,
    /// Console viewers whose sockets come beside the state.
    pub viewers: usize,
}

impl Loaded {
    /// Whether the guest's TSC did not run on as if nothing had been.
    pub fn has_disturbed_tsc(&self) -> bool {
        let exact = |vcpu: &LoadedVcpu| vcpu.tsc_offset_delta == Some(0);
        self.pause.held != 0 || !self.vcpus.iter().all(exact)
    }
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
        })
    }

    /// Loads saved state, with the files of devices that followed it: vCPUs in parallel on their own threads, everything else meanwhile, the
    /// clock last (after every TSC write).
    pub fn load(
        mut self,
        mut state: Unclaimed,
        late: &mut Borrowed,
        patience: Duration,
    ) -> Result<(Machine, Loaded), BuildError> {
        if faults::is_spoilt(Spoilt::Load) {
            let problem = "this build refuses all state, as it was told to".into();
            let section = "vcpu";
            return Err(StateError::Value { section, problem }.into());
        }
        self.vcpus.stand_by()?;
        let count = self.vcpus.count();
        let saved_clock: Clock = state.take("")?;
        let pause = pause_of(&saved_clock, &self.spec)?;
        let sections: Vec<Vcpu> = (0..count)
            .map(|id| state.take(&id.to_string()))
            .collect::<Result<_, _>>()?;
        let system_time = sections
            .iter()
            .map(|section| msr_of(section, msrs::SYSTEM_TIME))
            .collect::<Result<_, _>>()?;
        let wall_clock = sections.first().map(|s| msr_of(s, msrs::WALL_CLOCK));
        let wall_clock = wall_clock.transpose()?.unwrap_or(0);
        // The guest may have moved its TSC since the predecessor's machine was made.
        let tsc_offset_before = sections.first().and_then(|first| first.tsc_offset);
        let held = pause.held.cast_signed();
        self.tsc_offset = tsc_offset_before.map(|offset| offset.wrapping_sub(held));
        self.vcpus.load(sections, pause)?;
        irq::load(&self.vm, &state.take::<Irqchip>("")?)?;
        let viewers = self.buffer.load(&mut state)?;
        let vcpus = self.vcpus.loaded(patience)?;
        let clock =
            align::align(&self.vm, &saved_clock, pause.held).map_err(kvm("set the clock"))?;
        let (has_vmclock, ram) = (self.spec.clock.vmclock, Arc::clone(&self.ram));
        let machine = self.with_devices(|wiring| {
            let Lines { serial, power } = wiring.lines;
            let output = wiring.buffer.output();
            let vmclock = has_vmclock.then(|| VmClock::restore(ram.map(), &mut state));
            let virtio = wiring.slots.into_iter().map(|(slot, backend)| {
                let kind = backend.restore(slot.name(), &mut state, late)?;
                VirtioMmio::restore(slot, kind, &mut state).map(Arc::new)
            });
            Ok(Parts {
                vmclock: vmclock.transpose()?.map(Arc::new),
                virtio: virtio.collect::<Result<_, _>>()?,
                serial: Arc::new(SerialPort::restore(serial, output, &mut state)?),
                power: Arc::new(Power::restore(power, wiring.events, &mut state)?),
                probe: Arc::new(Probe::restore(&mut state)?),
            })
        })?;
        state.finish()?;
        if faults::is_spoilt(Spoilt::State) {
            let at = probe_abi::REG_SCRATCH;
            machine.probe.write(at, &u64::MAX.to_le_bytes());
        }
        Ok((
            machine,
            Loaded {
                vcpus,
                clock,
                saved_clock,
                pause,
                tsc_offset_before,
                system_time,
                wall_clock,
                viewers,
            },
        ))
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

/// The pause behind a saved clock, as far as it goes into the guest's clocks. For one that is held,
/// guest time goes on from now.
fn pause_of(clock: &Clock, spec: &MachineSpec) -> Result<Pause, BuildError> {
    if clock.hold && !clock::is_master(clock.flags) {
        return Err(BuildError::HoldWithoutMasterclock);
    }
    Ok(Pause {
        from_tsc: clock.host_tsc,
        held: match clock.hold {
            true => clock::host_tsc().saturating_sub(clock.host_tsc),
            false => 0,
        },
        steal: spec.clock.steal,
    })
}

fn msr_of(section: &Vcpu, msr: u32) -> Result<u64, StateError> {
    let found = section.msrs()?.into_iter().find(|(index, _)| *index == msr);
    Ok(found.map_or(0, |(_, value)| value))
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
