//! What will happen, in the order of time; and chance, from one seed.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::time::Duration;

use crate::model::Moment;
use crate::plan::rollout::Way;
use crate::plan::rollout::fleet::{Host, Ix, Vm};
use crate::plan::rollout::layout::Unit;

/// What happens.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Event {
    /// A swap ends.
    SwapEnds(Ix<Unit>, Way),
    /// The new release shows that it broke a guest.
    Breaks(Ix<Unit>),
    /// Some host fails.
    AHostFails,
    /// That host is well again.
    HostHeals(Ix<Host>),
    /// Some guest fails.
    AGuestFails,
    /// That guest is well again.
    GuestHeals(Ix<Vm>),
}

/// Events to come.
#[derive(Debug, Default)]
pub(super) struct Events(BinaryHeap<Reverse<(Moment, Event)>>);

impl Events {
    pub(super) fn add(&mut self, at: Moment, event: Event) {
        self.0.push(Reverse((at, event)));
    }

    /// When the next one is.
    pub(super) fn next_at(&self) -> Option<Moment> {
        self.0.peek().map(|Reverse((at, _))| *at)
    }

    /// The next one up to `until`.
    pub(super) fn pop_until(&mut self, until: Moment) -> Option<(Moment, Event)> {
        if self.next_at()? > until {
            return None;
        }
        self.0.pop().map(|Reverse(next)| next)
    }
}

/// Chance.
#[derive(Debug)]
pub(super) struct Chance(fastrand::Rng);

impl Chance {
    pub(super) fn new(seed: u64) -> Self {
        Self(fastrand::Rng::with_seed(seed))
    }

    /// Whether it is one of that share.
    pub(super) fn is(&mut self, share: f64) -> bool {
        self.0.f64() < share
    }

    /// One of `count`.
    pub(super) fn one_of(&mut self, count: usize) -> usize {
        self.0.usize(0..count.max(1))
    }

    /// A time until something that happens now and then: exponential.
    pub(super) fn wait(&mut self, mean: Duration) -> Duration {
        let uniform = 1.0 - self.0.f64();
        scaled(mean, -uniform.ln())
    }

    /// A time that is mostly near its middle and sometimes much longer: log-normal.
    pub(super) fn about(&mut self, middle: Duration) -> Duration {
        // The sum of twelve uniform ones is as good as normal.
        let normal = (0..12).map(|_| self.0.f64()).sum::<f64>() - 6.0;
        scaled(middle, (0.4 * normal).exp())
    }
}

fn scaled(time: Duration, by: f64) -> Duration {
    Duration::try_from_secs_f64(time.as_secs_f64() * by).unwrap_or(Duration::MAX)
}
