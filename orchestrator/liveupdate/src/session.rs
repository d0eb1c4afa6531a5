//! The device and its sessions.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

use crate::abi;

/// Where the orchestrator is.
pub const DEVICE: &str = "/dev/liveupdate";
/// The longest name of a session, bytes.
pub const NAME_MAX: usize = abi::NAME - 1;

/// Why the orchestrator did not do what it was asked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// This kernel has none, or it is switched off.
    #[error(
        "there is no {}: this kernel has no live update orchestrator (CONFIG_LIVEUPDATE), or was booted \
         without `kho=on liveupdate=on`", .0.display()
    )]
    Absent(PathBuf),
    /// One process has it at a time.
    #[error("{} is in use by another process, and one has it at a time", .0.display())]
    InUse(PathBuf),
    /// It can't be opened.
    #[error("cannot open {}: {errno}", path.display())]
    Open {
        /// Which.
        path: PathBuf,
        /// Why not.
        errno: Errno,
    },
    /// A name that no session can have.
    #[error("{0:?} can't be a session's name: 1 to {NAME_MAX} bytes, none of them zero")]
    Name(String),
    /// Nothing of that name, or that token, came from the kernel before.
    #[error("{0} did not come from the kernel before")]
    NotThere(String),
    /// The name, or the token, is taken.
    #[error("{0} is there already")]
    Taken(String),
    /// The kernel can't preserve a file of that kind.
    #[error("{0} is of a kind that this kernel does not preserve")]
    Kind(String),
    /// There is too little memory for it.
    #[error(
        "there is too little memory to preserve {0}: its holes are filled, and pages are moved"
    )]
    Memory(String),
    /// Anything else.
    #[error("cannot {what}: {errno}")]
    Failed {
        /// What was to be done.
        what: String,
        /// Why not.
        errno: Errno,
    },
}

/// The orchestrator, held by this process alone.
#[derive(Debug)]
pub struct LiveUpdate {
    device: OwnedFd,
}

/// A session whose files the next kernel gets, if it is held when this one is left.
#[derive(Debug)]
pub struct Outgoing {
    session: OwnedFd,
}

/// A session that came from the kernel before.
#[derive(Debug)]
pub struct Incoming {
    session: OwnedFd,
}

impl LiveUpdate {
    /// Opens [`DEVICE`].
    pub fn open() -> Result<Self, Error> {
        Self::open_at(Path::new(DEVICE))
    }

    /// Opens it at another path.
    pub fn open_at(path: &Path) -> Result<Self, Error> {
        let device = rustix::fs::open(path, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty());
        let path = path.to_owned();
        match device {
            Ok(device) => Ok(Self { device }),
            Err(Errno::NOENT | Errno::NXIO | Errno::NODEV) => Err(Error::Absent(path)),
            Err(Errno::BUSY) => Err(Error::InUse(path)),
            Err(errno) => Err(Error::Open { path, errno }),
        }
    }

    /// Makes a session.
    pub fn create(&self, name: &str) -> Result<Outgoing, Error> {
        let session = abi::create_session(self.device.as_fd(), bytes(name)?);
        let what = || format!("the session {name:?}");
        let session = session.map_err(|errno| match errno {
            Errno::EXIST => Error::Taken(what()),
            errno => failed(format!("make {}", what()), errno),
        })?;
        Ok(Outgoing { session })
    }

    /// Takes over a session that came from the kernel before; `None` if none of that name did.
    pub fn retrieve(&self, name: &str) -> Result<Option<Incoming>, Error> {
        match abi::retrieve_session(self.device.as_fd(), bytes(name)?) {
            Ok(session) => Ok(Some(Incoming { session })),
            Err(Errno::NOENT) => Ok(None),
            Err(errno) => Err(failed(format!("retrieve the session {name:?}"), errno)),
        }
    }
}

impl Outgoing {
    /// Has the next kernel get this file. Of a memfd every hole is filled and every page pinned, now; it may
    /// be written further, but not grow, shrink or be punched, while the session is held.
    pub fn preserve(&self, file: impl AsFd, token: u64) -> Result<(), Error> {
        let done = abi::preserve(self.session.as_fd(), file.as_fd().as_raw_fd(), token);
        let what = format!("the file of token {token}");
        done.map_err(|errno| match errno {
            Errno::EXIST => Error::Taken(what),
            Errno::NOENT | Errno::OPNOTSUPP => Error::Kind(what),
            Errno::NOMEM => Error::Memory(what),
            errno => failed(format!("preserve {what}"), errno),
        })
    }
}

impl Incoming {
    /// Takes a file. One that failed once fails each time.
    pub fn retrieve(&self, token: u64) -> Result<OwnedFd, Error> {
        let what = format!("the file of token {token}");
        abi::retrieve(self.session.as_fd(), token).map_err(|errno| match errno {
            Errno::NOENT => Error::NotThere(what),
            errno => failed(format!("retrieve {what}"), errno),
        })
    }

    /// Ends the session: what was retrieved is this process's, what was not is freed. An error leaves the
    /// session as it was, so it is handed back.
    pub fn finish(self) -> Result<(), (Self, Error)> {
        match abi::finish(self.session.as_fd()) {
            Ok(()) => Ok(()),
            Err(errno) => Err((self, failed("finish the session".into(), errno))),
        }
    }
}

fn failed(what: String, errno: Errno) -> Error {
    Error::Failed { what, errno }
}

/// A name as the kernel takes it.
fn bytes(name: &str) -> Result<[u8; abi::NAME], Error> {
    let fits = (1..=NAME_MAX).contains(&name.len()) && !name.bytes().any(|byte| byte == 0);
    if !fits {
        return Err(Error::Name(name.to_owned()));
    }
    let mut bytes = [0; abi::NAME];
    bytes[..name.len()].copy_from_slice(name.as_bytes());
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kernel_without_it_is_told_apart_from_one_that_refuses() {
        let dir = tempfile::tempdir().expect("a folder");
        let nowhere = dir.path().join("liveupdate");
        let absent = LiveUpdate::open_at(&nowhere).expect_err("there is none");
        assert_eq!(absent, Error::Absent(nowhere));
        assert!(absent.to_string().contains("CONFIG_LIVEUPDATE"), "{absent}");
        let folder = LiveUpdate::open_at(dir.path()).expect_err("a folder is none");
        assert!(matches!(folder, Error::Open { .. }), "{folder}");
    }

    #[test]
    fn what_is_no_orchestrator_makes_no_session() {
        let file = tempfile::NamedTempFile::new().expect("a file");
        let other = LiveUpdate::open_at(file.path()).expect("it opens");
        let error = other.create("a").expect_err("no ioctl of ours");
        let errno = Errno::NOTTY;
        let what = "make the session \"a\"".to_owned();
        assert_eq!(error, Error::Failed { what, errno });
        other.retrieve("a").expect_err("nor is any found");
    }

    #[test]
    fn names_that_the_kernel_would_cut_off_are_refused() {
        assert!(bytes(&"x".repeat(NAME_MAX)).is_ok());
        for name in ["", "a\0b", &"x".repeat(NAME_MAX + 1)] {
            assert_eq!(bytes(name), Err(Error::Name(name.to_owned())));
        }
    }
}
