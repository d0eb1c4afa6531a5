//! All connections of a device, and what is owed to the guest for those that are no more.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::time::{Duration, Instant};

use rustix::process::{Resource, getrlimit};

use super::connection::{Connection, Stage};
use super::credit::Credit;
use super::packet::{HOST_CID, Header, NO_MORE, Op, Ports, STREAM};
use super::socket::Socket;
use super::token_of;
use crate::devices::virtio::poller::Poller;

/// The most connections at a time, of whichever stage.
pub(super) const MOST: usize = 1023;
/// The most of them whose first line is being read.
pub(super) const MOST_GREETINGS: usize = 64;
/// How long a host program may take for its first line.
pub(super) const GREETING_PATIENCE: Duration = Duration::from_secs(10);
/// Resets owed to the guest beyond which nothing more is heard from it, until it takes some.
pub(super) const MOST_RESETS: usize = 256;

/// Ports of host programs that connect are of this range.
pub(super) const HOST_PORTS: std::ops::Range<u32> = 0x4000_0000..0x8000_0000;

/// The room that all connections share. While there is much of it each gets a 64th of what is left.
const ROOM: u32 = 16 << 20;
/// The most and the least room of a connection for what the guest sends and the host doesn't take.
const MOST_ROOM: u32 = 256 << 10;
const LEAST_ROOM: u32 = 4 << 10;

/// A reset owed to the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Reset {
    /// In whose name.
    pub(super) cid: u64,
    pub(super) ports: Ports,
    /// Socket type, as the guest gave it.
    pub(super) kind: u16,
}

impl Reset {
    /// In answer to a packet.
    pub(super) fn answer(to: &Header) -> Self {
        Self {
            cid: to.to_cid,
            ports: to.ports(),
            kind: to.kind,
        }
    }

    fn of(ports: Ports) -> Self {
        Self {
            cid: HOST_CID,
            ports,
            kind: STREAM,
        }
    }
}

#[derive(Debug)]
pub(super) struct Connections {
    pub(super) all: BTreeMap<u64, Connection>,
    by_ports: HashMap<Ports, u64>,
    /// Those that have something to do, in turn.
    due: VecDeque<u64>,
    pub(super) resets: VecDeque<Reset>,
    /// Number of the next one; none is used twice.
    pub(super) next: u64,
    /// Where the search for a host port begins.
    pub(super) next_port: u32,
    poller: Option<Poller>,
    pub(super) most: usize,
}

/// A handover needs two more descriptors for each for a moment.
fn most() -> usize {
    let limit = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
    usize::try_from(limit / 4).unwrap_or(MOST).clamp(16, MOST)
}

impl Connections {
    /// None yet. `next_port` is one of [`HOST_PORTS`].
    pub(super) fn new(next: u64, next_port: u32) -> Self {
        Self {
            all: BTreeMap::new(),
            by_ports: HashMap::new(),
            due: VecDeque::new(),
            resets: VecDeque::new(),
            next,
            next_port,
            poller: None,
            most: most(),
        }
    }

    /// Has all their sockets watched, those to come too.
    pub(super) fn watch(&mut self, poller: &Poller) -> std::io::Result<()> {
        self.poller = Some(poller.clone());
        let mut each = self.all.iter_mut();
        each.try_for_each(|(&id, connection)| match &mut connection.socket {
            Some(socket) => socket.watch(poller, token_of(id)),
            None => Ok(()),
        })
    }

    /// One that a predecessor had.
    pub(super) fn put(&mut self, id: u64, connection: Connection) {
        if connection.is_known() || connection.stage == Stage::Requesting {
            self.by_ports.insert(connection.ports, id);
        }
        self.all.insert(id, connection);
        self.list(id);
    }

    fn add(&mut self, stage: Stage, ports: Ports, mut socket: Socket) -> Option<u64> {
        self.make_place();
        let id = self.next;
        let watched = self.poller.as_ref().map(|p| socket.watch(p, token_of(id)));
        if !matches!(watched, Some(Ok(()))) {
            socket.end();
            return None;
        }
        self.next += 1;
        let room = self.room();
        self.put(id, Connection::new(stage, ports, socket, room));
        Some(id)
    }

    /// Room for a new connection.
    fn room(&self) -> u32 {
        let promised = self.all.values().map(|c| c.credit.own_room).sum();
        let left = ROOM.saturating_sub(promised);
        (left / 64).clamp(LEAST_ROOM, MOST_ROOM)
    }

    /// Whether one more may be, if need be in place of one that only one side still cares for.
    pub(super) fn has_place(&self) -> bool {
        self.all.len() < self.most || self.half_gone().is_some()
    }

    fn half_gone(&self) -> Option<u64> {
        let mut all = self.all.iter();
        let half_gone = all.find(|(_, connection)| connection.is_half_gone());
        half_gone.map(|(&id, _)| id)
    }

    /// Makes place for one more.
    fn make_place(&mut self) {
        if self.all.len() >= self.most
            && let Some(id) = self.half_gone()
        {
            self.reset(id);
        }
    }

