//! Packets from the guest and to it.
//!
//! Turns are short: so many packets and bytes, and the rest is for the next turn. A freeze waits
//! for a turn to end, and the guest stands still while it does.

use super::connection::{Given, Greeting, Stage};
use super::connections::{MOST_GREETINGS, MOST_RESETS, Reset, header};
use super::host::Caller;
use super::packet::{HEADER, HOST_CID, Header, NO_MORE, NO_MORE_OUT, Op, STREAM};
use super::{RX, TX, Vsock};
use crate::devices::virtio::queue::{Broken, Chain, Queues, total};

/// Packets of a turn.
const PACKETS: usize = 64;
/// Bytes of a turn.
const BYTES: usize = 256 << 10;
/// The most data of one packet for the guest, and of one write to a socket.
pub(super) const MOST_DATA: usize = 64 << 10;

/// What a turn may still do.
#[derive(Debug)]
struct Turn {
    packets: usize,
    bytes: usize,
    /// The guest has given no buffer for a packet.
    dry: bool,
    /// Buffers were given back to the guest.
    gave: bool,
}

impl Turn {
    fn new() -> Self {
        Self {
            packets: PACKETS,
            bytes: BYTES,
            dry: false,
            gave: false,
        }
    }

    /// A packet was given to the guest or taken from it.
    fn packet(&mut self, bytes: usize) {
        self.packets = self.packets.saturating_sub(1);
        self.bytes = self.bytes.saturating_sub(bytes);
        self.gave = true;
    }

    /// Bytes were written to a socket.
    fn written(&mut self, bytes: usize) {
        self.bytes = self.bytes.saturating_sub(bytes);
    }

    fn is_over(&self) -> bool {
        self.packets == 0 || self.bytes == 0
    }

    /// A buffer for a packet.
    fn buffer(&mut self, queues: &mut Queues<'_>) -> Result<Option<Chain>, Broken> {
        if self.dry {
            return Ok(None);
        }
        let chain = queues.pop(RX)?;
        self.dry = chain.is_none();
        if let Some(chain) = &chain
            && total(&chain.writable) <= HEADER as u64
        {
            return Err(Broken::Request("has no room for a packet"));
        }
        Ok(chain)
    }
}

/// What is to become of a connection after its turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Next {
    /// It waits for something to happen to it.
    Rest,
    /// It could go on.
    Again,
    /// It could go on if the guest gave buffers.
    Starve,
}

impl Vsock {
    /// Does whatever there is to do but hear the guest.
    pub(super) fn work(&mut self, queues: &mut Queues<'_>) -> Result<(), Broken> {
        let mut turn = Turn::new();
        self.let_in();
        self.give_resets(&mut turn, queues)?;
        let mut again = false;
        for _ in 0..self.connections.listed() {
            if turn.is_over() {
                again = true;
                break;
            }
            let Some(id) = self.connections.unlist() else {
                break;
            };
            let next = self.attend(id, &mut turn, queues)?;
            again |= next == Next::Again;
            if next != Next::Rest {
                self.connections.list(id);
            }
        }
        if turn.gave {
            queues.signal(RX)?;
        }
        let resets = !self.connections.resets.is_empty() && !turn.dry;
        if again || resets || self.may_let_in() {
            queues.again(RX);
        }
        Ok(())
    }

    fn may_let_in(&self) -> bool {
        self.host.knocked
            && !self.host.resting
            && self.connections.greetings() < MOST_GREETINGS
            && self.connections.has_place()
    }

    /// Lets host programs in, as many as there is place for. The others wait at the listener.
    fn let_in(&mut self) {
        for _ in 0..MOST_GREETINGS {
            if !self.may_let_in() {
                return;
            }
            match self.host.caller() {
                Caller::Here(socket) => {
                    self.connections.greet(socket);
                    self.host.tick_later();
                }
                Caller::Nobody => {}
                Caller::None | Caller::Later => return,
            }
        }
    }

    fn give_resets(&mut self, turn: &mut Turn, queues: &mut Queues<'_>) -> Result<(), Broken> {
        while let Some(&reset) = self.connections.resets.front() {
            if turn.is_over() {
                return Ok(());
            }
            let Some(chain) = turn.buffer(queues)? else {
                return Ok(());
            };
            let header = Header {
                from_cid: reset.cid,
                to_cid: self.cid,
                from_port: reset.ports.host,
                to_port: reset.ports.guest,
                kind: reset.kind,
                op: Op::Reset as u16,
                ..Header::default()
            };
            chain.write(queues.memory(), 0, &header.to_bytes())?;
            queues.push(RX, chain.head, HEADER as u32)?;
            turn.packet(0);
            self.connections.resets.pop_front();
            // The guest may have been kept waiting for this.
            queues.again(TX);
        }
        Ok(())
    }

    /// One connection's turn.
    fn attend(
        &mut self,
        id: u64,
        turn: &mut Turn,
        queues: &mut Queues<'_>,
    ) -> Result<Next, Broken> {
        self.greet(id);
        let Some(connection) = self.connections.all.get_mut(&id) else {
            return Ok(Next::Rest);
        };
        if connection.may_flush() {
            turn.written(connection.flush(MOST_DATA));
        }
        if connection.stage == Stage::Lingering && connection.for_host.is_empty() {
            self.connections.end(id);
            return Ok(Next::Rest);
        }
        let rest = match connection.may_flush() {
            true => Next::Again,
            false => Next::Rest,
        };
        if !connection.has_packet() {
            return Ok(rest);
        }
        let Some(chain) = turn.buffer(queues)? else {
            return Ok(match rest {
                Next::Again => Next::Again,
                _ => Next::Starve,
            });
        };
        self.give(id, chain, turn, queues)
    }

