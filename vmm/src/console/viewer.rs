//! Those who look at the console.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The most viewers at a time; their sockets travel in one message of a handover.
pub const MAX_VIEWERS: usize = 16;

/// One who looks at the console.
#[derive(Debug)]
pub struct Viewer {
    pub(super) socket: OwnedFd,
    /// Of the bytes kept, how many of the last it has not been sent. Changed by the console's
    /// thread alone, and only while that counts as in flight.
    behind: AtomicUsize,
}

impl Viewer {
    pub(super) fn new(socket: OwnedFd, behind: usize) -> Arc<Self> {
        let behind = AtomicUsize::new(behind);
        Arc::new(Self { socket, behind })
    }

    pub(super) fn behind(&self) -> usize {
        self.behind.load(Ordering::Relaxed)
    }

    pub(super) fn set_behind(&self, behind: usize) {
        self.behind.store(behind, Ordering::Relaxed);
    }
}

impl AsFd for Viewer {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

pub(super) type Viewers = Arc<Mutex<Vec<Arc<Viewer>>>>;

/// Those who look, locked for a moment.
pub(super) fn list(viewers: &Viewers) -> MutexGuard<'_, Vec<Arc<Viewer>>> {
    viewers.lock().unwrap_or_else(PoisonError::into_inner)
}
