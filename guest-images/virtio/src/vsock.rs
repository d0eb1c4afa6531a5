//! virtio-vsock (section 5.10): one connection to the host on which records go out and must come
//! back, and a few from the host on which we send back what comes.
//!
//! ```text
//!            REQUEST              RESPONSE
//! Closed ───────────▶ Requested ───────────▶ Open      RST, SHUTDOWN: back to Closed; of an open
//!   ▲  (in 100 ms)        │ RST, or 5 s      │         one that is `broken`
//!   └─────────────────────┴──────────────────┘
//! ```
//!
//! Every byte that we send follows from its place in the stream, so bytes lost, doubled or changed
//! are found out by the first of them. Packets are made one at a time, when there is a buffer for
//! one: [`Sockets::next_packet`].

use stillpoint_guest_abi::virtio::{VSOCK_ECHO_PORT, Vsock as Counts};

use crate::memory::Area;

mod echo;
mod packet;

use echo::Echoes;
pub use packet::{HEADER, Header, operation};

/// The host's CID.
pub const HOST: u64 = 2;
/// Bytes of a buffer for a packet.
pub const BUFFER: usize = 4096;
/// The most payload that we send in a packet.
const PAYLOAD: usize = 2048;
/// What we can take before we say that we have used it.
const BUFFERED: u32 = 16 << 10;
/// Records are as long as this at most, and longer than a packet and than a receive buffer.
const LONGEST_RECORD: u64 = 6000;
/// The first port of ours for a connection to the host; each has the next.
const FIRST_PORT: u32 = 0x1_0000;

/// Lengths of time in the clock that the caller uses.
#[derive(Clone, Copy, Debug)]
pub struct Patience {
    /// Until a refused connection is tried again, or credit is asked for: 100 ms.
    pub retry: u64,
    /// Until a request that was not answered is given up: 5 s.
    pub answer: u64,
    /// Until a record that has not come back counts as stalled: 10 s.
    pub record: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Closed,
    Requested,
    Open,
}

/// All connections.
#[derive(Debug)]
pub struct Sockets {
    counts: Counts,
    patience: Patience,
    run: u64,
    host_port: u32,
    port: u32,
    state: State,
    /// When the state was entered, or credit was asked for.
    since: u64,
    flow: Flow,
    /// Bytes of the stream: the end of the record, sent, and come back.
    record_end: u64,
    sent: u64,
    back: u64,
    /// When the record was begun; none once it counts as stalled.
    record_since: Option<u64>,
    /// An answer to a packet that belongs to no connection.
    reset: Option<(u32, u32)>,
    echoes: Echoes,
}

/// Credit, either way (5.10.6.3).
#[derive(Clone, Copy, Debug, Default)]
struct Flow {
    sent: u32,
    peer_buffer: u32,
    peer_used: u32,
    /// Bytes that came, those we have done with, and how many of these we have told the peer of.
    came: u32,
    used: u32,
    told: u32,
    /// The peer has asked.
    asked: bool,
}

impl Flow {
    /// What we may send.
    fn credit(&self) -> usize {
        let on_the_way = self.sent.wrapping_sub(self.peer_used);
        self.peer_buffer.saturating_sub(on_the_way) as usize
    }

    fn hear(&mut self, header: &Header) {
        self.peer_buffer = header.buffer;
        self.peer_used = header.used;
    }

    /// Bytes came. False if there was no room for them.
    fn take(&mut self, len: u32) -> bool {
        self.came = self.came.wrapping_add(len);
        self.came.wrapping_sub(self.told) <= BUFFERED
    }

    /// Whether the peer has to be told of what we used, or it might wait for ever.
    fn must_tell(&self) -> bool {
        self.asked || self.used.wrapping_sub(self.told) > BUFFERED / 2
    }
}

/// Byte `at` of our stream.
fn byte(run: u64, at: u64) -> u8 {
    let word = ((at / 8) ^ run).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (word >> (8 * (at % 8))) as u8
}

impl Sockets {
    /// For a guest with this CID; `area` is memory for what is to be sent back. The host is
    /// connected to at `host_port`, unless that is 0.
    pub fn new(
        area: &mut Area,
        cid: u64,
        host_port: u32,
        run: u64,
        patience: Patience,
        counts: Counts,
    ) -> Self {
        Self {
            counts: Counts { cid, ..counts },
            patience,
            run,
            host_port,
            // A new port for each run: the host may still know the last one's.
            port: FIRST_PORT + (run as u32 & 0xffff) * 0x100,
            state: State::Closed,
            since: 0,
            flow: Flow::default(),
            record_end: 0,
            sent: 0,
            back: 0,
            record_since: None,
            reset: None,
            echoes: Echoes::new(area),
        }
    }

    /// The counters.
    pub fn counts(&self) -> &Counts {
        &self.counts
    }

    /// Writes the next packet that is to be sent into a buffer of [`BUFFER`] bytes, and gives its
    /// length.
    pub fn next_packet(&mut self, buffer: Area, now: u64) -> Option<usize> {
        if let Some((ours, theirs)) = self.reset.take() {
            let header = self.header(operation::RST, ours, theirs, 0, &Flow::default());
            return Some(header.write(buffer));
        }
        self.next_of_ours(buffer, now).or_else(|| {
            let cid = self.counts.cid;
            self.echoes.next(buffer, cid, &mut self.counts)
        })
    }