    /// How many first lines are being read.
    pub(super) fn greetings(&self) -> usize {
        let greeting = |c: &&Connection| matches!(c.stage, Stage::Greeting { .. });
        self.all.values().filter(greeting).count()
    }

    /// A host program has connected.
    pub(super) fn greet(&mut self, socket: Socket) {
        let stage = Stage::Greeting {
            line: Vec::new(),
            since: Instant::now(),
        };
        self.add(stage, Ports::default(), socket);
    }

    /// A host program wants this port of the guest's.
    pub(super) fn request(&mut self, id: u64, guest: u32) {
        let host = self.free_port();
        if let Some(connection) = self.all.get_mut(&id) {
            connection.stage = Stage::Requesting;
            connection.ports = Ports { host, guest };
            self.by_ports.insert(connection.ports, id);
        }
    }

    /// A host port that no connection has.
    fn free_port(&mut self) -> u32 {
        loop {
            let port = self.next_port;
            self.next_port = match port + 1 {
                next if HOST_PORTS.contains(&next) => next,
                _ => HOST_PORTS.start,
            };
            // Ends: there are more ports than connections.
            if !self.by_ports.keys().any(|ports| ports.host == port) {
                return port;
            }
        }
    }

    /// The guest has connected to a host program. False if there is no place for it.
    pub(super) fn answer(&mut self, header: &Header, socket: Socket) -> bool {
        let id = self.add(Stage::Answering, header.ports(), socket);
        match id.and_then(|id| self.all.get_mut(&id)) {
            Some(connection) => {
                connection.credit.hear(header);
                true
            }
            None => false,
        }
    }

    /// The connection that the guest means.
    pub(super) fn find(&mut self, ports: Ports) -> Option<(u64, &mut Connection)> {
        let id = *self.by_ports.get(&ports)?;
        Some((id, self.all.get_mut(&id)?))
    }

    /// It may have something to do.
    pub(super) fn list(&mut self, id: u64) {
        if let Some(connection) = self.all.get_mut(&id)
            && !std::mem::replace(&mut connection.listed, true)
        {
            self.due.push_back(id);
        }
    }

    /// Something happened at the socket of this one.
    pub(super) fn look(&mut self, id: u64) {
        match self.all.get_mut(&id).map(Connection::look) {
            Some(true) => self.list(id),
            Some(false) => self.reset(id),
            // Ended meanwhile.
            None => {}
        }
    }

    /// How many may have something to do.
    pub(super) fn listed(&self) -> usize {
        self.due.len()
    }

    /// The next of them.
    pub(super) fn unlist(&mut self) -> Option<u64> {
        let id = self.due.pop_front()?;
        if let Some(connection) = self.all.get_mut(&id) {
            connection.listed = false;
        }
        Some(id)
    }

    /// Ends it without a word to the guest.
    pub(super) fn end(&mut self, id: u64) {
        if let Some(connection) = self.all.remove(&id) {
            if self.by_ports.get(&connection.ports) == Some(&id) {
                self.by_ports.remove(&connection.ports);
            }
            if let Some(socket) = connection.socket {
                socket.end();
            }
        }
    }

    /// Ends it, for the guest too if it knows of it.
    pub(super) fn reset(&mut self, id: u64) {
        if let Some(connection) = self.all.get(&id)
            && connection.is_known()
        {
            self.resets.push_back(Reset::of(connection.ports));
        }
        self.end(id);
    }

    /// The guest is through with it. The host still gets what the guest has sent.
    pub(super) fn guest_left(&mut self, id: u64) {
        let Some(connection) = self.all.get_mut(&id) else {
            return;
        };
        if connection.for_host.is_empty() || connection.socket.is_none() {
            return self.end(id);
        }
        connection.shut(NO_MORE);
        connection.stage = Stage::Lingering;
        // The guest may use its port again at once.
        self.by_ports.remove(&connection.ports);
        self.list(id);
    }

    /// Ends those whose first line took too long.
    pub(super) fn expire(&mut self, now: Instant) {
        let late = |stage: &Stage| match stage {
            Stage::Greeting { since, .. } => {
                now.saturating_duration_since(*since) >= GREETING_PATIENCE
            }
            _ => false,
        };
        let late = self.all.iter().filter(|(_, c)| late(&c.stage));
        for id in late.map(|(&id, _)| id).collect::<Vec<_>>() {
            self.end(id);
        }
    }

    /// The guest has forgotten all of them.
    pub(super) fn end_all(&mut self) {
        for (_, connection) in std::mem::take(&mut self.all) {
            if let Some(socket) = connection.socket {
                socket.end();
            }
        }
        self.by_ports.clear();
        self.due.clear();
        self.resets.clear();
    }
}

/// A packet's header without addresses, from what a connection's counters say.
pub(super) fn header(op: Op, flags: u32, len: usize, credit: &Credit) -> Header {
    Header {
        // A packet's data are at most `MOST_ROOM` bytes.
        len: len as u32,
        kind: STREAM,
        op: op as u16,
        flags,
        buf_alloc: credit.own_room,
        fwd_cnt: credit.consumed,
        ..Header::default()
    }
}
