//! One connection, between a socket on the host and a socket in the guest.
//!
//! ```text
//!  a host program connects              the guest asks for a port
//!          │                                      │
//!          ▼                                      ▼ its Unix socket answers
//!      Greeting ─ CONNECT line ─▶ Requesting   Answering
//!                                     │ told      │ told
//!                                     ▼           ▼
//!                                 Requested ───▶ Open ─ the guest is through with it ─▶ Lingering
//!                                      RESPONSE    │                                       │
//!                                                  ▼ RST, either way           last byte is out
//! ```
//!
//! *Lingering* is for the host alone: the guest has sent its last byte, knows nothing of the
//! connection any more, and the host has not read it all. An *orphan* is the reverse: open, but
//! its host program is gone; the guest was told so and still has to agree.
//!
//! Bytes for the guest stay in the host's socket until the guest has room for them. Bytes for
//! the host are held here, as many as the guest was promised room for and no more.

use std::collections::VecDeque;
use std::time::Instant;

use super::credit::Credit;
use super::host::{MAX_LINE, wanted_port};
use super::packet::{NO_MORE, NO_MORE_IN, NO_MORE_OUT, Op, Ports};
use super::socket::{Received, Sent, Socket};

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Stage {
    /// The host program's first line is being read; this is what came of it so far.
    Greeting {
        line: Vec<u8>,
        since: Instant,
    },
    /// The guest is to be asked.
    Requesting,
    /// It was asked.
    Requested,
    /// The guest asked and is to be told that it got what it wanted.
    Answering,
    Open,
    Lingering,
}

#[derive(Debug)]
pub(super) struct Connection {
    pub(super) ports: Ports,
    pub(super) stage: Stage,
    /// None once the host program is gone.
    pub(super) socket: Option<Socket>,
    pub(super) credit: Credit,
    /// Taken from the guest and not yet by the host's socket.
    pub(super) for_host: VecDeque<u8>,
    /// What the guest said that it won't do any more, `NO_MORE_*`.
    pub(super) guest_shut: u32,
    /// What the host program won't do any more.
    pub(super) host_shut: u32,
    /// That, as the guest was told.
    pub(super) told_shut: u32,
    /// The guest wants to hear of its credit.
    pub(super) owes_credit: bool,
    /// It is in the queue of those that have something to do.
    pub(super) listed: bool,
    /// Something may be in the socket. Wrong at worst for one attempt, so a successor begins
    /// with `true`; as it does with the next two.
    readable: bool,
    /// The socket had no room when it was written to last.
    full: bool,
    /// The guest was asked for credit since it last gave some.
    asked: bool,
}

/// What came of the first line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Greeting {
    /// The guest's port that is wanted.
    Port(u32),
    /// It is not complete yet.
    Wait,
    /// It is no such line, or the program is gone.
    Hopeless,
}

/// What there is for the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Given {
    Packet {
        op: Op,
        flags: u32,
        len: usize,
    },
    Nothing,
    /// The socket broke: the connection is to be reset.
    Broken,
}

fn packet(op: Op) -> Given {
    Given::Packet {
        op,
        flags: 0,
        len: 0,
    }
}

impl Connection {
    pub(super) fn new(stage: Stage, ports: Ports, socket: Socket, own_room: u32) -> Self {
        let credit = Credit {
            own_room,
            ..Credit::default()
        };
        Self::with(stage, ports, Some(socket), credit)
    }

    pub(super) fn with(stage: Stage, ports: Ports, socket: Option<Socket>, credit: Credit) -> Self {
        Self {
            ports,
            stage,
            socket,
            credit,
            for_host: VecDeque::new(),
            guest_shut: 0,
            host_shut: 0,
            told_shut: 0,
            owes_credit: false,
            listed: false,
            readable: true,
            full: false,
            asked: false,
        }
    }

    /// Whether the guest knows of it.
    pub(super) fn is_known(&self) -> bool {
        matches!(
            self.stage,
            Stage::Requested | Stage::Answering | Stage::Open
        )
    }