    /// Reads a host program's first line, if that is what the connection is at.
    fn greet(&mut self, id: u64) {
        let Some(connection) = self.connections.all.get_mut(&id) else {
            return;
        };
        if !matches!(connection.stage, Stage::Greeting { .. }) {
            return;
        }
        match connection.greet() {
            Greeting::Port(port) => self.connections.request(id, port),
            Greeting::Wait => {}
            Greeting::Hopeless => self.connections.end(id),
        }
    }

    /// Puts the connection's next packet into `chain`, or gives that back.
    fn give(
        &mut self,
        id: u64,
        chain: Chain,
        turn: &mut Turn,
        queues: &mut Queues<'_>,
    ) -> Result<Next, Broken> {
        let Some(connection) = self.connections.all.get_mut(&id) else {
            queues.put_back(RX);
            return Ok(Next::Rest);
        };
        let room = total(&chain.writable) as usize - HEADER;
        let room = room.min(MOST_DATA);
        self.data.resize(MOST_DATA, 0);
        let given = connection.next_packet(&mut self.data[..room]);
        let Given::Packet { op, flags, len } = given else {
            queues.put_back(RX);
            if given == Given::Broken {
                self.connections.reset(id);
            }
            return Ok(Next::Rest);
        };
        let header = Header {
            from_cid: HOST_CID,
            to_cid: self.cid,
            from_port: connection.ports.host,
            to_port: connection.ports.guest,
            ..header(op, flags, len, &connection.credit)
        };
        chain.write(queues.memory(), 0, &header.to_bytes())?;
        chain.write(queues.memory(), HEADER as u64, &self.data[..len])?;
        queues.push(RX, chain.head, (HEADER + len) as u32)?;
        turn.packet(len);
        Ok(match connection.has_packet() || connection.may_flush() {
            true => Next::Again,
            false => Next::Rest,
        })
    }

    /// Hears what the guest has to say.
    pub(super) fn hear(&mut self, queues: &mut Queues<'_>) -> Result<(), Broken> {
        let mut turn = Turn::new();
        let mut more = true;
        while more && !turn.is_over() {
            // The guest must be able to hear the answers (5.10.6.2): `give_resets` goes on here.
            let pause = self.connections.resets.len() >= MOST_RESETS;
            let chain = match pause {
                true => None,
                false => queues.pop(TX)?,
            };
            more = chain.is_some();
            if let Some(chain) = chain {
                let bytes = self.hear_one(&chain, queues)?;
                queues.push(TX, chain.head, 0)?;
                turn.packet(bytes);
            }
        }
        if turn.gave {
            queues.signal(TX)?;
        }
        if more {
            queues.again(TX);
        }
        Ok(())
    }

    /// Judges one packet, and does what it says. Tells how many bytes of data it had.
    fn hear_one(&mut self, chain: &Chain, queues: &Queues<'_>) -> Result<usize, Broken> {
        let mut bytes = [0; HEADER];
        chain.read(queues.memory(), 0, &mut bytes)?;
        let header = Header::from_bytes(&bytes);
        let len = header.len as usize;
        if total(&chain.readable) < (HEADER + len) as u64 {
            return Err(Broken::Request("has less data than it says"));
        }
        if header.from_cid != self.cid {
            // Not the guest's: there is nobody who could be answered.
            return Ok(0);
        }
        let op = Op::of(header.op);
        if header.to_cid != HOST_CID || header.kind != STREAM {
            // Nobody is there, or nobody who understands (5.10.6.4.1).
            self.refuse(&header);
            return Ok(0);
        }
        let Some((id, connection)) = self.connections.find(header.ports()) else {
            match op {
                Some(Op::Request) => self.connect(&header),
                _ => self.refuse(&header),
            }
            return Ok(0);
        };
        if connection.credit.hear(&header) {
            connection.has_credit();
        }
        let open = connection.stage == Stage::Open;
        let hears = open && connection.guest_shut & NO_MORE_OUT == 0;
        match op {
            Some(Op::Reset) => self.connections.guest_left(id),
            Some(Op::Response) if connection.stage == Stage::Requested => {
                if !connection.accept() {
                    self.connections.reset(id);
                }
            }
            Some(Op::Shutdown) if open => {
                connection.shut(header.flags);
                if connection.guest_shut == NO_MORE {
                    self.refuse(&header);
                    self.connections.guest_left(id);
                }
            }
            Some(Op::Data) if hears && len <= connection.room() => {
                self.data.resize(len.max(MOST_DATA), 0);
                let data = &mut self.data[..len];
                chain.read(queues.memory(), HEADER as u64, data)?;
                connection.take(data);
            }
            Some(Op::CreditUpdate) if connection.is_known() => {}
            Some(Op::CreditRequest) if connection.is_known() => connection.owes_credit = true,
            // Out of turn, or beyond its credit.
            _ => {
                self.refuse(&header);
                self.connections.end(id);
            }
        }
        self.connections.list(id);
        Ok(len)
    }

    /// Answers by a reset. Resets themselves are not answered.
    fn refuse(&mut self, header: &Header) {
        if header.op != Op::Reset as u16 {
            self.connections.resets.push_back(Reset::answer(header));
        }
    }

    /// The guest wants to connect to a host program.
    fn connect(&mut self, header: &Header) {
        let socket = match self.connections.has_place() {
            true => self.host.connect(header.to_port),
            false => None,
        };
        let connected = socket.is_some_and(|socket| self.connections.answer(header, socket));
        if !connected {
            self.refuse(header);
        }
    }
}
