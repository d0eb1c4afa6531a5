//! The memory itself: a device-dax, or a file, mapped.
//!
//! Must never: hand out a reference into it. Others change it at any time (a guest's RAM lies here),
//! so it is copied in and out, and single words are atomics.
#![allow(unsafe_code)] // mmap, copies to and from shared memory, CLFLUSH.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering, fence};

use rustix::fs::{FileType, Mode, OFlags};
use rustix::io::Errno;
use rustix::mm::{MapFlags, ProtFlags};

use crate::layout::Extent;

/// A cache line.
const LINE: usize = 64;

/// Why the memory can't be had.
#[derive(Debug, thiserror::Error)]
pub enum MapError {
    /// It can't be opened.
    #[error("cannot open the carve-out {path}: {source}")]
    Open {
        /// Which.
        path: PathBuf,
        /// Why not.
        source: Errno,
    },
    /// It is of a kind that can't be one.
    #[error("{path} is no carve-out: {why}")]
    Kind {
        /// Which.
        path: PathBuf,
        /// What it is.
        why: String,
    },
    /// It can't be mapped.
    #[error("cannot map {} bytes of the carve-out at {:#x}: {source}", extent.len, extent.start)]
    Map {
        /// Which part.
        extent: Extent,
        /// Why not.
        source: Errno,
    },
    /// It can't be made durable.
    #[error("cannot sync the carve-out: {0}")]
    Sync(std::io::Error),
}

/// An opened carve-out.
#[derive(Debug)]
pub struct Device {
    path: PathBuf,
    fd: OwnedFd,
    size: u64,
    /// A file has a page cache that a device-dax has not.
    is_file: bool,
}

impl Device {
    /// Opens one.
    pub fn open(path: &Path) -> Result<Self, MapError> {
        let failed = |source| MapError::Open {
            path: path.to_owned(),
            source,
        };
        let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::NONBLOCK;
        let fd = rustix::fs::open(path, flags, Mode::empty()).map_err(failed)?;
        Self::of(path, fd)
    }

    /// One that was opened by somebody else; `path` is for messages.
    pub fn of(path: &Path, fd: OwnedFd) -> Result<Self, MapError> {
        let kind = |why: String| MapError::Kind {
            path: path.to_owned(),
            why,
        };
        let stat = rustix::fs::fstat(&fd).map_err(|source| MapError::Open {
            path: path.to_owned(),
            source,
        })?;
        let (size, is_file) = match FileType::from_raw_mode(stat.st_mode) {
            FileType::RegularFile => (u64::try_from(stat.st_size).unwrap_or(0), true),
            FileType::CharacterDevice => {
                let (major, minor) = (
                    rustix::fs::major(stat.st_rdev),
                    rustix::fs::minor(stat.st_rdev),
                );
                (size_of_dax(major, minor).map_err(kind)?, false)
            }
            FileType::BlockDevice => {
                let why = "a block device's memory is the page cache, which no kernel leaves to the \
                           next; turn it into a device-dax (`ndctl create-namespace --mode devdax`)";
                return Err(kind(why.into()));
            }
            other => return Err(kind(format!("it is a {other:?}"))),
        };
        Ok(Self {
            path: path.to_owned(),
            fd,
            size,
            is_file,
        })
    }

    /// Its path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its size, bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Why what lies here would not outlive the kernel; `None` if it does.
    pub fn is_lost_by_kexec(&self) -> Option<String> {
        let why = || {
            let path = self.path.display();
            format!("{path} is a file whose memory is the page cache, which ends with the kernel")
        };
        (self.is_file && !self.is_dax_file()).then(why)
    }

    fn is_dax_file(&self) -> bool {
        use rustix::fs::{AtFlags, StatxAttributes, StatxFlags, statx};
        let found = statx(&self.fd, c"", AtFlags::EMPTY_PATH, StatxFlags::BASIC_STATS);
        found.is_ok_and(|found| found.stx_attributes.contains(StatxAttributes::DAX))
    }

    /// Maps a part of it.
    pub fn map(&self, extent: Extent) -> Result<Mapping, MapError> {
        let prot = ProtFlags::READ | ProtFlags::WRITE;
        let (base, len) = self.map_as(extent, prot, MapFlags::SHARED)?;
        Ok(Mapping {
            base,
            len,
            file: match self.is_file {
                true => Some(
                    self.fd
                        .try_clone()
                        .map(File::from)
                        .map_err(MapError::Sync)?,
                ),
                false => None,
            },
        })
    }

