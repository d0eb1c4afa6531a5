//! The word as a value: its states, and the acts that change it. No memory, no I/O: the page
//! (`super`), the model that checks every order of events (`tests/model`) and the check of the
//! compare-and-swaps under all interleavings (`tests/word.rs`) share what is written here.

use super::OwnershipError;

/// The number of a handover attempt. The first owner starts at 0.
#[derive(
    Clone,
    Copy,
    Debug,
    Default,
    PartialEq,
    Eq,
    PartialOrd,
    Ord,
    Hash,
    serde::Serialize,
    serde::Deserialize,
)]
#[serde(transparent)]
pub struct Epoch(pub u64);

impl Epoch {
    /// The attempt after this one.
    pub fn next(self) -> Self {
        Self(self.0 + 1)
    }
}

/// What the word says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Owner {
    /// The predecessor of this attempt (or the first owner) runs the guest.
    Held(Epoch),
    /// The predecessor is frozen, its saved state complete; it still owns the guest.
    Sealed(Epoch),
    /// Nobody runs the guest; the successor may take it, the predecessor may reclaim it.
    GivenUp(Epoch),
    /// The successor of this attempt owns the guest.
    Taken(Epoch),
    /// The daemon took the guest from a predecessor that hangs: it never runs it again, and the
    /// successor may take it once the predecessor is dead.
    Revoked(Epoch),
}

const HELD: u64 = 1;
const SEALED: u64 = 2;
const GIVEN_UP: u64 = 3;
const TAKEN: u64 = 4;
const REVOKED: u64 = 5;

impl Owner {
    /// As it stands in memory.
    pub fn word(self) -> u64 {
        let state = match self {
            Self::Held(_) => HELD,
            Self::Sealed(_) => SEALED,
            Self::GivenUp(_) => GIVEN_UP,
            Self::Taken(_) => TAKEN,
            Self::Revoked(_) => REVOKED,
        };
        self.epoch().0 << 8 | state
    }

    /// Out of what stands in memory; an error if that is no state.
    pub fn from_word(word: u64) -> Result<Self, OwnershipError> {
        let epoch = Epoch(word >> 8);
        Ok(match word & 0xff {
            HELD => Self::Held(epoch),
            SEALED => Self::Sealed(epoch),
            GIVEN_UP => Self::GivenUp(epoch),
            TAKEN => Self::Taken(epoch),
            REVOKED => Self::Revoked(epoch),
            _ => return Err(OwnershipError::Corrupt(word)),
        })
    }

    /// The attempt it speaks of.
    pub fn epoch(self) -> Epoch {
        match self {
            Self::Held(e)
            | Self::Sealed(e)
            | Self::GivenUp(e)
            | Self::Taken(e)
            | Self::Revoked(e) => e,
        }
    }
}

/// An act: one compare-and-swap, or a few from which the first that fits is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Act {
    /// Owner: the saved state of a new attempt is complete. Holds what the owner was.
    Seal(Owner),
    /// Predecessor: calls the attempt off, before a vCPU runs again.
    Unseal(Epoch),
    /// Predecessor: the point of no return, unless it wins a [`Act::Reclaim`].
    GiveUp(Epoch),
    /// Predecessor: takes back what the successor has not taken.
    Reclaim(Epoch),
    /// Successor: takes what was given up, before its first visible act.
    Take(Epoch),
    /// Successor: takes a sealed guest whose predecessor is dead (its pidfd said so).
    TakeFromDead(Epoch),
    /// Daemon: takes the guest from a predecessor that hangs, before it kills it.
    Revoke(Epoch),
}

impl Act {
    /// What it does, for people.
    pub fn name(self) -> &'static str {
        match self {
            Self::Seal(_) => "seal",
            Self::Unseal(_) => "unseal",
            Self::GiveUp(_) => "give up",
            Self::Reclaim(_) => "reclaim",
            Self::Take(_) => "take",
            Self::TakeFromDead(_) => "take from the dead predecessor",
            Self::Revoke(_) => "revoke",
        }
    }

    /// The states it may start from, in the order in which they are tried, and where it ends.
    /// Others move the word only forward in that order, so none is missed by trying one by one.
    pub fn edge(self) -> ([Option<Owner>; 3], Owner) {
        let one = |from, to| ([Some(from), None, None], to);
        match self {
            Self::Seal(current) => one(current, Owner::Sealed(current.epoch().next())),
            Self::Unseal(e) => one(Owner::Sealed(e), Owner::Held(e)),
            Self::GiveUp(e) => one(Owner::Sealed(e), Owner::GivenUp(e)),
            Self::Reclaim(e) => one(Owner::GivenUp(e), Owner::Held(e)),
            Self::Take(e) => one(Owner::GivenUp(e), Owner::Taken(e)),
            Self::TakeFromDead(e) => {
                let from = [Owner::Sealed(e), Owner::GivenUp(e), Owner::Revoked(e)];
                (from.map(Some), Owner::Taken(e))
            }
            Self::Revoke(e) => {
                let from = [Some(Owner::Sealed(e)), Some(Owner::GivenUp(e)), None];
                (from, Owner::Revoked(e))
            }
        }
    }

    /// Does it on a word that `exchange` compares and swaps: from, to, and back what it was.
    pub fn apply(
        self,
        exchange: impl Fn(u64, u64) -> Result<u64, u64>,
    ) -> Result<Owner, OwnershipError> {
        let (from, to) = self.edge();
        let mut found = to.word();
        for from in from.into_iter().flatten() {
            match exchange(from.word(), to.word()) {
                Ok(_) => return Ok(to),
                Err(other) => found = other,
            }
        }
        Err(OwnershipError::Lost {
            act: self.name(),
            found: Owner::from_word(found)?,
        })
    }
}
