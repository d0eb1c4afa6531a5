//! How often a VM may ask: five times in any second. What is refused does not count.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// Requests in any second.
const REQUESTS: usize = 5;
const SECOND: Duration = Duration::from_secs(1);

/// The last requests of one VM.
#[derive(Clone, Debug, Default)]
pub struct Rate(VecDeque<Instant>);

impl Rate {
    /// Whether one more may be answered now.
    pub fn allows(&mut self, now: Instant) -> bool {
        if self.0.len() >= REQUESTS {
            let oldest = self.0.front().copied();
            if oldest.is_some_and(|at| now.saturating_duration_since(at) < SECOND) {
                return false;
            }
            self.0.pop_front();
        }
        self.0.push_back(now);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_sixth_in_a_second_is_refused_and_the_first_after_it_is_not() {
        let mut rate = Rate::default();
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        assert!((0..5).all(|n| rate.allows(at(n * 10))));
        assert!(!rate.allows(at(50)));
        assert!(!rate.allows(at(999)));
        assert!(rate.allows(at(1000)));
        assert!(
            !rate.allows(at(1005)),
            "the second is 10 ms after the first"
        );
        assert!(rate.allows(at(1010)));
        let whole: usize = (1020..61_020).filter(|ms| rate.allows(at(*ms))).count();
        assert!((299..=301).contains(&whole), "{whole} in a minute");
    }
}
