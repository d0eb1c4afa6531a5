//! Kernel and initial RAM disk: the files, and where in RAM they go.
//!
//! What a kernel can't do, or what it needs and RAM has not, is said by the name of the field. A
//! bzImage goes to the address it prefers, with room behind it to unpack itself; an initial RAM
//! disk goes above all that.

mod bzimage;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use linux_loader::bootparam::setup_header;
use linux_loader::loader::elf::PvhBootCapability;
use linux_loader::loader::{BzImage, Elf, KernelLoader};
use stillpoint_control::spec::{KernelSpec, MAX_CMDLINE};
use vm_memory::{GuestAddress, GuestMemoryBackend, ReadVolatile};

use super::{BootError, HIGH, Protocol};
use crate::memory::{GuestRam, HOLE_START, Memory};
use bzimage::Needs;

const ELF_MAGIC: &[u8; 4] = b"\x7fELF";
/// `e_machine` of x86-64, and where it lies.
const ELF_X86_64: u16 = 62;
const ELF_MACHINE_AT: u64 = 18;
/// Where an initial RAM disk must end for a kernel whose header doesn't say (boot.rst,
/// `initrd_addr_max`).
const INITRD_END: u64 = 0x8000_0000;

/// Files of a kernel, opened before any guest code runs.
#[derive(Debug)]
pub struct Images {
    spec: KernelSpec,
    kernel: File,
    initrd: Option<File>,
}

/// A kernel in RAM.
#[derive(Clone, Copy, Debug)]
pub(super) struct Kernel {
    /// Its first instruction.
    pub(super) entry: u64,
    /// How it wants to be entered.
    pub(super) protocol: Protocol,
    /// The setup header of a bzImage.
    pub(super) header: Option<setup_header>,
    /// End of what it needs for itself, also while it unpacks itself.
    end: u64,
}

