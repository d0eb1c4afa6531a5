//! A machine: vCPUs, RAM, interrupt controllers, devices.
//!
//! [`build`] makes one, for a cold boot and for adoption alike; [`frozen`] makes it stand still.

pub mod build;
pub mod frozen;
pub mod gauge;
mod signs;
pub mod vcpus;

use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use kvm_bindings::kvm_cpuid_entry2;
use kvm_ioctls::VmFd;
use stillpoint_control::clock::Policy;
use stillpoint_control::spec::MachineSpec;
use stillpoint_state::contents::Contents;
use stillpoint_state::sections::{self, Clock, Irqchip, VIRTIO_FORMAT, Vcpu};
use stillpoint_state::{Saved, StateError};

use crate::bus::Bus;
use crate::console::buffer::ConsoleStuck;
use crate::console::{self, Console, Viewer};
use crate::devices::power::Power;
use crate::devices::probe::Probe;
use crate::devices::serial::SerialPort;
use crate::devices::virtio::mmio::VirtioMmio;
use crate::devices::vmclock::VmClock;
use crate::devices::{Busy, Device};
use crate::handover::lend::{Borrowed, Lending};
use crate::irq::IrqError;
use crate::memory::GuestRam;
use crate::vcpu::hurry::Hurry;
use crate::vcpu::outside::Left;
use crate::vcpu::{Entered, VcpuSet, VcpusError};
use crate::{clock, irq, release};

/// How long the parts of a machine that ends may take to come to rest.
const STOP_PATIENCE: Duration = Duration::from_secs(10);

/// Between two looks at whether the guest took note of its power button.
const GLANCE: Duration = Duration::from_millis(5);

