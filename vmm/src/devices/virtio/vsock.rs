//! Sockets between guest and host (virtio 1.2, section 5.10): streams, by which programs on both
//! sides speak without a network.
//!
//! ```text
//!  host program ── vsock.sock ─────── CONNECT 1024\n ──▶ the guest's port 1024
//!               ◀────────── OK 1073741824\n ───────────  it accepts
//!  host program ◀─ vsock.sock_5000 ──────────────────── the guest connects to CID 2, port 5000
//! ```
//!
//! On the host it is Unix sockets in the guest's directory, and not the host's AF_VSOCK: whoever
//! may open them is a matter of files, and they travel. **Connections live through a swap of the
//! VMM**: each has its state in the saved section, and its socket is lent under a number that is
//! never used again. What the guest was told is kept to the byte; what was not read yet is still
//! in the sockets. A connection whose socket did not arrive is reset towards the guest. When the
//! guest resets the device, or itself, all connections end and the listener stays.
//!
//! Must never: block; write to or read from a socket while it stands still; hold more for a
//! connection than its guest was promised; tell the guest TRANSPORT_RESET at a swap, since nothing
//! is lost in one.
//!
//! | file | what it holds |
//! |---|---|
//! | `packet`, `credit` | the protocol's header and its flow control |
//! | `socket`, `host` | a connection's socket; the listener, and the way to host programs |
//! | `connection`, `connections` | one connection, and all of them |
//! | `exchange` | what is done in a turn of the device's thread |
//! | `saved` | the saved form |

use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::Instant;

use stillpoint_state::contents::Kind as SectionKind;
use stillpoint_state::sections::VirtioVsock;
use stillpoint_state::{Saved, StateError, Unclaimed};

use super::poller::Poller;
use super::queue::{Broken, Queues};
use super::{FIRST_TOKEN, Kind};
use crate::handover::lend::{Borrowed, Lending};

mod connection;
mod connections;
mod credit;
mod exchange;
mod host;
mod packet;
mod saved;
mod socket;
#[cfg(test)]
mod tests;

pub use host::{SOCKET, listen};

use connections::{Connections, HOST_PORTS, MOST_GREETINGS};
use host::{Caller, Host};
use socket::Socket;

/// Device type of a socket device.
const SOCKETS: u32 = 19;
/// The queues (5.10.2).
const RX: usize = 0;
const TX: usize = 1;

/// Tokens of the device's own files.
const LISTENER: u64 = FIRST_TOKEN;
const TIMER: u64 = FIRST_TOKEN + 1;
const CONNECTIONS: u64 = FIRST_TOKEN + 2;

/// What a connection's socket is lent as, its number behind it.
const CONNECTION: &str = "conn";

fn token_of(connection: u64) -> u64 {
    CONNECTIONS + connection
}

/// Ends every connection that a device lent as `instance`: its guest begins anew.
pub fn end_lent(instance: &str, from: &mut Borrowed) {
    for (_, fd) in from.take_all(&format!("{instance}/{CONNECTION}")) {
        Socket::new(fd).end();
    }
}

/// The device.
#[derive(Debug)]
pub struct Vsock {
    cid: u64,
    host: Host,
    connections: Connections,
    /// A packet's data on their way.
    data: Vec<u8>,
}

impl Vsock {
    /// A device without connections. `listener` doesn't block; `dir` is the guest's directory.
    pub fn new(cid: u32, listener: OwnedFd, dir: &Path) -> Self {
        Self {
            cid: cid.into(),
            host: Host::new(listener, dir),
            connections: Connections::new(0, HOST_PORTS.start),
            data: Vec::new(),
        }
    }

    /// A device from its section, with the sockets of its connections that are in `late`. Those that
    /// are in `late` alone were ended by the predecessor after it had lent them.
    pub fn restore(
        cid: u32,
        listener: OwnedFd,
        dir: &Path,
        instance: &str,
        from: &mut Unclaimed,
        late: &mut Borrowed,
    ) -> Result<Self, StateError> {
        let connections = saved::connections(&from.take(instance)?, |id| {
            late.take(&format!("{instance}/{CONNECTION}{id}")).ok()
        })?;
        Ok(Self {
            connections,
            ..Self::new(cid, listener, dir)
        })
    }

    /// No driver is at work: nobody is connected, and host programs that want to be are sent away.
    fn send_away(&mut self) {
        self.connections.end_all();
        for _ in 0..MOST_GREETINGS {
            match self.host.caller() {
                Caller::Here(socket) => socket.end(),
                Caller::Nobody => {}
                Caller::None | Caller::Later => return,
            }
        }
        self.host.look_again();
    }
}

impl Kind for Vsock {
    fn device_type(&self) -> u32 {
        SOCKETS
    }

    fn features(&self) -> u64 {
        // Without VIRTIO_VSOCK_F_STREAM as with it: streams, and nothing else (5.10.3).
        0
    }

    fn queue_sizes(&self) -> &'static [u16] {
        &[256, 256, 16]
    }

    fn config(&self) -> Vec<u8> {
        self.cid.to_le_bytes().to_vec()
    }

    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    fn start(&mut self, _features: u64) -> Result<(), Broken> {
        Ok(())
    }

    fn reset(&mut self) {
        self.connections.end_all();
    }

    fn watch(&mut self, poller: &Poller) -> std::io::Result<()> {
        self.host.watch(poller)?;
        self.connections.watch(poller)
    }

    fn serve(&mut self, queue: usize, queues: &mut Queues<'_>) -> Result<(), Broken> {
        match queue {
            RX => self.work(queues),
            TX => {
                self.hear(queues)?;
                self.work(queues)
            }
            // Buffers for events, of which there are none: a guest that loses its connections has
            // reset the device itself.
            _ => Ok(()),
        }
    }

    fn takes_at_once(&self, queue: usize) -> bool {
        queue == TX
    }

    fn ready(&mut self, token: u64, live: bool, queues: &mut Queues<'_>) -> Result<(), Broken> {
        match token {
            LISTENER => self.host.knocked = true,
            TIMER => {
                self.host.ticked();
                self.connections.expire(Instant::now());
                if self.connections.greetings() > 0 {
                    self.host.tick_later();
                }
            }
            // Noted; what it leads to is done in a turn of a device that is at work.
            token => self.connections.look(token - CONNECTIONS),
        }
        match live {
            true => queues.again(RX),
            false => self.send_away(),
        }
        Ok(())
    }

    fn in_flight(&self) -> usize {
        0
    }

    fn section(&self) -> SectionKind {
        VirtioVsock::KIND
    }

    fn save(&self, instance: &str, to: &mut Saved) -> Result<(), StateError> {
        to.put(instance, &saved::section(&self.connections))
    }

    fn lend(&self, instance: &str, to: &mut Lending) -> std::io::Result<()> {
        to.offer(format!("{instance}/listener"), &self.host.listener)?;
        let mut each = self.connections.all.iter();
        each.try_for_each(|(id, connection)| match &connection.socket {
            Some(socket) => to.offer(format!("{instance}/{CONNECTION}{id}"), socket),
            None => Ok(()),
        })
    }
}