    /// Maps a part of it to be looked at, for the rest of the process's life; it may be open for reading only. What
    /// is written to a file's stays this process's own. The kernel maps a device-dax in no private way, so
    /// that one can't be written at all: a write there ends the process.
    pub fn view(&self, extent: Extent) -> Result<View, MapError> {
        let (prot, how) = match self.is_file {
            // Nothing is reserved: next to none of it is written.
            true => (
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::PRIVATE | MapFlags::NORESERVE,
            ),
            false => (ProtFlags::READ, MapFlags::SHARED),
        };
        let (base, len) = self.map_as(extent, prot, how)?;
        Ok(View {
            base,
            len,
            is_private: self.is_file,
        })
    }

    fn map_as(
        &self,
        extent: Extent,
        prot: ProtFlags,
        how: MapFlags,
    ) -> Result<(*mut u8, usize), MapError> {
        let failed = |source| MapError::Map { extent, source };
        if extent.end().is_none_or(|end| end > self.size) {
            return Err(failed(Errno::OVERFLOW));
        }
        let len = usize::try_from(extent.len).map_err(|_| failed(Errno::OVERFLOW))?;
        // SAFETY: a new mapping at an address of the kernel's choice; nothing else is there.
        let base = unsafe {
            rustix::mm::mmap(std::ptr::null_mut(), len, prot, how, &self.fd, extent.start)
        }
        .map_err(failed)?;
        Ok((base.cast(), len))
    }
}

/// A part that is only looked at.
#[derive(Clone, Copy, Debug)]
pub struct View {
    /// Where it is mapped.
    pub base: *mut u8,
    /// Its length.
    pub len: usize,
    /// Whether what is written there stays this process's own; else it can't be written.
    pub is_private: bool,
}

impl AsFd for Device {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Bytes of a device-dax; what else a character device is, no mapping of it would outlive anything.
fn size_of_dax(major: u32, minor: u32) -> Result<u64, String> {
    let dir = format!("/sys/dev/char/{major}:{minor}");
    let subsystem = std::fs::read_link(format!("{dir}/subsystem")).unwrap_or_default();
    if subsystem.file_name().is_none_or(|name| name != "dax") {
        return Err("it is a character device, and no device-dax".into());
    }
    let size = std::fs::read_to_string(format!("{dir}/size"));
    let size = size.map_err(|error| format!("its size can't be read: {error}"))?;
    size.trim()
        .parse()
        .map_err(|_| format!("its size is {size:?}"))
}

/// Whether this path is a device of any kind: then its memory is not a file system's.
pub fn is_device(path: &Path) -> bool {
    std::fs::metadata(path).is_ok_and(|found| {
        let kind = found.file_type();
        found.rdev() != 0 && (kind.is_char_device() || kind.is_block_device())
    })
}

/// A part of the carve-out, mapped.
#[derive(Debug)]
pub struct Mapping {
    base: *mut u8,
    len: usize,
    file: Option<File>,
}

// SAFETY: the mapping is the process's, not a thread's, and is only read and written by copies and
// atomics.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Its length.
    pub fn len(&self) -> u64 {
        self.len as u64
    }

    /// Whether there is nothing of it; the kernel maps no such thing.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Leaves it mapped for the rest of the process's life, and gives its address: KVM's memory slots
    /// and every thread of the machine have it.
    pub fn keep(mut self) -> *mut u8 {
        let base = self.base;
        self.file = None;
        std::mem::forget(self);
        base
    }

    /// The offset, if `len` bytes from it are within.
    fn within(&self, at: u64, len: usize) -> usize {
        let start = usize::try_from(at).unwrap_or(usize::MAX);
        let end = start.checked_add(len);
        assert!(
            end.is_some_and(|end| end <= self.len),
            "{len} bytes at {at:#x} are beyond the {:#x} mapped",
            self.len
        );
        start
    }

    /// Copies out.
    pub fn read(&self, at: u64, into: &mut [u8]) {
        let start = self.within(at, into.len());
        // SAFETY: within the mapping, as was just checked; `into` is memory of ours, so the two don't
        // overlap.
        unsafe {
            std::ptr::copy_nonoverlapping(self.base.add(start), into.as_mut_ptr(), into.len());
        }
    }

    /// Copies in. It is out of this core's caches when [`Mapping::flush`] returns.
    pub fn write(&self, at: u64, from: &[u8]) {
        let start = self.within(at, from.len());
        // SAFETY: as in `read`.
        unsafe {
            std::ptr::copy_nonoverlapping(from.as_ptr(), self.base.add(start), from.len());
        }
    }

    fn word(&self, at: u64) -> &AtomicU64 {
        let start = self.within(at, 8);
        assert!(at.is_multiple_of(8), "a word at {at:#x}");
        // SAFETY: within the mapping, aligned (a mapping begins at a page), and every access to these
        // bytes as a word is atomic.
        unsafe { AtomicU64::from_ptr(self.base.add(start).cast()) }
    }