    /// Whether only one side still cares for it, and has had its time.
    pub(super) fn is_half_gone(&self) -> bool {
        self.stage == Stage::Lingering || self.stage == Stage::Open && self.socket.is_none()
    }

    /// Reads the first line, and not a byte beyond it.
    pub(super) fn greet(&mut self) -> Greeting {
        let (Stage::Greeting { line, .. }, Some(socket)) = (&mut self.stage, &self.socket) else {
            return Greeting::Hopeless;
        };
        let mut bytes = [0; MAX_LINE];
        while line.len() < MAX_LINE {
            let room = &mut bytes[..MAX_LINE - line.len()];
            let there = match socket.receive(room, true) {
                Received::Bytes(there) => &room[..there],
                Received::Nothing => {
                    self.readable = false;
                    return Greeting::Wait;
                }
                Received::End | Received::Broken => return Greeting::Hopeless,
            };
            let end = there.iter().position(|&byte| byte == b'\n');
            let take = end.map_or(there.len(), |end| end + 1);
            let Received::Bytes(taken) = socket.receive(&mut bytes[..take], false) else {
                return Greeting::Hopeless;
            };
            line.extend(&bytes[..taken]);
            if end.is_some() {
                return wanted_port(line).map_or(Greeting::Hopeless, Greeting::Port);
            }
        }
        Greeting::Hopeless
    }

    /// The guest has accepted. False if the host program can't be told.
    pub(super) fn accept(&mut self) -> bool {
        self.stage = Stage::Open;
        let line = format!("OK {}\n", self.ports.host);
        // Nothing was written to it before: there is room, or nobody is there.
        let sent = self.socket.as_ref().map(|s| s.send(line.as_bytes()));
        sent == Some(Sent::Bytes(line.len()))
    }

    /// Something happened at the socket. False if nobody is there any more who would be told of
    /// the guest's answer.
    pub(super) fn look(&mut self) -> bool {
        self.readable = true;
        self.full = false;
        let hung_up = || self.socket.as_ref().is_some_and(Socket::has_hung_up);
        match self.stage {
            Stage::Requesting | Stage::Requested => !hung_up(),
            // What is still in the socket is read first, unless nobody wants it.
            Stage::Open if !self.reads() && hung_up() => {
                self.host_gone();
                true
            }
            _ => true,
        }
    }

    /// Whether what the host program sends is wanted.
    fn reads(&self) -> bool {
        let shut = self.guest_shut & NO_MORE_IN | self.host_shut & NO_MORE_OUT;
        self.socket.is_some() && shut == 0
    }

    fn may_read(&self) -> bool {
        self.readable && self.reads()
    }

    /// Takes data from the guest, for which it had credit.
    pub(super) fn take(&mut self, bytes: &[u8]) {
        if self.socket.is_none() || self.host_shut & NO_MORE_IN != 0 {
            self.consume(bytes.len());
        } else {
            self.for_host.extend(bytes);
        }
    }

    /// How much the guest may still send.
    pub(super) fn room(&self) -> usize {
        (self.credit.own_room as usize).saturating_sub(self.for_host.len())
    }

    fn consume(&mut self, bytes: usize) {
        self.credit.consumed = self.credit.consumed.wrapping_add(bytes as u32);
    }

    /// Whether there is something to write to the host's socket, and perhaps room for it.
    pub(super) fn may_flush(&self) -> bool {
        !self.for_host.is_empty() && !self.full
    }

    /// Writes to the host's socket, `most` bytes at most; tells how many it were.
    pub(super) fn flush(&mut self, most: usize) -> usize {
        let mut done = 0;
        while done < most && self.may_flush() {
            let Some(socket) = &self.socket else { break };
            let (front, _) = self.for_host.as_slices();
            match socket.send(&front[..front.len().min(most - done)]) {
                Sent::Bytes(0) => self.full = true,
                Sent::Bytes(sent) => {
                    self.for_host.drain(..sent);
                    self.consume(sent);
                    done += sent;
                }
                Sent::Deaf => self.host_deaf(),
            }
        }
        let full = self.full;
        if let Some(socket) = &mut self.socket {
            socket.want_room(full);
            if self.for_host.is_empty() && self.guest_shut & NO_MORE_OUT != 0 {
                socket.shut_out();
            }
        }
        done
    }

