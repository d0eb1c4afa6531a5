//! What a driver asks of a disk (virtio 1.2, 5.2.6), read once from its chain of buffers.
//!
//! ```text
//!   readable: header (type, reserved, sector), then data of OUT, DISCARD, WRITE_ZEROES
//!   writable: data of IN, GET_ID, then one byte of status, the last there is
//! ```
//!
//! Only a chain without room for header or status is broken. All else is answered by a status.

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN,
    VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
};

use super::disk::SECTOR;
use crate::devices::virtio::queue::{Broken, Buffer, Chain, part, total};
use crate::memory::Memory;

/// The most segments of data in one request (`seg_max`): what fits into the queue, or a table of
/// its size, beside header and status.
pub(super) const MOST_SEGMENTS: u32 = 254;
/// The most buffers that are taken: those, and a header that is split as finely as it can be.
const MOST_BUFFERS: usize = MOST_SEGMENTS as usize + HEADER + 1;

/// The most sectors of one discarded range.
pub(super) const MOST_DISCARDED: u32 = 1 << 21;
/// The most ranges of one discard.
pub(super) const MOST_DISCARDS: u32 = 16;
/// The most sectors of one zeroed range: a host that has to write them shall not need seconds.
pub(super) const MOST_ZEROED: u32 = 1 << 17;
/// The most ranges of one request for zeroes.
pub(super) const MOST_ZEROES: u32 = 1;

const HEADER: usize = 16;
/// `struct virtio_blk_discard_write_zeroes`.
const RANGE: u64 = 16;
/// Its only flag.
const UNMAP: u32 = 1;

/// The status byte.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Status {
    Ok = 0,
    IoError = 1,
    Unsupported = 2,
}

/// Bytes of a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Extent {
    pub(super) offset: u64,
    pub(super) len: u64,
}

/// What takes a disk.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Io {
    Read {
        offset: u64,
        into: Vec<Buffer>,
    },
    Write {
        offset: u64,
        from: Vec<Buffer>,
        /// Durable before it is done.
        through: bool,
    },
    Flush,
    Discard(Vec<Extent>),
    /// With whether the space may be given back.
    Zero(Vec<(Extent, bool)>),
}

impl Io {
    /// For the log.
    pub(super) fn name(&self) -> &'static str {
        match self {
            Self::Read { .. } => "read",
            Self::Write { .. } => "write",
            Self::Flush => "flush",
            Self::Discard(_) => "discard",
            Self::Zero(_) => "write zeroes",
        }
    }
}

/// A request, judged.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Request {
    /// To be done.
    Io(Io),
    /// It wants the disk's serial number.
    Identity,
    /// Not to be done.
    Refused(Status),
}

/// What requests are judged by.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    /// Bytes of the disk.
    pub(super) size: u64,
    pub(super) read_only: bool,
    /// Writes are durable before they are done.
    pub(super) through: bool,
}

/// Reads what a chain asks for.
pub(super) fn read(chain: &Chain, memory: &Memory, limits: Limits) -> Result<Request, Broken> {
    let mut header = [0; HEADER];
    chain.read(memory, 0, &mut header)?;
    if chain.writable.is_empty() {
        return Err(Broken::Request("has no room for its status"));
    }
    if chain.readable.len() + chain.writable.len() > MOST_BUFFERS {
        return Ok(Request::Refused(Status::IoError));
    }
    let [kind, _, low, high] = words(&header);
    let at = u64::from(low) | u64::from(high) << 32;
    // What has no room was refused above; what is too long for 32 bits, by the queue.
    let room = total(&chain.writable) - 1;
    let data = total(&chain.readable) - HEADER as u64;
    let asked = match kind {
        VIRTIO_BLK_T_IN => extent(at, room, limits).and_then(|offset| {
            let into = part(&chain.writable, 0, room)?;
            Some(Io::Read { offset, into })
        }),
        VIRTIO_BLK_T_FLUSH => Some(Io::Flush),
        VIRTIO_BLK_T_GET_ID => return Ok(Request::Identity),
        VIRTIO_BLK_T_OUT | VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES if limits.read_only => {
            None
        }
        VIRTIO_BLK_T_OUT => extent(at, data, limits).and_then(|offset| {
            let from = part(&chain.readable, HEADER as u64, data)?;
            let through = limits.through;
            Some(Io::Write {
                offset,
                from,
                through,
            })
        }),
        VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES => {
            let most = match kind {
                VIRTIO_BLK_T_DISCARD => MOST_DISCARDS,
                _ => MOST_ZEROES,
            };
            if data == 0 || !data.is_multiple_of(RANGE) || data / RANGE > u64::from(most) {
                return Ok(Request::Refused(Status::IoError));
            }
            let mut bytes = vec![0; data as usize];
            chain.read(memory, HEADER as u64, &mut bytes)?;
            return Ok(ranges(kind, &bytes, limits));
        }
        _ => return Ok(Request::Refused(Status::Unsupported)),
    };
    Ok(asked.map_or(Request::Refused(Status::IoError), Request::Io))
}

/// Ranges of a discard, or of zeroes.
fn ranges(kind: u32, bytes: &[u8], limits: Limits) -> Request {
    let (most, known) = match kind {
        VIRTIO_BLK_T_DISCARD => (MOST_DISCARDED, 0),
        _ => (MOST_ZEROED, UNMAP),
    };
    let mut extents = Vec::with_capacity(bytes.len() / RANGE as usize);
    let (ranges, _) = bytes.as_chunks();
    for range in ranges {
        let [low, high, sectors, flags] = words(range);
        let at = u64::from(low) | u64::from(high) << 32;
        if flags & !known != 0 {
            return Request::Refused(Status::Unsupported);
        }
        let len = u64::from(sectors) * SECTOR;
        match extent(at, len, limits) {
            Some(_) if sectors > most => return Request::Refused(Status::IoError),
            // The host's calls want at least a byte.
            Some(_) if len == 0 => {}
            Some(offset) => extents.push((Extent { offset, len }, flags & UNMAP != 0)),
            None => return Request::Refused(Status::IoError),
        }
    }
    Request::Io(match kind {
        VIRTIO_BLK_T_DISCARD => Io::Discard(extents.iter().map(|&(extent, _)| extent).collect()),
        _ => Io::Zero(extents),
    })
}

/// The offset of `len` bytes from a sector on, if all of them are on the disk.
fn extent(sector: u64, len: u64, limits: Limits) -> Option<u64> {
    let offset = sector.checked_mul(SECTOR)?;
    let end = offset.checked_add(len)?;
    (len.is_multiple_of(SECTOR) && end <= limits.size).then_some(offset)
}

fn words(bytes: &[u8; 16]) -> [u32; 4] {
    let (words, _) = bytes.as_chunks();
    let word = |n: usize| u32::from_le_bytes(words[n]);
    [word(0), word(1), word(2), word(3)]
}
