//! Model-specific registers: which are saved, and in what order they are loaded.
//!
//! Three groups, because of what a write does besides storing a value:
//! * *plain*: loaded with the rest of the vCPU;
//! * *TSC deadline*: loaded after the local APIC, or KVM drops it without a word (lapic.c,
//!   `kvm_set_lapic_tscdeadline_msr`);
//! * *late*: writing them may change guest memory at once (KVM's paravirtual ones), so they wait
//!   until the guest is ours.

use std::time::Duration;

use kvm_bindings::{Msrs, kvm_msr_entry};
use kvm_ioctls::{Kvm, VcpuFd};
use vm_memory::GuestAddress;

use super::error::VcpuError;
use crate::clock::steal;
use crate::clock::wall::WallClock;
use crate::memory::Memory;

/// IA32_TSC: never saved, never written. The TSC offset carries it, exactly.
const TSC: u32 = 0x10;
/// IA32_TSC_ADJUST: stored by KVM without an effect on the offset.
const TSC_ADJUST: u32 = 0x3b;
/// IA32_TSC_DEADLINE.
pub const TSC_DEADLINE: u32 = 0x6e0;

// arch/x86/include/uapi/asm/kvm_para.h
const WALL_CLOCK_OLD: u32 = 0x11;
const SYSTEM_TIME_OLD: u32 = 0x12;
/// Guest-physical address of the machine's wall clock structure.
pub const WALL_CLOCK: u32 = 0x4b56_4d00;
/// Guest-physical address of the vCPU's pvclock page, bit 0 for enabled.
pub const SYSTEM_TIME: u32 = 0x4b56_4d01;
const ASYNC_PF: u32 = 0x4b56_4d02;
const STEAL_TIME: u32 = 0x4b56_4d03;
const PV_EOI: u32 = 0x4b56_4d04;
const ASYNC_PF_INTERRUPT: u32 = 0x4b56_4d06;
/// IA32_MC0_CTL to IA32_MC31_CTL, four apart.
const BANK_CONTROLS: std::ops::Range<u32> = 0x400..0x480;
/// A doorbell, not a value.
const ASYNC_PF_ACK: u32 = 0x4b56_4d07;

/// Late ones in the order of their loading: the wall clock last, since KVM computes what it
/// writes into guest memory from kvmclock as it is then.
const LATE: [u32; 6] = [
    SYSTEM_TIME,
    STEAL_TIME,
    ASYNC_PF_INTERRUPT,
    ASYNC_PF,
    PV_EOI,
    WALL_CLOCK,
];

/// Whether this difference is one of a late MSR's value.
pub fn is_late(difference: &str) -> bool {
    let named = |msr: &u32| difference.contains(&format!("MSR {msr:#x} "));
    LATE.iter().any(named)
}

/// Not saved: the TSC (see above), the old names of the two clock MSRs (the new ones read the
/// same value), and the doorbell.
const SKIPPED: [u32; 4] = [TSC, WALL_CLOCK_OLD, SYSTEM_TIME_OLD, ASYNC_PF_ACK];

fn entry(index: u32, data: u64) -> kvm_msr_entry {
    kvm_msr_entry {
        index,
        data,
        ..Default::default()
    }
}

fn list(entries: &[kvm_msr_entry]) -> Result<Msrs, VcpuError> {
    Msrs::from_entries(entries).map_err(|_| VcpuError::MsrList)
}

/// IA32_MCi_CTL of the banks that a fresh vCPU has (`KVM_MAX_MCE_BANKS`), where each is zero. The
/// banks' other registers stay zero too, as nobody reports an error to the guest.
fn is_bank_control(index: u32) -> bool {
    BANK_CONTROLS.contains(&index) && index.is_multiple_of(4)
}

/// MSRs that carry guest state and that KVM does not list: speculation control, memory type
/// ranges (SDM vol. 3, 12.11), TSC_AUX, machine check banks, AMD's DE_CFG. KVM_GET_MSR_INDEX_LIST
/// leaves them out though KVM_GET_MSRS and KVM_SET_MSRS know them.
fn unlisted() -> impl Iterator<Item = u32> {
    let fixed = [
        0x250,
        0x258,
        0x259,
        0x2ff,
        0x48,
        0xc000_0103,
        0xc001_1029,
        TSC_ADJUST,
        TSC_DEADLINE,
    ];
    (0x200..0x210)
        .chain(0x268..0x270)
        .chain(BANK_CONTROLS.step_by(4))
        .chain(fixed)
}

/// The MSRs of this kernel that this vCPU lets us read. Kernels list some that they refuse.
pub fn readable(fd: &VcpuFd) -> Result<Vec<u32>, VcpuError> {
    let kvm = Kvm::new().map_err(VcpuError::kvm("open /dev/kvm"))?;
    let listed = kvm
        .get_msr_index_list()
        .map_err(VcpuError::kvm("list the MSRs"))?;
    let mut wanted: Vec<u32> = listed.as_slice().to_vec();
    wanted.extend(LATE.into_iter().chain(unlisted()));
    wanted.sort_unstable();
    wanted.dedup();
    wanted.retain(|index| !SKIPPED.contains(index));
    read(fd, &mut wanted)?;
    Ok(wanted)
}

