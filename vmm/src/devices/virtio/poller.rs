//! What a device's thread waits for.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::time::Timespec;

/// Events taken at once.
const BATCH: usize = 32;

/// When a descriptor is told of.
pub type Watch = EventFlags;

/// Descriptors of one device, each with a token. Clones are the same.
#[derive(Clone, Debug)]
pub struct Poller(Arc<OwnedFd>);

impl Poller {
    pub(super) fn new() -> std::io::Result<Self> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        Ok(Self(Arc::new(epoll)))
    }

    /// Watches `fd`; a kind's tokens begin at [`super::FIRST_TOKEN`].
    pub fn add(&self, fd: impl AsFd, token: u64, watch: Watch) -> std::io::Result<()> {
        Ok(epoll::add(&*self.0, fd, EventData::new_u64(token), watch)?)
    }

    /// Watches it for something else.
    pub fn modify(&self, fd: impl AsFd, token: u64, watch: Watch) -> std::io::Result<()> {
        Ok(epoll::modify(
            &*self.0,
            fd,
            EventData::new_u64(token),
            watch,
        )?)
    }

    /// Watches it no more. Closing a descriptor is not enough as long as another process, such as
    /// a successor, holds the same description.
    pub fn remove(&self, fd: impl AsFd) -> std::io::Result<()> {
        Ok(epoll::delete(&*self.0, fd)?)
    }

    /// Waits for the next events, or takes those that are there. An interrupted wait gives none.
    pub(super) fn wait(&self, at_once: bool) -> Vec<epoll::Event> {
        let mut events = Vec::with_capacity(BATCH);
        let no_time = Timespec::default();
        let timeout = at_once.then_some(&no_time);
        let _ = epoll::wait(
            &*self.0,
            rustix::buffer::spare_capacity(&mut events),
            timeout,
        );
        events
    }
}
