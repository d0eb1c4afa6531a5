//! Extents, and finding room for them. Pure.

use serde::{Deserialize, Serialize};

/// What every extent is a multiple of: the pages device-dax maps memory by.
pub const ALIGN: u64 = 2 << 20;
/// Room for the directory, at the very beginning.
pub const DIRECTORY: u64 = ALIGN;

/// A range of the carve-out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Extent {
    /// Where it begins, bytes from the carve-out's beginning.
    pub start: u64,
    /// Its length.
    pub len: u64,
}

impl Extent {
    /// The first byte behind it; `None` if there is no such number.
    pub fn end(&self) -> Option<u64> {
        self.start.checked_add(self.len)
    }

    /// Whether it is one that can be given to a guest of a carve-out of this size.
    pub fn is_sound(&self, size: u64) -> bool {
        let aligned = self.start.is_multiple_of(ALIGN) && self.len.is_multiple_of(ALIGN);
        let within = self.start >= DIRECTORY && self.end().is_some_and(|end| end <= size);
        aligned && within && self.len > 0
    }

    /// Whether they have a byte in common.
    pub fn overlaps(&self, other: &Self) -> bool {
        let ends = self.end().zip(other.end());
        ends.is_none_or(|(end, others)| self.start < others && other.start < end)
    }
}

/// Bytes rounded up to whole 2 MiB.
pub fn rounded(bytes: u64) -> u64 {
    bytes.div_ceil(ALIGN).saturating_mul(ALIGN)
}

/// The lowest room of `len` bytes (rounded up) in a carve-out of `size` bytes with these extents
/// taken.
pub fn find_room(size: u64, taken: &[Extent], len: u64) -> Option<Extent> {
    let len = rounded(len);
    let mut taken: Vec<_> = taken.to_vec();
    taken.sort_by_key(|extent| extent.start);
    let mut start = DIRECTORY;
    for extent in &taken {
        if extent
            .start
            .checked_sub(start)
            .is_some_and(|gap| gap >= len)
        {
            break;
        }
        start = start.max(extent.end()?);
    }
    let found = Extent { start, len };
    found.is_sound(size).then_some(found)
}

/// How many bytes no extent has.
pub fn free(size: u64, taken: &[Extent]) -> u64 {
    let used: u64 = taken.iter().map(|extent| extent.len).sum();
    size.saturating_sub(DIRECTORY).saturating_sub(used) / ALIGN * ALIGN
}

#[cfg(test)]
mod tests {
    use super::*;

    const M: u64 = 1 << 20;

    fn extent(start: u64, len: u64) -> Extent {
        Extent {
            start: start * M,
            len: len * M,
        }
    }

    #[test]
    fn the_lowest_gap_that_is_large_enough_is_taken() {
        let taken = [extent(8, 4), extent(2, 2), extent(20, 2)];
        assert_eq!(find_room(32 * M, &taken, 4 * M), Some(extent(4, 4)));
        assert_eq!(find_room(32 * M, &taken, 5 * M), Some(extent(12, 6)));
        assert_eq!(find_room(32 * M, &taken, 10 * M), Some(extent(22, 10)));
        assert_eq!(find_room(32 * M, &taken, 12 * M), None);
        assert_eq!(find_room(32 * M, &taken, 0), None, "nothing is no extent");
        assert_eq!(free(33 * M, &taken), 22 * M, "half of 2 MiB is of no use");
    }

    #[test]
    fn extents_that_can_not_be_are_told() {
        let size = 64 * M;
        assert!(extent(2, 62).is_sound(size));
        for bad in [
            extent(0, 2),
            extent(2, 64),
            extent(3, 2),
            extent(2, 3),
            extent(4, 0),
        ] {
            assert!(!bad.is_sound(size), "{bad:?}");
        }
        let beyond = Extent {
            start: u64::MAX - ALIGN + 1,
            len: ALIGN,
        };
        assert!(!beyond.is_sound(u64::MAX) && beyond.overlaps(&extent(2, 2)));
    }

    #[test]
    fn whatever_is_asked_for_nothing_overlaps() {
        let mut random = fastrand::Rng::with_seed(7);
        for _ in 0..200 {
            let size = random.u64(4..200) * M;
            let mut taken: Vec<Extent> = Vec::new();
            for _ in 0..40 {
                if random.bool() && !taken.is_empty() {
                    taken.swap_remove(random.usize(..taken.len()));
                }
                let Some(new) = find_room(size, &taken, random.u64(1..20) * M) else {
                    continue;
                };
                assert!(new.is_sound(size), "{new:?} in {size}");
                assert!(taken.iter().all(|old| !old.overlaps(&new)), "{new:?}");
                taken.push(new);
            }
        }
    }
}
