//! A block of a disk that says which one it is and when it was written.
//!
//! ```text
//! 0        8      16      24         32      36     40               4096
//! | magic  | seed | block | sequence | CRC32 | zero | random bytes ... |
//! ```
//!
//! Little endian. The checksum covers the whole block, itself taken as zero: a block of which
//! only a part was written doesn't pass.

use std::ops::{Deref, DerefMut};

/// Bytes of a block, and what its place is a multiple of.
pub(crate) const SIZE: usize = 4096;
const MAGIC: [u8; 8] = *b"SPLOADB1";
const CRC: std::ops::Range<usize> = 32..36;
const PATTERN: usize = 40;

/// Memory for a block, aligned as direct I/O asks for.
#[repr(align(4096))]
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Block([u8; SIZE]);

/// What a block turns out to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Found {
    /// The block that belongs here, as of this sequence number.
    Ours(u64),
    /// Another of this run's blocks.
    Misplaced(u64),
    /// A part of one of this run's blocks, or one with wrong bits.
    Torn,
    /// Nothing of this run's.
    Foreign,
}

impl Block {
    /// A block of zeros.
    pub(crate) fn new() -> Box<Self> {
        Box::new(Self([0; SIZE]))
    }

    /// Makes it the block of this place and time.
    pub(crate) fn fill(&mut self, seed: u64, block: u64, sequence: u64) {
        self.0[0..8].copy_from_slice(&MAGIC);
        self.0[8..16].copy_from_slice(&seed.to_le_bytes());
        self.0[16..24].copy_from_slice(&block.to_le_bytes());
        self.0[24..32].copy_from_slice(&sequence.to_le_bytes());
        self.0[32..PATTERN].fill(0);
        let mut random = fastrand::Rng::with_seed(seed ^ block.rotate_left(32) ^ sequence);
        random.fill(&mut self.0[PATTERN..]);
        let crc = crc32fast::hash(&self.0);
        self.0[CRC].copy_from_slice(&crc.to_le_bytes());
    }

    /// What it is, if it is to be the block of this place.
    pub(crate) fn judge(&self, seed: u64, block: u64) -> Found {
        if self.0[0..8] != MAGIC || self.number(8) != seed {
            return Found::Foreign;
        }
        let mut crc = crc32fast::Hasher::new();
        crc.update(&self.0[..CRC.start]);
        crc.update(&[0; 4]);
        crc.update(&self.0[CRC.end..]);
        if self.0[CRC] != crc.finalize().to_le_bytes() {
            return Found::Torn;
        }
        match self.number(16) {
            here if here == block => Found::Ours(self.number(24)),
            elsewhere => Found::Misplaced(elsewhere),
        }
    }

    fn number(&self, at: usize) -> u64 {
        let mut bytes = [0; 8];
        bytes.copy_from_slice(&self.0[at..at + 8]);
        u64::from_le_bytes(bytes)
    }
}

impl Deref for Block {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.0
    }
}

impl DerefMut for Block {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_knows_itself_and_any_change_shows() {
        let mut block = Block::new();
        assert_eq!(block.judge(7, 3), Found::Foreign);
        block.fill(7, 3, 99);
        assert_eq!(block.judge(7, 3), Found::Ours(99));
        assert_eq!(block.judge(7, 4), Found::Misplaced(3));
        assert_eq!(block.judge(8, 3), Found::Foreign);
        for at in [16, 24, 33, 37, 40, 2048, SIZE - 1] {
            let mut other = block.clone();
            other[at] ^= 1;
            assert_eq!(other.judge(7, 3), Found::Torn, "byte {at}");
        }
    }

    /// The first half of a later write over an earlier one.
    #[test]
    fn half_a_write_is_torn() {
        let (mut earlier, mut later) = (Block::new(), Block::new());
        earlier.fill(7, 3, 1);
        later.fill(7, 3, 2);
        earlier[..512].copy_from_slice(&later[..512]);
        assert_eq!(earlier.judge(7, 3), Found::Torn);
    }
}
