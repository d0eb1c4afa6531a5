//! What firmware would have done: a kernel in memory, and vCPU 0 at its entry.
//!
//! Three ways in, found by looking at the file:
//! * ELF with a PVH note: 32-bit protected mode, `hvm_start_info` in EBX
//!   (xenbits.xen.org/docs/unstable/misc/pvh.html);
//! * ELF without: 64-bit mode at its entry address, zero page in RSI (Linux boot protocol,
//!   "64-bit boot protocol");
//! * bzImage: 64-bit mode at load address + 0x200, zero page in RSI.
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

pub mod cpuid;
mod linux64;
mod pvh;
mod segments;

pub(crate) use segments::protected_mode as flat_protected_mode;

use std::fs::File;
use std::path::Path;

use kvm_bindings::{kvm_regs, kvm_sregs};
use kvm_ioctls::VcpuFd;
use linux_loader::loader::elf::PvhBootCapability;
use linux_loader::loader::{BzImage, Elf, KernelLoader, KernelLoaderResult};
use stillpoint_control::spec::KernelSpec;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, ReadVolatile};

use crate::memory::{self, GuestRam, Memory};

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
    /// Not enough RAM.
    #[error("machine spec: field `memory.size`: {what} does not fit into the guest's RAM")]
    NoRoom {
        /// What was to be placed.
        what: &'static str,
    },
    /// KVM refused the registers.
    #[error("KVM refused the boot registers: {0}")]
    Registers(#[from] kvm_ioctls::Error),
}