impl Images {
    /// Opens what the spec names.
    pub fn open(spec: &KernelSpec) -> Result<Self, BootError> {
        let open = |field, path: &Path| {
            let error = |source| BootError::file(field, path, source);
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

    fn no_kernel(&self, reason: impl Into<String>) -> BootError {
        BootError::NoKernel {
            path: self.spec.path.display().to_string(),
            reason: reason.into(),
        }
    }

    fn unreadable(&self, source: std::io::Error) -> BootError {
        BootError::file("kernel.path", &self.spec.path, source)
    }

    /// The command line, if `kernel` takes one of its length.
    pub(super) fn cmdline(&self, kernel: &Kernel) -> Result<&str, BootError> {
        let cmdline = &self.spec.cmdline;
        let most = match &kernel.header {
            Some(header) => header.cmdline_size as usize,
            None => MAX_CMDLINE,
        };
        if cmdline.len() > most {
            let len = cmdline.len();
            return Err(BootError::Cmdline { len, most });
        }
        Ok(cmdline)
    }

    /// Loads the kernel.
    pub(super) fn load_kernel(&mut self, ram: &GuestRam) -> Result<Kernel, BootError> {
        let mut magic = [0; 4];
        let is_elf = self.kernel.read_exact_at(&mut magic, 0).is_ok() && magic == *ELF_MAGIC;
        let kernel = match bzimage::header(&self.kernel) {
            _ if is_elf => self.load_elf(ram.map())?,
            Some(header) => self.load_bzimage(ram, &header)?,
            None => return Err(self.no_kernel("neither an ELF file nor a bzImage")),
        };
        if kernel.end > low_end(ram) {
            return Err(no_room(kernel.end));
        }
        Ok(kernel)
    }

    fn load_elf(&mut self, memory: &Memory) -> Result<Kernel, BootError> {
        let mut machine = [0; 2];
        let read = self.kernel.read_exact_at(&mut machine, ELF_MACHINE_AT);
        if read.is_err() || u16::from_le_bytes(machine) != ELF_X86_64 {
            return Err(self.no_kernel("an ELF file, but not for x86-64"));
        }
        let high = Some(GuestAddress(HIGH));
        let loaded = Elf::load(memory, None, &mut self.kernel, high).map_err(|e| {
            self.no_kernel(format!(
                "as an ELF file: {e}; is it whole, and RAM large enough?"
            ))
        })?;
        let (entry, protocol) = match loaded.pvh_boot_cap {
            PvhBootCapability::PvhEntryPresent(entry) => (entry.0, Protocol::Pvh),
            _ => (loaded.kernel_load.0, Protocol::Linux64),
        };
        Ok(Kernel {
            entry,
            protocol,
            header: None,
            end: loaded.kernel_end,
        })
    }

    fn load_bzimage(&mut self, ram: &GuestRam, header: &setup_header) -> Result<Kernel, BootError> {
        let len = self
            .kernel
            .metadata()
            .map_err(|e| self.unreadable(e))?
            .len();
        let Needs { start, end } =
            bzimage::judge(header, len).map_err(|reason| self.no_kernel(reason))?;
        // Before it is loaded: a kernel that needs more than there is would not tell us why.
        if end > low_end(ram) {
            return Err(no_room(end));
        }
        let at = Some(GuestAddress(start));
        let loaded = BzImage::load(ram.map(), at, &mut self.kernel, None)
            .map_err(|e| self.no_kernel(format!("as a bzImage: {e}")))?;
        Ok(Kernel {
            entry: start + bzimage::ENTRY_64,
            protocol: Protocol::Linux64,
            header: loaded.setup_header,
            end,
        })
    }

    /// Loads the initial RAM disk, if there is one; gives its address and length.
    pub(super) fn load_initrd(
        &mut self,
        ram: &GuestRam,
        kernel: &Kernel,
    ) -> Result<Option<(u64, u64)>, BootError> {
        let Some(file) = &mut self.initrd else {
            return Ok(None);
        };
        let path = self.spec.initrd.as_deref().unwrap_or(Path::new(""));
        let failed = |source| BootError::file("kernel.initrd", path, source);
        let len = file.metadata().map_err(failed)?.len();
        // As high as it may be, so that it is out of the way of whatever the kernel unpacks.
        let limit = match &kernel.header {
            Some(header) => u64::from(header.initrd_addr_max) + 1,
            None => INITRD_END,
        };
        let top = low_end(ram).min(limit);
        let start = top.checked_sub(len).map(|start| start & !0xfff);
        let Some(start) = start.filter(|&start| start >= kernel.end) else {
            let room = top.saturating_sub(kernel.end);
            return Err(BootError::Initrd {
                path: path.display().to_string(),
                len_mib: mib(len),
                room_mib: room >> 20,
            });
        };
        let size = usize::try_from(len).unwrap_or(usize::MAX);
        let mut target = ram
            .map()
            .get_slice(GuestAddress(start), size)
            .map_err(|e| failed(std::io::Error::other(e)))?;
        file.read_exact_volatile(&mut target)
            .map_err(|e| failed(std::io::Error::other(e)))?;
        Ok(Some((start, len)))
    }
}

/// End of the RAM below the hole, which is all that boot protocols speak of.
fn low_end(ram: &GuestRam) -> u64 {
    ram.size().min(HOLE_START)
}

fn mib(bytes: u64) -> u64 {
    bytes.div_ceil(1 << 20)
}

fn no_room(end: u64) -> BootError {
    BootError::KernelRoom {
        least_mib: mib(end),
    }
}

#[cfg(test)]
mod tests {
    use super::bzimage::{KERNEL_64, LOADED_HIGH, MAGIC};
    use super::*;
    use std::io::Write;

    use stillpoint_control::spec::MemorySpec;
    use vm_memory::ByteValued;

    struct Given {
        image: Vec<u8>,
        initrd: Option<u64>,
        cmdline: usize,
        ram_mib: u64,
    }

    impl Given {
        fn kernel(image: Vec<u8>) -> Self {
            Self {
                image,
                initrd: None,
                cmdline: 1,
                ram_mib: 32,
            }
        }

        /// Loads it all; gives the kernel and where the initial RAM disk came to lie.
        fn load(self) -> Result<(Kernel, Option<(u64, u64)>), BootError> {
            let mut image = tempfile::NamedTempFile::new().expect("temp file");
            image.write_all(&self.image).expect("write");
            let initrd = self.initrd.map(|len| {
                let file = tempfile::NamedTempFile::new().expect("temp file");
                file.as_file().set_len(len).expect("size");
                file
            });
            let spec = KernelSpec {
                path: image.path().into(),
                initrd: initrd.as_ref().map(|file| file.path().into()),
                cmdline: "x".repeat(self.cmdline),
            };
            let ram = GuestRam::create(&MemorySpec {
                size: self.ram_mib << 20,
                ..Default::default()
            })
            .expect("ram");
            let mut images = Images::open(&spec)?;
            let kernel = images.load_kernel(&ram)?;
            images.cmdline(&kernel)?;
            let initrd = images.load_initrd(&ram, &kernel)?;
            Ok((kernel, initrd))
        }

        fn refusal(self) -> String {
            self.load().expect_err("must be refused").to_string()
        }
    }

    /// A bzImage: one setup sector, which `change` may change, and a body.
    fn bzimage(body: &[u8], change: impl FnOnce(&mut setup_header)) -> Vec<u8> {
        let mut header = setup_header {
            setup_sects: 1,
            header: MAGIC,
            version: 0x020f,
            loadflags: LOADED_HIGH,
            code32_start: 0x10_0000,
            initrd_addr_max: 0x7fff_ffff,
            kernel_alignment: 0x20_0000,
            relocatable_kernel: 1,
            xloadflags: KERNEL_64,
            cmdline_size: 255,
            pref_address: 0x100_0000,
            init_size: 0x80_0000,
            ..Default::default()
        };
        change(&mut header);
        let mut image = vec![0u8; 1024];
        image[0x1f1..][..size_of::<setup_header>()].copy_from_slice(header.as_slice());
        image.extend(body);
        image
    }

    fn plain() -> Vec<u8> {
        bzimage(&[0xf4; 4096], |h| h.syssize = 256)
    }

    #[test]
    fn what_is_no_kernel_is_refused_by_name() {
        let mut arm = vec![0; 64];
        arm[..4].copy_from_slice(ELF_MAGIC);
        arm[18] = 183;
        for bytes in [
            b"".to_vec(),
            b"#!/bin/sh\n".to_vec(),
            vec![0; 8192],
            b"\x7fELF\x02\x01\x01".to_vec(),
            arm,
            bzimage(&[0; 4096], |h| h.version = 0x020b),
            bzimage(&[0; 4096], |h| h.xloadflags = 0),
            bzimage(&[0; 4096], |h| h.loadflags = 0),
            bzimage(&[0; 4096], |h| h.pref_address = u64::MAX),
            bzimage(&[0; 4096], |h| h.init_size = u32::MAX),
            bzimage(&[], |h| h.setup_sects = 200),
            bzimage(&[0; 4096], |h| h.syssize = 257),
        ] {
            let error = Given::kernel(bytes).refusal();
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

    #[test]
    fn a_bzimage_goes_where_it_prefers() {
        let (kernel, _) = Given::kernel(plain()).load().expect("bzImage");
        assert_eq!(kernel.entry, 0x100_0200);
        assert!(matches!(kernel.protocol, Protocol::Linux64));
        let odd = bzimage(&[0; 4096], |h| h.pref_address = 0x110_0000);
        let (kernel, _) = Given::kernel(odd).load().expect("aligned");
        assert_eq!(kernel.entry, 0x120_0200);
        let low = bzimage(&[0; 4096], |h| {
            (h.pref_address, h.kernel_alignment) = (0, 0);
        });
        let (kernel, _) = Given::kernel(low).load().expect("1 MiB");
        assert_eq!(kernel.entry, 0x10_0200);
    }

    #[test]
    fn a_kernel_that_ram_has_no_room_for_is_refused() {
        let unpacked = bzimage(&[0; 4096], |h| h.init_size = 0x200_0000);
        let packed = bzimage(&vec![0; 32 << 20], |h| h.init_size = 0);
        for image in [unpacked, packed] {
            let error = Given::kernel(image).refusal();
            assert!(
                error.contains("`memory.size`") && error.contains("48 MiB"),
                "{error}"
            );
        }
    }

    #[test]
    fn an_initrd_lies_above_what_the_kernel_needs_and_below_its_limit() {
        let given = |initrd, image| Given {
            initrd: Some(initrd),
            ..Given::kernel(image)
        };
        // RAM ends at 32 MiB, the kernel's needs at 24 MiB.
        let (_, at) = given(5000, plain()).load().expect("fits");
        assert_eq!(at, Some((0x1ff_e000, 5000)));
        let limited = bzimage(&[0; 4096], |h| h.initrd_addr_max = 0x1bf_ffff);
        let (_, at) = given(4096, limited).load().expect("fits");
        assert_eq!(at, Some((0x1bf_f000, 4096)));
        given(8 << 20, plain()).load().expect("just fits");
        for len in [(8 << 20) + 1, 64 << 20, 1 << 40] {
            let error = given(len, plain()).refusal();
            assert!(
                error.contains("`kernel.initrd`") && error.contains("8 MiB"),
                "{error}"
            );
        }
    }

    #[test]
    fn a_command_line_beyond_the_kernels_own_limit_is_refused() {
        let given = |cmdline| Given {
            cmdline,
            ..Given::kernel(plain())
        };
        given(255).load().expect("as long as it may be");
        let error = given(256).refusal();
        assert!(
            error.contains("`kernel.cmdline`") && error.contains("255"),
            "{error}"
        );
    }
}
