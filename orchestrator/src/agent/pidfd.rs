//! A pidfd that the runtime waits on.
#![allow(unsafe_code)] // `AsyncFd::register` asks for a promise about the fd's life.

use std::os::fd::OwnedFd;

use tokio::io::unix::AsyncFd;

/// Registers a pidfd with the runtime.
pub(super) fn watch(pidfd: OwnedFd) -> std::io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an OwnedFd has the same open fd for all its life, and the AsyncFd owns it and
    // deregisters it before it closes it.
    unsafe { AsyncFd::register(pidfd) }.map_err(Into::into)
}
