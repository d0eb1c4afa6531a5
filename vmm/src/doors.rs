//! The sockets and files of a guest, in its own directory; opened before guest code runs.
//!
//! | name | what |
//! |---|---|
//! | `control.sock` | requests (`stillpoint_control::message`) |
//! | `console.sock` | the serial console, raw bytes both ways |
//! | `console.log` | all the guest ever wrote to it |
//!
//! A vsock device has one of its own (`devices::virtio::vsock`).
//!
//! The directory is 0700 and every caller's uid is checked (`SO_PEERCRED`). A successor gets the
//! listening sockets themselves: clients find it under the same path.

use std::fs::{DirBuilder, OpenOptions};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

use crate::console;

/// Name of the control socket in the guest's directory.
pub const CONTROL_SOCKET: &str = "control.sock";
/// Callers that may wait to be let in.
const BACKLOG: i32 = 16;

/// Why a door could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum DoorError {
    /// The directory or a file in it.
    #[error("cannot open {path}: {source}")]
    Open {
        /// Which.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// Somebody else's directory, or one that others may enter.
    #[error("{path} must belong to us alone: it has owner {owner} and mode {mode:o} (want 0700)")]
    NotOursAlone {
        /// The directory.
        path: PathBuf,
        /// Its owner.
        owner: u32,
        /// Its mode.
        mode: u32,
    },
    /// A living VMM is there.
    #[error("another VMM serves {0}: a guest with this directory runs already")]
    Taken(PathBuf),
}

/// The doors of one guest.
#[derive(Debug)]
pub struct Doors {
    /// Where requests come in.
    pub control: OwnedFd,
    /// Console socket and log.
    pub console: console::Doors,
}

fn open(path: &Path) -> impl FnOnce(std::io::Error) -> DoorError {
    let path = path.to_owned();
    move |source| DoorError::Open { path, source }
}

impl Doors {
    /// Opens them in `dir`, which is made if it isn't there.
    pub fn open(dir: &Path) -> Result<Self, DoorError> {
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(dir)
            .map_err(open(dir))?;
        check_dir(dir)?;
        let log = dir.join("console.log");
        let log = OpenOptions::new()
            .append(true)
            .create(true)
            .mode(0o600)
            .open(&log)
            .map_err(open(&log))?;
        Ok(Self {
            control: listen(&dir.join(CONTROL_SOCKET), SocketType::SEQPACKET)?,
            console: console::Doors {
                listener: listen(&dir.join("console.sock"), SocketType::STREAM)?,
                log,
            },
        })
    }

    /// Duplicates, to be handed to a successor: control, console, console log.
    pub fn duplicate(&self) -> std::io::Result<[OwnedFd; 3]> {
        let console = self.console.try_clone()?;
        Ok([
            self.control.try_clone()?,
            console.listener,
            console.log.into(),
        ])
    }

    /// (Re)starts listening, which also makes this process the one that `SO_PEERCRED` shows to
    /// those who connect (net/unix/af_unix.c, `unix_listen`).
    pub fn answer(&self) -> std::io::Result<()> {
        rustix::net::listen(&self.control, BACKLOG)?;
        Ok(rustix::net::listen(&self.console.listener, BACKLOG)?)
    }
}

fn check_dir(dir: &Path) -> Result<(), DoorError> {
    let meta = std::fs::metadata(dir).map_err(open(dir))?;
    let (owner, mode) = (meta.uid(), meta.permissions().mode() & 0o777);
    if owner != rustix::process::geteuid().as_raw() || mode & 0o077 != 0 {
        return Err(DoorError::NotOursAlone {
            path: dir.to_owned(),
            owner,
            mode,
        });
    }
    Ok(())
}

/// Listens at `path`. A socket file that nobody answers at is left over from a dead process and
/// replaced; one that somebody answers at is not touched.
pub(crate) fn listen(path: &Path, kind: SocketType) -> Result<OwnedFd, DoorError> {
    let failed = |errno: Errno| open(path)(errno.into());
    let address = SocketAddrUnix::new(path).map_err(failed)?;
    let new_socket =
        || rustix::net::socket_with(AddressFamily::UNIX, kind, SocketFlags::CLOEXEC, None);
    if let Ok(meta) = std::fs::symlink_metadata(path) {
        if !meta.file_type().is_socket() {
            return Err(open(path)(std::io::Error::other(
                "a file that is no socket is there",
            )));
        }
        let probe = new_socket().map_err(failed)?;
        match rustix::net::connect(&probe, &address) {
            Err(Errno::CONNREFUSED) => std::fs::remove_file(path).map_err(open(path))?,
            Err(errno) => return Err(failed(errno)),
            Ok(()) => return Err(DoorError::Taken(path.to_owned())),
        }
    }
    let socket = new_socket().map_err(failed)?;
    rustix::net::bind(&socket, &address).map_err(failed)?;
    rustix::net::listen(&socket, BACKLOG).map_err(failed)?;
    Ok(socket)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stale_sockets_are_replaced_and_living_ones_left_alone() {
        let dir = tempfile::tempdir().expect("dir");
        let dir = dir.path().join("vm");
        drop(Doors::open(&dir).expect("first"));
        let second = Doors::open(&dir).expect("the first's sockets are stale now");
        let error = Doors::open(&dir).expect_err("the second lives");
        assert!(matches!(error, DoorError::Taken(_)), "{error}");
        drop(second);
    }

    #[test]
    fn a_directory_others_may_enter_is_refused() {
        let dir = tempfile::tempdir().expect("dir");
        let open_dir = dir.path().join("vm");
        std::fs::create_dir(&open_dir).expect("mkdir");
        std::fs::set_permissions(&open_dir, std::fs::Permissions::from_mode(0o755)).expect("mode");
        let error = Doors::open(&open_dir).expect_err("0755");
        assert!(error.to_string().contains("0700"), "{error}");
    }

    #[test]
    fn a_file_in_place_of_a_socket_is_not_deleted() {
        let dir = tempfile::tempdir().expect("dir");
        let dir = dir.path().join("vm");
        DirBuilder::new().mode(0o700).create(&dir).expect("mkdir");
        std::fs::write(dir.join("control.sock"), "mine").expect("write");
        Doors::open(&dir).expect_err("no socket");
        assert_eq!(
            std::fs::read(dir.join("control.sock")).expect("read"),
            b"mine"
        );
    }
}
