//! Duplicates of guest RAM and ownership pages in systemd's fd store.
//!
//! They are one more holder, never the only one: the VMM has them itself, and a daemon that
//! starts anew is lent them again. Names: `ram-NAME` and `own-NAME`.
//!
//! What came from the kernel before is kept there as well, until its VMM has it ([`Keeping`]): of that the
//! daemon and systemd are the only holders.
#![allow(unsafe_code)] // Received fds are numbers; the one place where a number becomes an owner.

use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd};

use sd_notify::NotifyState;

use crate::model::VmName;

const PREFIXES: [&str; 2] = ["ram", "own"];
/// Of a guest's memfd that came from the kernel before.
const CAME: &str = "came-";
const DIRECTORY: &str = "live-update-directory";

/// What came from the kernel before by live update.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Keeping {
    /// The directory.
    Directory,
    /// A guest's memory.
    Guest(String),
}

impl Keeping {
    fn name(&self) -> String {
        match self {
            Self::Directory => DIRECTORY.to_owned(),
            Self::Guest(vm) => format!("{CAME}{vm}"),
        }
    }

    fn of(name: &str) -> Option<Self> {
        match name {
            DIRECTORY => Some(Self::Directory),
            name => Some(Self::Guest(name.strip_prefix(CAME)?.to_owned())),
        }
    }
}

/// Gives a duplicate to systemd, for a daemon that starts before its guest runs. Without systemd nothing happens.
pub fn keep_for_later(what: &Keeping, fd: impl AsFd) {
    let name = what.name();
    forget(&name);
    let told = tell(
        &[NotifyState::FdStore, NotifyState::FdName(&name)],
        &[fd.as_fd()],
    );
    if let Err(error) = told {
        tracing::warn!(name, "not in the fd store: {error}");
    }
}

/// Takes it back out.
pub fn let_go(what: &Keeping) {
    forget(&what.name());
}

/// Gives duplicates to systemd. Without systemd nothing happens.
pub fn keep(vm: &VmName, memory: impl AsFd, ownership: impl AsFd) {
    for (prefix, fd) in PREFIXES.iter().zip([memory.as_fd(), ownership.as_fd()]) {
        let name = format!("{prefix}-{vm}");
        let told = tell(&[NotifyState::FdStore, NotifyState::FdName(&name)], &[fd]);
        if let Err(error) = told {
            tracing::warn!(name, "not in the fd store: {error}");
        }
    }
}

/// Takes them back out.
pub fn release(vm: &VmName) {
    for prefix in PREFIXES {
        forget(&format!("{prefix}-{vm}"));
    }
}

/// Removes one name.
fn forget(name: &str) {
    if let Err(error) = tell(
        &[NotifyState::FdStoreRemove, NotifyState::FdName(name)],
        &[],
    ) {
        tracing::warn!(name, "stays in the fd store: {error}");
    }
}

fn tell(state: &[NotifyState<'_>], fds: &[BorrowedFd<'_>]) -> std::io::Result<()> {
    if fds.is_empty() {
        sd_notify::notify(state)
    } else {
        sd_notify::notify_with_fds(state, fds)
    }
}

/// What systemd kept for us. To be called once, early: the numbers are taken for fds that nobody else owns.
pub fn received() -> Vec<(String, OwnedFd)> {
    let received: Vec<_> = match sd_notify::listen_fds_with_names() {
        Ok(received) => received.collect(),
        Err(error) => {
            tracing::warn!("what systemd kept can't be read: {error}");
            return Vec::new();
        }
    };
    let owned = |(number, name)| {
        // SAFETY: systemd passed this fd to this very process (LISTEN_PID was checked), and this
        // function, called once, is the only one that looks at those numbers.
        (name, unsafe { OwnedFd::from_raw_fd(number) })
    };
    received.into_iter().map(owned).collect()
}

/// What of it came from the kernel before, taken out of the rest.
pub fn came(received: &mut Vec<(String, OwnedFd)>) -> Vec<(Keeping, OwnedFd)> {
    let (came, rest): (Vec<_>, Vec<_>) = std::mem::take(received)
        .into_iter()
        .partition(|(name, _)| Keeping::of(name).is_some());
    *received = rest;
    let named = came.into_iter();
    named
        .filter_map(|(name, fd)| Some((Keeping::of(&name)?, fd)))
        .collect()
}

/// Closes the rest, and forgets what belongs to no VM of `known`.
pub fn settle(received: Vec<(String, OwnedFd)>, known: &[VmName]) {
    for (name, fd) in received {
        // RAM that only we hold must not outlive its guest; living VMMs lend it again.
        drop(fd);
        let vm = PREFIXES
            .iter()
            .find_map(|prefix| name.strip_prefix(prefix)?.strip_prefix('-'));
        if !known.iter().any(|known| Some(known.as_str()) == vm) {
            forget(&name);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_came_from_the_kernel_before_is_told_apart() {
        let fd = || OwnedFd::from(std::fs::File::open("/dev/null").expect("a file"));
        let names = ["ram-a", "came-a", DIRECTORY, "own-a", "came-directory"];
        let mut received = names.map(|name| (name.to_owned(), fd())).into();
        let came: Vec<_> = came(&mut received)
            .into_iter()
            .map(|(what, _)| what)
            .collect();
        let guest = |vm: &str| Keeping::Guest(vm.into());
        assert_eq!(came, [guest("a"), Keeping::Directory, guest("directory")]);
        assert!(
            came.iter()
                .all(|what| Keeping::of(&what.name()) == Some(what.clone()))
        );
        let rest: Vec<_> = received.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(rest, ["ram-a", "own-a"]);
    }
}
