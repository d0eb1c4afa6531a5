//! What firmware would have done: a kernel in memory, and vCPU 0 at its entry.
//!
//! Three ways in, found by looking at the file:
//! * ELF with a PVH note: 32-bit protected mode, `hvm_start_info` in EBX
//!   (xenbits.xen.org/docs/unstable/misc/pvh.html);
//! * ELF without: 64-bit mode at its entry address, zero page in RSI (Linux boot protocol,
//!   "64-bit boot protocol");
//! * bzImage: 64-bit mode at load address + 0x200, zero page in RSI.
//!
//! Each of them is told the command line, the initial RAM disk, the memory map, and where the
//! [ACPI tables](acpi) are.
//!
//! Guest-physical layout below 1 MiB:
//!
//! | address | what |
//! |---|---|
//! | `0x500` | GDT |
//! | `0x6000` | PVH start info, modules, memory map |
//! | `0x7000` | Linux zero page |
//! | `0x9000`..`0xf000` | page tables: first 4 GiB one to one, 2 MiB pages |
//! | `0x20000` | command line |
//! | `0xe0000`..`0xffff0` | ACPI tables, reserved in the memory map |
//! | `0xffff0` | code at the reset vector, reserved too |

pub mod acpi;
pub mod cpuid;
mod images;
mod linux64;
mod pvh;
mod reset;
mod segments;

use std::path::Path;

use kvm_bindings::{kvm_regs, kvm_sregs};
use kvm_ioctls::VcpuFd;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use crate::memory::{self, GuestRam, Memory};
use crate::vcpu::msrs;
use acpi::Platform;
pub use images::Images;
pub(crate) use segments::protected_mode as flat_protected_mode;

/// MTRR default type: enabled, write-back. What firmware leaves on a PC.
const MTRR_DEFAULT_TYPE: (u32, u64) = (0x2ff, 0x806);
/// IA32_MISC_ENABLE: fast string operations; neither branch traces nor precise events (SDM vol. 4,
/// table 2-2).
const MISC_ENABLE: (u32, u64) = (0x1a0, 1 | 1 << 11 | 1 << 12);
/// IA32_BIOS_SIGN_ID, AMD's PATCH_LEVEL: the microcode's revision.
const MICROCODE: u32 = 0x8b;

const CMDLINE: GuestAddress = GuestAddress(0x2_0000);
/// Start of RAM that kernels are loaded to.
const HIGH: u64 = 0x10_0000;
/// End of low memory that a guest may use (the EBDA lies above it on a PC).
const LOW_END: u64 = 0x9_fc00;

/// Why a kernel could not be loaded.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// A file could not be opened or read.
    #[error("machine spec: field `{field}`: cannot read {path}: {source}")]
    File {
        /// Field of the spec.
        field: &'static str,
        /// The file.
        path: String,
        /// Why not.
        source: std::io::Error,
    },
    /// Not a kernel.
    #[error(
        "machine spec: field `kernel.path`: {path} is no kernel that can be booted ({reason}); \
         give an ELF vmlinux or a bzImage"
    )]
    NoKernel {
        /// The file.
        path: String,
        /// What is wrong with it.
        reason: String,
    },
    /// Not enough RAM for the kernel.
    #[error(
        "machine spec: field `memory.size`: the kernel does not fit into the guest's RAM; to \
         unpack itself it needs {least_mib} MiB at the least"
    )]
    KernelRoom {
        /// What it needs, MiB.
        least_mib: u64,
    },
    /// Not enough RAM for the initial RAM disk.
    #[error(
        "machine spec: field `kernel.initrd`: {path} of {len_mib} MiB does not fit into the \
         guest's RAM, which has {room_mib} MiB for it above the kernel; raise `memory.size`"
    )]
    Initrd {
        /// The file.
        path: String,
        /// Its size, MiB.
        len_mib: u64,
        /// Room that there is, MiB.
        room_mib: u64,
    },
    /// The kernel would cut the command line off.
    #[error("machine spec: field `kernel.cmdline`: {len} bytes; this kernel takes {most} at most")]
    Cmdline {
        /// Its length.
        len: usize,
        /// What the kernel's header says.
        most: usize,
    },
    /// The boot structures could not be written.
    #[error("cannot write the boot structures into the guest's RAM: {0}")]
    Write(#[from] GuestMemoryError),
    /// KVM refused the registers.
    #[error("KVM refused the boot registers: {0}")]
    Registers(#[from] kvm_ioctls::Error),
}

impl BootError {
    fn file(field: &'static str, path: &Path, source: std::io::Error) -> Self {
        Self::File {
            field,
            path: path.display().to_string(),
            source,
        }
    }
}

/// A range of the memory map given to the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Range {
    start: u64,
    len: u64,
    kind: Kind,
}

/// What is in a range, as e820 has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
enum Kind {
    Ram = 1,
    Reserved = 2,
}

