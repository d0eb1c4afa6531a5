//! The acts on the ownership word, under every interleaving of their compare-and-swaps: those of
//! `Act::apply`, which the page does on shared memory and loom does here on a word of its own.
//! What processes make of them is in `tests/model`.

use loom::sync::Arc;
use loom::sync::atomic::{AtomicU64, Ordering};
use loom::thread;
use stillpoint_control::ownership::{Act, Epoch, Owner};

struct Word(AtomicU64);

impl Word {
    fn new(owner: Owner) -> Arc<Self> {
        Arc::new(Self(AtomicU64::new(owner.word())))
    }

    fn act(&self, act: Act) -> Option<Owner> {
        act.apply(|from, to| {
            self.0
                .compare_exchange(from, to, Ordering::SeqCst, Ordering::SeqCst)
        })
        .ok()
    }

    fn read(&self) -> Owner {
        Owner::from_word(self.0.load(Ordering::SeqCst)).expect("a state")
    }
}

const ONE: Epoch = Epoch(1);

/// Which of those that hold a claim may run the guest in the end.
fn runs<const N: usize>(claims: [Option<Owner>; N], word: Owner) -> usize {
    let claims = claims.into_iter().flatten();
    let runners = claims.filter(|owner| matches!(owner, Owner::Held(_) | Owner::Taken(_)));
    runners.inspect(|owner| assert_eq!(*owner, word)).count()
}

#[test]
fn reclaim_take_and_revoke_exclude_each_other() {
    loom::model(|| {
        let word = Word::new(Owner::GivenUp(ONE));
        let act = |act| {
            let word = word.clone();
            thread::spawn(move || word.act(act))
        };
        let others = [act(Act::Take(ONE)), act(Act::Revoke(ONE))];
        let reclaimed = word.act(Act::Reclaim(ONE));
        let [taken, revoked] = others.map(|thread| thread.join().expect("join"));
        let won = [reclaimed, taken, revoked];
        assert_eq!(won.into_iter().flatten().count(), 1, "{won:?}");
        assert!(runs(won, word.read()) <= 1);
    });
}

#[test]
fn a_predecessor_at_its_deadline_and_a_daemon_that_thinks_it_hangs() {
    loom::model(|| {
        let word = Word::new(Owner::Sealed(ONE));
        let daemon = {
            let word = word.clone();
            thread::spawn(move || word.act(Act::Revoke(ONE)))
        };
        // It gives up, hears nothing, and wants it back; or calls off before that.
        let back = match word.act(Act::GiveUp(ONE)) {
            Some(_) => word.act(Act::Reclaim(ONE)),
            None => word.act(Act::Unseal(ONE)),
        };
        let revoked = daemon.join().expect("join");
        assert!(back.is_some() != revoked.is_some(), "{back:?} {revoked:?}");
    });
}

#[test]
fn who_takes_from_the_dead_misses_no_state_that_a_daemon_makes_meanwhile() {
    for last in [Owner::Sealed(ONE), Owner::GivenUp(ONE)] {
        loom::model(move || {
            let word = Word::new(last);
            let daemon = {
                let word = word.clone();
                thread::spawn(move || word.act(Act::Revoke(ONE)))
            };
            assert_eq!(word.act(Act::TakeFromDead(ONE)), Some(Owner::Taken(ONE)));
            daemon.join().expect("join");
            assert_eq!(word.read(), Owner::Taken(ONE));
        });
    }
}

#[test]
fn a_late_successor_wins_nothing_of_a_later_attempt() {
    loom::model(|| {
        let word = Word::new(Owner::Sealed(ONE));
        let late = {
            let word = word.clone();
            thread::spawn(move || (word.act(Act::Take(ONE)), word.act(Act::Revoke(ONE))))
        };
        let second = word
            .act(Act::Unseal(ONE))
            .and_then(|held| word.act(Act::Seal(held)))
            .and_then(|sealed| word.act(Act::GiveUp(sealed.epoch())));
        let (taken, revoked) = late.join().expect("join");
        assert_eq!(taken, None, "nothing was given up in the first");
        assert!(second.is_some() != revoked.is_some());
        if second.is_some() {
            assert_eq!(word.read(), Owner::GivenUp(Epoch(2)));
        }
    });
}
