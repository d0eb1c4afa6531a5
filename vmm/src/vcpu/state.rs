//! KVM_GET of one vCPU, in the one right order.

use kvm_bindings::{Xsave, kvm_regs, kvm_sregs, kvm_xsave2};
use kvm_ioctls::{Cap, Kvm, SyncReg, VcpuFd};
use stillpoint_state::sections::Vcpu as VcpuSection;
use stillpoint_state::{Section, StateError};

use super::error::VcpuError;
use super::msrs;
use super::timer;
use crate::raw;

/// Saves one parked vCPU, whose TSC runs at `tsc_khz`; gives its section and the section version that
/// `format` wants.
pub fn save(
    fd: &mut VcpuFd,
    msr_list: &mut Vec<u32>,
    format: u32,
    tsc_khz: u32,
) -> Result<(VcpuSection, u32), VcpuError> {
    let run_page = has_sync_regs();
    if run_page {
        SYNCED.iter().for_each(|&reg| fd.set_sync_valid_reg(reg));
    }
    let saved = save_with(fd, msr_list, format, tsc_khz, run_page);
    // Or every exit of a guest that runs on would pay for it.
    SYNCED.iter().for_each(|&reg| fd.clear_sync_valid_reg(reg));
    saved
}

fn save_with(
    fd: &mut VcpuFd,
    msr_list: &mut Vec<u32>,
    format: u32,
    tsc_khz: u32,
    run_page: bool,
) -> Result<(VcpuSection, u32), VcpuError> {
    // First: reading it accepts a pending INIT or SIPI, which changes registers and local APIC.
    let mp_state = timer::mp_state(fd)?;
    let mut section = VcpuSection {
        tsc_khz,
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
    section.mp_state = match saved.settled {
        true => timer::mp_state(fd)?,
        false => mp_state,
    };
    section.lapic = raw::bytes_of(&saved.lapic.0).to_vec();
    section.lapic_tsc = saved.host_tsc;
    // Settling left them in the run page, and nothing changes them any more.
    let synced = (run_page && saved.settled).then(|| fd.sync_regs());
    let (regs, sregs) = match &synced {
        Some(synced) => (synced.regs, synced.sregs),
        None => registers(fd)?,
    };
    section.regs = raw::bytes_of(&regs).to_vec();
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
    let events = match synced {
        Some(synced) => synced.events,
        // Last: it gathers what the calls above may have moved.
        None => fd
            .get_vcpu_events()
            .map_err(VcpuError::kvm("save pending events"))?,
    };
    section.events = raw::bytes_of(&events).to_vec();
    let version = section.set_msrs(format, msrs.into_iter());
    Ok((section, version))
}

fn registers(fd: &VcpuFd) -> Result<(kvm_regs, kvm_sregs), VcpuError> {
    let regs = fd.get_regs().map_err(VcpuError::kvm("save registers"))?;
    let sregs = fd
        .get_sregs()
        .map_err(VcpuError::kvm("save system registers"))?;
    Ok((regs, sregs))
}

/// What `KVM_RUN` leaves in its page when it comes back, if it is asked to (api.rst, KVM_CAP_SYNC_REGS): three calls less.
const SYNCED: [SyncReg; 3] = [
    SyncReg::Register,
    SyncReg::SystemRegister,
    SyncReg::VcpuEvents,
];

/// Whether this KVM does so, with all of them.
fn has_sync_regs() -> bool {
    static HAS: std::sync::OnceLock<bool> = std::sync::OnceLock::new();
    *HAS.get_or_init(|| {
        let known = Kvm::new().map_or(0, |kvm| kvm.check_extension_int(Cap::SyncRegs));
        let known = u64::try_from(known).unwrap_or(0);
        SYNCED.iter().all(|&reg| known & reg as u64 != 0)
    })
}

/// Bytes of a `kvm_xsave` on this host; at least the 4096 of the structure without extension.
pub(super) fn xsave_size() -> usize {
    static SIZE: std::sync::OnceLock<usize> = std::sync::OnceLock::new();
    *SIZE.get_or_init(|| {
        let size = Kvm::new().map_or(0, |kvm| kvm.check_extension_int(Cap::Xsave2));
        usize::try_from(size).unwrap_or(0).max(4096)
    })
}

/// Asks the host now what a save would otherwise ask during a blackout.
pub fn warm_up() {
    let _ = (xsave_size(), has_sync_regs());
}

pub(super) fn new_xsave(size: usize) -> Result<Xsave, VcpuError> {
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
