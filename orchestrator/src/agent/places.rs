//! Where things lie.
//!
//! ```text
//! RUN (0700)                           STATE (0700)
//!   lock            one daemon           store.sqlite
//!   api.sock        the API              releases/VERSION/stillpoint-vmm
//!   vms/NAME/       see `VmDir`          releases/VERSION/manifest.json
//! ```

use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

use crate::model::VmName;

/// The longest path of a Unix socket (`sun_path` less its terminator).
const MAX_SOCKET_PATH: usize = 107;

/// A directory that is not safe to use.
#[derive(Debug, thiserror::Error)]
pub enum DirError {
    /// It can't be made or looked at.
    #[error("cannot use the directory {path}: {source}")]
    Io {
        /// The directory.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// Someone else could change what lies in it.
    #[error(
        "the directory {path} {problem}; it must be a directory of uid {uid} with mode 0700 \
         (`chmod 0700 {path}`, or name another)"
    )]
    Unsafe {
        /// The directory.
        path: PathBuf,
        /// What is wrong.
        problem: String,
        /// Whose it must be.
        uid: u32,
    },
    /// A socket in it could not be bound.
    #[error(
        "the path {0} is longer than the {MAX_SOCKET_PATH} bytes a Unix socket may have; use a \
         shorter run directory or name"
    )]
    TooLong(PathBuf),
}

/// Makes a directory with mode 0700, or checks that one that is there is ours alone.
pub fn private_dir(path: &Path) -> Result<(), DirError> {
    let io = |source| DirError::Io {
        path: path.to_owned(),
        source,
    };
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .map_err(io)?;
    check_private(path)
}

/// Makes the run directory. Others may pass through it to the API's socket, if they are let in there at all; what else
/// lies in it is closed to them by its own mode.
pub fn run_dir(path: &Path, others_pass: bool) -> Result<(), DirError> {
    use std::os::unix::fs::PermissionsExt;
    let io = |source| DirError::Io {
        path: path.to_owned(),
        source,
    };
    let mut builder = std::fs::DirBuilder::new();
    builder
        .recursive(true)
        .mode(0o700)
        .create(path)
        .map_err(io)?;
    check(path, 0o066)?;
    let mode = if others_pass { 0o711 } else { 0o700 };
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).map_err(io)
}

/// Whether a directory is ours alone.
pub fn check_private(path: &Path) -> Result<(), DirError> {
    check(path, 0o077)
}

fn check(path: &Path, closed: u32) -> Result<(), DirError> {
    let io = |source| DirError::Io {
        path: path.to_owned(),
        source,
    };
    let found = std::fs::symlink_metadata(path).map_err(io)?;
    let uid = rustix::process::geteuid().as_raw();
    let problem = if !found.is_dir() {
        "is not a directory".to_owned()
    } else if found.uid() != uid {
        format!("belongs to uid {}", found.uid())
    } else if found.mode() & closed != 0 {
        format!("has mode {:04o}", found.mode() & 0o7777)
    } else {
        return Ok(());
    };
    Err(DirError::Unsafe {
        path: path.to_owned(),
        problem,
        uid,
    })
}

/// The directory of one VM: what its VMM makes there, and its log.
#[derive(Clone, Debug)]
pub struct VmDir(PathBuf);

impl VmDir {
    /// Of the VM of that name.
    pub fn new(run_dir: &Path, name: &VmName) -> Self {
        Self(run_dir.join("vms").join(name.as_str()))
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// The control socket.
    pub fn control(&self) -> PathBuf {
        self.0.join("control.sock")
    }

    /// The serial console, as a socket.
    pub fn console(&self) -> PathBuf {
        self.0.join("console.sock")
    }

    /// Where host programs connect to the guest's sockets, if it has a vsock device.
    pub fn vsock(&self) -> PathBuf {
        self.0.join("vsock.sock")
    }

    /// Where a host program listens for guests that connect to this port of the host.
    pub fn vsock_port(&self, port: u32) -> PathBuf {
        self.0.join(format!("vsock.sock_{port}"))
    }

    /// What the serial console said.
    pub fn console_log(&self) -> PathBuf {
        self.0.join("console.log")
    }

    /// What its VMMs logged.
    pub fn log(&self) -> PathBuf {
        self.0.join("vmm.log")
    }

    /// Its machine spec, as its VMM read it.
    pub fn spec(&self) -> PathBuf {
        self.0.join("spec.json")
    }

    /// Makes it, with mode 0700.
    pub fn create(&self) -> Result<(), DirError> {
        self.check_length()?;
        private_dir(&self.0)
    }

    /// Whether the paths of its sockets can be bound.
    pub fn check_length(&self) -> Result<(), DirError> {
        let longest = self.console();
        if longest.as_os_str().len() > MAX_SOCKET_PATH {
            return Err(DirError::TooLong(longest));
        }
        Ok(())
    }

    /// Removes socket files at which nobody listens any more.
    pub fn remove_stale_sockets(&self) {
        let sockets = [
            (self.control(), SocketType::SEQPACKET),
            (self.console(), SocketType::STREAM),
            (self.vsock(), SocketType::STREAM),
        ];
        for (path, kind) in sockets {
            if !is_stale(&path, kind) {
                continue;
            }
            match std::fs::remove_file(&path) {
                Ok(()) => tracing::info!(path = %path.display(), "removed a stale socket"),
                Err(e) => tracing::warn!(path = %path.display(), "stale socket stays: {e}"),
            }
        }
    }
}

/// Whether a socket file is there whose listener is dead.
fn is_stale(path: &Path, kind: SocketType) -> bool {
    let connected = SocketAddrUnix::new(path).and_then(|address| {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = rustix::net::socket_with(AddressFamily::UNIX, kind, flags, None)?;
        rustix::net::connect(&socket, &address)
    });
    connected == Err(rustix::io::Errno::CONNREFUSED)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn a_directory_open_to_others_is_refused() {
        let base = tempfile::tempdir().expect("temp dir");
        let path = base.path().join("run");
        private_dir(&path).expect("made");
        private_dir(&path).expect("ours");
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o750)).expect("chmod");
        let error = private_dir(&path).expect_err("open to the group");
        assert!(error.to_string().contains("0750"), "{error}");
        std::os::unix::fs::symlink(base.path(), base.path().join("link")).expect("link");
        private_dir(&base.path().join("link")).expect_err("a link is no directory of ours");
    }
}