/// Why a machine did not come to rest or could not be saved.
#[derive(Debug, thiserror::Error)]
pub enum FreezeError {
    /// A vCPU.
    #[error(transparent)]
    Vcpus(#[from] VcpusError),
    /// A device.
    #[error(transparent)]
    Busy(#[from] Busy),
    /// A device's file that could not be lent.
    #[error("out of file descriptors for the guest's devices: {0}")]
    Lend(std::io::Error),
    /// The console.
    #[error(transparent)]
    Console(#[from] ConsoleStuck),
    /// The interrupt controllers.
    #[error(transparent)]
    Irq(#[from] IrqError),
    /// The clock.
    #[error("KVM refused to read the clock: {0}")]
    Clock(kvm_ioctls::Error),
    /// The codec.
    #[error(transparent)]
    State(#[from] StateError),
    /// The ownership word.
    #[error(transparent)]
    Ownership(#[from] stillpoint_control::ownership::OwnershipError),
    /// A fault that was injected.
    #[error("{0}")]
    Injected(&'static str),
}

/// A machine. Fields are dropped in order: the threads first, then what they use.
#[derive(Debug)]
pub struct Machine {
    vcpus: VcpuSet,
    console: Option<Console>,
    /// The console's output buffer; there before the console's thread is.
    buffer: console::buffer::Buffer,
    devices: Vec<Arc<dyn Device>>,
    /// Those of `devices` that have files on the host.
    virtio: Vec<Arc<VirtioMmio>>,
    serial: Arc<SerialPort>,
    power: Arc<Power>,
    probe: Arc<Probe>,
    vmclock: Option<Arc<VmClock>>,
    bus: Arc<Bus>,
    vm: VmFd,
    ram: Arc<GuestRam>,
    spec: MachineSpec,
    cpuid: Vec<kvm_cpuid_entry2>,
    tsc_khz: u32,
    tsc_offset: Option<i64>,
    /// What letting its vCPUs in took.
    entry: OnceLock<Duration>,
}

impl Machine {
    /// What it is.
    pub fn spec(&self) -> &MachineSpec {
        &self.spec
    }

    /// Its RAM.
    pub fn ram(&self) -> &Arc<GuestRam> {
        &self.ram
    }

    /// CPUID as its guest sees it (before each vCPU's own ids).
    pub fn cpuid(&self) -> &[kvm_cpuid_entry2] {
        &self.cpuid
    }

    /// Frequency of the guest's TSC.
    pub fn tsc_khz(&self) -> u32 {
        self.tsc_khz
    }

    /// TSC offset of vCPU 0 when it was made: a guest may have changed it since.
    pub fn tsc_offset(&self) -> Option<i64> {
        self.tsc_offset
    }

    /// Its kvmclock as it is now.
    pub fn clock(&self) -> Result<Clock, kvm_ioctls::Error> {
        clock::save(&self.vm, self.tsc_khz, Policy::Advance)
    }

    /// How many vCPUs it has.
    pub fn vcpu_count(&self) -> usize {
        self.vcpus.count()
    }

    /// The probe device, to see what the guest saw of a pause.
    pub fn probe(&self) -> &Probe {
        &self.probe
    }

    /// Presses the power button, and waits up to `patience` for the guest to take note of it; tells
    /// whether it did. What the guest makes of it is its own affair.
    pub fn press_power_button(&self, patience: Duration) -> bool {
        self.power.press_button();
        let deadline = Instant::now() + patience;
        while self.power.is_press_pending() {
            if Instant::now() >= deadline {
                return false;
            }
            std::thread::sleep(GLANCE);
        }
        true
    }

    /// The console's viewers.
    pub fn viewers(&self) -> Vec<Arc<Viewer>> {
        self.console
            .as_ref()
            .map(Console::viewers)
            .unwrap_or_default()
    }

    /// Offers every file of its devices that a successor needs and has not had yet.
    pub fn lend(&self, to: &mut Lending) -> std::io::Result<()> {
        self.virtio.iter().try_for_each(|device| device.lend(to))
    }

    /// Formats of saved state that carry all there is of this machine, preferred first.
    /// `policy` is the pause's.
    pub fn formats(&self, policy: Policy) -> Vec<u32> {
        // Releases of before format 3 would read over `hold`, and the guest's clocks would jump.
        let old = self.virtio.is_empty() && self.vmclock.is_none() && policy == Policy::Advance;
        let least = if old { 0 } else { VIRTIO_FORMAT };
        let formats = release::FORMATS.iter().copied();
        formats.filter(|&format| format >= least).collect()
    }

    /// What its saved state will hold, in each of these formats. Nothing has to stand still for it.
    pub fn contents(&self, formats: &[u32]) -> Vec<Contents> {
        let contents = |&format: &u32| {
            let mut to = Contents::new(format);
            to.announce(&Clock::KIND, "");
            to.announce_version(&Vcpu::KIND, "", Vcpu::version(format));
            to.announce(&Irqchip::KIND, "");
            for device in &self.devices {
                device.announce(&mut to);
            }
            to.announce(&sections::Console::KIND, "");
            #[cfg(feature = "later")]
            stillpoint_state::later::announce(&mut to);
            to
        };
        formats.iter().map(contents).collect()
    }

    /// Has the guest hear of a swap, in which its TSC was disturbed or not. It is ours, and stands
    /// still.
    pub fn tell_of_swap(&self, disturbed: bool) {
        // The page is in RAM, which every machine has.
        if let Some(Ok(())) = self.vmclock.as_ref().map(|c| c.note_swap(disturbed)) {
            self.power.tell_of_clock();
        }
    }

    /// Connects the console to the outside. A machine runs without; output waits in memory.
    pub fn open_console(
        &mut self,
        doors: console::Doors,
        viewers: Vec<OwnedFd>,
    ) -> std::io::Result<()> {
        let serial = Arc::clone(&self.serial);
        self.console = Some(Console::start(self.buffer.clone(), doors, viewers, serial)?);
        Ok(())
    }

    /// Runs a machine that was built and has not run: devices first, then the vCPUs. The guest must
    /// be ours.
    pub fn enter(&self, hurry: Hurry, patience: Duration) -> Result<Entered, VcpusError> {
        for device in &self.devices {
            device.resume();
        }
        self.buffer.thaw();
        let began = clock::host_tsc();
        let entered = self.vcpus.enter(&self.bus, hurry, patience)?;
        let cycles = entered.tsc.saturating_sub(began);
        // A machine is entered once in its life.
        let _ = self.entry.set(clock::duration(cycles, self.tsc_khz));
        Ok(entered)
    }

    /// What it took to let its vCPUs in, from the order to the last one's entry.
    pub fn entry_cost(&self) -> Duration {
        self.entry.get().copied().unwrap_or_default()
    }

    /// Ends it for good: vCPUs parked, devices and console at rest. Gives the viewers' sockets and
    /// the devices' files, for the machine that comes after it.
    pub fn stop(&mut self) -> std::io::Result<(Vec<OwnedFd>, Borrowed)> {
        // A vCPU that does not park can't be helped; its thread ends with the machine.
        let _ = self.vcpus.park(&Hurry::default(), STOP_PATIENCE);
        let deadline = Instant::now() + STOP_PATIENCE;
        for device in &self.devices {
            // I/O that hangs must not write into the RAM of the guest that comes next.
            let rest = device
                .drain(deadline)
                .and_then(|()| device.freeze(deadline));
            rest.map_err(std::io::Error::other)?;
        }
        let belongings = self.belongings()?;
        self.console = None;
        Ok(belongings)
    }

    /// Duplicates of the viewers' sockets and of the devices' files, for a machine that comes after it.
    pub fn belongings(&self) -> std::io::Result<(Vec<OwnedFd>, Borrowed)> {
        let mut lending = Lending::default();
        self.lend(&mut lending)?;
        let viewers = self.viewers();
        let viewers = viewers.iter().map(|v| v.as_fd().try_clone_to_owned());
        Ok((viewers.collect::<Result<_, _>>()?, lending.arrive()))
    }

    /// Brings to rest, while the guest runs, what may take long to come to rest.
    fn drain(&self, deadline: Instant) -> Result<(), FreezeError> {
        for device in &self.devices {
            device.drain(deadline)?;
        }
        Ok(())
    }

    /// Parks the vCPUs and quiesces the devices. On an error call [`Machine::run_on`].
    fn stand_still(
        &self,
        hurry: &Hurry,
        deadline: Instant,
        timing: &mut Timing,
    ) -> Result<(), FreezeError> {
        let patience = deadline.saturating_duration_since(Instant::now());
        self.vcpus.park(hurry, patience)?;
        timing.mark("park");
        // After the vCPUs: nothing new can reach a device now.
        for device in &self.devices {
            device.freeze(deadline)?;
        }
        self.buffer.freeze(deadline)?;
        timing.mark("quiesce");
        Ok(())
    }

    /// The guest is about to stand still: its threads go before all others of the host.
    fn hurry(&self) -> Hurry {
        self.vcpus.hurry()
    }

    /// The machine runs and nothing is urgent: its threads go where the scheduler wants them.
    pub fn release_cpus(&self) {
        self.vcpus.release_cpus();
    }

    /// As [`Machine::run_on`], after a pause in place that was meant: `stolen` of it counts as such
    /// to a guest that keeps an account. Tells how the vCPUs were let in.
    fn resume(
        &self,
        stolen: Duration,
        hurry: Hurry,
        patience: Duration,
    ) -> Result<Entered, VcpusError> {
        for device in &self.devices {
            device.resume();
        }
        self.buffer.thaw();
        self.vcpus.resume(stolen, hurry, patience)
    }

    /// Undoes [`Machine::drain`] and [`Machine::stand_still`], wherever they came to.
    fn run_on(&self) {
        for device in &self.devices {
            device.resume();
        }
        self.buffer.thaw();
        // A thread that is gone has reported why, and the machine's loop ends on that report.
        let _ = self.vcpus.unpark();
    }

    /// In a rehearsal: loads what may write guest RAM, which is a view of it.
    pub fn load_rest(&self, patience: Duration) -> Result<(), VcpusError> {
        self.vcpus.load_rest(patience)
    }

    /// Saves everything, and tells how each vCPU came to rest. It stands still, or has never run.
    pub fn save(
        &self,
        format: u32,
        policy: Policy,
        deadline: Instant,
    ) -> Result<(Saved, Vec<Left>), FreezeError> {
        self.vcpus.save(format)?;
        let mut saved = Saved::with_capacity(64 << 10);
        for device in &self.devices {
            device.save(&mut saved)?;
        }
        self.buffer.save(&self.viewers(), &mut saved)?;
        let patience = deadline.saturating_duration_since(Instant::now());
        let vcpus = self.vcpus.saved(patience)?;
        // The clock next to the vCPUs, so that their timers and it are of one moment.
        let clock = clock::save(&self.vm, self.tsc_khz, policy).map_err(FreezeError::Clock)?;
        saved.put("", &clock)?;
        let left = vcpus.iter().map(|vcpu| vcpu.left).collect();
        for (id, vcpu) in vcpus.into_iter().enumerate() {
            saved.add(&id.to_string(), vcpu.section)?;
        }
        saved.put("", &irq::save(&self.vm)?)?;
        #[cfg(feature = "later")]
        stillpoint_state::later::save(&mut saved, format)?;
        Ok((saved, left))
    }
}

/// Marks of time within a freeze.
#[derive(Clone, Debug)]
pub struct Timing {
    since: Instant,
    /// Name and length of each phase so far.
    pub marks: Vec<(&'static str, Duration)>,
}

impl Timing {
    /// Starts now.
    pub fn start() -> Self {
        Self {
            since: Instant::now(),
            marks: Vec::with_capacity(16),
        }
    }

    /// Ends a phase.
    pub fn mark(&mut self, name: &'static str) {
        let now = Instant::now();
        self.marks.push((name, now - self.since));
        self.since = now;
    }
}
