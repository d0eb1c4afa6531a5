//! The ownership word: which process may run the guest.
//!
//! One page, shared by predecessor, successor and agent. Its first word is `epoch << 8 | state`,
//! changed by compare-and-swap only. The epoch is the number of the handover attempt: each seal
//! begins a new one, so a successor that was given up on can never take a later attempt's guest.
//!
//! ```text
//!               seal(n)               give_up(n)                take(n)
//!  Held(n-1) ──────────▶ Sealed(n) ──────────────▶ GivenUp(n) ──────────▶ Taken(n)
//!  Taken(n-1)               │  │                       │                     │
//!      ▲      unseal(n)     │  │ take_from_dead(n)     │ reclaim(n)          └─ owner of the
//!      └─── Held(n) ◀───────┘  └──────▶ Taken(n)       ▼                        next attempt
//!                                                   Held(n)
//!
//!  Sealed(n), GivenUp(n) ── revoke(n) ──▶ Revoked(n) ── take_from_dead(n) ──▶ Taken(n)
//! ```
//!
//! * Until `Sealed` the saved state is not complete: nobody but the owner may run the guest.
//! * `unseal` must win before the predecessor lets a vCPU run again, so a complete state and a
//!   running predecessor never exist together.
//! * `take` must win before the successor's first act that can be seen outside it.
//! * `reclaim` is the way back after give-up: it and `take` can't both win.
//! * `take_from_dead` is for a successor that holds the predecessor's pidfd and saw it dead:
//!   a predecessor that dies frozen with its state sealed counts as having given up.
//! * `revoke` is the daemon's one act: a predecessor that hangs with its state sealed holds no
//!   deadline any more. After it that predecessor can neither unseal nor reclaim, so it may be
//!   killed, and its death is what the successor waits for.
//!
//! States and acts are named as in `tests/model`, which goes through every order of events, deaths
//! and delays of predecessor, successor and daemon, and in RFD 0010. Who changes one changes all.
#![allow(unsafe_code)] // A word shared between processes is raw memory; this module is all of it.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::{MemfdFlags, SealFlags};
use rustix::mm::{MapFlags, ProtFlags};

mod word;

pub use word::{Act, Epoch, Owner};

const PAGE: usize = 4096;

/// Why the word could not be changed or mapped.
#[derive(Debug, thiserror::Error)]
pub enum OwnershipError {
    /// Somebody else changed it first.
    #[error("the guest is not ours to {act}: the ownership word says {found:?}")]
    Lost {
        /// What was to be done.
        act: &'static str,
        /// What the word says instead.
        found: Owner,
    },
    /// The word holds no known state.
    #[error("the ownership word holds {0:#x}, which is no state of ours")]
    Corrupt(u64),
    /// The page could not be made or mapped.
    #[error("cannot {what} the ownership page")]
    Page {
        /// What was to be done.
        what: &'static str,
        /// Why not.
        #[source]
        source: rustix::io::Errno,
    },
}

/// A mapping of the ownership page.
#[derive(Debug)]
pub struct Ownership {
    fd: OwnedFd,
    word: NonNull<AtomicU64>,
}

// SAFETY: the mapping is shared memory of an atomic; all access goes through the atomic.
unsafe impl Send for Ownership {}
// SAFETY: as above.
unsafe impl Sync for Ownership {}

impl Ownership {
    /// Makes the page of a new guest: `Held(0)`.
    pub fn create() -> Result<Self, OwnershipError> {
        let page = |what| move |source| OwnershipError::Page { what, source };
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let fd = rustix::fs::memfd_create("stillpoint-ownership", flags).map_err(page("create"))?;
        rustix::fs::ftruncate(&fd, PAGE as u64).map_err(page("size"))?;
        let seals = SealFlags::GROW | SealFlags::SHRINK | SealFlags::SEAL;
        rustix::fs::fcntl_add_seals(&fd, seals).map_err(page("seal"))?;
        let ownership = Self::map(fd)?;
        ownership
            .atomic()
            .store(Owner::Held(Epoch(0)).word(), Ordering::SeqCst);
        Ok(ownership)
    }

    /// Maps a page that was received.
    pub fn map(fd: OwnedFd) -> Result<Self, OwnershipError> {
        let page = |what| move |source| OwnershipError::Page { what, source };
        let seals = rustix::fs::fcntl_get_seals(&fd).map_err(page("read the seals of"))?;
        // Without the seal another holder could truncate the file under the mapping (SIGBUS).
        if !seals.contains(SealFlags::SHRINK) {
            return Err(page("trust the size of")(rustix::io::Errno::PERM));
        }
        // SAFETY: a fresh mapping of a file of one page; nothing else lies there.
        let base = unsafe {
            rustix::mm::mmap(
                std::ptr::null_mut(),
                PAGE,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED,
                &fd,
                0,
            )
        }
        .map_err(page("map"))?;
        let word = NonNull::new(base.cast::<AtomicU64>())
            .ok_or_else(|| page("map")(rustix::io::Errno::FAULT))?;
        Ok(Self { fd, word })
    }

    fn atomic(&self) -> &AtomicU64 {
        // SAFETY: the mapping lives as long as self, is aligned, and is only used as an atomic.
        unsafe { self.word.as_ref() }
    }

