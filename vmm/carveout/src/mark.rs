//! The mark of a record: one aligned word, changed by compare-and-swap only. It alone says whether
//! the guest beside it may be run from its record.
//!
//! ```text
//!            store (its VMM, the guest stands still)
//!  (other) ────────▶ Stored ──── withdraw (the same VMM, before the guest runs on) ──▶ Withdrawn
//!                      │
//!                      └──────── consume (the VMM under the next kernel, before its
//!                                guest's first act) ────────────────────────────────▶ Consumed
//! ```
//!
//! Both ways out begin at the same value, so one of two fails: a guest runs on where it stood, or
//! under the next kernel, and never in both.

/// What a mark says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mark {
    /// Nothing that may be run.
    Empty,
    /// The record is whole, and its guest stands still.
    Stored,
    /// The guest ran on where it was; the record is of the past.
    Withdrawn,
    /// The guest was taken and has run since; the record is of the past.
    Consumed,
    /// None of ours.
    Unknown(u64),
}

// Far from each other, and from what memory holds by itself.
const EMPTY: u64 = 0x5f59_5450_4d45_0001;
const STORED: u64 = 0xa3d1_4f52_4f54_53c2;
const WITHDRAWN: u64 = 0x1d7c_5744_5448_57c4;
const CONSUMED: u64 = 0xc8e6_4d55_534e_43f8;

impl Mark {
    /// As it lies in memory.
    pub fn word(self) -> u64 {
        match self {
            Self::Empty => EMPTY,
            Self::Stored => STORED,
            Self::Withdrawn => WITHDRAWN,
            Self::Consumed => CONSUMED,
            Self::Unknown(word) => word,
        }
    }

    /// What a word in memory says.
    pub fn of(word: u64) -> Self {
        match word {
            EMPTY => Self::Empty,
            STORED => Self::Stored,
            WITHDRAWN => Self::Withdrawn,
            CONSUMED => Self::Consumed,
            other => Self::Unknown(other),
        }
    }
}

impl std::fmt::Display for Mark {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(match self {
            Self::Empty => "empty",
            Self::Stored => "stored",
            Self::Withdrawn => "withdrawn",
            Self::Consumed => "consumed",
            Self::Unknown(_) => "unknown",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_are_told_apart_and_nothing_else_is_one() {
        let all = [Mark::Empty, Mark::Stored, Mark::Withdrawn, Mark::Consumed];
        for mark in all {
            assert_eq!(Mark::of(mark.word()), mark);
            for other in all.iter().filter(|other| **other != mark) {
                let differ = (mark.word() ^ other.word()).count_ones();
                assert!(differ >= 8, "{mark} and {other} differ by {differ} bits");
            }
        }
        for word in [0, u64::MAX, 1] {
            assert_eq!(Mark::of(word), Mark::Unknown(word));
        }
    }
}