    fn next_of_ours(&mut self, buffer: Area, now: u64) -> Option<usize> {
        let waited = now.saturating_sub(self.since);
        match self.state {
            State::Closed if self.host_port != 0 && waited >= self.patience.retry => {
                self.port += 1;
                self.flow = Flow::default();
                (self.record_end, self.sent, self.back) = (0, 0, 0);
                self.enter(State::Requested, now);
                Some(self.ours(operation::REQUEST, 0).write(buffer))
            }
            State::Requested if waited >= self.patience.answer => {
                self.counts.refused += 1;
                self.enter(State::Closed, now);
                Some(self.ours(operation::RST, 0).write(buffer))
            }
            State::Open => self.next_data(buffer, now, waited),
            State::Closed | State::Requested => None,
        }
    }

    fn next_data(&mut self, buffer: Area, now: u64, waited: u64) -> Option<usize> {
        if self.back == self.record_end {
            // The next record; all lengths, in no order.
            let spread = self.record_end.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40;
            self.record_end += 1 + spread % LONGEST_RECORD;
            self.record_since = Some(now);
        }
        let stalled = |since: &u64| now.saturating_sub(*since) > self.patience.record;
        if self.record_since.take_if(|since| stalled(since)).is_some() {
            self.counts.stalled += 1;
        }
        let left = (self.record_end - self.sent) as usize;
        let len = left.min(PAYLOAD).min(self.flow.credit());
        if len > 0 {
            for n in 0..len {
                buffer.set8(HEADER + n, byte(self.run, self.sent + n as u64));
            }
            self.sent += len as u64;
            self.flow.sent = self.flow.sent.wrapping_add(len as u32);
            self.since = now;
            return Some(self.ours(operation::RW, len as u32).write(buffer) + len);
        }
        if left > 0 && waited >= self.patience.retry {
            self.since = now;
            return Some(self.ours(operation::CREDIT_REQUEST, 0).write(buffer));
        }
        if self.flow.must_tell() {
            return Some(self.ours(operation::CREDIT_UPDATE, 0).write(buffer));
        }
        None
    }

    fn enter(&mut self, state: State, now: u64) {
        self.state = state;
        self.since = now;
    }

    /// Any packet tells of our credit.
    fn ours(&mut self, op: u16, len: u32) -> Header {
        self.flow.told = self.flow.used;
        self.flow.asked = false;
        self.header(op, self.port, self.host_port, len, &self.flow)
    }

    fn header(&self, op: u16, ours: u32, theirs: u32, len: u32, flow: &Flow) -> Header {
        Header::stream(self.counts.cid, ours, theirs, op, len, flow.used)
    }

    /// A packet of `len` bytes came in.
    pub fn receive(&mut self, buffer: Area, len: usize, now: u64) {
        let Some(header) = Header::read(buffer, len.min(buffer.len())) else {
            self.counts.bad_packets += 1;
            return;
        };
        let sound = header.from_cid == HOST
            && header.to_cid == self.counts.cid
            && header.kind == packet::STREAM
            && (operation::REQUEST..=operation::CREDIT_REQUEST).contains(&header.op)
            && HEADER + header.len as usize <= len;
        if !sound {
            self.counts.bad_packets += 1;
            return;
        }
        let payload = buffer.part(HEADER, header.len as usize);
        if header.to_port == self.port && header.from_port == self.host_port {
            self.receive_ours(&header, payload, now);
        } else if header.to_port == VSOCK_ECHO_PORT {
            self.echoes.receive(&header, payload, &mut self.counts);
        } else if header.op != operation::RST {
            self.reset = Some((header.to_port, header.from_port));
        }
    }

    fn receive_ours(&mut self, header: &Header, payload: Area, now: u64) {
        match (self.state, header.op) {
            (State::Requested, operation::RESPONSE) => {
                self.flow.hear(header);
                self.counts.opened += 1;
                self.enter(State::Open, now);
            }
            (State::Requested, operation::RST) => {
                self.counts.refused += 1;
                self.enter(State::Closed, now);
            }
            (State::Open, operation::RST | operation::SHUTDOWN) => {
                self.counts.broken += 1;
                self.enter(State::Closed, now);
                if header.op == operation::SHUTDOWN {
                    self.reset = Some((self.port, self.host_port));
                }
            }
            (State::Open, operation::RW) => {
                self.flow.hear(header);
                if !self.flow.take(header.len) {
                    self.counts.bad_packets += 1;
                }
                self.came_back(payload);
            }
            (State::Open, operation::CREDIT_UPDATE | operation::CREDIT_REQUEST) => {
                self.flow.hear(header);
                self.flow.asked |= header.op == operation::CREDIT_REQUEST;
            }
            // What was on its way when we gave up.
            (State::Closed, _) => {}
            _ => self.counts.bad_packets += 1,
        }
    }

    fn came_back(&mut self, payload: Area) {
        for n in 0..payload.len() {
            // More than was sent is wrong whatever it is.
            let due = (self.back < self.sent).then(|| byte(self.run, self.back));
            if due != Some(payload.get8(n)) {
                self.counts.wrong += 1;
            }
            self.back = (self.back + 1).min(self.sent);
        }
        self.flow.used = self.flow.used.wrapping_add(payload.len() as u32);
        self.counts.bytes += payload.len() as u64;
        if !payload.is_empty() && self.back == self.record_end {
            self.counts.rounds += 1;
        }
    }

    /// The device says that all connections are gone (5.10.6.7).
    pub fn transport_reset(&mut self, cid: u64, now: u64) {
        if self.state == State::Open {
            self.counts.broken += 1;
        }
        self.counts.cid = cid;
        self.enter(State::Closed, now);
        self.echoes.forget();
    }
}

#[cfg(test)]
mod tests;
