//! Duplicates of guest RAM and ownership pages in systemd's fd store.
//!
//! They are one more holder, never the only one: the VMM has them itself, and a daemon that
//! starts anew is lent them again. Names: `ram-NAME` and `own-NAME`.
#![allow(unsafe_code)] // Received fds are numbers; the one place where a number becomes an owner.

use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd};

use sd_notify::NotifyState;

use crate::model::VmName;

const PREFIXES: [&str; 2] = ["ram", "own"];

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

/// Closes what systemd kept for us, and forgets what belongs to no VM of `known`. To be called
/// once, early: the numbers are taken for fds that nobody else owns.
pub fn take_over(known: &[VmName]) {
    let received: Vec<_> = match sd_notify::listen_fds_with_names() {
        Ok(received) => received.collect(),
        Err(error) => {
            tracing::warn!("what systemd kept can't be read: {error}");
            return;
        }
    };
    for (number, name) in received {
        // SAFETY: systemd passed this fd to this very process (LISTEN_PID was checked), and this
        // function, called once, is the only one that looks at those numbers.
        let fd = unsafe { OwnedFd::from_raw_fd(number) };
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
