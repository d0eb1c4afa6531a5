//! Flow control of one connection, both ways (virtio 1.2, section 5.10.6.3).
//!
//! Each side says with every packet how much it can hold (`buf_alloc`) and how much it has taken
//! out of that so far (`fwd_cnt`, modulo 2^32); the other never has more under way. So a program
//! that doesn't read stops the one that writes, and nobody in between.

use super::packet::Header;

/// Counters of one connection.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Credit {
    /// What we hold at most of what the guest has sent.
    pub(super) own_room: u32,
    /// What the host has had of it so far.
    pub(super) consumed: u32,
    /// That, as the guest heard it last.
    pub(super) told: u32,
    /// What the guest holds at most of what we have sent.
    pub(super) guest_room: u32,
    /// What its program has had of it so far.
    pub(super) guest_consumed: u32,
    /// What we have sent so far.
    pub(super) sent: u32,
}

impl Credit {
    /// What the guest can still take.
    pub(super) fn left(&self) -> u32 {
        // A guest that says it took what was never sent, or that its room shrank, gets nothing.
        let under_way = self.sent.wrapping_sub(self.guest_consumed);
        self.guest_room.saturating_sub(under_way)
    }

    /// The guest said where it stands; tells whether it can take more than before.
    pub(super) fn hear(&mut self, header: &Header) -> bool {
        let before = self.left();
        self.guest_room = header.buf_alloc;
        self.guest_consumed = header.fwd_cnt;
        self.left() > before
    }

    /// Whether the guest should hear how far the host has come, even if there is nothing else to
    /// tell it: it believes that a quarter of the room is taken which isn't.
    pub(super) fn is_news(&self) -> bool {
        let untold = self.consumed.wrapping_sub(self.told);
        untold > 0 && untold >= self.own_room / 4
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_wrap_and_lies_give_nothing() {
        let mut credit = Credit {
            guest_room: 100,
            guest_consumed: u32::MAX - 9,
            sent: 30,
            ..Credit::default()
        };
        assert_eq!(credit.left(), 60, "40 are under way across the wrap");
        let header = |buf_alloc, fwd_cnt| Header {
            buf_alloc,
            fwd_cnt,
            ..Header::default()
        };
        assert!(credit.hear(&header(100, 30)));
        assert_eq!(credit.left(), 100);
        assert!(!credit.hear(&header(100, 31)), "it took what was not sent");
        assert_eq!(credit.left(), 0);
        assert!(!credit.hear(&header(0, 30)));
        assert_eq!(credit.left(), 0);
    }

    #[test]
    fn a_quarter_is_news() {
        let mut credit = Credit {
            own_room: 400,
            told: u32::MAX,
            consumed: 98,
            ..Credit::default()
        };
        assert!(!credit.is_news(), "99 of 400");
        credit.consumed = 99;
        assert!(credit.is_news());
        let nothing = Credit::default();
        assert!(!nothing.is_news());
    }
}
