//! PVH start info (xenbits.xen.org/docs/unstable/misc/pvh.html, `struct hvm_start_info`).

use linux_loader::loader::elf::start_info::{
    hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info,
};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use super::{CMDLINE, Told};
use crate::memory::Memory;

const START_INFO: GuestAddress = GuestAddress(0x6000);
const MODULES: u64 = 0x6100;
const MEMORY_MAP: u64 = 0x6200;
/// `XEN_HVM_START_MAGIC_VALUE`.
const MAGIC: u32 = 0x336e_c578;

/// Writes it; gives its address.
pub(super) fn write(memory: &Memory, told: &Told) -> Result<GuestAddress, GuestMemoryError> {
    let mut at = MEMORY_MAP;
    for range in &told.map {
        let entry = hvm_memmap_table_entry {
            addr: range.start,
            size: range.len,
            type_: range.kind as u32,
            reserved: 0,
        };
        memory.write_obj(entry, GuestAddress(at))?;
        at += size_of::<hvm_memmap_table_entry>() as u64;
    }
    if let Some((start, len)) = told.initrd {
        let module = hvm_modlist_entry {
            paddr: start,
            size: len,
            ..Default::default()
        };
        memory.write_obj(module, GuestAddress(MODULES))?;
    }
    let info = hvm_start_info {
        magic: MAGIC,
        version: 1,
        nr_modules: u32::from(told.initrd.is_some()),
        modlist_paddr: if told.initrd.is_some() { MODULES } else { 0 },
        cmdline_paddr: CMDLINE.0,
        rsdp_paddr: told.rsdp.0,
        memmap_paddr: MEMORY_MAP,
        memmap_entries: u32::try_from(told.map.len()).unwrap_or(0),
        ..Default::default()
    };
    memory.write_obj(info, START_INFO)?;
    Ok(START_INFO)
}
