//! Clocks against the one outside: each question takes its time, and that is how well the answer is known.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, ensure};
use serde::{Deserialize, Serialize};
use stillpoint_tests::linux::Linux;

use super::wires;

/// Questions, of which the one that was answered soonest counts.
const ASKED: usize = 100;
/// What a clock may move by beyond what is uncertain, us. Each kernel calibrates the TSC anew, to some tens of parts per
/// million, and nobody disciplines these hosts' clocks: until a new kernel is asked for the first time that is a
/// millisecond or so.
const DRIFT_US: i64 = 5_000;

/// How far a clock is from another.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Off {
    /// By so much it is ahead.
    pub(crate) ns: i64,
    /// It may be so much more or less.
    pub(crate) uncertain_ns: i64,
    /// When that was, by this host's clock.
    at_ns: i64,
}

/// How far a clock of a steady rate is from another, by two looks.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Line {
    pub(crate) first: Off,
    pub(crate) last: Off,
}

impl Line {
    /// Where it leads to at the moment of a later look.
    pub(crate) fn led_to(&self, later: &Off) -> Off {
        let Self { first, last } = self;
        let known = (last.at_ns - first.at_ns).max(1) as f64;
        let ahead = (later.at_ns - last.at_ns) as f64 / known;
        let moved = (last.ns - first.ns) as f64 * ahead;
        let uncertain = (first.uncertain_ns + last.uncertain_ns) as f64 * ahead;
        Off {
            ns: last.ns + moved as i64,
            uncertain_ns: last.uncertain_ns + uncertain as i64,
            at_ns: later.at_ns,
        }
    }
}

/// How far it moved.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Moved {
    pub(crate) us: i64,
    pub(crate) uncertain_us: i64,
}

impl std::fmt::Display for Moved {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} us (within {} us)", self.us, self.uncertain_us)
    }
}

impl Off {
    /// How far it moved since, which must not be far.
    pub(crate) fn since(&self, before: &Self) -> anyhow::Result<Moved> {
        let moved = Moved {
            us: (self.ns - before.ns) / 1000,
            uncertain_us: (self.uncertain_ns + before.uncertain_ns) / 1000,
        };
        ensure!(
            moved.us.abs() <= moved.uncertain_us + DRIFT_US,
            "a clock moved by {moved}: it was {before:?} off and is {self:?}"
        );
        Ok(moved)
    }
}

fn now() -> Duration {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default()
}

fn ns(time: Duration) -> i64 {
    i64::try_from(time.as_nanos()).unwrap_or(i64::MAX)
}

/// Of questions to a clock: how far this host's is from it, by the answer that came soonest.
fn tightest(mut ask: impl FnMut() -> anyhow::Result<i64>) -> anyhow::Result<Off> {
    let mut best: Option<Off> = None;
    for _ in 0..ASKED {
        let asked = now();
        let said = ask()?;
        let took = now().saturating_sub(asked);
        let off = Off {
            ns: ns(asked + took / 2) - said,
            uncertain_ns: ns(took / 2),
            at_ns: ns(asked),
        };
        best = Some(
            best.filter(|best| best.uncertain_ns <= off.uncertain_ns)
                .unwrap_or(off),
        );
    }
    best.context("nobody was asked")
}

/// The host's against the one outside.
pub(crate) fn outside() -> anyhow::Result<Off> {
    let address = wires::outside()?.clock;
    let mut stream =
        TcpStream::connect(&address).with_context(|| format!("connecting to {address}"))?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(Duration::from_secs(30)))?;
    tightest(|| {
        let mut time = [0; 8];
        stream.write_all(&[1])?;
        stream.read_exact(&mut time)?;
        Ok(i64::try_from(u64::from_le_bytes(time))?)
    })
}

/// The host's against a guest's, by the guest's agent.
pub(crate) fn of_guest(guest: &Linux<'_>) -> anyhow::Result<Off> {
    let mut agent = guest.agent()?;
    tightest(|| Ok(i64::try_from(agent.clocks()?.realtime.ns)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn off(ns: i64, at_s: i64) -> Off {
        Off {
            ns,
            uncertain_ns: 100,
            at_ns: at_s * 1_000_000_000,
        }
    }

    #[test]
    fn a_steady_drift_is_no_move_and_a_step_is_one() {
        // 27 parts per million for five minutes: more than a clock may move by.
        let line = Line {
            first: off(-1_000, 0),
            last: off(8_099_000, 300),
        };
        let led_to = |ns| {
            let now = off(ns, 450);
            now.since(&line.led_to(&now))
        };
        let moved = led_to(12_149_000).expect("on its line");
        assert_eq!((moved.us, moved.uncertain_us), (0, 0));
        led_to(12_149_000 + 6_000_000).expect_err("a step");
    }
}
