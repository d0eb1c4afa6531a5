//! The ioctls as the kernel has them (include/uapi/linux/liveupdate.h). Each struct begins with its own
//! size, by which the kernel tells versions apart.
#![allow(unsafe_code)] // ioctls take untyped memory.

use std::os::fd::{BorrowedFd, FromRawFd, OwnedFd, RawFd};

use rustix::io::{Errno, FdFlags};
use rustix::ioctl::{Opcode, Updater, ioctl, opcode};

/// Bytes of a session's name, with the zero at its end.
pub(crate) const NAME: usize = 64;
const TYPE: u8 = 0xba;

/// On the device.
#[repr(C)]
struct SessionByName {
    size: u32,
    fd: i32,
    name: [u8; NAME],
}

/// On a session.
#[repr(C)]
struct FileByToken {
    size: u32,
    fd: i32,
    token: u64,
}

/// On a session.
#[repr(C)]
struct Finish {
    size: u32,
    reserved: u32,
}

/// Makes a session.
pub(crate) fn create_session(device: BorrowedFd<'_>, name: [u8; NAME]) -> Result<OwnedFd, Errno> {
    session::<{ opcode::none(TYPE, 0x00) }>(device, name)
}

/// Takes over the session of that name that came from the kernel before.
pub(crate) fn retrieve_session(device: BorrowedFd<'_>, name: [u8; NAME]) -> Result<OwnedFd, Errno> {
    session::<{ opcode::none(TYPE, 0x01) }>(device, name)
}

fn session<const CODE: Opcode>(device: BorrowedFd<'_>, name: [u8; NAME]) -> Result<OwnedFd, Errno> {
    let mut asked = SessionByName {
        size: size_of::<SessionByName>() as u32,
        fd: -1,
        name,
    };
    // SAFETY: these codes take such a struct, and write a descriptor into it.
    unsafe { ioctl(device, Updater::<CODE, _>::new(&mut asked)) }?;
    owned(asked.fd)
}

/// Adds a file.
pub(crate) fn preserve(session: BorrowedFd<'_>, fd: RawFd, token: u64) -> Result<(), Errno> {
    file::<{ opcode::none(TYPE, 0x40) }>(session, fd, token).map(drop)
}

/// Takes a file.
pub(crate) fn retrieve(session: BorrowedFd<'_>, token: u64) -> Result<OwnedFd, Errno> {
    owned(file::<{ opcode::none(TYPE, 0x41) }>(session, -1, token)?)
}

fn file<const CODE: Opcode>(
    session: BorrowedFd<'_>,
    fd: RawFd,
    token: u64,
) -> Result<RawFd, Errno> {
    let mut asked = FileByToken {
        size: size_of::<FileByToken>() as u32,
        fd,
        token,
    };
    // SAFETY: these codes take such a struct; one reads its descriptor, the other writes it.
    unsafe { ioctl(session, Updater::<CODE, _>::new(&mut asked)) }?;
    Ok(asked.fd)
}

/// Ends a session that came from the kernel before.
pub(crate) fn finish(session: BorrowedFd<'_>) -> Result<(), Errno> {
    let mut asked = Finish {
        size: size_of::<Finish>() as u32,
        reserved: 0,
    };
    // SAFETY: this code takes such a struct, and reads it.
    unsafe {
        ioctl(
            session,
            Updater::<{ opcode::none(TYPE, 0x42) }, _>::new(&mut asked),
        )
    }
}

/// A descriptor that the kernel just made for this process.
fn owned(fd: RawFd) -> Result<OwnedFd, Errno> {
    if fd < 0 {
        return Err(Errno::BADF);
    }
    // SAFETY: the kernel installed it by the call that gave this number, and nobody else has seen it.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    rustix::io::fcntl_setfd(&fd, FdFlags::CLOEXEC)?;
    Ok(fd)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_structs_are_as_long_as_the_kernels() {
        assert_eq!(size_of::<SessionByName>(), 72);
        assert_eq!(size_of::<FileByToken>(), 16);
        assert_eq!(size_of::<Finish>(), 8);
    }

    #[test]
    fn what_is_no_session_refuses_every_call() {
        use std::os::fd::AsFd;
        let file = tempfile::tempfile().expect("a file");
        let fd = file.as_fd();
        let name = [0; NAME];
        assert_eq!(create_session(fd, name).err(), Some(Errno::NOTTY));
        assert_eq!(retrieve_session(fd, name).err(), Some(Errno::NOTTY));
        assert_eq!(preserve(fd, 0, 1), Err(Errno::NOTTY));
        assert_eq!(retrieve(fd, 1).err(), Some(Errno::NOTTY));
        assert_eq!(finish(fd), Err(Errno::NOTTY));
    }
}