/// Reads `wanted`, dropping from it what KVM refuses.
pub fn read(fd: &VcpuFd, wanted: &mut Vec<u32>) -> Result<Vec<(u32, u64)>, VcpuError> {
    loop {
        let entries: Vec<_> = wanted.iter().map(|&index| entry(index, 0)).collect();
        let mut msrs = list(&entries)?;
        let got = fd
            .get_msrs(&mut msrs)
            .map_err(VcpuError::kvm("read the MSRs"))?;
        if got == wanted.len() {
            return Ok(msrs.as_slice().iter().map(|e| (e.index, e.data)).collect());
        }
        wanted.remove(got);
    }
}

/// Reads what is to be saved of `wanted`, dropping from it what KVM refuses.
pub fn save(fd: &VcpuFd, wanted: &mut Vec<u32>) -> Result<Vec<(u32, u64)>, VcpuError> {
    let mut msrs = read(fd, wanted)?;
    msrs.retain(|&(index, value)| value != 0 || !is_bank_control(index));
    Ok(msrs)
}

/// An MSR by which KVM tells of the host itself (KVM_GET_MSRS of /dev/kvm); `None` if it doesn't.
pub fn of_host(index: u32) -> Option<u64> {
    let mut msrs = list(&[entry(index, 0)]).ok()?;
    let got = Kvm::new().ok()?.get_msrs(&mut msrs).ok()?;
    (got == 1).then(|| msrs.as_slice()[0].data)
}

/// Reads one MSR; `None` if KVM refuses it.
pub fn read_one(fd: &VcpuFd, index: u32) -> Result<Option<u64>, VcpuError> {
    let mut msrs = list(&[entry(index, 0)])?;
    let got = fd
        .get_msrs(&mut msrs)
        .map_err(VcpuError::kvm("read an MSR"))?;
    Ok((got == 1).then(|| msrs.as_slice()[0].data))
}

/// Where the guest keeps an account of stolen time; `None` if it doesn't.
pub fn steal_time(fd: &VcpuFd) -> Result<Option<u64>, VcpuError> {
    Ok(read_one(fd, STEAL_TIME)?.filter(|msr| msr & 1 == 1))
}

/// Ranges of MSRs that are [still](is_still): SYSENTER, machine check, memory type ranges, bank controls,
/// VMX capabilities, SYSCALL.
const STILL_RANGES: [std::ops::Range<u32>; 7] = [
    0x174..0x177,
    0x179..0x17c,
    0x200..0x210,
    0x250..0x270,
    BANK_CONTROLS,
    0x480..0x492,
    0xc000_0081..0xc000_0085,
];

/// Single ones, by their names in the kernel's asm/msr-index.h.
const STILL: [u32; 24] = [
    0x34,        // SMI_COUNT: there is no SMM
    0x3a,        // IA32_FEAT_CTL
    TSC_ADJUST,  // KVM keeps it beside the offset
    0x48,        // IA32_SPEC_CTRL
    0x8b,        // IA32_UCODE_REV
    0xce,        // PLATFORM_INFO
    0xfe,        // MTRRcap
    0x10a,       // IA32_ARCH_CAPABILITIES
    0x140,       // MISC_FEATURES_ENABLES
    0x1a0,       // IA32_MISC_ENABLE
    0x1d9,       // IA32_DEBUGCTLMSR
    0x1db,       // IA32_LASTBRANCHFROMIP
    0x1dc,       // IA32_LASTBRANCHTOIP
    0x1dd,       // IA32_LASTINTFROMIP
    0x1de,       // IA32_LASTINTTOIP
    0x1fc,       // IA32_POWER_CTL
    0x277,       // IA32_CR_PAT
    0x2ff,       // MTRRdefType
    0x345,       // IA32_PERF_CAPABILITIES
    0xc000_0102, // KERNEL_GS_BASE
    0xc000_0103, // TSC_AUX
    0xc001_0117, // VM_HSAVE_PA
    0xc001_011f, // AMD64_VIRT_SPEC_CTRL
    0xc001_1029, // AMD64_DE_CFG
];

/// Whether KVM does nothing with such an MSR but keep it for the guest: what was written stays, and says the
/// same whenever it is written. Any other may count, tick, or mean something beside its value, and is not
/// loaded ahead.
pub fn is_still(index: u32) -> bool {
    STILL.contains(&index) || STILL_RANGES.iter().any(|range| range.contains(&index))
}

