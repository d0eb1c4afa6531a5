//! What the record of a swap says about its release, against the limits of a rollout.
//!
//! Whoever drives a rollout puts it into [`Seen::breaches`](super::seen::Seen): a swap that moved and is
//! beyond a limit has failed. A guest that was not well after it has no limit to be within.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::seen::Breach;
use crate::model::{HealthState, Limits, SwapRecord};

/// The gravest that a swap was beyond; `None` if nothing is known against it.
pub fn breach(swap: &SwapRecord, limits: &Limits) -> Option<Breach> {
    let health = swap.safeguards.health.as_ref();
    if health.is_some_and(|health| health.state == HealthState::Unwell) {
        return Some(Breach::Unwell);
    }
    Worst::of([swap]).breach(limits)
}

/// What swaps of one moment were to their guests: of each measure the worst.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Worst {
    /// How many guests were measured.
    pub guests: u32,
    /// The longest blackout, ns.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub blackout_ns: Option<u64>,
    /// The error of the clock that was most wrong afterwards, ns.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub clock_error_ns: Option<i64>,
    /// The longest brownout, ns.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub brownout_ns: Option<u64>,
}

impl Worst {
    /// Of these swaps, as far as they have reports.
    pub fn of<'a>(swaps: impl IntoIterator<Item = &'a SwapRecord>) -> Self {
        let mut worst = Self::default();
        let reports = swaps.into_iter().filter_map(|swap| swap.report.as_ref());
        for report in reports {
            worst.guests += 1;
            worst.blackout_ns = worst.blackout_ns.max(ns(report.blackout.host));
            let clock = report.clock.as_ref();
            let errors = [
                worst.clock_error_ns,
                clock.and_then(|clock| clock.kvmclock_error_ns),
            ];
            let errors = errors.into_iter().flatten();
            worst.clock_error_ns = errors.max_by_key(|error| error.unsigned_abs());
            let bright = report.phases.iter().filter(|phase| !phase.in_blackout);
            let brownout = ns(bright.map(|phase| phase.duration).sum());
            worst.brownout_ns = worst.brownout_ns.max(brownout);
        }
        worst
    }

    /// The gravest that they were beyond.
    pub fn breach(&self, limits: &Limits) -> Option<Breach> {
        let over = |seen: Option<u64>, limit: Option<Duration>| {
            let seen = Duration::from_nanos(seen.unwrap_or(0));
            limit.is_some_and(|limit| seen > limit)
        };
        let error = self.clock_error_ns.map(i64::unsigned_abs);
        if over(self.blackout_ns, limits.blackout) {
            Some(Breach::Blackout)
        } else if over(error, limits.clock_error) {
            Some(Breach::ClockError)
        } else if over(self.brownout_ns, limits.brownout) {
            Some(Breach::Brownout)
        } else {
            None
        }
    }
}

fn ns(duration: Duration) -> Option<u64> {
    u64::try_from(duration.as_nanos()).ok()
}

/// Whether all is known of a swap that its watch can tell: until then it may still be put back.
pub fn is_settled(swap: &SwapRecord) -> bool {
    let health = swap.safeguards.health.as_ref();
    swap.state.is_over() && !health.is_some_and(|health| health.state.is_open())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Health, Safeguards, SwapId, SwapState};
    use stillpoint_control::report::{
        Blackout, ClockReceipt, Outcome, Phase, ReleaseName, Side, SwapReport,
    };

    const MS: Duration = Duration::from_millis(1);

    fn report() -> SwapReport {
        let phase = |name: &str, in_blackout, duration| Phase {
            name: name.into(),
            side: Side::Successor,
            in_blackout,
            duration,
        };
        SwapReport {
            swap: "s".into(),
            vm: "web-1".into(),
            component: "vmm".into(),
            from: ReleaseName::default(),
            to: ReleaseName::default(),
            outcome: Outcome::Moved,
            reason: None,
            started_at_unix_ns: 0,
            vcpus: 1,
            memory_bytes: 0,
            state_format: 3,
            state_bytes: 0,
            budget: MS * 1000,
            margin: None,
            phases: vec![phase("build", false, MS * 30), phase("load", true, MS * 5)],
            blackout: Blackout {
                host: MS * 7,
                guest_ns: Vec::new(),
                vcpus: Vec::new(),
            },
            clock: Some(ClockReceipt {
                kvmclock_error_ns: Some(-20),
                ..ClockReceipt::default()
            }),
            recovery: Vec::new(),
            warnings: Vec::new(),
        }
    }

    fn swap(state: HealthState) -> SwapRecord {
        SwapRecord {
            id: SwapId("s".into()),
            part_of: None,
            rollout: None,
            vm: "web-1".to_owned().try_into().expect("name"),
            component: "vmm".into(),
            from: ReleaseName::default(),
            to: ReleaseName::default(),
            state: SwapState::Moved,
            step: "done".into(),
            reason: None,
            budget_ns: None,
            clock: None,
            notice_ns: None,
            no_notice: None,
            safeguards: Safeguards {
                health: Some(Health::new(state, Vec::new(), 0)),
                ..Safeguards::default()
            },
            successor: None,
            epoch_before: None,
            asked_at_unix_ns: 0,
            ended_at_unix_ns: Some(1),
            report: Some(report()),
        }
    }

    #[test]
    fn each_limit_is_seen_and_health_before_all() {
        let well = swap(HealthState::Well);
        let of = |limits: Limits| breach(&well, &limits);
        assert_eq!(of(Limits::default()), None);
        let blackout = |limit| Limits {
            blackout: Some(limit),
            ..Limits::default()
        };
        assert_eq!(of(blackout(MS * 6)), Some(Breach::Blackout));
        assert_eq!(of(blackout(MS * 7)), None);
        let clock_error = Some(Duration::from_nanos(19));
        let clock = Limits {
            clock_error,
            ..Limits::default()
        };
        assert_eq!(of(clock), Some(Breach::ClockError));
        let brownout = Limits {
            brownout: Some(MS * 29),
            ..Limits::default()
        };
        assert_eq!(of(brownout), Some(Breach::Brownout));
        let unwell = swap(HealthState::Unwell);
        assert_eq!(breach(&unwell, &blackout(MS * 6)), Some(Breach::Unwell));
    }

    #[test]
    fn of_many_guests_the_worst_counts_whichever_guest_it_was() {
        let mut swaps = [swap(HealthState::Well), swap(HealthState::Well)];
        let second = swaps[1].report.as_mut().expect("a report");
        second.blackout.host = MS * 9;
        let clock = second.clock.as_mut().expect("a receipt");
        clock.kvmclock_error_ns = Some(7);
        let worst = Worst::of(&swaps);
        assert_eq!(worst.guests, 2);
        assert_eq!(worst.blackout_ns, Some(9_000_000));
        assert_eq!(worst.clock_error_ns, Some(-20));
        assert_eq!(worst.brownout_ns, Some(30_000_000));
        let limits = Limits {
            blackout: Some(MS * 8),
            ..Limits::default()
        };
        assert_eq!(worst.breach(&limits), Some(Breach::Blackout));
        assert_eq!(Worst::of(&[]).breach(&limits), None);
    }

    #[test]
    fn a_swap_whose_guest_is_watched_is_not_settled() {
        for (state, settled) in [
            (HealthState::Watching, false),
            (HealthState::WellSoFar, false),
            (HealthState::Well, true),
            (HealthState::Unwell, true),
            (HealthState::Ended, true),
        ] {
            assert_eq!(is_settled(&swap(state)), settled, "{state}");
        }
    }
}