    /// The guest won't send, or won't receive.
    pub(super) fn shut(&mut self, flags: u32) {
        self.guest_shut |= flags & NO_MORE;
        if let Some(socket) = &self.socket {
            if self.guest_shut & NO_MORE_IN != 0 {
                socket.shut_in();
            }
            if self.guest_shut & NO_MORE_OUT != 0 && self.for_host.is_empty() {
                socket.shut_out();
            }
        }
    }

    fn host_deaf(&mut self) {
        self.consume(self.for_host.len());
        self.for_host.clear();
        self.host_shut |= NO_MORE_IN;
        if self.host_shut == NO_MORE || !self.reads() {
            self.host_gone();
        }
    }

    fn host_ended(&mut self) {
        self.host_shut |= NO_MORE_OUT;
        let hung_up = self.socket.as_ref().is_some_and(Socket::has_hung_up);
        if self.host_shut == NO_MORE || hung_up {
            self.host_gone();
        }
    }

    fn host_gone(&mut self) {
        self.consume(self.for_host.len());
        self.for_host.clear();
        self.host_shut = NO_MORE;
        if let Some(socket) = self.socket.take() {
            socket.end();
        }
    }

    /// The guest gave credit.
    pub(super) fn has_credit(&mut self) {
        self.asked = false;
    }

    /// Whether there may be something for the guest.
    pub(super) fn has_packet(&self) -> bool {
        match self.stage {
            Stage::Requesting | Stage::Answering => true,
            Stage::Open => {
                let data = self.may_read() && (self.credit.left() > 0 || !self.asked);
                data || self.host_shut != self.told_shut
                    || self.owes_credit
                    || self.credit.is_news()
            }
            Stage::Greeting { .. } | Stage::Requested | Stage::Lingering => false,
        }
    }

    /// The next packet for the guest; its data are in `room`.
    pub(super) fn next_packet(&mut self, room: &mut [u8]) -> Given {
        let given = match self.stage {
            Stage::Requesting => {
                self.stage = Stage::Requested;
                packet(Op::Request)
            }
            Stage::Answering => {
                self.stage = Stage::Open;
                packet(Op::Response)
            }
            Stage::Open => self.open_packet(room),
            Stage::Greeting { .. } | Stage::Requested | Stage::Lingering => Given::Nothing,
        };
        if matches!(given, Given::Packet { .. }) {
            // Every packet tells it.
            self.credit.told = self.credit.consumed;
            self.owes_credit = false;
        }
        given
    }

    fn open_packet(&mut self, room: &mut [u8]) -> Given {
        let given = match self.may_read() {
            true => self.data(room),
            false => Given::Nothing,
        };
        if given != Given::Nothing {
            given
        } else if self.host_shut != self.told_shut {
            self.told_shut = self.host_shut;
            Given::Packet {
                op: Op::Shutdown,
                flags: self.host_shut,
                len: 0,
            }
        } else if self.owes_credit || self.credit.is_news() {
            packet(Op::CreditUpdate)
        } else {
            Given::Nothing
        }
    }

    fn data(&mut self, room: &mut [u8]) -> Given {
        let Some(socket) = &self.socket else {
            return Given::Nothing;
        };
        let most = room.len().min(self.credit.left() as usize);
        // Without credit a look must do: the end needs none.
        let received = match most {
            0 => socket.receive(&mut [0], true),
            most => socket.receive(&mut room[..most], false),
        };
        match received {
            Received::Bytes(_) if most == 0 && self.asked => Given::Nothing,
            Received::Bytes(_) if most == 0 => {
                self.asked = true;
                packet(Op::CreditRequest)
            }
            Received::Bytes(len) => {
                self.credit.sent = self.credit.sent.wrapping_add(len as u32);
                Given::Packet {
                    op: Op::Data,
                    flags: 0,
                    len,
                }
            }
            Received::End => {
                self.host_ended();
                Given::Nothing
            }
            Received::Nothing => {
                self.readable = false;
                Given::Nothing
            }
            Received::Broken => Given::Broken,
        }
    }
}