/// Writes MSRs. KVM stops at the first it refuses: a refusal of zero is passed over (another
/// kernel's counters and the like), any other is an error that names the MSR.
pub fn write(fd: &VcpuFd, msrs: &[(u32, u64)]) -> Result<(), VcpuError> {
    let mut rest = msrs;
    while !rest.is_empty() {
        let entries: Vec<_> = rest
            .iter()
            .map(|&(index, value)| entry(index, value))
            .collect();
        let done = fd
            .set_msrs(&list(&entries)?)
            .map_err(VcpuError::kvm("write the MSRs"))?;
        rest = &rest[done.min(rest.len())..];
        if let Some(((index, value), after)) = rest.split_first() {
            if *value != 0 {
                return Err(VcpuError::MsrRefused {
                    index: *index,
                    value: *value,
                });
            }
            rest = after;
        }
    }
    Ok(())
}

/// MSRs that wait until the guest is ours.
#[derive(Debug, Default)]
pub struct Late(Vec<(u32, u64)>);

/// What late MSRs need to know of the pause.
#[derive(Clone, Copy, Debug)]
pub struct Passed {
    /// What the guest's clocks leave out of it.
    pub held: Duration,
    /// What of it counts as stolen from the vCPU.
    pub stolen: Duration,
    /// What the vCPU's thread has waited for a core so far, in its whole life.
    pub waited: Duration,
}

/// Splits saved MSRs: (plain ones, the TSC deadline, late ones).
pub fn split(msrs: Vec<(u32, u64)>) -> (Vec<(u32, u64)>, Option<u64>, Late) {
    let deadline = msrs
        .iter()
        .find(|(index, _)| *index == TSC_DEADLINE)
        .map(|(_, v)| *v);
    let late = LATE
        .iter()
        .filter_map(|wanted| msrs.iter().find(|(index, _)| index == wanted).copied())
        // Zero is what they are in a fresh vCPU: off.
        .filter(|(_, value)| *value != 0)
        .collect();
    let plain = msrs
        .into_iter()
        .filter(|(index, _)| *index != TSC_DEADLINE && !LATE.contains(index))
        .filter(|(index, _)| !SKIPPED.contains(index))
        .collect();
    (plain, deadline, Late(late))
}

impl Late {
    /// What this MSR is to be; 0 if it stays as it is in a fresh vCPU.
    pub fn of(&self, msr: u32) -> u64 {
        let found = self.0.iter().find(|(index, _)| *index == msr);
        found.map_or(0, |&(_, value)| value)
    }

    /// Whether the guest keeps an account of stolen time.
    pub fn has_steal_time(&self) -> bool {
        self.0.iter().any(|(index, _)| *index == STEAL_TIME)
    }

    /// The wall clock is the machine's, not a vCPU's: one of them loads it, before the others are
    /// far, and nobody's write of it comes twice.
    pub fn without_wall_clock(mut self) -> Self {
        self.0.retain(|(index, _)| *index != WALL_CLOCK);
        self
    }

    /// Loads them. KVM rewrites the guest's wall clock structure with each write of its MSR; what
    /// was there before is right to the bit, but for a pause that was held, so it is put back.
    pub fn load(self, fd: &VcpuFd, memory: &Memory, passed: Passed) -> Result<(), VcpuError> {
        let of = |wanted: u32| self.0.iter().find(|(index, _)| *index == wanted);
        if let Some(&(_, account)) = of(STEAL_TIME) {
            steal::carry(memory, account, passed.stolen, passed.waited);
        }
        let wall = of(WALL_CLOCK).and_then(|(_, value)| {
            let at = GuestAddress(value & !1);
            Some((at, WallClock::read(memory, at)?))
        });
        write(fd, &self.0)?;
        if let Some((at, wall)) = wall {
            let held_ns = u64::try_from(passed.held.as_nanos()).unwrap_or(u64::MAX);
            let right = wall.after_hold(held_ns);
            right.write(memory, at).map_err(|_| VcpuError::WallClock)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_bank_has_one_control() {
        let banks: Vec<u32> = unlisted().filter(|&i| is_bank_control(i)).collect();
        assert_eq!(banks.len(), 32);
        assert_eq!((banks[0], banks[31]), (0x400, 0x47c));
        assert!(!is_bank_control(0x401) && !is_bank_control(0x480));
    }

    #[test]
    fn what_writes_guest_memory_waits_and_the_wall_clock_is_last() {
        let saved = vec![
            (WALL_CLOCK, 0x1000),
            (0x174, 8),
            (TSC_DEADLINE, 99),
            (TSC, 5),
            (SYSTEM_TIME, 0x2001),
            (STEAL_TIME, 0),
            (TSC_ADJUST, 3),
        ];
        let (plain, deadline, late) = split(saved);
        assert_eq!(plain, [(0x174, 8), (TSC_ADJUST, 3)]);
        assert_eq!(deadline, Some(99));
        assert_eq!(late.0, [(SYSTEM_TIME, 0x2001), (WALL_CLOCK, 0x1000)]);
        assert!(!late.has_steal_time(), "zero is off");
        assert_eq!(late.without_wall_clock().0, [(SYSTEM_TIME, 0x2001)]);
    }
}
