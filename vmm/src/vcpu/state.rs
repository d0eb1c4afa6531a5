//! KVM_GET and KVM_SET of one vCPU, in the one right order.

use kvm_bindings::{Xsave, kvm_mp_state, kvm_xsave2};
use kvm_ioctls::{Cap, Kvm, VcpuFd};
use stillpoint_state::sections::Vcpu as VcpuSection;
use stillpoint_state::{Section, StateError};

use super::error::VcpuError;
use super::msrs::{self, Late};
use super::settle::take_up_requests;
use super::timer::phase::{self, Moment};
use super::timer::{self, Lapic};
use crate::faults::{self, Spoilt};
use crate::{clock, raw};

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
    /// TSC offset read back, less the one it was to have; `None` where the kernel has none.
    pub tsc_offset_delta: Option<i64>,
}

/// Saves one parked vCPU; gives its section and the section version that `format` wants.
pub fn save(
    fd: &mut VcpuFd,
    msr_list: &mut Vec<u32>,
    format: u32,
) -> Result<(VcpuSection, u32), VcpuError> {
    // First: reading it accepts a pending INIT or SIPI, which changes registers and local APIC.
    timer::mp_state(fd)?;
    let mut section = VcpuSection {
        tsc_khz: fd.get_tsc_khz().unwrap_or(0),
        tsc_offset: raw::tsc_offset(fd).ok(),
        ..VcpuSection::default()
    };
    let mut msrs = msrs::save(fd, msr_list)?;
    // Settles due timers, so before anything that an injection changes.
    let deadline = msrs
        .iter()
        .find(|(i, _)| *i == msrs::TSC_DEADLINE)
        .map(|(_, v)| *v);
    let saved = timer::save(fd, deadline)?;
    if let Some(entry) = msrs.iter_mut().find(|(i, _)| *i == msrs::TSC_DEADLINE) {
        entry.1 = saved.deadline.unwrap_or(0);
    }
    // Again: settling may have ended a halt. One that is saved as halted with its interrupt
    // already injected would never wake up.
    section.mp_state = timer::mp_state(fd)?;
    section.lapic = raw::bytes_of(&saved.lapic.0).to_vec();
    section.lapic_tsc = saved.host_tsc;
    let regs = fd.get_regs().map_err(VcpuError::kvm("save registers"))?;
    section.regs = raw::bytes_of(&regs).to_vec();
    let sregs = fd
        .get_sregs()
        .map_err(VcpuError::kvm("save system registers"))?;
    section.sregs = raw::bytes_of(&sregs).to_vec();
    section.xsave = save_xsave(fd)?;
    // Hosts without XSAVE have no XCRs: they refuse, or give none and then refuse to take none back
    // (arch/x86/kvm/x86.c, `kvm_vcpu_ioctl_x86_set_xcrs`).
    section.xcrs = fd
        .get_xcrs()
        .ok()
        .filter(|xcrs| xcrs.nr_xcrs > 0)
        .map(|xcrs| raw::bytes_of(&xcrs).to_vec())
        .unwrap_or_default();
    let debugregs = fd
        .get_debug_regs()
        .map_err(VcpuError::kvm("save debug registers"))?;
    section.debugregs = raw::bytes_of(&debugregs).to_vec();
    // Last: it gathers what the calls above may have moved.
    let events = fd
        .get_vcpu_events()
        .map_err(VcpuError::kvm("save pending events"))?;
    section.events = raw::bytes_of(&events).to_vec();
    let version = section.set_msrs(format, msrs.into_iter());
    Ok((section, version))
}

