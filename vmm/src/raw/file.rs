//! Files of devices: vectored I/O between a file and guest memory, locks that belong to a
//! description, and discards.
//!
//! Guest memory is never seen as a Rust slice: the guest changes it whenever it likes. Its
//! addresses go to the kernel, and nowhere else.

use std::os::fd::{AsFd, AsRawFd};

use rustix::io::Errno;
use vm_memory::VolatileSlice;
use vm_memory::volatile_memory::PtrGuardMut;
use vmm_sys_util::ioctl::ioctl_with_ref;

use super::{errno, last_errno};

/// The most pieces that one call takes (`UIO_MAXIOV`, include/uapi/linux/uio.h).
const MOST_PIECES: usize = 1024;

/// Numbers of the ioctls (include/uapi/linux/fs.h).
mod nr {
    #![allow(missing_docs, unreachable_pub)] // The macro makes undocumented public functions.
    use vmm_sys_util::ioctl_io_nr;
    ioctl_io_nr!(BLKDISCARD, 0x12, 119);
}

/// Pieces of guest memory as the kernel wants them, with what keeps their addresses good.
struct Pieces<'m> {
    vectors: Vec<libc::iovec>,
    _guards: Vec<PtrGuardMut>,
    _memory: std::marker::PhantomData<VolatileSlice<'m>>,
}

impl<'m> Pieces<'m> {
    fn of(slices: &[VolatileSlice<'m>]) -> Self {
        let some = &slices[..slices.len().min(MOST_PIECES)];
        let guards: Vec<_> = some.iter().map(VolatileSlice::ptr_guard_mut).collect();
        let vectors = guards.iter().map(|guard| libc::iovec {
            iov_base: guard.as_ptr().cast(),
            iov_len: guard.len(),
        });
        Self {
            vectors: vectors.collect(),
            _guards: guards,
            _memory: std::marker::PhantomData,
        }
    }

    /// At most `MOST_PIECES`, so it fits.
    fn count(&self) -> libc::c_int {
        self.vectors.len() as libc::c_int
    }
}

fn position(offset: u64) -> Result<libc::off_t, Errno> {
    libc::off_t::try_from(offset).map_err(|_| Errno::FBIG)
}

fn length(ret: isize) -> Result<usize, Errno> {
    usize::try_from(ret).map_err(|_| last_errno())
}

/// Reads from `offset` of a file into guest memory; gives how many bytes came, which may be fewer
/// than there is room for, and 0 at the file's end.
pub fn read_at(file: impl AsFd, into: &[VolatileSlice<'_>], offset: u64) -> Result<usize, Errno> {
    let (pieces, offset) = (Pieces::of(into), position(offset)?);
    let fd = file.as_fd().as_raw_fd();
    // SAFETY: every piece is a mapped part of guest memory, which `into` borrows until the call is
    // over; the kernel writes there as a guest might, and nobody holds a reference into it.
    length(unsafe { libc::preadv(fd, pieces.vectors.as_ptr(), pieces.count(), offset) })
}

/// Writes guest memory to `offset` of a file; gives how many bytes went.
pub fn write_at(file: impl AsFd, from: &[VolatileSlice<'_>], offset: u64) -> Result<usize, Errno> {
    let (pieces, offset) = (Pieces::of(from), position(offset)?);
    let fd = file.as_fd().as_raw_fd();
    // SAFETY: as in `read_at`; the kernel only reads.
    length(unsafe { libc::pwritev(fd, pieces.vectors.as_ptr(), pieces.count(), offset) })
}

/// A lock on a whole file, which belongs to its open description (`F_OFD_SETLK`, fcntl(2)): it goes
/// wherever duplicates of the descriptor go, and ends when the last of them is closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lock {
    /// Others may have it too.
    Shared,
    /// Nobody else may have any.
    Exclusive,
}

/// Takes the lock at once, or gives `EAGAIN` when it is somebody else's.
pub fn lock(file: impl AsFd, lock: Lock) -> Result<(), Errno> {
    let kind = match lock {
        Lock::Shared => libc::F_RDLCK,
        Lock::Exclusive => libc::F_WRLCK,
    };
    // Start 0 and length 0: to the end, wherever that comes to be. No pid, as fcntl(2) wants it.
    let whole = libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    };
    let fd = file.as_fd().as_raw_fd();
    // SAFETY: the kernel reads one `flock` structure, which lives until the call is over.
    errno(unsafe { libc::fcntl(fd, libc::F_OFD_SETLK, &raw const whole) })
}

/// Tells a block device that nobody needs these bytes.
pub fn discard(device: impl AsFd, offset: u64, len: u64) -> Result<(), Errno> {
    let range = [offset, len];
    let fd = device.as_fd().as_raw_fd();
    // SAFETY: BLKDISCARD reads two integers of 64 bits, which live until the call is over.
    errno(unsafe { ioctl_with_ref(&fd, nr::BLKDISCARD(), &range) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt;
    use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

    #[test]
    fn bytes_go_to_and_from_guest_memory() {
        let ranges = [(GuestAddress(0), 0x2000)];
        let memory = crate::memory::Memory::from_ranges(&ranges).expect("memory");
        let slice = |at, len| memory.get_slice(GuestAddress(at), len).expect("in RAM");
        memory
            .write_slice(b"one, two", GuestAddress(0x10))
            .expect("write");
        let file = tempfile::tempfile().expect("file");
        let pieces = [slice(0x15, 3), slice(0x10, 5)];
        assert_eq!(write_at(&file, &pieces, 4), Ok(8));
        let mut found = [0; 12];
        file.read_exact_at(&mut found, 0).expect("read");
        assert_eq!(&found, b"\0\0\0\0twoone, ");
        let pieces = [slice(0x1000, 3), slice(0x1800, 5)];
        assert_eq!(read_at(&file, &pieces, 4), Ok(8));
        memory
            .read_slice(&mut found[..5], GuestAddress(0x1800))
            .expect("read");
        assert_eq!(&found[..5], b"one, ");
        assert_eq!(read_at(&file, &pieces, 12), Ok(0), "the end");
        assert_eq!(read_at(&file, &pieces, 1 << 63), Err(Errno::FBIG));
        // More pieces than one call takes are not an error: some go.
        let many = vec![slice(0, 1); 3000];
        assert_eq!(write_at(&file, &many, 0), Ok(1024));
    }

    #[test]
    fn a_lock_is_the_descriptions() {
        let file = tempfile::NamedTempFile::new().expect("file");
        let open = || std::fs::File::open(file.path()).expect("open");
        let write = file.reopen().expect("open");
        let other = file.reopen().expect("open");
        lock(&write, Lock::Exclusive).expect("free");
        let double = write.try_clone().expect("dup");
        drop(write);
        assert_eq!(lock(&other, Lock::Exclusive), Err(Errno::AGAIN));
        assert_eq!(lock(open(), Lock::Shared), Err(Errno::AGAIN));
        drop(double);
        let (one, two) = (open(), open());
        lock(&one, Lock::Shared).expect("free again");
        lock(&two, Lock::Shared).expect("shared");
        assert_eq!(lock(&other, Lock::Exclusive), Err(Errno::AGAIN));
    }
}
