//! A tap's ioctls, and frames in and out of guest RAM without a copy of ours.
//!
//! A frame is read from the tap by the kernel straight into the guest's buffers, and written the
//! same way. The guest may change those bytes at any time, so no reference of ours ever covers
//! them: they go by address, as `struct iovec`.

use std::os::fd::{AsRawFd, OwnedFd};

use rustix::io::Errno;
use vm_memory::VolatileSlice;
use vm_memory::bitmap::BitmapSlice;
use vmm_sys_util::ioctl::{ioctl_with_mut_ref, ioctl_with_ref, ioctl_with_val};

use super::{errno, last_errno};

/// `IFNAMSIZ`, with the terminating zero.
const NAME: usize = 16;

/// `struct ifreq` (include/uapi/linux/if.h), as TUNSETIFF and TUNGETIFF use it.
#[repr(C)]
struct Request {
    name: [u8; NAME],
    flags: u16,
    rest: [u8; 22],
}

/// Numbers of the ioctls (include/uapi/linux/if_tun.h).
mod nr {
    #![allow(missing_docs, unreachable_pub)] // The macro makes undocumented public functions.
    use vmm_sys_util::{ioctl_ior_nr, ioctl_iow_nr};
    const TUN: u32 = b'T' as u32;
    ioctl_iow_nr!(TUNSETIFF, TUN, 202, i32);
    ioctl_iow_nr!(TUNSETOFFLOAD, TUN, 208, u32);
    ioctl_ior_nr!(TUNGETIFF, TUN, 210, u32);
    ioctl_iow_nr!(TUNSETVNETHDRSZ, TUN, 216, i32);
}

/// Makes an open `/dev/net/tun` a queue of the interface `name`, with `IFF_*` flags. The name must
/// be shorter than 16 bytes (`MachineSpec::validate`); the rest is cut off.
pub fn attach(tun: &OwnedFd, name: &str, flags: u16) -> Result<(), Errno> {
    let mut request = Request {
        name: [0; NAME],
        flags,
        rest: [0; 22],
    };
    for (to, &from) in request.name[..NAME - 1].iter_mut().zip(name.as_bytes()) {
        *to = from;
    }
    // SAFETY: TUNSETIFF reads and writes a `struct ifreq`, which `Request` is.
    errno(unsafe { ioctl_with_mut_ref(tun, nr::TUNSETIFF(), &mut request) })
}

/// Name of the interface that a queue belongs to.
pub fn name(queue: &OwnedFd) -> Result<String, Errno> {
    let mut request = Request {
        name: [0; NAME],
        flags: 0,
        rest: [0; 22],
    };
    // SAFETY: TUNGETIFF writes a `struct ifreq`, which `Request` is.
    errno(unsafe { ioctl_with_mut_ref(queue, nr::TUNGETIFF(), &mut request) })?;
    let name = request.name.split(|&byte| byte == 0).next();
    Ok(String::from_utf8_lossy(name.unwrap_or_default()).into_owned())
}

/// Sets the size of the header before each frame.
pub fn set_header_size(queue: &OwnedFd, size: i32) -> Result<(), Errno> {
    // SAFETY: TUNSETVNETHDRSZ reads one int.
    errno(unsafe { ioctl_with_ref(queue, nr::TUNSETVNETHDRSZ(), &size) })
}

/// Sets what the other side of the interface takes, `TUN_F_*`: frames without checksums, frames
/// longer than the wire's.
pub fn set_offload(queue: &OwnedFd, flags: u32) -> Result<(), Errno> {
    // SAFETY: TUNSETOFFLOAD's argument is the flags themselves; nothing is read by address.
    errno(unsafe { ioctl_with_val(queue, nr::TUNSETOFFLOAD(), flags.into()) })
}

/// Takes one frame: into `room`, and what does not fit there into `spill`. Gives its length;
/// what fits in neither is lost, and the length is then that of both together.
pub fn read<B: BitmapSlice>(
    queue: &OwnedFd,
    room: &[VolatileSlice<'_, B>],
    spill: &mut [u8],
) -> Result<usize, Errno> {
    let guards: Vec<_> = room.iter().map(VolatileSlice::ptr_guard_mut).collect();
    let mut parts: Vec<_> = guards
        .iter()
        .map(|guard| iovec(guard.as_ptr(), guard.len()))
        .collect();
    parts.push(iovec(spill.as_mut_ptr(), spill.len()));
    // SAFETY: every part is mapped and writable for as long as the guards and `spill` are borrowed;
    // guest RAM is under no Rust reference, `spill` is borrowed exclusively.
    let got = unsafe { libc::readv(queue.as_raw_fd(), parts.as_ptr(), count(&parts)?) };
    length(got)
}

/// Hands one frame over.
pub fn write<B: BitmapSlice>(
    queue: &OwnedFd,
    frame: &[VolatileSlice<'_, B>],
) -> Result<usize, Errno> {
    let guards: Vec<_> = frame.iter().map(VolatileSlice::ptr_guard).collect();
    let parts: Vec<_> = guards
        .iter()
        .map(|guard| iovec(guard.as_ptr().cast_mut(), guard.len()))
        .collect();
    // SAFETY: every part is mapped for as long as the guards live; writev only reads them.
    let sent = unsafe { libc::writev(queue.as_raw_fd(), parts.as_ptr(), count(&parts)?) };
    length(sent)
}

fn iovec(base: *mut u8, len: usize) -> libc::iovec {
    libc::iovec {
        iov_base: base.cast(),
        iov_len: len,
    }
}

fn count(parts: &[libc::iovec]) -> Result<libc::c_int, Errno> {
    libc::c_int::try_from(parts.len()).map_err(|_| Errno::INVAL)
}

fn length(result: isize) -> Result<usize, Errno> {
    usize::try_from(result).map_err(|_| last_errno())
}
