//! How soon the guest gets as much done as before the swap. The predecessor looks for a moment before it offers
//! the guest, while nothing is done to it; the successor looks from the guest's entry on, from a thread beside it.
//!
//! Must never: keep a machine's part alive, or look while the guest is not this process's to run.

use std::sync::mpsc::{Receiver, TryRecvError};
use std::time::{Duration, Instant};

use stillpoint_control::recovery::Recovery;

use crate::machine::Machine;
use crate::machine::gauge::{Counts, Gauge};

/// How long the predecessor looks.
const BEFORE: Duration = Duration::from_millis(50);
/// What happens less often than so many times meanwhile is not judged: chance would be the judge.
const LEAST: u64 = 50;
/// How much of what was done before counts as recovered.
const SHARE: f64 = 0.95;
/// The rate is that over so long at least, and over as long as `LEAST` of them took before.
const WINDOW: Duration = Duration::from_millis(10);
/// Between two looks of the successor.
const GLANCE: Duration = Duration::from_millis(3);
/// How long it looks at most.
const LONGEST: Duration = Duration::from_secs(2);

/// What the guest gets done now: nothing of it is known yet but the rates.
pub(super) fn before(machine: &Machine) -> Vec<Recovery> {
    let mut gauge = machine.gauge();
    let first = gauge.read();
    if first.is_empty() {
        return Vec::new();
    }
    let began = Instant::now();
    std::thread::sleep(BEFORE);
    let (second, took) = (gauge.read(), began.elapsed());
    let rate = |(of, count): (String, u64)| {
        let done = count.saturating_sub(first.get(&of).copied()?);
        (done >= LEAST).then(|| Recovery {
            of,
            before_per_s: per_second(done, took),
            ..Recovery::default()
        })
    };
    second.into_iter().filter_map(rate).collect()
}

fn per_second(count: u64, took: Duration) -> u64 {
    let took = took.as_nanos().max(1);
    u64::try_from(u128::from(count) * 1_000_000_000 / took).unwrap_or(u64::MAX)
}

/// A guest that was let in.
#[derive(Debug)]
pub struct Watch {
    gauge: Gauge,
    looks: Vec<(Duration, Counts)>,
    entered: Instant,
}

impl Watch {
    /// Begins; `since` is how long ago the guest was let in.
    pub fn begin(machine: &Machine, since: Duration) -> Self {
        let now = Instant::now();
        let mut watch = Self {
            gauge: machine.gauge(),
            looks: Vec::new(),
            entered: now.checked_sub(since).unwrap_or(now),
        };
        watch.look();
        watch
    }

    fn look(&mut self) {
        let counts = self.gauge.read();
        self.looks.push((self.entered.elapsed(), counts));
    }

    /// Looks until everything is as fast as `before` says that it was, which may come later than the first looks;
    /// or until it has looked for long enough, or the guest is somebody else's.
    pub fn watch(
        mut self,
        before: &Receiver<Vec<Recovery>>,
        is_ours: impl Fn() -> bool,
    ) -> Vec<Recovery> {
        let mut known = None;
        loop {
            std::thread::sleep(GLANCE);
            let goes_on = is_ours() && self.entered.elapsed() < LONGEST;
            if goes_on {
                self.look();
            }
            match before.try_recv() {
                Ok(before) => known = Some(before),
                // There is no report for it.
                Err(TryRecvError::Disconnected) if known.is_none() => return Vec::new(),
                Err(_) => {}
            }
            let judged = known.as_deref().map(|before| self.judge(before));
            match judged {
                Some(judged) if !goes_on || judged.iter().all(|one| one.until_ns.is_some()) => {
                    return judged;
                }
                None if !goes_on => return Vec::new(),
                _ => {}
            }
        }
    }

    fn judge(&self, before: &[Recovery]) -> Vec<Recovery> {
        let judge = |known: &Recovery| {
            let count = |(at, counts): &(Duration, Counts)| Some((*at, *counts.get(&known.of)?));
            let looks: Vec<_> = self.looks.iter().filter_map(count).collect();
            judged(known, &looks)
        };
        before.iter().map(judge).collect()
    }
}

/// What looks at one count say of it; each is a time since the entry, and what was counted by then.
fn judged(known: &Recovery, looks: &[(Duration, u64)]) -> Recovery {
    let rate = known.before_per_s as f64;
    let window = WINDOW.max(Duration::from_secs_f64(LEAST as f64 / rate.max(1.0)));
    let (Some(&first), Some(&last)) = (looks.first(), looks.last()) else {
        return known.clone();
    };
    let is_fast = |&&(from, count): &&(Duration, u64)| {
        let end = looks.iter().find(|(at, _)| *at >= from + window);
        end.is_some_and(|&(at, by)| {
            by.saturating_sub(count) as f64 >= SHARE * rate * (at - from).as_secs_f64()
        })
    };
    let recovered = looks.iter().find(is_fast);
    let (at, count) = recovered.copied().unwrap_or(last);
    let would_take = Duration::from_secs_f64(count.saturating_sub(first.1) as f64 / rate.max(1.0));
    // Before the first look it is all that is known that it ran.
    let lost = (at - first.0).saturating_sub(would_take);
    let whole = |duration: Duration| u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX);
    Recovery {
        until_ns: recovered.map(|&(at, _)| match at == first.0 {
            true => 0,
            false => whole(at),
        }),
        lost,
        watched: last.0,
        ..known.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    fn known(before_per_s: u64) -> Recovery {
        Recovery {
            of: "guest".into(),
            before_per_s,
            ..Recovery::default()
        }
    }

    /// Looks each 5 ms for a second, at a count that `at_ms` gives.
    fn looks(at_ms: impl Fn(u32) -> u64) -> Vec<(Duration, u64)> {
        (0..200).map(|n| (MS * (n * 5), at_ms(n * 5))).collect()
    }

    #[test]
    fn a_guest_as_fast_as_before_lost_nothing() {
        let seen = judged(&known(100_000), &looks(|ms| 700 + u64::from(ms) * 100));
        assert_eq!((seen.until_ns, seen.lost), (Some(0), Duration::ZERO));
        assert_eq!(seen.watched, MS * 995);
    }

    #[test]
    fn one_at_half_speed_for_a_while_lost_half_of_it() {
        let half = |ms: u32| u64::from(ms.min(300)) * 50 + u64::from(ms.saturating_sub(300)) * 100;
        let seen = judged(&known(100_000), &looks(half));
        let until = Duration::from_nanos(seen.until_ns.expect("it recovers"));
        assert_eq!(until, MS * 300);
        let off = seen.lost.abs_diff(MS * 150);
        assert!(off < MS, "{:?}", seen.lost);
    }

    #[test]
    fn one_that_stays_slow_is_said_to() {
        let seen = judged(&known(100_000), &looks(|ms| u64::from(ms) * 90));
        assert_eq!(seen.until_ns, None);
        assert!(seen.lost.abs_diff(MS * 99) < MS, "{:?}", seen.lost);
        assert!(seen.is_known());
    }

    #[test]
    fn rare_things_are_judged_over_as_long_as_many_of_them_take() {
        // 1,000 in a second: 50 in 50 ms. None for 200 ms, then all.
        let late = |ms: u32| u64::from(ms.saturating_sub(200));
        let seen = judged(&known(1000), &looks(late));
        let until = Duration::from_nanos(seen.until_ns.expect("it recovers"));
        // The window from there on holds 95 % already.
        assert!((MS * 195..=MS * 200).contains(&until), "{until:?}");
    }
}
