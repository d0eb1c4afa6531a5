//! Connections that the host opens: what comes is sent back.

use stillpoint_guest_abi::virtio::{VSOCK_ECHO_PORT, Vsock as Counts};

use super::{BUFFERED, Flow, HEADER, Header, PAYLOAD, operation};
use crate::memory::Area;

/// Connections at a time.
const MOST: usize = 4;

/// One of them.
#[derive(Clone, Copy, Debug)]
struct Echo {
    /// The host's port; None: free.
    peer: Option<u32>,
    /// What is to be told first, if anything.
    answer: Option<u16>,
    flow: Flow,
    /// Bytes to be sent back: a ring of BUFFERED bytes, from `flow.used` to `flow.came`.
    memory: Area,
}

/// All of them.
#[derive(Debug)]
pub(super) struct Echoes {
    of: [Echo; MOST],
    turn: usize,
    /// A host's port to be told that there is no room for it.
    refused: Option<u32>,
}

impl Echoes {
    /// None open.
    pub(super) fn new(area: &mut Area) -> Self {
        let mut echo = || Echo {
            peer: None,
            answer: None,
            flow: Flow::default(),
            memory: area.take(BUFFERED as usize, 8),
        };
        Self {
            of: [echo(), echo(), echo(), echo()],
            turn: 0,
            refused: None,
        }
    }

    /// The next packet; connections take turns.
    pub(super) fn next(&mut self, buffer: Area, cid: u64, counts: &mut Counts) -> Option<usize> {
        if let Some(peer) = self.refused.take() {
            let header = Header::stream(cid, VSOCK_ECHO_PORT, peer, operation::RST, 0, 0);
            return Some(header.write(buffer));
        }
        self.turn += 1;
        let first = self.turn;
        (0..MOST).find_map(|n| self.of[(first + n) % MOST].next(buffer, cid, counts))
    }

    /// A packet for our port.
    pub(super) fn receive(&mut self, header: &Header, payload: Area, counts: &mut Counts) {
        let peer = Some(header.from_port);
        let known = self.of.iter_mut().find(|echo| echo.peer == peer);
        match (known, header.op) {
            (Some(echo), _) => echo.receive(header, payload, counts),
            (None, operation::REQUEST) => match self.of.iter_mut().find(|e| e.peer.is_none()) {
                Some(free) => {
                    free.open(header);
                    counts.accepted += 1;
                }
                None => self.refused = peer,
            },
            (None, operation::RST) => {}
            (None, _) => self.refused = peer,
        }
    }

    /// All are gone.
    pub(super) fn forget(&mut self) {
        self.of.iter_mut().for_each(|echo| echo.peer = None);
    }
}

impl Echo {
    fn open(&mut self, header: &Header) {
        self.peer = Some(header.from_port);
        self.answer = Some(operation::RESPONSE);
        self.flow = Flow::default();
        self.flow.hear(header);
    }

    fn receive(&mut self, header: &Header, payload: Area, counts: &mut Counts) {
        self.flow.hear(header);
        match header.op {
            operation::RST => self.peer = None,
            operation::SHUTDOWN => self.answer = Some(operation::RST),
            operation::CREDIT_REQUEST => self.answer = Some(operation::CREDIT_UPDATE),
            operation::CREDIT_UPDATE => {}
            operation::RW => {
                // `used` is never ahead of what was told by more than a buffer, so nothing that
                // is within its credit overwrites what is still to be sent.
                if !self.flow.take(header.len) {
                    counts.bad_packets += 1;
                    self.answer = Some(operation::RST);
                    return;
                }
                let start = self.flow.came.wrapping_sub(header.len);
                for n in 0..header.len {
                    let at = start.wrapping_add(n) % BUFFERED;
                    self.memory.set8(at as usize, payload.get8(n as usize));
                }
            }
            _ => counts.bad_packets += 1,
        }
    }

    fn next(&mut self, buffer: Area, cid: u64, counts: &mut Counts) -> Option<usize> {
        let peer = self.peer?;
        let header = |op, len, used| Header::stream(cid, VSOCK_ECHO_PORT, peer, op, len, used);
        let waiting = self.flow.came.wrapping_sub(self.flow.used) as usize;
        let len = waiting.min(PAYLOAD).min(self.flow.credit());
        // Whoever shuts down first gets what is still to be sent.
        let last = self.answer == Some(operation::RST) && len > 0;
        if let Some(op) = self.answer.filter(|_| !last) {
            self.answer = None;
            if op == operation::RST {
                self.peer = None;
            }
            self.flow.told = self.flow.used;
            return Some(header(op, 0, self.flow.used).write(buffer));
        }
        if len == 0 {
            return None;
        }
        for n in 0..len {
            let at = self.flow.used.wrapping_add(n as u32) % BUFFERED;
            buffer.set8(HEADER + n, self.memory.get8(at as usize));
        }
        self.flow.used = self.flow.used.wrapping_add(len as u32);
        self.flow.sent = self.flow.sent.wrapping_add(len as u32);
        self.flow.told = self.flow.used;
        counts.echoed += len as u64;
        Some(header(operation::RW, len as u32, self.flow.used).write(buffer) + len)
    }
}
