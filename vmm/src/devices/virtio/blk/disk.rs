//! What can be done to a disk: one call for each kind of request, on whichever thread.
//!
//! Short reads and writes are continued. Whatever the host refuses is an I/O error of the guest's,
//! said in the log once in a while, and nothing worse: a full filesystem, a disk that is gone, an
//! image that somebody cut off.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::FileExt;

use rustix::fs::FallocateFlags;
use rustix::io::Errno;
use vm_memory::VolatileSlice;

use super::request::{Extent, Io};
use crate::devices::virtio::complaints::Complaints;
use crate::devices::virtio::queue::{Broken, Buffer, slices};
use crate::memory::Memory;
use crate::raw::file;

/// Unit of addresses and sizes, whatever the disk's own block size (virtio 1.2, 5.2.4).
pub(super) const SECTOR: u64 = 512;

/// Physical blocks of a file, as its guest is told: pages of the host's cache.
const FILE_BLOCK: u32 = 4096;

/// Bytes written at once where zeroes have to be written.
const ZEROES: u64 = 64 << 10;

/// A hole reads as zeroes and takes no space.
const HOLE: FallocateFlags = FallocateFlags::PUNCH_HOLE.union(FallocateFlags::KEEP_SIZE);

/// What is behind a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Media {
    File,
    Block,
}

/// An open image or device.
#[derive(Debug)]
pub(super) struct Disk {
    name: String,
    file: File,
    media: Media,
    /// Bytes, whole sectors.
    pub(super) size: u64,
    pub(super) read_only: bool,
    /// Bytes of a logical block.
    pub(super) block: u32,
    /// Bytes of a physical block.
    pub(super) physical: u32,
    complaints: Complaints,
}

/// Why a request failed.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error("{0}")]
    Host(#[from] Errno),
    #[error("the image ends before the disk does; somebody has cut it off")]
    CutOff,
    #[error("{0}")]
    Memory(#[from] Broken),
}

/// How a request ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Outcome {
    pub(super) ok: bool,
    /// Bytes read into guest memory.
    pub(super) read: u64,
}

impl Disk {
    pub(super) fn new(
        name: &str,
        file: File,
        media: Media,
        size: u64,
        read_only: bool,
    ) -> Result<Self, Errno> {
        let (block, physical) = match media {
            Media::File => (SECTOR as u32, FILE_BLOCK),
            Media::Block => (
                rustix::fs::ioctl_blksszget(&file)?,
                rustix::fs::ioctl_blkpbszget(&file)?,
            ),
        };
        Ok(Self {
            name: name.to_owned(),
            file,
            media,
            size,
            read_only,
            block,
            physical,
            complaints: Complaints::default(),
        })
    }

    /// Does it. Waits for the host's disk and for nothing else.
    pub(super) fn perform(&self, io: &Io, memory: &Memory) -> Outcome {
        let mut read = 0;
        let done = match io {
            Io::Read { offset, into } => self.read(*offset, into, memory, &mut read),
            Io::Write {
                offset,
                from,
                through,
            } => {
                let written = self.write(*offset, from, memory);
                // The whole file, and not these bytes alone (RWF_DSYNC): what was written before
                // the driver chose write-through has to become durable too.
                written.and_then(|()| if *through { self.flush() } else { Ok(()) })
            }
            Io::Flush => self.flush(),
            Io::Discard(extents) => extents.iter().try_for_each(|&extent| self.discard(extent)),
            Io::Zero(extents) => extents
                .iter()
                .try_for_each(|&(extent, unmap)| self.zero(extent, unmap)),
        };
        if let Err(failure) = &done {
            self.complain(io.name(), failure);
        }
        let ok = done.is_ok();
        Outcome { ok, read }
    }

