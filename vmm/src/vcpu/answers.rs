//! Answers of all vCPUs to one order.
//!
//! Whoever waits for all of them has nothing to do with the first: to be woken by it costs two switches on a core that
//! another vCPU works on. So only the last answer of a round wakes, if the one who waits sleeps at all.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, TryRecvError, channel};
use std::time::{Duration, Instant};

use super::orders::{Answer, Gone};

/// The machine thread's end.
#[derive(Debug)]
pub(super) struct Answers {
    inbox: Receiver<(u8, Answer)>,
    /// A word for each answer that may be the last.
    complete: Receiver<()>,
    missing: Arc<AtomicUsize>,
}

/// A vCPU thread's end.
#[derive(Clone, Debug)]
pub(super) struct Teller {
    outbox: Sender<(u8, Answer)>,
    complete: Sender<()>,
    missing: Arc<AtomicUsize>,
}

/// Both ends.
pub(super) fn answers() -> (Teller, Answers) {
    let (outbox, inbox) = channel();
    let (completes, complete) = channel();
    let missing = Arc::new(AtomicUsize::new(0));
    let teller = Teller {
        outbox,
        complete: completes,
        missing: Arc::clone(&missing),
    };
    let answers = Answers {
        inbox,
        complete,
        missing,
    };
    (teller, answers)
}

impl Teller {
    /// Gives an answer. The machine thread may have given up on us; then there is nobody to tell.
    pub(super) fn tell(&self, id: u8, answer: Answer) {
        let _ = self.outbox.send((id, answer));
        // Late answers of an earlier round count in this one: it is complete too early then, never too late, and each
        // answer after that wakes.
        let count_down = |missing: usize| Some(missing.saturating_sub(1));
        let before = self
            .missing
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, count_down);
        if before.is_ok_and(|before| before <= 1) {
            let _ = self.complete.send(());
        }
    }
}

impl Answers {
    /// An order that so many will answer is about to be given.
    pub(super) fn expect(&self, count: usize) {
        // Of rounds in which nobody slept.
        while self.complete.try_recv().is_ok() {}
        self.missing.store(count, Ordering::Release);
    }

    /// The next answer: it is waited for awake a little, then asleep until all are there. `None` when the deadline
    /// passes.
    pub(super) fn next(
        &self,
        spin: Duration,
        deadline: Instant,
    ) -> Result<Option<(u8, Answer)>, Gone> {
        let began = Instant::now();
        loop {
            match self.inbox.try_recv() {
                Ok(answer) => return Ok(Some(answer)),
                Err(TryRecvError::Disconnected) => return Err(Gone),
                Err(TryRecvError::Empty) if began.elapsed() < spin => std::thread::yield_now(),
                Err(TryRecvError::Empty) => {
                    let left = deadline.saturating_duration_since(Instant::now());
                    match self.complete.recv_timeout(left) {
                        Ok(()) => {}
                        // Those who did answer are heard, whoever else did not.
                        Err(RecvTimeoutError::Timeout) => return Ok(self.inbox.try_recv().ok()),
                        Err(RecvTimeoutError::Disconnected) => return Err(Gone),
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONG: Duration = Duration::from_secs(20);

    fn next(answers: &Answers, patience: Duration) -> Option<u8> {
        let next = answers.next(Duration::ZERO, Instant::now() + patience);
        next.expect("somebody is there").map(|(id, _)| id)
    }

    #[test]
    fn only_the_last_wakes_and_all_are_heard() {
        let (teller, answers) = answers();
        answers.expect(3);
        teller.tell(0, Answer::Parked);
        teller.tell(1, Answer::Parked);
        assert!(answers.complete.try_recv().is_err(), "one is missing");
        teller.tell(2, Answer::Parked);
        assert!(answers.complete.try_recv().is_ok());
        let heard: Vec<_> = (0..3).map(|_| next(&answers, LONG)).collect();
        assert_eq!(heard, [Some(0), Some(1), Some(2)]);
        assert_eq!(next(&answers, Duration::ZERO), None);
    }

    #[test]
    fn who_is_waited_for_in_vain_keeps_nobody_unheard() {
        let (teller, answers) = answers();
        answers.expect(3);
        teller.tell(1, Answer::Parked);
        let patience = Duration::from_millis(1);
        assert_eq!(next(&answers, patience), Some(1));
        assert_eq!(next(&answers, patience), None);
    }

    #[test]
    fn a_late_answer_of_an_earlier_round_costs_a_wake_up_and_no_more() {
        let (teller, answers) = answers();
        answers.expect(2);
        teller.tell(0, Answer::Parked);
        assert_eq!(next(&answers, Duration::ZERO), Some(0));
        answers.expect(2);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for id in [1, 0, 1] {
                    std::thread::sleep(Duration::from_millis(5));
                    teller.tell(id, Answer::Parked);
                }
            });
            let heard: Vec<_> = (0..3).map(|_| next(&answers, LONG)).collect();
            assert_eq!(heard, [Some(1), Some(0), Some(1)]);
        });
    }

    #[test]
    fn nobody_left_is_noticed() {
        let (teller, answers) = answers();
        answers.expect(1);
        drop(teller);
        let next = answers.next(Duration::ZERO, Instant::now() + LONG);
        assert!(next.is_err());
    }
}
