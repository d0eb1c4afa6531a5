//! Loads pulse and sets the first vCPU at its entry.

use std::fs::File;
use std::path::Path;

use anyhow::{Context, Result, bail};
use kvm_bindings::{kvm_regs, kvm_segment};
use kvm_ioctls::VcpuFd;
use linux_loader::loader::elf::start_info::{hvm_memmap_table_entry, hvm_start_info};
use linux_loader::loader::elf::{Elf, PvhBootCapability};
use linux_loader::loader::{KernelLoader, bootparam};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use crate::Entry;

const START_INFO: u64 = 0x6000;
const MEMORY_MAP: u64 = 0x6800;
const ZERO_PAGE: u64 = 0x7000;
const PAGE_TABLES: u64 = 0x9000;
const COMMAND_LINE: u64 = 0x2_0000;
const START_INFO_MAGIC: u32 = 0x336e_c578;
const RAM: u32 = 1;

const CR0_PE: u64 = 1;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME_LMA: u64 = 0x500;

/// Where to start, and in which way.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Start {
    /// In 32-bit mode.
    Pvh(u64),
    /// In long mode.
    Linux(u64),
}

/// Puts the image, the command line and the memory map where the guest will look for them.
pub(crate) fn load(
    memory: &GuestMemoryMmap,
    kernel: &Path,
    cmdline: &str,
    entry: Entry,
) -> Result<Start> {
    let mut file = File::open(kernel).with_context(|| format!("open {}", kernel.display()))?;
    let image = Elf::load(memory, None, &mut file, None)
        .with_context(|| format!("load {}", kernel.display()))?;
    let line = [cmdline.as_bytes(), b"\0"].concat();
    memory
        .write_slice(&line, GuestAddress(COMMAND_LINE))
        .context("command line")?;
    match (entry, image.pvh_boot_cap) {
        (Entry::Pvh, PvhBootCapability::PvhEntryPresent(entry)) => {
            load_pvh(memory)?;
            Ok(Start::Pvh(entry.0))
        }
        (Entry::Pvh, _) => bail!("{} has no PVH note", kernel.display()),
        (Entry::Linux, _) => {
            load_linux(memory)?;
            Ok(Start::Linux(image.kernel_load.0))
        }
    }
}

fn load_pvh(memory: &GuestMemoryMmap) -> Result<()> {
    let mut entries = 0;
    for (index, region) in memory.iter().enumerate() {
        let entry = hvm_memmap_table_entry {
            addr: region.start_addr().0,
            size: region.len(),
            type_: RAM,
            reserved: 0,
        };
        let at = MEMORY_MAP + (index * size_of::<hvm_memmap_table_entry>()) as u64;
        memory
            .write_obj(entry, GuestAddress(at))
            .context("memory map")?;
        entries += 1;
    }
    let info = hvm_start_info {
        magic: START_INFO_MAGIC,
        version: 1,
        cmdline_paddr: COMMAND_LINE,
        memmap_paddr: MEMORY_MAP,
        memmap_entries: entries,
        ..Default::default()
    };
    memory
        .write_obj(info, GuestAddress(START_INFO))
        .context("start info")
}

fn load_linux(memory: &GuestMemoryMmap) -> Result<()> {
    let mut params = bootparam::boot_params::default();
    params.hdr.cmd_line_ptr = COMMAND_LINE as u32;
    for (index, region) in memory.iter().enumerate() {
        params.e820_table[index] = bootparam::boot_e820_entry {
            addr: region.start_addr().0,
            size: region.len(),
            r#type: RAM,
        };
        params.e820_entries += 1;
    }
    memory
        .write_obj(params, GuestAddress(ZERO_PAGE))
        .context("zero page")?;
    // One PML4, one PDPT, one page directory: the first GiB.
    let put = |at: u64, value: u64| memory.write_obj(value, GuestAddress(at));
    put(PAGE_TABLES, (PAGE_TABLES + 0x1000) | 3).context("page tables")?;
    put(PAGE_TABLES + 0x1000, (PAGE_TABLES + 0x2000) | 3).context("page tables")?;
    for entry in 0..512 {
        put(PAGE_TABLES + 0x2000 + 8 * entry, (entry << 21) | 0x83).context("page tables")?;
    }
    Ok(())
}

/// Sets the registers for the entry.
pub(crate) fn enter(vcpu: &VcpuFd, _: &GuestMemoryMmap, start: Start) -> Result<()> {
    let mut sregs = vcpu.get_sregs().context("KVM_GET_SREGS")?;
    let code = kvm_segment {
        limit: 0xffff_ffff,
        selector: 0x8,
        type_: 0xb,
        present: 1,
        s: 1,
        g: 1,
        db: 1,
        ..Default::default()
    };
    let data = kvm_segment {
        selector: 0x10,
        type_: 0x3,
        ..code
    };
    (sregs.ds, sregs.es, sregs.ss, sregs.fs, sregs.gs) = (data, data, data, data, data);
    sregs.tr = kvm_segment {
        limit: 0x67,
        selector: 0x18,
        type_: 0xb,
        present: 1,
        ..Default::default()
    };
    let mut regs = kvm_regs {
        rflags: 2,
        ..Default::default()
    };
    match start {
        Start::Pvh(entry) => {
            sregs.cs = code;
            sregs.cr0 |= CR0_PE;
            (regs.rip, regs.rbx) = (entry, START_INFO);
        }
        Start::Linux(entry) => {
            sregs.cs = kvm_segment {
                l: 1,
                db: 0,
                ..code
            };
            sregs.cr0 |= CR0_PE | CR0_PG;
            sregs.cr4 |= CR4_PAE;
            sregs.cr3 = PAGE_TABLES;
            sregs.efer |= EFER_LME_LMA;
            (regs.rip, regs.rsi) = (entry, ZERO_PAGE);
        }
    }
    vcpu.set_sregs(&sregs).context("KVM_SET_SREGS")?;
    vcpu.set_regs(&regs).context("KVM_SET_REGS")
}
