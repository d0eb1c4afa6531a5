//! What a device made of an attack.

use stillpoint_guest_virtio::registers::kind;
use stillpoint_guest_virtio::ring::{Layout, NEXT};

use super::super::device::{Clock, reset};
use super::bench::{Bench, SIZE};
use super::{Attack, Then};
use crate::tsc;

/// The descriptors of the request that tells whether a device works, at the table's end.
const PROBE_HEAD: u16 = SIZE - 3;
/// What no device may overwrite.
const RED: u8 = 0x5a;
/// A device that works has answered by then.
const ANSWER_US: u64 = 2_000_000;

/// How it went; the first three are as they should be.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Verdict {
    Worked,
    NeedsReset,
    Silent,
    Stuck,
    ResetStuck,
    Dead,
    Scribbled,
}

impl Bench {
    /// Makes an attack, and says what became of it. None if it was not made.
    pub(super) fn judge(&mut self, attack: Attack) -> Option<Verdict> {
        self.red().fill(RED);
        self.pit().fill(0);
        if !self.start(u64::MAX) {
            return Some(Verdict::Dead);
        }
        let then = attack(self);
        let mut verdict = match then {
            Then::Skipped => return None,
            Then::Reset => Verdict::Worked,
            Then::Judge => self.look(Verdict::Stuck),
            Then::MayBeSilent if self.failed() => Verdict::NeedsReset,
            Then::MayBeSilent => Verdict::Silent,
        };
        if !reset(self.window()) {
            return Some(Verdict::ResetStuck);
        }
        if !self.red().is_all(RED) {
            verdict = Verdict::Scribbled;
        }
        if !self.start(u64::MAX) || self.look(Verdict::Dead) != Verdict::Worked {
            return Some(Verdict::Dead);
        }
        Some(verdict)
    }

    /// Asks something proper of it.
    fn look(&mut self, otherwise: Verdict) -> Verdict {
        let chain = self.proper(self.probe());
        let ring = self.ring();
        for (n, buffer) in (0..).zip(chain.all()) {
            let last = usize::from(n) + 1 == chain.len;
            let flags = if last { 0 } else { NEXT };
            let index = PROBE_HEAD + n;
            Layout::describe(ring.descriptors, index, *buffer, flags, index + 1);
        }
        self.offer(PROBE_HEAD);
        self.show();
        let mut clock = Clock::new();
        loop {
            if self.answered(ring) {
                return Verdict::Worked;
            }
            if self.failed() {
                return Verdict::NeedsReset;
            }
            if clock.tick() > tsc::cycles(ANSWER_US) {
                return otherwise;
            }
        }
    }

    /// Whether the proper request was answered, and properly.
    fn answered(&self, ring: Layout) -> bool {
        let back = (0..SIZE).any(|n| ring.used_entry(n).0 == PROBE_HEAD.into());
        back && match self.kind() {
            kind::BLK => self.probe().get8(2048) == 0,
            kind::RNG => !self.probe().part(0, 64).is_all(0),
            _ => true,
        }
    }
}