    /// What the word says now.
    pub fn read(&self) -> Result<Owner, OwnershipError> {
        Owner::from_word(self.atomic().load(Ordering::SeqCst))
    }

    fn act(&self, act: Act) -> Result<Owner, OwnershipError> {
        act.apply(|from, to| {
            self.atomic()
                .compare_exchange(from, to, Ordering::SeqCst, Ordering::SeqCst)
        })
    }

    /// Owner: the saved state of a new attempt is complete. `current` is what the owner was.
    pub fn seal(&self, current: Owner) -> Result<Epoch, OwnershipError> {
        Ok(self.act(Act::Seal(current))?.epoch())
    }

    /// Predecessor: call the attempt off. Must succeed before a vCPU runs again.
    pub fn unseal(&self, epoch: Epoch) -> Result<Owner, OwnershipError> {
        self.act(Act::Unseal(epoch))
    }

    /// Predecessor: the point of no return, unless [`Ownership::reclaim`] wins.
    pub fn give_up(&self, epoch: Epoch) -> Result<(), OwnershipError> {
        self.act(Act::GiveUp(epoch)).map(drop)
    }

    /// Predecessor: take back what the successor has not taken.
    pub fn reclaim(&self, epoch: Epoch) -> Result<Owner, OwnershipError> {
        self.act(Act::Reclaim(epoch))
    }

    /// Successor: take what was given up. Must succeed before the first visible act.
    pub fn take(&self, epoch: Epoch) -> Result<Owner, OwnershipError> {
        self.act(Act::Take(epoch))
    }

    /// Successor: take a sealed guest whose predecessor is dead (its pidfd said so).
    pub fn take_from_dead(&self, epoch: Epoch) -> Result<Owner, OwnershipError> {
        self.act(Act::TakeFromDead(epoch))
    }

    /// Daemon: take a sealed guest from a predecessor that hangs; kill that one next, and the
    /// successor takes it from the dead. Must succeed before the predecessor is killed: one that
    /// woke up and runs its guest must not be.
    pub fn revoke(&self, epoch: Epoch) -> Result<(), OwnershipError> {
        self.act(Act::Revoke(epoch)).map(drop)
    }
}

impl AsFd for Ownership {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Drop for Ownership {
    fn drop(&mut self) {
        // SAFETY: the mapping was made by `map` with this address and length.
        let _ = unsafe { rustix::mm::munmap(self.word.as_ptr().cast(), PAGE) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_usual_way() {
        let word = Ownership::create().expect("page");
        let epoch = word.seal(Owner::Held(Epoch(0))).expect("seal");
        assert_eq!(epoch, Epoch(1));
        word.give_up(epoch).expect("give up");
        assert_eq!(word.take(epoch).expect("take"), Owner::Taken(epoch));
        word.reclaim(epoch).expect_err("taken is taken");
        // The successor is the predecessor of the next attempt.
        assert_eq!(word.seal(Owner::Taken(epoch)).expect("seal"), Epoch(2));
    }

    #[test]
    fn reclaim_and_take_exclude_each_other() {
        let word = Ownership::create().expect("page");
        let epoch = word.seal(Owner::Held(Epoch(0))).expect("seal");
        word.give_up(epoch).expect("give up");
        word.reclaim(epoch).expect("reclaim");
        word.take(epoch).expect_err("reclaimed");
    }

    #[test]
    fn a_late_successor_cannot_take_a_later_attempt() {
        let word = Ownership::create().expect("page");
        let first = word.seal(Owner::Held(Epoch(0))).expect("seal");
        let held = word.unseal(first).expect("unseal");
        let second = word.seal(held).expect("seal again");
        word.give_up(second).expect("give up");
        word.take(first).expect_err("the first attempt is over");
        word.take_from_dead(first).expect_err("for the dead too");
        word.take(second).expect("the second may");
    }

    #[test]
    fn nothing_is_taken_before_the_seal() {
        let word = Ownership::create().expect("page");
        word.take_from_dead(Epoch(0)).expect_err("never sealed");
        word.take_from_dead(Epoch(1)).expect_err("never sealed");
        assert_eq!(word.read().expect("read"), Owner::Held(Epoch(0)));
    }

    #[test]
    fn what_was_revoked_is_for_the_successor_of_a_dead_predecessor_alone() {
        for give_up in [false, true] {
            let word = Ownership::create().expect("page");
            let epoch = word.seal(Owner::Held(Epoch(0))).expect("seal");
            if give_up {
                word.give_up(epoch).expect("give up");
            }
            word.revoke(epoch).expect("revoke");
            word.unseal(epoch).expect_err("revoked");
            word.give_up(epoch).expect_err("revoked");
            word.reclaim(epoch).expect_err("revoked");
            word.take(epoch).expect_err("the predecessor may live");
            word.take_from_dead(epoch).expect("it is dead");
            word.revoke(epoch).expect_err("taken is taken");
        }
        let word = Ownership::create().expect("page");
        word.revoke(Epoch(0)).expect_err("a guest that runs");
    }

    #[test]
    fn two_mappings_see_one_word() {
        let word = Ownership::create().expect("page");
        let other = Ownership::map(word.as_fd().try_clone_to_owned().expect("dup")).expect("map");
        let epoch = word.seal(Owner::Held(Epoch(0))).expect("seal");
        assert_eq!(other.read().expect("read"), Owner::Sealed(epoch));
    }
}
