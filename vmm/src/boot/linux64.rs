//! Linux's zero page (Documentation/arch/x86/boot.rst and zero-page.rst).

use linux_loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use super::{CMDLINE, Told};
use crate::memory::Memory;

const ZERO_PAGE: GuestAddress = GuestAddress(0x7000);
/// `boot_flag` and `header` of a valid setup header.
const BOOT_FLAG: u16 = 0xaa55;
const HEADER: u32 = 0x5372_6448;
/// Loader type "undefined": no number is assigned to us.
const LOADER: u8 = 0xff;

/// Writes it; gives its address. The header is the kernel's own, with the loader's fields filled
/// in; an ELF kernel has none.
pub(super) fn write(
    memory: &Memory,
    told: &Told,
    header: Option<setup_header>,
) -> Result<GuestAddress, GuestMemoryError> {
    let default = || setup_header {
        boot_flag: BOOT_FLAG,
        header: HEADER,
        kernel_alignment: 0x100_0000,
        ..Default::default()
    };
    let mut header = header.unwrap_or_else(default);
    header.type_of_loader = LOADER;
    header.cmd_line_ptr = CMDLINE.0 as u32;
    if let Some((start, len)) = told.initrd {
        // Loaded below 2 GiB.
        header.ramdisk_image = start as u32;
        header.ramdisk_size = len as u32;
    }
    let mut params = boot_params {
        acpi_rsdp_addr: told.rsdp.0,
        hdr: header,
        ..Default::default()
    };
    for (slot, range) in params.e820_table.iter_mut().zip(&told.map) {
        *slot = boot_e820_entry {
            addr: range.start,
            size: range.len,
            r#type: range.kind as u32,
        };
    }
    params.e820_entries = told.map.len() as u8;
    memory.write_obj(params, ZERO_PAGE)?;
    Ok(ZERO_PAGE)
}