    fn read(
        &self,
        offset: u64,
        into: &[Buffer],
        memory: &Memory,
        read: &mut u64,
    ) -> Result<(), Failure> {
        let mut pieces = slices(memory, into)?;
        let call = |pieces: &[VolatileSlice<'_>], offset| file::read_at(&self.file, pieces, offset);
        transfer(&mut pieces, offset, read, call)
    }

    fn write(&self, offset: u64, from: &[Buffer], memory: &Memory) -> Result<(), Failure> {
        let mut pieces = slices(memory, from)?;
        let call =
            |pieces: &[VolatileSlice<'_>], offset| file::write_at(&self.file, pieces, offset);
        transfer(&mut pieces, offset, &mut 0, call)
    }

    /// Makes every write that has ended durable.
    fn flush(&self) -> Result<(), Failure> {
        Ok(rustix::fs::fdatasync(&self.file)?)
    }

    /// Gives the space back to the host, where it takes it. What is read there afterwards is
    /// anything (virtio 1.2, 5.2.6.2), so doing nothing is right too.
    fn discard(&self, Extent { offset, len }: Extent) -> Result<(), Failure> {
        let done = match self.media {
            Media::File => self.allocate(HOLE, offset, len),
            Media::Block => file::discard(&self.file, offset, len),
        };
        match done {
            Err(error) if is_unsupported(error) => Ok(()),
            done => Ok(done?),
        }
    }

    /// Zeroes, by the cheapest way that there is. With `unmap` a hole will do.
    fn zero(&self, Extent { offset, len }: Extent, unmap: bool) -> Result<(), Failure> {
        let ways = [HOLE, FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE];
        for flags in &ways[usize::from(!unmap)..] {
            match self.allocate(*flags, offset, len) {
                Err(error) if is_unsupported(error) => {}
                done => return Ok(done?),
            }
        }
        let zeroes = vec![0; ZEROES.min(len) as usize];
        let mut at = offset;
        while at < offset + len {
            let some = (offset + len - at).min(ZEROES);
            let written = self.file.write_all_at(&zeroes[..some as usize], at);
            written.map_err(|e| Errno::from_io_error(&e).unwrap_or(Errno::IO))?;
            at += some;
        }
        Ok(())
    }

    /// Files and block devices alike (fallocate(2), `blkdev_fallocate`).
    fn allocate(&self, flags: FallocateFlags, offset: u64, len: u64) -> Result<(), Errno> {
        rustix::io::retry_on_intr(|| rustix::fs::fallocate(&self.file, flags, offset, len))
    }

    fn complain(&self, what: &str, failure: &Failure) {
        if let Some(more) = self.complaints.due() {
            tracing::warn!(
                disk = self.name, what, %failure, more,
                "I/O failed, and the guest was told so",
            );
        }
    }
}

impl AsFd for Disk {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// Filesystems and devices that can't do it; a block device says EINVAL for what is no multiple of
/// its own blocks.
fn is_unsupported(error: Errno) -> bool {
    matches!(error, Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL)
}

/// Moves all pieces, in as many calls as it takes; `moved` counts the bytes.
fn transfer(
    mut pieces: &mut [VolatileSlice<'_>],
    offset: u64,
    moved: &mut u64,
    call: impl Fn(&[VolatileSlice<'_>], u64) -> Result<usize, Errno>,
) -> Result<(), Failure> {
    while !pieces.is_empty() {
        match call(pieces, offset + *moved) {
            Ok(0) => return Err(Failure::CutOff),
            Ok(len) => {
                *moved += len as u64;
                pieces = behind(pieces, len);
            }
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// What is left of the pieces behind the first `len` bytes.
fn behind<'p, 'm>(
    pieces: &'p mut [VolatileSlice<'m>],
    mut len: usize,
) -> &'p mut [VolatileSlice<'m>] {
    let whole = pieces.iter().take_while(|piece| {
        let fits = piece.len() <= len;
        len -= if fits { piece.len() } else { 0 };
        fits
    });
    let rest = pieces.split_at_mut(whole.count()).1;
    if let Some(first) = rest.first_mut()
        && let Ok(tail) = first.offset(len)
    {
        *first = tail;
    }
    rest
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::virtio::driver::{FREE, buffer, memory};
    use vm_memory::{Bytes, GuestAddress};

    #[test]
    fn short_transfers_are_continued() {
        let memory = memory();
        let text = b"0123456789abcdefghij";
        let at = GuestAddress(FREE);
        memory.write_slice(text, at).expect("write");
        let buffers = [(0, 3), (3, 1), (4, 9), (13, 7)];
        let buffers = buffers.map(|(at, len)| buffer(FREE + at, len));
        for most in 1..=text.len() {
            let found = std::cell::RefCell::new(Vec::new());
            let call = |pieces: &[VolatileSlice<'_>], offset: u64| {
                let mut found = found.borrow_mut();
                assert_eq!(offset, 100 + found.len() as u64);
                let bytes = pieces.iter().flat_map(|piece| {
                    let mut bytes = vec![0; piece.len()];
                    piece.copy_to(&mut bytes);
                    bytes
                });
                let bytes: Vec<u8> = bytes.take(most).collect();
                found.extend_from_slice(&bytes);
                Ok(bytes.len())
            };
            let mut pieces = slices(&memory, &buffers).expect("in RAM");
            let mut moved = 0;
            transfer(&mut pieces, 100, &mut moved, call).expect("all of it");
            assert_eq!((moved, &*found.borrow()), (20, &text.to_vec()));
        }
        let mut pieces = slices(&memory, &buffers).expect("in RAM");
        let ended = transfer(&mut pieces, 0, &mut 0, |_, _| Ok(0));
        assert!(matches!(ended, Err(Failure::CutOff)));
    }
}
