//! The header of a packet (5.10.6).

use super::{BUFFERED, HOST};
use crate::memory::Area;

/// Its length.
pub const HEADER: usize = 44;
/// The type of a stream's packets.
pub(super) const STREAM: u16 = 1;

/// What a packet is for.
pub mod operation {
    /// A connection is wanted.
    pub const REQUEST: u16 = 1;
    /// It is granted.
    pub const RESPONSE: u16 = 2;
    /// There is none.
    pub const RST: u16 = 3;
    /// It is to end.
    pub const SHUTDOWN: u16 = 4;
    /// Payload.
    pub const RW: u16 = 5;
    /// How much may be sent.
    pub const CREDIT_UPDATE: u16 = 6;
    /// That is asked.
    pub const CREDIT_REQUEST: u16 = 7;
}

/// A packet's header.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Header {
    /// The sender's CID.
    pub from_cid: u64,
    /// The receiver's.
    pub to_cid: u64,
    /// The sender's port.
    pub from_port: u32,
    /// The receiver's.
    pub to_port: u32,
    /// Bytes of payload behind it.
    pub len: u32,
    /// 1 for a stream.
    pub kind: u16,
    /// See [`operation`].
    pub op: u16,
    /// Of a shutdown: who will do no more of what.
    pub flags: u32,
    /// The sender's buffer in all.
    pub buffer: u32,
    /// Bytes that the sender has taken out of it.
    pub used: u32,
}

impl Header {
    /// One of ours for a stream to the host.
    pub(super) fn stream(cid: u64, ours: u32, theirs: u32, op: u16, len: u32, used: u32) -> Self {
        Self {
            from_cid: cid,
            to_cid: HOST,
            from_port: ours,
            to_port: theirs,
            len,
            kind: STREAM,
            op,
            flags: if op == operation::SHUTDOWN { 3 } else { 0 },
            buffer: BUFFERED,
            used,
        }
    }

    /// Writes it at the start of a buffer, and gives its length. Field by field: 64-bit ones too
    /// lie at multiples of 4 only if the buffer does.
    pub fn write(&self, buffer: Area) -> usize {
        buffer.set64(0, self.from_cid);
        buffer.set64(8, self.to_cid);
        buffer.set32(16, self.from_port);
        buffer.set32(20, self.to_port);
        buffer.set32(24, self.len);
        buffer.set16(28, self.kind);
        buffer.set16(30, self.op);
        buffer.set32(32, self.flags);
        buffer.set32(36, self.buffer);
        buffer.set32(40, self.used);
        HEADER
    }

    /// Reads it, if `len` bytes hold one.
    pub fn read(buffer: Area, len: usize) -> Option<Self> {
        (len >= HEADER).then(|| Self {
            from_cid: buffer.get64(0),
            to_cid: buffer.get64(8),
            from_port: buffer.get32(16),
            to_port: buffer.get32(20),
            len: buffer.get32(24),
            kind: buffer.get16(28),
            op: buffer.get16(30),
            flags: buffer.get32(32),
            buffer: buffer.get32(36),
            used: buffer.get32(40),
        })
    }
}