/// Loads one vCPU that has never run a guest instruction. Writes no byte of guest memory; what
/// would is given back as [`Late`].
pub fn load(
    fd: &mut VcpuFd,
    from: &VcpuSection,
    pause: Pause,
) -> Result<(LoadedVcpu, Late), VcpuError> {
    const NAME: &str = VcpuSection::NAME;
    let (plain, deadline, late) = msrs::split(from.msrs()?);
    // TSC first: timers below are armed against the guest's TSC.
    let loaded = load_tsc(fd, from, pause)?;
    let mp_state = kvm_mp_state {
        mp_state: from.mp_state,
    };
    fd.set_mp_state(mp_state)
        .map_err(VcpuError::kvm("load MP state"))?;
    // System registers hold the APIC base, which must stand before the local APIC is loaded.
    let sregs = raw::from_bytes(NAME, &from.sregs)?;
    fd.set_sregs(&sregs)
        .map_err(VcpuError::kvm("load system registers"))?;
    let regs = raw::from_bytes(NAME, &from.regs)?;
    fd.set_regs(&regs)
        .map_err(VcpuError::kvm("load registers"))?;
    if !from.xcrs.is_empty() {
        let xcrs = raw::from_bytes(NAME, &from.xcrs)?;
        fd.set_xcrs(&xcrs)
            .map_err(VcpuError::kvm("load extended control registers"))?;
    }
    load_xsave(fd, &from.xsave)?;
    let debugregs = raw::from_bytes(NAME, &from.debugregs)?;
    fd.set_debug_regs(&debugregs)
        .map_err(VcpuError::kvm("load debug registers"))?;
    msrs::write(fd, &plain)?;
    let lapic = Lapic(raw::from_bytes(NAME, &from.lapic)?);
    load_lapic(fd, lapic, from, pause)?;
    if let Some(deadline) = deadline.filter(|&deadline| deadline != 0) {
        msrs::write(fd, &[(msrs::TSC_DEADLINE, deadline)])?;
    }
    let events = raw::from_bytes(NAME, &from.events)?;
    fd.set_vcpu_events(&events)
        .map_err(VcpuError::kvm("load pending events"))?;
    Ok((loaded, late))
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

fn load_tsc(fd: &mut VcpuFd, from: &VcpuSection, pause: Pause) -> Result<LoadedVcpu, VcpuError> {
    if from.tsc_khz != 0 && fd.get_tsc_khz().is_ok_and(|khz| khz != from.tsc_khz) {
        fd.set_tsc_khz(from.tsc_khz)
            .map_err(VcpuError::kvm("set the TSC frequency"))?;
    }
    let saved = from.tsc_offset.filter(|_| raw::has_tsc_offset(fd));
    let Some(saved) = saved else {
        return match pause.held {
            0 => Ok(LoadedVcpu::default()),
            _ => Err(VcpuError::Hold),
        };
    };
    let offset = saved.wrapping_sub(pause.held.cast_signed());
    let to_write = match faults::is_spoilt(Spoilt::Offset) {
        true => offset.wrapping_add(1_000),
        false => offset,
    };
    // Where it already is what it was (a guest that never touched its TSC, on the same host), the
    // write is left out: every write opens a new TSC generation.
    if raw::tsc_offset(fd) != Ok(to_write) {
        raw::set_tsc_offset(fd, to_write).map_err(VcpuError::kvm("set the TSC offset"))?;
        take_up_requests(fd)?;
    }
    let now = raw::tsc_offset(fd).map_err(VcpuError::kvm("read the TSC offset back"))?;
    let delta = now.wrapping_sub(offset);
    if pause.held != 0 && delta != 0 {
        // Before the guest is ours: it goes on in the predecessor.
        return Err(VcpuError::Hold);
    }
    Ok(LoadedVcpu {
        tsc_offset_delta: Some(delta),
    })
}

/// Bytes of a `kvm_xsave` on this host; at least the 4096 of the structure without extension.
fn xsave_size() -> usize {
    static SIZE: std::sync::OnceLock<usize> = std::sync::OnceLock::new();
    *SIZE.get_or_init(|| {
        let size = Kvm::new().map_or(0, |kvm| kvm.check_extension_int(Cap::Xsave2));
        usize::try_from(size).unwrap_or(0).max(4096)
    })
}

/// Asks the host now what a save would otherwise ask during a blackout.
pub fn warm_up() {
    let _ = xsave_size();
}

fn new_xsave(size: usize) -> Result<Xsave, VcpuError> {
    let extra = (size - 4096).div_ceil(4);
    let xsave = Xsave::new(extra).map_err(|_| StateError::Value {
        section: VcpuSection::NAME,
        problem: format!("an XSAVE area of {size} bytes"),
    })?;
    Ok(xsave)
}

#[allow(unsafe_code)]
fn save_xsave(fd: &VcpuFd) -> Result<Vec<u8>, VcpuError> {
    let size = xsave_size();
    if size == 4096 {
        let xsave = fd.get_xsave().map_err(VcpuError::kvm("save the FPU"))?;
        return Ok(xsave
            .region
            .iter()
            .flat_map(|word| word.to_le_bytes())
            .collect());
    }
    let mut xsave = new_xsave(size)?;
    // SAFETY: the buffer has the size that KVM_CAP_XSAVE2 asks for.
    unsafe { fd.get_xsave2(&mut xsave) }.map_err(VcpuError::kvm("save the FPU"))?;
    let whole: &kvm_xsave2 = xsave.as_fam_struct_ref();
    let words = whole.xsave.region.iter().chain(xsave.as_slice());
    Ok(words
        .flat_map(|word| word.to_le_bytes())
        .take(size)
        .collect())
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
