//! The device's place on the host: a socket at which host programs connect, and sockets of theirs
//! to which the guest can.
//!
//! | name in the guest's directory | what |
//! |---|---|
//! | `vsock.sock` | host programs connect, and say `CONNECT <port>` |
//! | `vsock.sock_<port>` | a host program listens; the guest connects to this port of CID 2 |

use std::fs::Permissions;
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
    timerfd_settime,
};

use super::socket::Socket;
use super::{LISTENER, TIMER};
use crate::devices::virtio::poller::{Poller, Watch};
use crate::doors::{self, DoorError};

/// Name of the socket at which host programs connect, in the guest's directory.
pub const SOCKET: &str = "vsock.sock";

/// The longest line a host program may begin with, its end included.
pub(super) const MAX_LINE: usize = 32;

/// How often first lines, and a listener that failed, are looked at.
const TICK: Duration = Duration::from_secs(1);

/// Opens the socket at which host programs connect.
pub fn listen(dir: &Path) -> Result<OwnedFd, DoorError> {
    let path = dir.join(SOCKET);
    let listener = doors::listen(&path, SocketType::STREAM)?;
    let mode = Permissions::from_mode(0o600);
    // A caller can be gone again before it is let in: that must not make the device wait.
    let prepared = std::fs::set_permissions(&path, mode)
        .and_then(|()| Ok(rustix::io::ioctl_fionbio(&listener, true)?));
    match prepared {
        Ok(()) => Ok(listener),
        Err(source) => Err(DoorError::Open { path, source }),
    }
}

/// What came of looking for a caller.
#[derive(Debug)]
pub(super) enum Caller {
    Here(Socket),
    /// Somebody who may not enter, or who left.
    Nobody,
    /// No one is waiting.
    None,
    /// Not now: this process has no descriptor to spare.
    Later,
}

#[derive(Debug)]
pub(super) struct Host {
    pub(super) listener: OwnedFd,
    dir: PathBuf,
    poller: Option<Poller>,
    timer: Option<OwnedFd>,
    ticking: bool,
    /// Somebody may be waiting at the listener.
    pub(super) knocked: bool,
    /// No descriptor could be had; the next tick ends it.
    pub(super) resting: bool,
}

impl Host {
    pub(super) fn new(listener: OwnedFd, dir: &Path) -> Self {
        Self {
            listener,
            dir: dir.to_owned(),
            poller: None,
            timer: None,
            ticking: false,
            knocked: true,
            resting: false,
        }
    }

    pub(super) fn watch(&mut self, poller: &Poller) -> std::io::Result<()> {
        let flags = TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC;
        let timer = timerfd_create(TimerfdClockId::Monotonic, flags)?;
        poller.add(&timer, TIMER, Watch::IN | Watch::ET)?;
        self.timer = Some(timer);
        self.poller = Some(poller.clone());
        poller.add(&self.listener, LISTENER, Watch::IN | Watch::ET)
    }

    /// Has the device's thread told of the listener once more, if somebody still waits there.
    pub(super) fn look_again(&self) {
        if let Some(poller) = &self.poller {
            // Fails for no descriptor that is watched.
            let _ = poller.modify(&self.listener, LISTENER, Watch::IN | Watch::ET);
        }
    }

    /// Has the device's thread told in a moment, once.
    pub(super) fn tick_later(&mut self) {
        let Some(timer) = self.timer.as_ref().filter(|_| !self.ticking) else {
            return;
        };
        let once = Itimerspec {
            it_interval: Timespec::default(),
            it_value: Timespec::try_from(TICK).unwrap_or_default(),
        };
        self.ticking = timerfd_settime(timer, TimerfdTimerFlags::empty(), &once).is_ok();
    }

    /// The moment has come.
    pub(super) fn ticked(&mut self) {
        self.ticking = false;
        self.resting = false;
    }

    /// Lets the next host program in.
    pub(super) fn caller(&mut self) -> Caller {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        match rustix::net::accept_with(&self.listener, flags) {
            Ok(socket) if crate::peer::may_enter(&socket) => Caller::Here(Socket::new(socket)),
            Ok(_) | Err(Errno::CONNABORTED | Errno::INTR) => Caller::Nobody,
            Err(Errno::AGAIN) => {
                self.knocked = false;
                Caller::None
            }
            Err(_) => {
                self.resting = true;
                self.tick_later();
                Caller::Later
            }
        }
    }

    /// Connects to the host program that serves `port`; never waits for it.
    pub(super) fn connect(&self, port: u32) -> Option<Socket> {
        let path = self.dir.join(format!("{SOCKET}_{port}"));
        let address = SocketAddrUnix::new(path).ok()?;
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let (family, kind) = (AddressFamily::UNIX, SocketType::STREAM);
        let socket = rustix::net::socket_with(family, kind, flags, None).ok()?;
        // A Unix socket connects at once or not at all (net/unix/af_unix.c).
        rustix::net::connect(&socket, &address).ok()?;
        Some(Socket::new(socket))
    }
}

/// The port in `CONNECT <port>\n`.
pub(super) fn wanted_port(line: &[u8]) -> Option<u32> {
    let line = std::str::from_utf8(line).ok()?.trim_end();
    let port = line.strip_prefix("CONNECT ")?;
    // Not by `parse` alone, which takes a sign.
    match port.bytes().all(|byte| byte.is_ascii_digit()) {
        true => port.parse().ok(),
        false => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_connect_line_names_a_port() {
        assert_eq!(wanted_port(b"CONNECT 1024\n"), Some(1024));
        assert_eq!(wanted_port(b"CONNECT 4294967295\r\n"), Some(u32::MAX));
        let bad: [&[u8]; 8] = [
            b"CONNECT \n",
            b"CONNECT +1\n",
            b"CONNECT 4294967296\n",
            b"CONNECT  1\n",
            b"connect 1\n",
            b"GET / HTTP/1.1\n",
            b"CONNECT 1 2\n",
            b"\xff\n",
        ];
        for line in bad {
            assert_eq!(wanted_port(line), None, "{line:?}");
        }
    }
}
