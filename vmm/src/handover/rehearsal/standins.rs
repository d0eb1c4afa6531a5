//! What a rehearsal gets in place of the files that the guest's devices have: by name the same, and
//! none of them the guest's own.

use std::os::fd::{AsRawFd, OwnedFd};

use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{Mode, OFlags};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

/// A stand-in for each of these files.
pub(super) fn of(files: Vec<(String, OwnedFd)>) -> std::io::Result<Vec<(String, OwnedFd)>> {
    let each = files.into_iter().map(|(name, file)| {
        let standin = of_one(&name, &file)?;
        Ok((name, standin))
    });
    each.collect()
}

/// Names are `DEVICE/FILE` ([`lend`](crate::handover::lend)). What is not known here is a socket.
fn of_one(name: &str, file: &OwnedFd) -> std::io::Result<OwnedFd> {
    let kind = name.rsplit('/').next().unwrap_or_default();
    if kind == "image" {
        // Another description of the same file: it can't write, and has no part in the lock. The
        // name may be gone from its directory, so it is opened by the descriptor.
        let path = format!("/proc/self/fd/{}", file.as_raw_fd());
        let flags = OFlags::RDONLY | OFlags::CLOEXEC;
        return Ok(rustix::fs::open(path, flags, Mode::empty())?);
    }
    if kind.starts_with("kick") {
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        return Ok(eventfd(0, flags)?);
    }
    // Of a pair whose other end is closed: it can be watched, and nothing is ever said there.
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let (end, _) = socketpair(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    Ok(end)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::raw::file::{Lock, lock};

    #[test]
    fn an_image_is_read_without_its_lock_and_can_not_be_written() {
        let file = tempfile::NamedTempFile::new().expect("file");
        std::fs::write(file.path(), b"guest").expect("write");
        let own: OwnedFd = file.reopen().expect("open").into();
        lock(&own, Lock::Exclusive).expect("lock");
        std::fs::remove_file(file.path()).expect("remove");
        let standins = of(vec![("disk0/image".into(), own)]).expect("stand-ins");
        let (name, image) = &standins[0];
        assert_eq!(name, "disk0/image");
        let mut bytes = [0; 5];
        rustix::io::pread(image, &mut bytes, 0).expect("read");
        assert_eq!(&bytes, b"guest");
        rustix::io::pwrite(image, b"x", 0).expect_err("for reading only");
        // The guest's description is gone here, and its lock with it: the stand-in never had one.
        let other: std::fs::File = std::fs::OpenOptions::new()
            .read(true)
            .write(true)
            .open(format!("/proc/self/fd/{}", image.as_raw_fd()))
            .expect("again");
        lock(&other, Lock::Exclusive).expect("nobody holds it");
    }

    #[test]
    fn a_kick_and_a_socket_are_not_the_guests() {
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        let kick = eventfd(1, flags).expect("eventfd");
        let guests = kick.try_clone().expect("dup");
        let (tap, other) = socketpair(
            AddressFamily::UNIX,
            SocketType::STREAM,
            SocketFlags::CLOEXEC,
            None,
        )
        .expect("pair");
        let standins = of(vec![("net0/kick0".into(), kick), ("net0/tap0".into(), tap)]);
        let standins = standins.expect("stand-ins");
        let mut eight = [0; 8];
        rustix::io::read(&standins[0].1, &mut eight).expect_err("a fresh one is empty");
        rustix::io::read(&guests, &mut eight).expect("the guest's was not touched");
        let _ = rustix::net::send(&standins[1].1, b"frame", rustix::net::SendFlags::NOSIGNAL);
        let mut byte = [0];
        assert_eq!(rustix::io::read(&other, &mut byte), Ok(0), "nothing came");
    }
}
