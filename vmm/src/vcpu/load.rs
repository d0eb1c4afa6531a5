//! KVM_SET of one vCPU, in the one right order, and only of what is not there yet.
//!
//! Most of what a load costs is KVM's own work around each call (it puts the vCPU's state onto the core and
//! takes it off again), so a call that is left out is time won. A state that was saved a little earlier can
//! be loaded ahead of the freeze, as far as it has no life of its own: what is loaded afterwards is compared
//! with it ([`Standing`]), and written only where it differs. What moves by itself in a machine that never
//! ran (local APIC, TSC deadline, MSRs that count or that KVM gives a meaning of their own), and what an
//! injection changes in every swap (registers, pending events), is written every time.

use kvm_bindings::kvm_mp_state;
use kvm_ioctls::VcpuFd;
use stillpoint_state::sections::Vcpu as VcpuSection;
use stillpoint_state::{Section, StateError};

use super::error::VcpuError;
use super::msrs::{self, Late};
use super::settle::take_up_requests;
use super::state::{new_xsave, xsave_size};
use super::timer::Lapic;
use super::timer::phase::{self, Moment};
use crate::faults::{self, Spoilt};
use crate::{clock, raw};

const NAME: &str = VcpuSection::NAME;

/// The pause that a vCPU is loaded after.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Pause {
    /// Host TSC when the predecessor read the clock.
    pub from_tsc: u64,
    /// TSC cycles of the pause that the guest's clocks leave out; 0 for policy *advance*.
    pub held: u64,
    /// The pause counts as stolen from the guest's vCPUs.
    pub steal: bool,
}

/// What loading one vCPU showed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LoadedVcpu {
    /// TSC offset before the pause.
    pub tsc_offset_before: Option<i64>,
    /// TSC offset read back, less the one it was to have; `None` where the kernel has none.
    pub tsc_offset_delta: Option<i64>,
    /// Its `MSR_KVM_SYSTEM_TIME`, which is loaded late.
    pub system_time: u64,
    /// Its `MSR_KVM_WALL_CLOCK`, likewise.
    pub wall_clock: u64,
}

/// What is known of a vCPU that was made and has never run a guest instruction.
#[derive(Debug, Default)]
pub struct Known {
    /// Frequency of its TSC.
    pub tsc_khz: u32,
    /// Whether this kernel has TSC offsets to be read and set.
    pub has_tsc_offset: bool,
    /// What was loaded already.
    pub standing: Standing,
}

/// State that was loaded ahead, and stays as it is until something else is written.
///
/// Nothing at all stands in the default.
#[derive(Debug, Default)]
pub struct Standing {
    mp_state: Option<u32>,
    sregs: Vec<u8>,
    xcrs: Vec<u8>,
    xsave: Vec<u8>,
    debugregs: Vec<u8>,
    /// Sorted.
    msrs: Vec<(u32, u64)>,
}

impl Known {
    /// Asks KVM.
    pub fn of(fd: &VcpuFd) -> Self {
        Self {
            tsc_khz: fd.get_tsc_khz().unwrap_or(0),
            has_tsc_offset: raw::has_tsc_offset(fd),
            standing: Standing::default(),
        }
    }

    /// Loads ahead what has no life of its own of a state that is not the last word. Writes no byte of guest
    /// memory. Where it fails, nothing counts as loaded, and the last word is loaded whole.
    pub fn load_ahead(&mut self, fd: &VcpuFd, from: &VcpuSection) -> Result<(), VcpuError> {
        let before = std::mem::take(&mut self.standing);
        let (mut still, _, _) = msrs::split(from.msrs()?);
        still.retain(|&(index, _)| msrs::is_still(index));
        before.complete(fd, from, &still)?;
        still.sort_unstable();
        self.standing = Standing {
            mp_state: Some(from.mp_state),
            sregs: from.sregs.clone(),
            xcrs: from.xcrs.clone(),
            xsave: from.xsave.clone(),
            debugregs: from.debugregs.clone(),
            msrs: still,
        };
        Ok(())
    }

