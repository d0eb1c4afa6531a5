//! The Ethernet frames of pulse's mode `net`. A test's peer sends back what it gets, as it is or
//! with the two addresses exchanged.
//!
//! ```text
//! 0        6        12         14      22      30        38     42
//! +--------+--------+----------+-------+-------+---------+------+----------
//! | to     | from   | ETHERTYPE| MAGIC | run   | number  | len  | filling
//! +--------+--------+----------+-------+-------+---------+------+----------
//! ```
//! Numbers are little endian, but for the type, which is big endian as on every wire. Each byte
//! of the filling follows from run, number and place.

/// IEEE 802's "local experimental" type 1.
pub const ETHERTYPE: u16 = 0x88b5;
/// First eight bytes after the type.
pub const MAGIC: u64 = u64::from_le_bytes(*b"SPFRAME1");
/// Bytes before the filling.
pub const HEAD: usize = 42;
/// The shortest and the longest frame, without a checksum.
pub const SHORTEST: usize = 60;
/// See [`SHORTEST`].
pub const LONGEST: usize = 1514;
/// A frame that has not come back when this many later ones were sent is called lost.
pub const WINDOW: u64 = 1024;

/// The length of frame `number`: all lengths from the shortest to the longest, in no order.
pub fn length(number: u64) -> usize {
    let span = (LONGEST - SHORTEST + 1) as u64;
    SHORTEST + (number.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 33) as usize % span as usize
}

/// Byte `at` of frame `number`, behind the two addresses.
pub fn byte(run: u64, number: u64, at: usize) -> u8 {
    let of = |word: u64, first: usize| word.to_le_bytes()[at - first];
    match at {
        12..14 => ETHERTYPE.to_be_bytes()[at - 12],
        14..22 => of(MAGIC, 14),
        22..30 => of(run, 22),
        30..38 => of(number, 30),
        38..42 => (length(number) as u32).to_le_bytes()[at - 38],
        _ => {
            let word = (run ^ number.rotate_left(24)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
            (word >> (8 * (at % 8))) as u8 ^ (at / 8) as u8
        }
    }
}

/// Whose frame this is, by its first [`HEAD`] bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Owner {
    /// Frame of this number of this run.
    Ours(u64),
    /// Anyone else's.
    Foreign,
}

/// Tells whose frame begins with `head`.
pub fn owner(run: u64, head: &[u8]) -> Owner {
    let Some(head) = head.get(..HEAD) else {
        return Owner::Foreign;
    };
    let number = head[30..38].iter().rev();
    let number = number.fold(0, |number, byte| number << 8 | u64::from(*byte));
    if (12..30).all(|at| head[at] == byte(run, number, at)) {
        Owner::Ours(number)
    } else {
        Owner::Foreign
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frame_is_known_by_its_head() {
        let frame: [u8; SHORTEST] =
            core::array::from_fn(|at| if at < 12 { 0xff } else { byte(9, 77, at) });
        assert_eq!(owner(9, &frame), Owner::Ours(77));
        assert_eq!(owner(8, &frame), Owner::Foreign);
        assert_eq!(owner(9, &frame[..41]), Owner::Foreign);
    }

    #[test]
    fn lengths_stay_within_a_frame() {
        let lengths = || (0..100_000).map(length);
        assert_eq!(lengths().min(), Some(SHORTEST));
        assert_eq!(lengths().max(), Some(LONGEST));
    }
}
