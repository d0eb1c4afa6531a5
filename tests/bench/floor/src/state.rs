//! Everything KVM keeps of a guest, as plain structures for one message.
#![allow(unsafe_code)] // structures to bytes and back; kvm_xsave

use anyhow::{Context, Result, ensure};
use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, Msrs, kvm_clock_data,
    kvm_debugregs, kvm_irqchip, kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_pit_state2,
    kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};

/// MSRs at most.
const MSRS: usize = 64;

/// MSRs that are moved where KVM lists them: TSC, system calls, PAT, machine check, KVM's own.
#[rustfmt::skip]
const LISTED: [u32; 22] = [
    0x10, 0x3b, 0x48, 0x140, 0x174, 0x175, 0x176, 0x17a, 0x17b, 0x1a0, 0x277, 0xc000_0081,
    0xc000_0082, 0xc000_0083, 0xc000_0084, 0xc000_0102, 0xc000_0103, 0x4b56_4d00, 0x4b56_4d01,
    0x4b56_4d02, 0x4b56_4d03, 0x4b56_4d04,
];

/// The MTRRs, which KVM has but does not list.
#[rustfmt::skip]
const MTRRS: [u32; 20] = [
    0x200, 0x201, 0x202, 0x203, 0x204, 0x205, 0x206, 0x207, 0x250, 0x258, 0x259, 0x268, 0x269,
    0x26a, 0x26b, 0x26c, 0x26d, 0x26e, 0x26f, 0x2ff,
];

/// The last to be set: KVM drops it unless the local APIC is in that mode already.
const TSC_DEADLINE: u32 = 0x6e0;

/// One vCPU.
#[repr(C)]
pub(crate) struct VcpuState {
    mp_state: kvm_mp_state,
    regs: kvm_regs,
    sregs: kvm_sregs,
    xsave: kvm_xsave,
    xcrs: kvm_xcrs,
    debugregs: kvm_debugregs,
    events: kvm_vcpu_events,
    lapic: kvm_lapic_state,
    msrs: [kvm_msr_entry; MSRS],
}

/// What the vCPUs share, and the devices' few registers.
#[repr(C)]
pub(crate) struct VmState {
    irqchips: [kvm_irqchip; 3],
    pit: kvm_pit_state2,
    clock: kvm_clock_data,
    /// Registers of the probe device.
    pub(crate) scratch: u64,
    /// See `scratch`.
    pub(crate) table: u64,
    /// When the first vCPU was kicked, CLOCK_MONOTONIC.
    pub(crate) kicked_ns: u64,
}

/// Structures of integers alone: any bytes are a value, and every byte may be sent.
///
/// # Safety
/// The type has no pointers, no references and no values that are forbidden.
pub(crate) unsafe trait Plain: Sized {
    /// All zeros, on the heap.
    fn zeroed() -> Box<Self> {
        // SAFETY: zeros are a value of such a type.
        unsafe { Box::<Self>::new_zeroed().assume_init() }
    }

    /// Its bytes.
    fn bytes(&self) -> &[u8] {
        // SAFETY: padding was zeroed when the structure was made.
        unsafe { std::slice::from_raw_parts((&raw const *self).cast(), size_of::<Self>()) }
    }

    /// A copy from bytes.
    fn from_bytes(bytes: &[u8]) -> Result<Box<Self>> {
        ensure!(
            bytes.len() == size_of::<Self>(),
            "state of {} bytes",
            bytes.len()
        );
        let mut state = Self::zeroed();
        // SAFETY: the lengths agree, and any bytes are a value.
        unsafe {
            let to = (&raw mut *state).cast::<u8>();
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len());
        }
        Ok(state)
    }
}

// SAFETY: C structures of integers.
unsafe impl Plain for VcpuState {}
// SAFETY: the same.
unsafe impl Plain for VmState {}

/// The MSRs to move, in order.
pub(crate) fn msr_list(kvm: &Kvm) -> Result<Msrs> {
    let has = kvm.get_msr_index_list().context("KVM_GET_MSR_INDEX_LIST")?;
    let listed = LISTED
        .into_iter()
        .filter(|index| has.as_slice().contains(index));
    let entries: Vec<_> = listed
        .chain(MTRRS)
        .chain([TSC_DEADLINE])
        .map(|index| kvm_msr_entry {
            index,
            ..Default::default()
        })
        .collect();
    Msrs::from_entries(&entries).map_err(|e| anyhow::anyhow!("list of MSRs: {e:?}"))
}

