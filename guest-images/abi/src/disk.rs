//! What pulse writes on a virtio-blk disk, so that each sector can be judged by itself.
//!
//! A *block* is [`BLOCK_SECTORS`] sectors, written by one request. Every write has a number, and
//! every sector of it says which write of which run it comes from, and where it belongs. The guest
//! keeps a [`Block`] for each: whatever happens to the VMM, the host or the guest, each sector of
//! the disk must hold a write numbered from `durable` up to `issued`.

/// Bytes in a sector.
pub const SECTOR: usize = 512;
/// Sectors in a block.
pub const BLOCK_SECTORS: u64 = 8;
/// First eight bytes of a sector that pulse wrote.
pub const MAGIC: u64 = u64::from_le_bytes(*b"SPDISK_1");

/// What the guest knows of one block.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Block {
    /// Number of the latest write handed to the device; 0: none.
    pub issued: u64,
    /// Number of the latest write that a flush has made durable; 0: none.
    pub durable: u64,
    /// Number of the latest write that was a zeroing; such a sector holds zeros.
    pub zeroed: u64,
}

impl Block {
    /// Whether a sector with `content` may be what is found on the disk.
    pub fn allows(&self, content: Content) -> bool {
        match content {
            // Nothing durable: what was there before, or a write torn off by a crash.
            _ if self.durable == 0 && content == Content::Foreign => true,
            Content::Zeros => self.durable == 0 || self.zeroed >= self.durable,
            Content::Written(number) => (self.durable.max(1)..=self.issued).contains(&number),
            Content::Foreign | Content::Damaged => false,
        }
    }
}

/// What a sector holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// Zeros.
    Zeros,
    /// The whole of what write `number` put there.
    Written(u64),
    /// A sector of another run or of no run at all.
    Foreign,
    /// A sector of this run that is another sector's, or not whole.
    Damaged,
}

/// Word `index` of a sector of a write.
fn word(run: u64, sector: u64, number: u64, index: usize) -> u64 {
    match index {
        0 => MAGIC,
        1 => run,
        2 => sector,
        3 => number,
        _ => (number.rotate_left(32) ^ sector ^ run ^ index as u64)
            .wrapping_mul(0x9e37_79b9_7f4a_7c15),
    }
}

/// The words of a sector, in order.
pub fn words(run: u64, sector: u64, number: u64) -> impl Iterator<Item = u64> {
    (0..SECTOR / 8).map(move |index| word(run, sector, number, index))
}

/// What a sector's words say of it; `at` gives word n.
pub fn content(run: u64, sector: u64, at: impl Fn(usize) -> u64) -> Content {
    if (0..SECTOR / 8).all(|index| at(index) == 0) {
        return Content::Zeros;
    }
    if at(0) != MAGIC || at(1) != run {
        return Content::Foreign;
    }
    let number = at(3);
    let mut due = words(run, sector, number).enumerate();
    if due.all(|(index, word)| at(index) == word) {
        Content::Written(number)
    } else {
        Content::Damaged
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sector_says_what_it_is() {
        let mut sector: [u64; SECTOR / 8] = core::array::from_fn(|i| word(7, 40, 3, i));
        let of = |sector: &[u64], run, at| content(run, at, |i| sector[i]);
        assert_eq!(of(&sector, 7, 40), Content::Written(3));
        assert_eq!(of(&sector, 8, 40), Content::Foreign, "another run");
        assert_eq!(of(&sector, 7, 41), Content::Damaged, "misplaced");
        sector[63] ^= 1 << 63;
        assert_eq!(of(&sector, 7, 40), Content::Damaged, "one bit");
        assert_eq!(of(&[0; 64], 7, 40), Content::Zeros);
    }

    #[test]
    fn what_is_durable_must_be_there() {
        let block = |issued, durable, zeroed| Block {
            issued,
            durable,
            zeroed,
        };
        assert!(block(5, 3, 0).allows(Content::Written(3)));
        assert!(block(5, 3, 0).allows(Content::Written(5)));
        assert!(!block(5, 3, 0).allows(Content::Written(2)), "lost");
        assert!(!block(5, 3, 0).allows(Content::Written(6)), "never issued");
        assert!(!block(5, 3, 0).allows(Content::Foreign));
        assert!(!block(5, 3, 2).allows(Content::Zeros), "zeroed before");
        assert!(block(5, 3, 4).allows(Content::Zeros));
        assert!(block(5, 0, 0).allows(Content::Foreign), "nothing promised");
        assert!(!block(5, 0, 0).allows(Content::Damaged));
    }
}