    /// One word.
    pub fn load(&self, at: u64) -> u64 {
        self.word(at).load(Ordering::SeqCst)
    }

    /// Changes one word from `old` to `new`; the word that was there if it is another. Flushed.
    pub fn exchange(&self, at: u64, old: u64, new: u64) -> Result<Result<(), u64>, MapError> {
        let word = self.word(at);
        let done = word.compare_exchange(old, new, Ordering::SeqCst, Ordering::SeqCst);
        self.flush(at, 8)?;
        Ok(done.map(drop))
    }

    /// Sets one word, flushed.
    pub fn store(&self, at: u64, word: u64) -> Result<(), MapError> {
        self.word(at).store(word, Ordering::SeqCst);
        self.flush(at, 8)
    }

    /// Writes a part back to memory, and does not return before.
    pub fn flush(&self, at: u64, len: usize) -> Result<(), MapError> {
        let start = self.within(at, len);
        fence(Ordering::SeqCst);
        let first = start / LINE * LINE;
        for line in (first..start + len).step_by(LINE) {
            // SAFETY: a line of the mapping; flushing changes no content. Every x86-64 has CLFLUSH.
            unsafe { std::arch::x86_64::_mm_clflush(self.base.add(line)) };
        }
        // SAFETY: a fence; it touches no memory.
        unsafe { std::arch::x86_64::_mm_mfence() };
        match &self.file {
            Some(file) => file.sync_data().map_err(MapError::Sync),
            None => Ok(()),
        }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: this very mapping, and no reference into it is ever handed out that outlives it.
        let _ = unsafe { rustix::mm::munmap(self.base.cast(), self.len) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::ALIGN;

    fn file(mib: u64) -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().expect("a folder");
        let path = dir.path().join("carve-out");
        let file = File::create(&path).expect("a file");
        file.set_len(mib << 20).expect("sized");
        (dir, path)
    }

    #[test]
    fn what_is_written_is_there_for_the_next_who_maps_it() {
        let (_dir, path) = file(8);
        let extent = Extent {
            start: ALIGN,
            len: ALIGN,
        };
        let device = Device::open(&path).expect("opened");
        assert_eq!(device.size(), 8 << 20);
        assert!(device.is_lost_by_kexec().is_some(), "a plain file");
        let mapping = device.map(extent).expect("mapped");
        mapping.write(100, b"words");
        mapping.flush(100, 5).expect("flushed");
        mapping.store(8, 5).expect("stored");
        assert_eq!(mapping.exchange(8, 5, 6).expect("flushed"), Ok(()));
        assert_eq!(mapping.exchange(8, 5, 7).expect("flushed"), Err(6));
        drop(mapping);
        let again = Device::open(&path).expect("opened");
        let again = again.map(extent).expect("mapped");
        let mut bytes = [0; 5];
        again.read(100, &mut bytes);
        assert_eq!((&bytes, again.load(8)), (b"words", 6));
    }

    #[test]
    fn what_is_written_to_a_view_stays_with_who_wrote_it() {
        let (_dir, path) = file(8);
        let extent = Extent {
            start: ALIGN,
            len: ALIGN,
        };
        let mapping = Device::open(&path).expect("opened").map(extent);
        let mapping = mapping.expect("mapped");
        mapping.store(8, 5).expect("stored");
        let reader = File::open(&path).expect("for reading only");
        let device = Device::of(&path, reader.into()).expect("a file");
        device.map(extent).expect_err("it can't be written");
        let view = device.view(extent).expect("a view");
        assert!(view.is_private && view.len as u64 == ALIGN);
        let word = view.base.wrapping_add(8).cast::<u64>();
        // SAFETY: a mapping of this test's own, which stays for good; the word is aligned.
        let seen = unsafe {
            let seen = word.read_volatile();
            word.write_volatile(6);
            (seen, word.read_volatile())
        };
        assert_eq!((seen, mapping.load(8)), ((5, 6), 5));
    }

    #[test]
    fn what_is_no_carve_out_is_refused_in_words() {
        let error = Device::open(Path::new("/dev/zero")).expect_err("refused");
        assert!(error.to_string().contains("no device-dax"), "{error}");
        let error = Device::open(Path::new("/nonesuch")).expect_err("refused");
        assert!(error.to_string().contains("/nonesuch"), "{error}");
        let (_dir, path) = file(2);
        let beyond = Extent {
            start: ALIGN,
            len: ALIGN,
        };
        let device = Device::open(&path).expect("opened");
        device.map(beyond).expect_err("beyond its end");
    }
}
