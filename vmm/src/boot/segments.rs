//! Segments, descriptor table and page tables of a vCPU at its entry.

use kvm_bindings::{kvm_segment, kvm_sregs};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use crate::memory::Memory;

const GDT: u64 = 0x500;
const PML4: u64 = 0x9000;
const PDPT: u64 = 0xa000;
const PAGE_DIRECTORIES: u64 = 0xb000;

const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;

/// Descriptors (SDM vol. 3, 3.4.5): null, code 32, code 64, data, TSS (two entries' worth).
const DESCRIPTORS: [u64; 6] = [
    0,
    0x00cf_9b00_0000_ffff,
    0x00af_9b00_0000_ffff,
    0x00cf_9300_0000_ffff,
    0x0000_8b00_0000_ffff,
    0,
];
const CODE_32: u16 = 0x08;
const CODE_64: u16 = 0x10;
const DATA: u16 = 0x18;
const TSS: u16 = 0x20;

/// Writes the GDT, and page tables that map the first 4 GiB one to one with 2 MiB pages.
pub(super) fn write_tables(memory: &Memory) -> Result<(), GuestMemoryError> {
    for (at, descriptor) in (GDT..).step_by(8).zip(DESCRIPTORS) {
        memory.write_obj(descriptor, GuestAddress(at))?;
    }
    memory.write_obj(PDPT | 3, GuestAddress(PML4))?;
    for gib in 0..4 {
        let directory = PAGE_DIRECTORIES + gib * 0x1000;
        memory.write_obj(directory | 3, GuestAddress(PDPT + gib * 8))?;
        for page in 0..512 {
            let target = gib << 30 | page << 21;
            memory.write_obj(target | 0x83, GuestAddress(directory + page * 8))?;
        }
    }
    Ok(())
}

fn segment(selector: u16, type_: u8, long: bool) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector,
        type_,
        present: 1,
        dpl: 0,
        db: u8::from(!long),
        s: 1,
        l: u8::from(long),
        g: 1,
        avl: 0,
        unusable: 0,
        padding: 0,
    }
}

fn flat(sregs: &mut kvm_sregs, code: kvm_segment) {
    let data = segment(DATA, 3, false);
    sregs.cs = code;
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    // A busy 32-bit TSS: entering a guest without a valid one fails on VMX.
    sregs.tr = kvm_segment {
        limit: 0xffff,
        type_: 11,
        s: 0,
        g: 0,
        db: 0,
        ..segment(TSS, 11, false)
    };
    sregs.gdt.base = GDT;
    sregs.gdt.limit = 8 * 6 - 1;
}

/// PVH: flat 32-bit protected mode, paging off.
pub(crate) fn protected_mode(sregs: &mut kvm_sregs) {
    flat(sregs, segment(CODE_32, 11, false));
    sregs.cr0 = CR0_PE | CR0_ET;
    sregs.cr4 = 0;
    sregs.efer = 0;
}

/// Linux's 64-bit entry: long mode, the tables of [`write_tables`].
pub(super) fn long_mode(sregs: &mut kvm_sregs) {
    flat(sregs, segment(CODE_64, 11, true));
    sregs.cr0 = CR0_PE | CR0_ET | CR0_PG;
    sregs.cr3 = PML4;
    sregs.cr4 = CR4_PAE;
    sregs.efer = EFER_LME | EFER_LMA;
}
