//! What a device has to complain of, in the log: now and then, however often a guest gives cause.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// One complaint in so long.
const EVERY: Duration = Duration::from_secs(10);

/// Complaints of one device.
#[derive(Debug, Default)]
pub(super) struct Complaints(Mutex<Told>);

#[derive(Debug, Default)]
struct Told {
    last: Option<Instant>,
    kept: u64,
}

impl Complaints {
    /// Whether one may be told now, and then how many were kept back since the last that was.
    pub(super) fn due(&self) -> Option<u64> {
        self.due_at(Instant::now())
    }

    fn due_at(&self, now: Instant) -> Option<u64> {
        let mut told = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if told.last.is_some_and(|last| now - last < EVERY) {
            told.kept += 1;
            return None;
        }
        told.last = Some(now);
        Some(std::mem::take(&mut told.kept))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_in_so_long_and_the_others_are_counted() {
        let complaints = Complaints::default();
        let start = Instant::now();
        assert_eq!(complaints.due_at(start), Some(0));
        for ms in [0, 1, 9999] {
            assert_eq!(complaints.due_at(start + Duration::from_millis(ms)), None);
        }
        assert_eq!(complaints.due_at(start + EVERY), Some(3));
        assert_eq!(complaints.due_at(start + EVERY), None);
        assert_eq!(complaints.due_at(start + 3 * EVERY), Some(1));
    }
}
