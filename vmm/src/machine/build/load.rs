//! Saved state into a blank machine. Restoring is construction: what comes out is whole, or an error.
//!
//! Must never: enter a vCPU, or write a byte of guest RAM. What would write waits for the take
//! ([`msrs`](crate::vcpu::msrs)).

use std::sync::Arc;
use std::time::Duration;

use stillpoint_control::spec::MachineSpec;
use stillpoint_guest_abi::probe as probe_abi;
use stillpoint_state::sections::{Clock, Irqchip, Vcpu};
use stillpoint_state::{StateError, Unclaimed, Unread};

use super::{Blank, BuildError, Lines, Parts, kvm};
use crate::clock::align::{self, Alignment};
use crate::devices::Device;
use crate::devices::power::Power;
use crate::devices::probe::Probe;
use crate::devices::serial::SerialPort;
use crate::devices::virtio::mmio::VirtioMmio;
use crate::devices::vmclock::VmClock;
use crate::faults::{self, Spoilt};
use crate::handover::lend::Borrowed;
use crate::machine::Machine;
use crate::vcpu::hurry::Hurry;
use crate::vcpu::load::{LoadedVcpu, Pause};
use crate::{clock, irq};

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
    /// Console viewers whose sockets come beside the state.
    pub viewers: usize,
}

impl Loaded {
    /// TSC offset of vCPU 0 before the pause.
    pub fn tsc_offset_before(&self) -> Option<i64> {
        self.vcpus.first()?.tsc_offset_before
    }

    /// `MSR_KVM_SYSTEM_TIME` of each vCPU: where its pvclock page is.
    pub fn system_time(&self) -> impl Iterator<Item = u64> {
        self.vcpus.iter().map(|vcpu| vcpu.system_time)
    }

    /// `MSR_KVM_WALL_CLOCK`, the machine's: where the wall clock structure is; 0 if there is none.
    pub fn wall_clock(&self) -> u64 {
        self.vcpus.first().map_or(0, |first| first.wall_clock)
    }

    /// Whether the guest's TSC did not run on as if nothing had been.
    pub fn has_disturbed_tsc(&self) -> bool {
        let exact = |vcpu: &LoadedVcpu| vcpu.tsc_offset_delta == Some(0);
        self.pause.held != 0 || !self.vcpus.iter().all(exact)
    }
}

impl Blank {
    /// Has the calling thread and the vCPUs' go before all others.
    pub fn hurry(&self) -> Hurry {
        let hurry = self.vcpus.hurry();
        hurry.among();
        hurry
    }

    /// How many vCPUs it has.
    pub fn vcpu_count(&self) -> usize {
        self.vcpus.count()
    }

    /// Whether who waits may stay awake for it.
    pub fn may_stay_awake(&self) -> bool {
        self.vcpus.may_stay_awake()
    }

    /// Wakes the vCPUs' threads for a load that comes within this time.
    pub fn stand_by(&self, awake: Duration) -> Result<(), BuildError> {
        Ok(self.vcpus.stand_by(awake)?)
    }

    /// Loads ahead what stands, of a state that is not the last word, until that is loaded.
    pub fn load_ahead(&self, mut state: Unclaimed, patience: Duration) -> Result<(), BuildError> {
        let sections = self.claim_vcpus(&mut state)?;
        Ok(self.vcpus.load_ahead(sections, patience)?)
    }

    /// The vCPUs' sections, which their own threads read.
    fn claim_vcpus(&self, state: &mut Unclaimed) -> Result<Vec<Unread<Vcpu>>, StateError> {
        let ids = 0..self.vcpus.count();
        ids.map(|id| state.claim(&id.to_string())).collect()
    }

    /// Loads saved state, with the files of devices that followed it: vCPUs in parallel on their own
    /// threads, everything else meanwhile; the clock as soon as every TSC write is done.
    pub fn load(
        self,
        mut state: Unclaimed,
        late: &mut Borrowed,
        patience: Duration,
    ) -> Result<(Machine, Loaded), BuildError> {
        if faults::is_spoilt(Spoilt::Load) {
            let problem = "this build refuses all state, as it was told to".into();
            let section = "vcpu";
            return Err(StateError::Value { section, problem }.into());
        }
        let saved_clock: Clock = state.take("")?;
        let pause = pause_of(&saved_clock, &self.spec)?;
        let sections = self.claim_vcpus(&mut state)?;
        let tscs = self.vcpus.load(sections, pause)?;
        irq::load(&self.vm, &state.take::<Irqchip>("")?)?;
        let viewers = self.buffer.load(&mut state)?;
        tscs.wait(patience);
        let clock =
            align::align(&self.vm, &saved_clock, pause.held).map_err(kvm("set the clock"))?;
        let (has_vmclock, ram) = (self.spec.clock.vmclock, Arc::clone(&self.ram));
        let mut machine = self.with_devices(|wiring| {
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
        #[cfg(feature = "later")]
        stillpoint_state::later::load(&mut state)?;
        state.finish()?;
        let vcpus = machine.vcpus.loaded(patience)?;
        if faults::is_spoilt(Spoilt::State) {
            let at = probe_abi::REG_SCRATCH;
            machine.probe.write(at, &u64::MAX.to_le_bytes());
        }
        let loaded = Loaded {
            vcpus,
            clock,
            saved_clock,
            pause,
            viewers,
        };
        // The guest may have moved its TSC since the predecessor's machine was made.
        let held = pause.held.cast_signed();
        let now = |offset: i64| offset.wrapping_sub(held);
        machine.tsc_offset = loaded.tsc_offset_before().map(now);
        Ok((machine, loaded))
    }
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
