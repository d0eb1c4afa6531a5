//! The setup header of a bzImage, judged before a byte of the kernel is loaded (Linux boot protocol,
//! Documentation/arch/x86/boot.rst).

use std::fs::File;
use std::os::unix::fs::FileExt;

use linux_loader::bootparam::setup_header;
use vm_memory::ByteValued;

use crate::boot::HIGH;
use crate::memory::HOLE_START;

/// Where the setup header lies.
const HEADER_AT: u64 = 0x1f1;
/// `header` of a valid one, "HdrS".
pub(super) const MAGIC: u32 = 0x5372_6448;
/// The first boot protocol whose header tells of a 64-bit entry (2.12, Linux 3.8).
const LEAST_PROTOCOL: u16 = 0x020c;
/// `loadflags`: the protected-mode part goes to 1 MiB and above.
pub(super) const LOADED_HIGH: u8 = 1 << 0;
/// `xloadflags`: there is a 64-bit entry, [`ENTRY_64`] behind the first.
pub(super) const KERNEL_64: u16 = 1 << 0;
/// Offset of the 64-bit entry.
pub(super) const ENTRY_64: u64 = 0x200;
/// `setup_sects` if it says 0.
const SETUP_SECTORS: u8 = 4;

/// The header, if `file` is a bzImage.
pub(super) fn header(file: &File) -> Option<setup_header> {
    let mut header = setup_header::default();
    file.read_exact_at(header.as_mut_slice(), HEADER_AT).ok()?;
    (header.header == MAGIC).then_some(header)
}

/// What a bzImage needs: the address to load it to, and the end of what it takes from there on to
/// unpack itself (`pref_address`, `init_size`).
#[derive(Clone, Copy, Debug)]
pub(super) struct Needs {
    pub(super) start: u64,
    pub(super) end: u64,
}

/// Judges a bzImage of `len` bytes; an error says why it can't be booted.
pub(super) fn judge(header: &setup_header, len: u64) -> Result<Needs, String> {
    if header.version < LEAST_PROTOCOL {
        let (major, minor) = (header.version >> 8, header.version & 0xff);
        return Err(format!(
            "a bzImage of boot protocol {major}.{minor:02}; 2.12 (Linux 3.8) is the first with a \
             64-bit entry"
        ));
    }
    if header.xloadflags & KERNEL_64 == 0 || header.loadflags & LOADED_HIGH == 0 {
        return Err("a bzImage without a 64-bit entry".into());
    }
    let setup = match header.setup_sects {
        0 => SETUP_SECTORS,
        sectors => sectors,
    };
    // The boot sector comes before the setup sectors; `syssize` counts units of 16 bytes.
    let setup = (u64::from(setup) + 1) * 512;
    let whole = setup + u64::from(header.syssize) * 16;
    if len < whole {
        return Err(format!("a bzImage cut off at {len} of {whole} bytes"));
    }
    needs(header, len - setup)
        .ok_or_else(|| "a bzImage whose header asks for an impossible address".into())
}

fn needs(header: &setup_header, packed: u64) -> Option<Needs> {
    let alignment = u64::from(header.kernel_alignment).max(1);
    let start = header.pref_address.max(HIGH);
    let start = match header.relocatable_kernel {
        0 => start,
        _ => start.checked_next_multiple_of(alignment)?,
    };
    let end = start.checked_add(packed.max(header.init_size.into()))?;
    (end <= HOLE_START).then_some(Needs { start, end })
}
