//! Saved state into a blank machine. Restoring is construction: what comes out is whole, or an error.
//!
//! Must never: enter a vCPU, or write a byte of guest RAM. What would write waits for the take
//! ([`msrs`]).

use std::sync::Arc;
use std::time::Duration;

use stillpoint_control::spec::MachineSpec;
use stillpoint_guest_abi::probe as probe_abi;
use stillpoint_state::sections::{Clock, Irqchip, Vcpu};
use stillpoint_state::{StateError, Unclaimed};

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
use crate::vcpu::msrs;
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
    /// Has the calling thread and the vCPUs' go before all others.
    pub fn hurry(&self) -> Hurry {
        let hurry = self.vcpus.hurry();
        hurry.among();
        hurry
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
        let sections: Vec<Vcpu> = (0..self.vcpus.count())
            .map(|id| state.take(&id.to_string()))
            .collect::<Result<_, _>>()?;
        Ok(self.vcpus.load_ahead(sections, patience)?)
    }

    /// Loads saved state, with the files of devices that followed it: vCPUs in parallel on their own
    /// threads, everything else meanwhile; the clock as soon as every TSC write is done.
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
        let tscs = self.vcpus.load(sections, pause)?;
        irq::load(&self.vm, &state.take::<Irqchip>("")?)?;
        let viewers = self.buffer.load(&mut state)?;
        tscs.wait(patience);
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
        #[cfg(feature = "later")]
        stillpoint_state::later::load(&mut state)?;
        state.finish()?;
        let vcpus = machine.vcpus.loaded(patience)?;
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
