//! A VM over guest memory, ready to be booted or to be given a guest.
#![allow(unsafe_code)] // memory slots

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::mpsc::{Receiver, channel};

use anyhow::{Context, Result, bail};
use kvm_bindings::{
    CpuId, KVM_MAX_CPUID_ENTRIES, KVM_PIT_SPEAKER_DUMMY, kvm_pit_config,
    kvm_userspace_memory_region,
};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use vm_memory::{GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use crate::devices::Devices;
use crate::state::{VcpuState, VmState, msr_list};
use crate::vcpu::{News, Vcpu, install_kick};
use crate::wire::now_ns;

/// Where VMX wants some pages of its own, unused by the guest.
const TSS_ADDRESS: usize = 0xfffb_d000;

/// A VM and its threads.
pub(crate) struct Machine {
    vm: VmFd,
    vcpus: Vec<Vcpu>,
    news: Receiver<News>,
    /// Its devices.
    pub(crate) devices: Arc<Devices>,
    /// Frequency of the guest's TSC.
    pub(crate) tsc_khz: u32,
}

/// All state of a machine.
pub(crate) struct MachineState {
    /// What the vCPUs share.
    pub(crate) vm: Box<VmState>,
    /// Each vCPU, in order.
    pub(crate) vcpus: Vec<Box<VcpuState>>,
}

impl Machine {
    /// Makes it; `prepare` is given each vCPU before its thread takes it.
    pub(crate) fn new(
        memory: &GuestMemoryMmap,
        count: usize,
        devices: Devices,
        prepare: impl Fn(usize, &VcpuFd) -> Result<()>,
    ) -> Result<Self> {
        install_kick()?;
        let kvm = Kvm::new().context("open /dev/kvm")?;
        let vm = kvm.create_vm().context("KVM_CREATE_VM")?;
        vm.set_tss_address(TSS_ADDRESS)
            .context("KVM_SET_TSS_ADDR")?;
        vm.create_irq_chip().context("KVM_CREATE_IRQCHIP")?;
        let pit = kvm_pit_config {
            flags: KVM_PIT_SPEAKER_DUMMY,
            ..Default::default()
        };
        vm.create_pit2(pit).context("KVM_CREATE_PIT2")?;
        add_memory(&vm, memory)?;

        let devices = Arc::new(devices);
        let cpuid = kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .context("supported CPUID")?;
        let msrs = msr_list(&kvm)?;
        let (sender, news) = channel();
        let mut vcpus = Vec::new();
        let mut tsc_khz = 0;
        for index in 0..count {
            let fd = vm.create_vcpu(index as u64).context("KVM_CREATE_VCPU")?;
            fd.set_cpuid2(&cpuid_of(&cpuid, index, count))
                .context("KVM_SET_CPUID2")?;
            tsc_khz = fd.get_tsc_khz().context("KVM_GET_TSC_KHZ")?;
            prepare(index, &fd)?;
            let devices = Arc::clone(&devices);
            vcpus.push(Vcpu::spawn(
                index,
                fd,
                msrs.clone(),
                devices,
                sender.clone(),
            )?);
        }
        Ok(Self {
            vm,
            vcpus,
            news,
            devices,
            tsc_khz,
        })
    }

    /// Lets a freshly booted guest run.
    pub(crate) fn boot(&self) -> Result<()> {
        self.vcpus.iter().try_for_each(|vcpu| vcpu.start(None))?;
        self.wait_running()?;
        Ok(())
    }

    /// Stops the guest for good and takes all of its state.
    pub(crate) fn take(&self) -> Result<MachineState> {
        let kicked_ns = now_ns();
        self.vcpus.iter().try_for_each(Vcpu::kick)?;
        let mut states: Vec<Option<Box<VcpuState>>> = self.vcpus.iter().map(|_| None).collect();
        for _ in 0..self.vcpus.len() {
            match self.news.recv().context("wait for the vCPUs")? {
                News::Stopped(index, state) => states[index] = Some(state),
                News::Failed(error) => return Err(error),
                News::Running(_) => bail!("a vCPU started while it was to stop"),
            }
        }
        let mut vm = VmState::get(&self.vm)?;
        vm.scratch = self.devices.scratch.load(Relaxed);
        vm.table = self.devices.table.load(Relaxed);
        vm.kicked_ns = kicked_ns;
        let vcpus = states.into_iter().flatten().collect();
        Ok(MachineState { vm, vcpus })
    }

    /// Gives the machine a guest and lets it run. Returns when the last vCPU entered it.
    pub(crate) fn give(&self, state: MachineState) -> Result<u64> {
        state.vm.set(&self.vm)?;
        // Before any vCPU runs, or it would find them at zero.
        self.devices.scratch.store(state.vm.scratch, Relaxed);
        self.devices.table.store(state.vm.table, Relaxed);
        for (vcpu, state) in self.vcpus.iter().zip(state.vcpus) {
            vcpu.start(Some(state))?;
        }
        self.wait_running()
    }

    /// A failure that a vCPU met since.
    pub(crate) fn failure(&self) -> Option<anyhow::Error> {
        match self.news.try_recv() {
            Ok(News::Failed(error)) => Some(error),
            _ => None,
        }
    }

    fn wait_running(&self) -> Result<u64> {
        let mut last = 0;
        for _ in 0..self.vcpus.len() {
            match self.news.recv().context("wait for the vCPUs")? {
                News::Running(at) => last = last.max(at),
                News::Failed(error) => return Err(error),
                News::Stopped(..) => bail!("a vCPU stopped while it was to start"),
            }
        }
        Ok(last)
    }
}

fn add_memory(vm: &VmFd, memory: &GuestMemoryMmap) -> Result<()> {
    for (slot, region) in memory.iter().enumerate() {
        let slot = kvm_userspace_memory_region {
            slot: slot as u32,
            flags: 0,
            guest_phys_addr: region.start_addr().0,
            memory_size: region.len(),
            userspace_addr: region.as_ptr() as u64,
        };
        // SAFETY: the mapping is kept to the end of the process, and slots do not overlap.
        unsafe { vm.set_user_memory_region(slot) }.context("KVM_SET_USER_MEMORY_REGION")?;
    }
    Ok(())
}

/// The host's CPUID, with this vCPU's APIC id and the TSC-deadline timer, which KVM's in-kernel
/// local APIC has but does not announce.
fn cpuid_of(supported: &CpuId, index: usize, count: usize) -> CpuId {
    let id = index as u32;
    let mut cpuid = supported.clone();
    for entry in cpuid.as_mut_slice() {
        match entry.function {
            0x1 => {
                entry.ebx = (entry.ebx & 0xffff) | id << 24 | (count as u32) << 16;
                entry.ecx |= 1 << 24 | 1 << 31;
            }
            0xb | 0x1f => entry.edx = id,
            0x8000_001e => entry.eax = id,
            _ => {}
        }
    }
    cpuid
}
