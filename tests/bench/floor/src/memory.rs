//! Guest memory: a memfd that every process maps.
#![allow(unsafe_code)] // madvise on our own mapping

use std::fs::File;
use std::os::fd::AsFd;

use anyhow::{Context, Result};
use rustix::fs::{MemfdFlags, SeekFrom, ftruncate, memfd_create, seek};
use rustix::io::Errno;
use rustix::mm::{Advice, madvise};
use vm_memory::{FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

/// Low memory ends here at the latest; devices lie above.
const LOW_END: u64 = 0xc000_0000;
const HIGH_START: u64 = 1 << 32;

/// Makes the memfd.
pub(crate) fn create(len: u64) -> Result<File> {
    let fd = memfd_create("floor-ram", MemfdFlags::CLOEXEC).context("memfd_create")?;
    ftruncate(&fd, len).context("set the size of guest memory")?;
    Ok(File::from(fd))
}

/// The ranges of a guest with `len` bytes: address, length.
pub(crate) fn layout(len: u64) -> Vec<(GuestAddress, usize)> {
    let low = len.min(LOW_END);
    let mut ranges = vec![(GuestAddress(0), low as usize)];
    if len > low {
        ranges.push((GuestAddress(HIGH_START), (len - low) as usize));
    }
    ranges
}

/// Maps all of it.
pub(crate) fn map(memfd: &File) -> Result<GuestMemoryMmap> {
    let len = memfd.metadata().context("size of guest memory")?.len();
    let mut offset = 0;
    let mut ranges = Vec::new();
    for (start, len) in layout(len) {
        let file = memfd.try_clone().context("duplicate the memfd")?;
        ranges.push((start, len, Some(FileOffset::new(file, offset))));
        offset += len as u64;
    }
    GuestMemoryMmap::from_ranges_with_files(ranges).context("map guest memory")
}

/// Fills this process's page tables for whatever the memfd holds, so that the guest does not
/// pay for it page by page after the swap.
pub(crate) fn populate(memfd: &File, memory: &GuestMemoryMmap) -> Result<()> {
    for (start, end) in data_ranges(memfd)? {
        for region in memory.iter() {
            let base = region.file_offset().map_or(0, FileOffset::start);
            let (from, to) = (start.max(base), end.min(base + region.len()));
            if from < to {
                let at = region.as_ptr().wrapping_add((from - base) as usize);
                // SAFETY: the range lies in our mapping; populating changes no content.
                unsafe {
                    madvise(at.cast(), (to - from) as usize, Advice::LinuxPopulateWrite)
                        .context("populate guest memory")?;
                }
            }
        }
    }
    Ok(())
}

fn data_ranges(memfd: &File) -> Result<Vec<(u64, u64)>> {
    let mut ranges = Vec::new();
    let mut at = 0;
    loop {
        let start = match seek(memfd.as_fd(), SeekFrom::Data(at)) {
            Ok(start) => start,
            Err(Errno::NXIO) => return Ok(ranges),
            Err(error) => return Err(error).context("look for data in guest memory"),
        };
        at = seek(memfd.as_fd(), SeekFrom::Hole(start)).context("look for a hole")?;
        ranges.push((start, at));
    }
}
