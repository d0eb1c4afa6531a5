//! A connection's socket on the host.
//!
//! Watched edge-triggered: the device's thread notes what it is told and acts when it can, so it
//! never spins on a socket that it can't serve now. Nothing here ever blocks.
//!
//! Dropping a socket says nothing to its peer as long as another process, such as a successor,
//! holds the same description; [`Socket::end`] does. So a predecessor that retires ends no
//! connection, and a process that ends a connection ends it for all.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::{Errno, retry_on_intr};
use rustix::net::{RecvFlags, SendFlags, Shutdown};

use crate::devices::virtio::poller::{Poller, Watch};

/// What reading gave.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Received {
    /// So many bytes, at least one.
    Bytes(usize),
    /// The peer sends no more.
    End,
    /// Nothing is there now.
    Nothing,
    /// The connection is broken.
    Broken,
}

/// What writing gave.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Sent {
    /// So many bytes, perhaps none.
    Bytes(usize),
    /// The peer reads no more.
    Deaf,
}

#[derive(Debug)]
pub(super) struct Socket {
    fd: OwnedFd,
    watched: Option<(Poller, u64)>,
    /// Whether room for writing is watched for.
    wants_room: bool,
}

impl Socket {
    pub(super) fn new(fd: OwnedFd) -> Self {
        Self {
            fd,
            watched: None,
            wants_room: false,
        }
    }

    /// Has the device's thread told of it, under `token`.
    pub(super) fn watch(&mut self, poller: &Poller, token: u64) -> std::io::Result<()> {
        poller.add(&self.fd, token, self.events())?;
        self.watched = Some((poller.clone(), token));
        Ok(())
    }

    fn events(&self) -> Watch {
        // Hang-ups are always told of.
        let room = match self.wants_room {
            true => Watch::OUT,
            false => Watch::empty(),
        };
        Watch::IN | Watch::RDHUP | Watch::ET | room
    }

    /// Watches for room, or no more. A peer that reads would wake the thread each time.
    pub(super) fn want_room(&mut self, wanted: bool) {
        if wanted == self.wants_room {
            return;
        }
        self.wants_room = wanted;
        if let Some((poller, token)) = &self.watched {
            // Fails only for a descriptor that isn't watched or out of kernel memory; what is
            // watched then is told of once more at the next event.
            let _ = poller.modify(&self.fd, *token, self.events());
        }
    }

    /// Reads what is there; `peek` leaves it there.
    pub(super) fn receive(&self, into: &mut [u8], peek: bool) -> Received {
        let peek = match peek {
            true => RecvFlags::PEEK,
            false => RecvFlags::empty(),
        };
        let flags = RecvFlags::DONTWAIT | peek;
        match retry_on_intr(|| rustix::net::recv(&self.fd, &mut *into, flags)) {
            Ok((_, 0)) => Received::End,
            Ok((_, n)) => Received::Bytes(n),
            Err(Errno::AGAIN) => Received::Nothing,
            Err(_) => Received::Broken,
        }
    }

    /// Writes as much as there is room for.
    pub(super) fn send(&self, bytes: &[u8]) -> Sent {
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        match retry_on_intr(|| rustix::net::send(&self.fd, bytes, flags)) {
            Ok(n) => Sent::Bytes(n),
            Err(Errno::AGAIN | Errno::NOBUFS | Errno::NOMEM) => Sent::Bytes(0),
            Err(_) => Sent::Deaf,
        }
    }

    /// Whether neither side can send any more.
    pub(super) fn has_hung_up(&self) -> bool {
        let mut fds = [PollFd::new(&self.fd, PollFlags::empty())];
        let at_once = Timespec::default();
        poll(&mut fds, Some(&at_once)).is_ok() && fds[0].revents().contains(PollFlags::HUP)
    }

    /// The peer's next write fails.
    pub(super) fn shut_in(&self) {
        let _ = rustix::net::shutdown(&self.fd, Shutdown::Read);
    }

    /// The peer reads to the end of what was sent.
    pub(super) fn shut_out(&self) {
        let _ = rustix::net::shutdown(&self.fd, Shutdown::Write);
    }

    /// Ends the connection, for everybody who holds its socket.
    pub(super) fn end(self) {
        let _ = rustix::net::shutdown(&self.fd, Shutdown::Both);
        if let Some((poller, _)) = &self.watched {
            // Closing is not enough while a duplicate lives elsewhere.
            let _ = poller.remove(&self.fd);
        }
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}