    /// Loads all of a state. Writes no byte of guest memory; what would is given back as [`Late`].
    /// `tsc_stands` is dropped as soon as no write to the TSC follows.
    pub fn load<T>(
        &mut self,
        fd: &mut VcpuFd,
        from: &VcpuSection,
        pause: Pause,
        tsc_stands: T,
    ) -> Result<(LoadedVcpu, Late), VcpuError> {
        let (plain, deadline, late) = msrs::split(from.msrs()?);
        // TSC first: timers below are armed against the guest's TSC.
        let tsc_offset_delta = self.load_tsc(fd, from, pause)?;
        drop(tsc_stands);
        std::mem::take(&mut self.standing).complete(fd, from, &plain)?;
        let regs = raw::from_bytes(NAME, &from.regs)?;
        fd.set_regs(&regs)
            .map_err(VcpuError::kvm("load registers"))?;
        let lapic = Lapic(raw::from_bytes(NAME, &from.lapic)?);
        load_lapic(fd, lapic, from, pause)?;
        if let Some(deadline) = deadline.filter(|&deadline| deadline != 0) {
            msrs::write(fd, &[(msrs::TSC_DEADLINE, deadline)])?;
        }
        let events = raw::from_bytes(NAME, &from.events)?;
        fd.set_vcpu_events(&events)
            .map_err(VcpuError::kvm("load pending events"))?;
        let loaded = LoadedVcpu {
            tsc_offset_before: from.tsc_offset,
            tsc_offset_delta,
            system_time: late.of(msrs::SYSTEM_TIME),
            wall_clock: late.of(msrs::WALL_CLOCK),
        };
        Ok((loaded, late))
    }

    /// Gives what the TSC offset is off by.
    fn load_tsc(
        &mut self,
        fd: &mut VcpuFd,
        from: &VcpuSection,
        pause: Pause,
    ) -> Result<Option<i64>, VcpuError> {
        if from.tsc_khz != 0 && self.tsc_khz != 0 && self.tsc_khz != from.tsc_khz {
            fd.set_tsc_khz(from.tsc_khz)
                .map_err(VcpuError::kvm("set the TSC frequency"))?;
            self.tsc_khz = from.tsc_khz;
        }
        let saved = from.tsc_offset.filter(|_| self.has_tsc_offset);
        let Some(saved) = saved else {
            return match pause.held {
                0 => Ok(None),
                _ => Err(VcpuError::Hold),
            };
        };
        let offset = saved.wrapping_sub(pause.held.cast_signed());
        let to_write = match faults::is_spoilt(Spoilt::Offset) {
            true => offset.wrapping_add(1_000),
            false => offset,
        };
        let read_back =
            |fd: &VcpuFd| raw::tsc_offset(fd).map_err(VcpuError::kvm("read the TSC offset back"));
        let mut now = read_back(fd)?;
        // Where it already is what it was (a guest that never touched its TSC, on the same host), the
        // write is left out: every write opens a new TSC generation.
        if now != to_write {
            raw::set_tsc_offset(fd, to_write).map_err(VcpuError::kvm("set the TSC offset"))?;
            take_up_requests(fd)?;
            now = read_back(fd)?;
        }
        let delta = now.wrapping_sub(offset);
        if pause.held != 0 && delta != 0 {
            // Before the guest is ours: it goes on in the predecessor.
            return Err(VcpuError::Hold);
        }
        Ok(Some(delta))
    }
}

