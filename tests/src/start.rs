//! How VMM processes are started: with fds of ours, and what they say on their ready fd.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, PoisonError};

use anyhow::Context;
use rustix::io::FdFlags;
use stillpoint_control::message::Ready;

/// Held while fds are inheritable: a process started meanwhile by another thread would keep them.
static STARTING: Mutex<()> = Mutex::new(());

/// Gives a user who is not root a `/dev/kvm` of its own, in a mount namespace of its own, and
/// becomes that user.
const AS_USER: &str = r#"set -e
cd "$1"; uid="$2"; shift 2
mount -t tmpfs -o mode=755 none /mnt
mknod -m 666 /mnt/kvm c 10 232
mount --bind /mnt/kvm /dev/kvm
exec setpriv --reuid "$uid" --regid "$uid" --clear-groups "$@""#;

/// How the VMMs of a guest are started.
#[derive(Clone, Copy, Debug, Default)]
pub struct Manner {
    /// As this user, with a `/dev/kvm` of its own; as ours if `None`.
    pub uid: Option<u32>,
    /// In the session of the test, and not each in its own, as the daemon has it. Schedulers may
    /// share cores out by session.
    pub in_our_session: bool,
}

/// A command whose standard error goes to `log`.
pub fn command(binary: &Path, log: &Path, manner: Manner) -> anyhow::Result<Command> {
    let log = std::fs::OpenOptions::new()
        .create(true)
        .append(true)
        .open(log)?;
    let mut command = Command::new(match manner.in_our_session {
        false => "setsid",
        true => "env",
    });
    if let Some(uid) = manner.uid {
        command.args(["unshare", "-m", "sh", "-c", AS_USER, "sh", "/"]);
        command.arg(uid.to_string());
    }
    command.arg(binary);
    command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(log);
    Ok(command)
}

/// Starts it. It inherits `fds`, under the same numbers.
pub fn start(command: &mut Command, fds: &[&OwnedFd]) -> anyhow::Result<Child> {
    let _alone = STARTING.lock().unwrap_or_else(PoisonError::into_inner);
    for fd in fds {
        rustix::io::fcntl_setfd(fd, FdFlags::empty())?;
    }
    let child = command.spawn();
    for fd in fds {
        rustix::io::fcntl_setfd(fd, FdFlags::CLOEXEC)?;
    }
    child.with_context(|| format!("starting {command:?}"))
}

/// Takes what a child says on its ready fd.
pub fn wait_ready(from: std::io::PipeReader, who: &str, log: &Path) -> anyhow::Result<()> {
    let line = std::io::read_to_string(from)?;
    match serde_json::from_str::<Ready>(&line) {
        Ok(Ready::Yes) => Ok(()),
        Ok(Ready::No { error }) => anyhow::bail!("{who}: {error}"),
        Err(_) => {
            let log = std::fs::read_to_string(log).unwrap_or_default();
            anyhow::bail!("{who} died without a word; its log:\n{log}")
        }
    }
}

/// A file that user `uid` can read, as a copy of `from` in `dir`.
pub fn copy_for_all(from: &Path, dir: &Path) -> anyhow::Result<PathBuf> {
    let name = from.file_name().context("a file's name")?;
    let to = dir.join(name);
    if !to.exists() {
        std::fs::copy(from, &to)?;
    }
    Ok(to)
}