/// What the boot structures of both protocols tell.
#[derive(Debug)]
struct Told {
    map: Vec<Range>,
    /// Address and length.
    initrd: Option<(u64, u64)>,
    rsdp: GuestAddress,
}

/// Where a guest begins.
#[derive(Clone, Copy, Debug)]
pub struct Entry {
    regs: kvm_regs,
    protocol: Protocol,
}

#[derive(Clone, Copy, Debug)]
enum Protocol {
    Pvh,
    Linux64,
}

fn memory_map(size: u64) -> Vec<Range> {
    let range = |start, end, kind| Range {
        start,
        len: end - start,
        kind,
    };
    let mut map = vec![
        range(0, LOW_END, Kind::Ram),
        // The ACPI tables are in here.
        range(LOW_END, HIGH, Kind::Reserved),
    ];
    for (start, len) in memory::ranges(size) {
        let end = start.0 + len;
        map.push(range(start.0.max(HIGH), end, Kind::Ram));
    }
    map.push(range(
        memory::KVM_PRIVATE.start,
        memory::KVM_PRIVATE.end,
        Kind::Reserved,
    ));
    map.sort_by_key(|range| range.start);
    map
}

/// Loads kernel, initrd, command line, ACPI tables and boot structures into fresh RAM.
pub fn load(images: &mut Images, ram: &GuestRam, platform: &Platform) -> Result<Entry, BootError> {
    let memory = ram.map();
    let kernel = images.load_kernel(ram)?;
    let cmdline = images.cmdline(&kernel)?;
    write_cmdline(memory, cmdline)?;
    let told = Told {
        map: memory_map(ram.size()),
        initrd: images.load_initrd(ram, &kernel)?,
        rsdp: acpi::write(memory, platform)?,
    };
    reset::write(memory)?;
    segments::write_tables(memory)?;
    let mut regs = kvm_regs {
        rip: kernel.entry,
        rflags: 2,
        rsp: 0x8ff0,
        ..Default::default()
    };
    match kernel.protocol {
        Protocol::Pvh => regs.rbx = pvh::write(memory, &told)?.0,
        Protocol::Linux64 => regs.rsi = linux64::write(memory, &told, kernel.header)?.0,
    }
    Ok(Entry {
        regs,
        protocol: kernel.protocol,
    })
}

/// Writes it with the zero byte that ends it.
fn write_cmdline(memory: &Memory, cmdline: &str) -> Result<(), GuestMemoryError> {
    memory.write_slice(cmdline.as_bytes(), CMDLINE)?;
    memory.write_obj(0u8, GuestAddress(CMDLINE.0 + cmdline.len() as u64))
}

impl Entry {
    /// Puts vCPU 0 at the entry.
    pub fn apply(&self, vcpu: &VcpuFd) -> Result<(), BootError> {
        let mut sregs: kvm_sregs = vcpu.get_sregs()?;
        match self.protocol {
            Protocol::Pvh => segments::protected_mode(&mut sregs),
            Protocol::Linux64 => segments::long_mode(&mut sregs),
        }
        vcpu.set_sregs(&sregs)?;
        vcpu.set_regs(&self.regs)?;
        Ok(())
    }
}

/// Leaves MSRs as firmware does. A KVM that refuses one of them boots Linux all the same, which
/// then sets its own.
pub fn leave_msrs(vcpu: &VcpuFd) {
    // By the host's revision a kernel judges which mitigations the processor has.
    let microcode = msrs::of_host(MICROCODE).map(|revision| (MICROCODE, revision));
    for msr in [MTRR_DEFAULT_TYPE, MISC_ENABLE]
        .into_iter()
        .chain(microcode)
    {
        let _ = msrs::write(vcpu, &[msr]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_memory_map_has_all_of_ram_and_not_the_hole() {
        for size in [16 << 20, 3 << 30, 8 << 30] {
            let map = memory_map(size);
            assert!(map.windows(2).all(|w| w[0].start + w[0].len <= w[1].start));
            let ram = map.iter().filter(|range| range.kind == Kind::Ram);
            let sum: u64 = ram.clone().map(|range| range.len).sum();
            assert_eq!(sum, size - (HIGH - LOW_END), "{size:#x}");
            let hole = memory::HOLE_START..memory::HOLE_END;
            let ends_in_hole = |r: &Range| hole.contains(&(r.start + r.len - 1));
            assert!(!ram.clone().any(ends_in_hole));
            assert!(ram.clone().any(|r| r.start >= 4 << 30) == (size > 3 << 30));
        }
    }

    #[test]
    fn the_acpi_tables_lie_in_reserved_memory() {
        let map = memory_map(1 << 30);
        let holds = |r: &Range| (r.start..r.start + r.len).contains(&acpi::RSDP.0);
        let range = map.iter().find(|range| holds(range)).expect("in the map");
        assert_eq!(range.kind, Kind::Reserved);
    }
}