impl VcpuState {
    /// Reads all of a stopped vCPU, in its own thread.
    pub(crate) fn get(vcpu: &VcpuFd, msrs: &mut Msrs) -> Result<Box<Self>> {
        let mut state = Self::zeroed();
        // First: it may act on a pending INIT or SIPI.
        state.mp_state = vcpu.get_mp_state().context("KVM_GET_MP_STATE")?;
        state.regs = vcpu.get_regs().context("KVM_GET_REGS")?;
        state.sregs = vcpu.get_sregs().context("KVM_GET_SREGS")?;
        state.xsave = vcpu.get_xsave().context("KVM_GET_XSAVE")?;
        state.xcrs = vcpu.get_xcrs().context("KVM_GET_XCRS")?;
        state.debugregs = vcpu.get_debug_regs().context("KVM_GET_DEBUGREGS")?;
        state.events = vcpu.get_vcpu_events().context("KVM_GET_VCPU_EVENTS")?;
        state.lapic = vcpu.get_lapic().context("KVM_GET_LAPIC")?;
        let all = msrs.as_slice().len();
        let got = vcpu.get_msrs(msrs).context("KVM_GET_MSRS")?;
        ensure!(
            got == all,
            "KVM_GET_MSRS stopped at {:#x}",
            msrs.as_slice()[got].index
        );
        state.msrs[..all].copy_from_slice(msrs.as_slice());
        Ok(state)
    }

    /// Writes all of it to a new vCPU, in its own thread.
    pub(crate) fn set(&self, vcpu: &VcpuFd, msrs: &mut Msrs) -> Result<()> {
        vcpu.set_mp_state(self.mp_state)
            .context("KVM_SET_MP_STATE")?;
        vcpu.set_sregs(&self.sregs).context("KVM_SET_SREGS")?;
        vcpu.set_regs(&self.regs).context("KVM_SET_REGS")?;
        // SAFETY: KVM reads 4096 bytes, unless a feature with more was permitted: none was.
        unsafe { vcpu.set_xsave(&self.xsave) }.context("KVM_SET_XSAVE")?;
        vcpu.set_xcrs(&self.xcrs).context("KVM_SET_XCRS")?;
        vcpu.set_debug_regs(&self.debugregs)
            .context("KVM_SET_DEBUGREGS")?;
        vcpu.set_lapic(&self.lapic).context("KVM_SET_LAPIC")?;
        let all = msrs.as_slice().len();
        msrs.as_mut_slice().copy_from_slice(&self.msrs[..all]);
        let set = vcpu.set_msrs(msrs).context("KVM_SET_MSRS")?;
        ensure!(
            set == all,
            "KVM_SET_MSRS stopped at {:#x}",
            msrs.as_slice()[set].index
        );
        vcpu.set_vcpu_events(&self.events)
            .context("KVM_SET_VCPU_EVENTS")
    }
}

impl VmState {
    /// Reads what the vCPUs share, while all are stopped.
    pub(crate) fn get(vm: &VmFd) -> Result<Box<Self>> {
        let mut state = Self::zeroed();
        let chips = [
            KVM_IRQCHIP_PIC_MASTER,
            KVM_IRQCHIP_PIC_SLAVE,
            KVM_IRQCHIP_IOAPIC,
        ];
        for (chip, id) in state.irqchips.iter_mut().zip(chips) {
            chip.chip_id = id;
            vm.get_irqchip(chip).context("KVM_GET_IRQCHIP")?;
        }
        state.pit = vm.get_pit2().context("KVM_GET_PIT2")?;
        state.clock = vm.get_clock().context("KVM_GET_CLOCK")?;
        Ok(state)
    }

    /// Writes it to a new VM.
    pub(crate) fn set(&self, vm: &VmFd) -> Result<()> {
        for chip in &self.irqchips {
            vm.set_irqchip(chip).context("KVM_SET_IRQCHIP")?;
        }
        vm.set_pit2(&self.pit).context("KVM_SET_PIT2")?;
        let clock = kvm_clock_data {
            clock: self.clock.clock,
            ..Default::default()
        };
        vm.set_clock(&clock).context("KVM_SET_CLOCK")
    }
}
