//! A frame of a stream that shows when frames before it were lost, doubled or changed.
//!
//! ```text
//! 0       4      8        16     20         24
//! | magic | kind | number | len  | CRC32    | random bytes ... |
//! ```
//!
//! Little endian. Numbers begin at 0 and have no gaps. The checksum covers everything else; in a
//! *plain* stream it leaves out the bytes behind the head, which costs less.

use std::io::{self, Read, Write};

const MAGIC: [u8; 4] = *b"SPFR";
const HEAD: usize = 24;
/// The most bytes behind a head.
pub(crate) const MAX_PAYLOAD: usize = 1 << 20;

/// What a frame is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// To be counted.
    Load,
    /// There are no more; its number is how many there were.
    End,
}

/// What was wrong with a frame.
#[derive(Debug)]
pub(crate) enum Broken {
    /// The stream ended or failed.
    Stream(io::Error),
    /// This isn't the head of a frame, so nothing behind it can be told either.
    Head,
    /// The bytes behind the head are not those that were sent.
    Payload,
}

/// Makes frames of one size.
pub(crate) struct Frames {
    /// Random bytes that payloads are cut out of, at another place for each number.
    random: Vec<u8>,
    size: usize,
    plain: bool,
    buffer: Vec<u8>,
}

impl Frames {
    /// Frames of `size` bytes behind each head.
    pub(crate) fn new(seed: u64, size: usize, plain: bool) -> Self {
        let size = size.min(MAX_PAYLOAD);
        let mut random = vec![0; size + 4096];
        fastrand::Rng::with_seed(seed).fill(&mut random);
        Self {
            random,
            size,
            plain,
            buffer: Vec::new(),
        }
    }

    /// The bytes of a frame.
    pub(crate) fn make(&mut self, kind: Kind, number: u64) -> &[u8] {
        let size = if kind == Kind::End { 0 } else { self.size };
        let at = usize::try_from(number % 4096).unwrap_or_default();
        let payload = &self.random[at..at + size];
        self.buffer.clear();
        self.buffer.extend(MAGIC);
        self.buffer
            .extend(u32::from(kind == Kind::End).to_le_bytes());
        self.buffer.extend(number.to_le_bytes());
        self.buffer
            .extend(u32::try_from(size).unwrap_or_default().to_le_bytes());
        let crc = checksum(&self.buffer, if self.plain { &[] } else { payload });
        self.buffer.extend(crc.to_le_bytes());
        self.buffer.extend(payload);
        &self.buffer
    }

    /// Sends a frame.
    pub(crate) fn send(
        &mut self,
        stream: &mut impl Write,
        kind: Kind,
        number: u64,
    ) -> io::Result<()> {
        stream.write_all(self.make(kind, number))
    }
}

/// Takes frames off a stream.
pub(crate) struct Taker {
    plain: bool,
    payload: Vec<u8>,
}

impl Taker {
    /// For a stream that is plain, or isn't.
    pub(crate) fn new(plain: bool) -> Self {
        let payload = Vec::new();
        Self { plain, payload }
    }

    /// The next frame's kind, number, and bytes of payload.
    pub(crate) fn take(&mut self, stream: &mut impl Read) -> Result<(Kind, u64, usize), Broken> {
        let mut head = [0; HEAD];
        stream.read_exact(&mut head).map_err(Broken::Stream)?;
        let word =
            |at: usize| u32::from_le_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]);
        let number = u64::from(word(8)) | u64::from(word(12)) << 32;
        let size = usize::try_from(word(16)).unwrap_or(usize::MAX);
        let kind = match word(4) {
            0 => Kind::Load,
            1 => Kind::End,
            _ => return Err(Broken::Head),
        };
        if head[..4] != MAGIC || size > MAX_PAYLOAD {
            return Err(Broken::Head);
        }
        self.payload.resize(size, 0);
        stream
            .read_exact(&mut self.payload)
            .map_err(Broken::Stream)?;
        let covered = if self.plain { &[][..] } else { &self.payload };
        if checksum(&head[..20], covered) != word(20) {
            return Err(Broken::Payload);
        }
        Ok((kind, number, size))
    }
}

fn checksum(head: &[u8], payload: &[u8]) -> u32 {
    let mut crc = crc32fast::Hasher::new();
    crc.update(head);
    crc.update(payload);
    crc.finalize()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_are_taken_as_they_were_made_and_changes_show() {
        for plain in [false, true] {
            let mut frames = Frames::new(1, 100, plain);
            let bytes = frames.make(Kind::Load, 5000).to_vec();
            let take = |bytes: &[u8]| Taker::new(plain).take(&mut &bytes[..]);
            assert!(matches!(take(&bytes), Ok((Kind::Load, 5000, 100))));
            assert!(matches!(take(&bytes[..80]), Err(Broken::Stream(_))));
            for at in 0..bytes.len() {
                let mut other = bytes.clone();
                other[at] ^= 0x10;
                assert_eq!(
                    take(&other).is_ok(),
                    plain && at >= HEAD,
                    "byte {at}, {plain}"
                );
            }
        }
    }
}