impl Standing {
    /// Writes what of this does not stand yet.
    fn complete(
        self,
        fd: &VcpuFd,
        from: &VcpuSection,
        msrs: &[(u32, u64)],
    ) -> Result<(), VcpuError> {
        // What a saved state does not have stands nowhere: it is refused, as ever.
        let stands = |ours: &[u8], theirs: &[u8]| !theirs.is_empty() && ours == theirs;
        // System registers hold the APIC base, which must stand before the local APIC is loaded.
        let same_sregs = stands(&self.sregs, &from.sregs);
        if !same_sregs {
            let sregs = raw::from_bytes(NAME, &from.sregs)?;
            fd.set_sregs(&sregs)
                .map_err(VcpuError::kvm("load system registers"))?;
        }
        let same_xcrs = self.xcrs == from.xcrs;
        if !from.xcrs.is_empty() && !same_xcrs {
            let xcrs = raw::from_bytes(NAME, &from.xcrs)?;
            fd.set_xcrs(&xcrs)
                .map_err(VcpuError::kvm("load extended control registers"))?;
        }
        if !stands(&self.xsave, &from.xsave) || !same_xcrs {
            load_xsave(fd, &from.xsave)?;
        }
        if !stands(&self.debugregs, &from.debugregs) {
            let debugregs = raw::from_bytes(NAME, &from.debugregs)?;
            fd.set_debug_regs(&debugregs)
                .map_err(VcpuError::kvm("load debug registers"))?;
        }
        msrs::write(fd, &self.differing(msrs))?;
        // After the system registers, with which KVM ends the halt of a vCPU at its reset vector (x86.c,
        // `__set_sregs_common`).
        let mp_state = from.mp_state;
        if self.mp_state != Some(mp_state) || !same_sregs {
            fd.set_mp_state(kvm_mp_state { mp_state })
                .map_err(VcpuError::kvm("load MP state"))?;
        }
        Ok(())
    }

    /// MSRs to write, so that these are what there is: a saved state leaves out some that are zero.
    fn differing(&self, msrs: &[(u32, u64)]) -> Vec<(u32, u64)> {
        let gone = |index: u32| !msrs.iter().any(|(saved, _)| *saved == index);
        let zeroed = self.msrs.iter().filter(|(index, _)| gone(*index));
        let differs = |msr: &&(u32, u64)| self.msrs.binary_search(msr).is_err();
        let changed = msrs.iter().filter(differs).copied();
        zeroed
            .map(|&(index, _)| (index, 0))
            .chain(changed)
            .collect()
    }
}

/// Loads the local APIC as it is by now, by the guest's own time: what is held, its timers don't feel.
fn load_lapic(
    fd: &VcpuFd,
    mut lapic: Lapic,
    from: &VcpuSection,
    pause: Pause,
) -> Result<(), VcpuError> {
    let read = Moment {
        host_tsc: from.lapic_tsc,
        tsc_khz: from.tsc_khz,
    };
    if from.lapic_tsc != 0 && lapic.is_periodic() {
        return phase::load(fd, lapic, read, pause.held);
    }
    if from.lapic_tsc != 0 {
        lapic.advance(read.passed_ns(clock::host_tsc(), pause.held));
    }
    fd.set_lapic(&lapic.0)
        .map_err(VcpuError::kvm("load the local APIC"))
}

#[allow(unsafe_code)]
fn load_xsave(fd: &VcpuFd, bytes: &[u8]) -> Result<(), VcpuError> {
    if bytes.len() < 4096 || bytes.len() > xsave_size() || !bytes.len().is_multiple_of(4) {
        let (got, most) = (bytes.len(), xsave_size());
        return Err(VcpuError::State(StateError::Value {
            section: VcpuSection::NAME,
            problem: format!("an XSAVE area of {got} bytes; this host's KVM takes {most}"),
        }));
    }
    // The whole size of this host's area, so that KVM never reads beyond it.
    let mut xsave = new_xsave(xsave_size())?;
    let words = bytes
        .chunks_exact(4)
        .map(|w| w.first_chunk().copied().unwrap_or_default());
    let mut words = words.map(u32::from_le_bytes);
    // SAFETY: only the words are changed, not the length field of the flexible array.
    let whole = unsafe { xsave.as_mut_fam_struct() };
    for word in &mut whole.xsave.region {
        *word = words.next().unwrap_or_default();
    }
    for (slot, word) in xsave.as_mut_slice().iter_mut().zip(words) {
        *slot = word;
    }
    // SAFETY: the buffer is at least as large as KVM_CAP_XSAVE2 says.
    unsafe { fd.set_xsave2(&xsave) }.map_err(VcpuError::kvm("load the FPU"))
}
