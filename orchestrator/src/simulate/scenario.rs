//! What is pretended.

use std::time::Duration;

use crate::model::{Amount, AtOnce, Policy, Rung, Stage};

/// How large a fleet is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Size {
    /// Hosts.
    pub hosts: u32,
    /// VMs, spread evenly.
    pub vms: u32,
}

/// What the release does that is rolled out.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Release {
    /// The share of guests that it breaks: their heartbeat is lost, until they are put back.
    pub breaks: f64,
    /// How long that takes to show, on average.
    pub shows_after: Duration,
}

/// A rollout to be simulated.
#[derive(Clone, Debug)]
pub struct Scenario {
    /// What it is called in tables.
    pub name: String,
    /// What everything random follows from.
    pub seed: u64,
    /// The fleet's size.
    pub size: Size,
    /// Members of an availability set.
    pub set_size: u32,
    /// What is swapped.
    pub rung: Rung,
    /// What the release does.
    pub release: Release,
    /// How the rollout goes about it.
    pub policy: Policy,
    /// How long guests are asked before a swap, at most; not at all if zero.
    pub notice: Duration,
    /// The share of guests that answer, after a minute on average. The others let it run out.
    pub answer: f64,
    /// The share of swaps that are kept.
    pub kept: f64,
    /// How long a swap takes from its begin, on average.
    pub swap: Duration,
    /// How many steps the store can record in a second.
    pub store_per_second: u32,
    /// The mean time between two failures of a host, and how long it is down.
    pub host_fails: (Duration, Duration),
    /// The same of a guest, for reasons of its own.
    pub guest_fails: (Duration, Duration),
}

const MINUTE: Duration = Duration::from_secs(60);
const HOUR: Duration = Duration::from_secs(3_600);
const DAY: Duration = Duration::from_secs(86_400);

impl Scenario {
    /// A good release in an ordinary fleet: canaries, one percent, then all, up to one percent of it
    /// at once.
    pub fn ordinary(size: Size, seed: u64) -> Self {
        let policy = Policy {
            stages: vec![
                Stage {
                    size: Amount::Share(1),
                    bake: 30 * MINUTE,
                },
                Stage {
                    size: Amount::percent(1),
                    bake: HOUR,
                },
            ],
            at_once: AtOnce {
                total: (size.vms / 100).max(1),
                per_host: 2,
                per_rack: Some(20),
                per_zone: None,
            },
            failures: Amount::Share(10),
            ..Policy::default()
        };
        Self {
            name: "good release".into(),
            seed,
            size,
            set_size: 12,
            rung: Rung::Vmm,
            release: Release {
                breaks: 0.0,
                shows_after: MINUTE / 3,
            },
            policy,
            notice: Duration::ZERO,
            answer: 0.7,
            kept: 0.002,
            swap: Duration::from_millis(1_500),
            store_per_second: 2_000,
            host_fails: (2 * 365 * DAY, 30 * MINUTE),
            guest_fails: (365 * DAY, 5 * MINUTE),
        }
    }

    /// The same of what takes whole hosts: the limits are of hosts then, and where there is no way back the rollout
    /// stops.
    #[must_use]
    pub fn of(mut self, rung: Rung) -> Self {
        self.rung = rung;
        if rung.takes_whole_host() {
            self.policy.at_once.total = (self.policy.at_once.total / self.guests_a_host()).max(1);
        }
        self.policy.roll_back &= rung.has_way_back();
        self
    }

    fn guests_a_host(&self) -> u32 {
        (self.size.vms / self.size.hosts.max(1)).max(1)
    }

    /// The same, called otherwise and changed.
    #[must_use]
    pub fn but(mut self, name: &str, change: impl FnOnce(&mut Self)) -> Self {
        name.clone_into(&mut self.name);
        change(&mut self);
        self
    }

    /// The same without canaries and stages: all at once, up to the limits.
    #[must_use]
    pub fn without_stages(self, name: &str) -> Self {
        self.but(name, |scenario| scenario.policy.stages.clear())
    }
}

/// The scenarios that are told about in the documents.
pub fn standard(size: Size, seed: u64) -> Vec<Scenario> {
    let ordinary = || Scenario::ordinary(size, seed);
    let breaks = |share| move |scenario: &mut Scenario| scenario.release.breaks = share;
    vec![
        ordinary(),
        ordinary().but("guests are asked, 15 min", |s| {
            s.notice = 15 * MINUTE;
            s.policy.deadline = 30 * MINUTE;
            s.policy.at_once.total = (s.size.vms / 20).max(1);
            s.policy.at_once.per_host = 3;
            s.policy.at_once.per_rack = None;
        }),
        ordinary().but("breaks every guest", breaks(1.0)),
        ordinary().but("breaks 1 in 20", breaks(0.05)),
        ordinary().but("breaks 1 in 1000", breaks(0.001)),
        ordinary()
            .but("", breaks(0.05))
            .without_stages("breaks 1 in 20, no stages"),
    ]
}
