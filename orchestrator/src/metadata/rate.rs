//! How often a VM may ask: five answers in any second, and some more questions that have none here.
//!
//! Software that finds out where it runs asks the services of several clouds at once, at this one
//! address. What does not exist here must not cost it the answer that does.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// Answers in any second.
const ANSWERS: usize = 5;
/// Requests in any second, whatever they are.
const REQUESTS: usize = 25;
const SECOND: Duration = Duration::from_secs(1);

/// The last requests of one VM. What is refused does not count.
#[derive(Clone, Debug, Default)]
pub struct Rate {
    answers: VecDeque<Instant>,
    requests: VecDeque<Instant>,
}

impl Rate {
    /// Whether one more request may be looked at now.
    pub fn allows(&mut self, now: Instant) -> bool {
        one_more(&mut self.requests, REQUESTS, now)
    }

    /// Whether one more may be answered now.
    pub fn answers(&mut self, now: Instant) -> bool {
        one_more(&mut self.answers, ANSWERS, now)
    }
}

fn one_more(last: &mut VecDeque<Instant>, most: usize, now: Instant) -> bool {
    if last.len() >= most {
        let oldest = last.front().copied();
        if oldest.is_some_and(|at| now.saturating_duration_since(at) < SECOND) {
            return false;
        }
        last.pop_front();
    }
    last.push_back(now);
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_sixth_in_a_second_is_refused_and_the_first_after_it_is_not() {
        let mut rate = Rate::default();
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        assert!((0..5).all(|n| rate.answers(at(n * 10))));
        assert!(!rate.answers(at(50)));
        assert!(!rate.answers(at(999)));
        assert!(rate.answers(at(1000)));
        assert!(
            !rate.answers(at(1005)),
            "the second is 10 ms after the first"
        );
        assert!(rate.answers(at(1010)));
        let whole: usize = (1020..61_020).filter(|ms| rate.answers(at(*ms))).count();
        assert!((299..=301).contains(&whole), "{whole} in a minute");
        assert!((0..25).all(|_| rate.allows(at(90_000))));
        assert!(!rate.allows(at(90_000)), "the 26th of any kind");
    }
}