/// A range of the memory map given to the guest.
#[derive(Clone, Copy, Debug)]
struct Range {
    start: u64,
    len: u64,
    /// e820 type: 1 RAM, 2 reserved.
    kind: u32,
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

/// Files of a kernel, opened before any guest code runs.
#[derive(Debug)]
pub struct Images {
    spec: KernelSpec,
    kernel: File,
    initrd: Option<File>,
}

impl Images {
    /// Opens what the spec names.
    pub fn open(spec: &KernelSpec) -> Result<Self, BootError> {
        let open = |field, path: &Path| {
            let error = |source| BootError::File {
                field,
                path: path.display().to_string(),
                source,
            };
            let file = File::open(path).map_err(error)?;
            // A directory opens too, and fails only when read.
            if !file.metadata().map_err(error)?.is_file() {
                return Err(error(std::io::Error::other("not a regular file")));
            }
            Ok(file)
        };
        let kernel = open("kernel.path", &spec.path)?;
        let initrd = spec
            .initrd
            .as_deref()
            .map(|path| open("kernel.initrd", path))
            .transpose()?;
        Ok(Self {
            spec: spec.clone(),
            kernel,
            initrd,
        })
    }
}

fn memory_map(size: u64) -> Vec<Range> {
    let mut map = vec![
        Range {
            start: 0,
            len: LOW_END,
            kind: 1,
        },
        Range {
            start: LOW_END,
            len: HIGH - LOW_END,
            kind: 2,
        },
    ];
    map.extend(
        memory::ranges(size)
            .into_iter()
            .map(|(start, len)| match start.0 {
                0 => Range {
                    start: HIGH,
                    len: len - HIGH,
                    kind: 1,
                },
                start => Range {
                    start,
                    len,
                    kind: 1,
                },
            }),
    );
    map
}

/// Loads kernel, initrd, command line and boot structures into fresh RAM.
pub fn load(images: &mut Images, ram: &GuestRam) -> Result<Entry, BootError> {
    let memory = ram.map();
    let loaded = load_kernel(images, memory)?;
    let initrd = load_initrd(images, ram, loaded.kernel_end)?;
    let mut cmdline = images.spec.cmdline.clone().into_bytes();
    cmdline.push(0);
    memory
        .write_slice(&cmdline, CMDLINE)
        .map_err(|_| BootError::NoRoom {
            what: "the command line",
        })?;
    let map = memory_map(ram.size());
    let place = |what| move |_| BootError::NoRoom { what };
    segments::write_tables(memory).map_err(place("the page tables"))?;
    if let PvhBootCapability::PvhEntryPresent(entry) = loaded.pvh_boot_cap {
        let info = pvh::write(memory, &map, initrd).map_err(place("the start info"))?;
        let regs = kvm_regs {
            rip: entry.0,
            rbx: info.0,
            rflags: 2,
            rsp: 0x8ff0,
            ..Default::default()
        };
        return Ok(Entry {
            regs,
            protocol: Protocol::Pvh,
        });
    }
    let zero_page = linux64::write(memory, &map, initrd, &loaded, cmdline.len() - 1)
        .map_err(place("the zero page"))?;
    let entry = match loaded.setup_header {
        Some(_) => loaded.kernel_load.0 + 0x200,
        None => loaded.kernel_load.0,
    };
    let regs = kvm_regs {
        rip: entry,
        rsi: zero_page.0,
        rflags: 2,
        rsp: 0x8ff0,
        ..Default::default()
    };
    Ok(Entry {
        regs,
        protocol: Protocol::Linux64,
    })
}

fn load_kernel(images: &mut Images, memory: &Memory) -> Result<KernelLoaderResult, BootError> {
    let path = images.spec.path.display().to_string();
    let no_kernel = |reason: String| BootError::NoKernel {
        path: path.clone(),
        reason,
    };
    let high = Some(GuestAddress(HIGH));
    match Elf::load(memory, None, &mut images.kernel, high) {
        Ok(loaded) => Ok(loaded),
        Err(elf) => match BzImage::load(memory, None, &mut images.kernel, high) {
            Ok(loaded) => Ok(loaded),
            Err(bz) => Err(no_kernel(format!("as an ELF: {elf}; as a bzImage: {bz}"))),
        },
    }
}

fn load_initrd(
    images: &mut Images,
    ram: &GuestRam,
    kernel_end: u64,
) -> Result<Option<(u64, u64)>, BootError> {
    let Some(file) = &mut images.initrd else {
        return Ok(None);
    };
    let no_room = BootError::NoRoom { what: "the initrd" };
    let len = file.metadata().map(|m| m.len()).unwrap_or(0);
    // As high as possible below the hole (Linux boot protocol: below initrd_addr_max, 2 GiB - 1).
    let top = ram.size().min(0x7fff_f000);
    let Some(start) = top.checked_sub(len).map(|start| start & !0xfff) else {
        return Err(no_room);
    };
    let size = usize::try_from(len).unwrap_or(usize::MAX);
    if start < kernel_end || !ram.map().check_range(GuestAddress(start), size) {
        return Err(no_room);
    }
    let target = ram
        .map()
        .get_slice(GuestAddress(start), size)
        .map_err(|_| no_room)?;
    file.read_exact_volatile(
        &mut target
            .offset(0)
            .map_err(|_| BootError::NoRoom { what: "the initrd" })?,
    )
    .map_err(|e| BootError::File {
        field: "kernel.initrd",
        path: images
            .spec
            .initrd
            .as_deref()
            .unwrap_or(Path::new(""))
            .display()
            .to_string(),
        source: std::io::Error::other(e.to_string()),
    })?;
    Ok(Some((start, len)))
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

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use stillpoint_control::spec::MemorySpec;

    fn load_bytes(bytes: &[u8], ram_mib: u64) -> Result<Entry, BootError> {
        let mut file = tempfile::NamedTempFile::new().expect("temp file");
        file.write_all(bytes).expect("write");
        let spec = KernelSpec {
            path: file.path().into(),
            initrd: None,
            cmdline: "x".into(),
        };
        let ram = GuestRam::create(&MemorySpec {
            size: ram_mib << 20,
            ..Default::default()
        });
        load(&mut Images::open(&spec)?, &ram.expect("ram"))
    }

    #[test]
    fn what_is_no_kernel_is_refused_by_name() {
        for bytes in [
            &b""[..],
            b"#!/bin/sh\n",
            &[0u8; 8192],
            b"\x7fELF\x02\x01\x01",
        ] {
            let error = load_bytes(bytes, 16).expect_err("no kernel").to_string();
            assert!(
                error.contains("`kernel.path`") && error.contains("no kernel"),
                "{error}"
            );
        }
        let spec = KernelSpec {
            path: "/no/such".into(),
            initrd: None,
            cmdline: String::new(),
        };
        let error = Images::open(&spec).expect_err("missing").to_string();
        assert!(error.contains("/no/such"), "{error}");
    }

    /// The least bzImage: one setup sector, and a body.
    fn bzimage(body: &[u8]) -> Vec<u8> {
        let mut image = vec![0u8; 1024];
        image[0x1f1] = 1; // setup_sects
        image[0x202..0x206].copy_from_slice(b"HdrS");
        image[0x206..0x208].copy_from_slice(&0x020fu16.to_le_bytes());
        image[0x211] = 1; // loaded high
        image[0x214..0x218].copy_from_slice(&0x10_0000u32.to_le_bytes());
        image.extend(body);
        image
    }

    #[test]
    fn a_bzimage_is_entered_in_64_bit_mode() {
        let entry = load_bytes(&bzimage(&[0xf4; 4096]), 16).expect("bzImage");
        assert_eq!(entry.regs.rip, 0x10_0200);
        assert!(matches!(entry.protocol, Protocol::Linux64));
    }

    #[test]
    fn a_kernel_larger_than_ram_is_refused() {
        load_bytes(&bzimage(&vec![0; 32 << 20]), 16).expect_err("too large");
    }
}
