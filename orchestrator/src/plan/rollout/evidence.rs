//! What the record of a swap says about its release, against the limits of a rollout.
//!
//! Whoever drives a rollout puts it into [`Seen::breaches`](super::seen::Seen): a swap that moved and is
//! beyond a limit has failed. A guest that was not well after it has no limit to be within.

use std::time::Duration;

use super::seen::Breach;
use crate::model::{HealthState, Limits, SwapRecord};

/// The gravest that a swap was beyond; `None` if nothing is known against it.
pub fn breach(swap: &SwapRecord, limits: &Limits) -> Option<Breach> {
    let health = swap.safeguards.health.as_ref();
    if health.is_some_and(|health| health.state == HealthState::Unwell) {
        return Some(Breach::Unwell);
    }
    let report = swap.report.as_ref()?;
    let over = |seen: Duration, limit: Option<Duration>| limit.is_some_and(|limit| seen > limit);
    let error = report
        .clock
        .as_ref()
        .and_then(|clock| clock.kvmclock_error_ns);
    let error = Duration::from_nanos(error.map_or(0, i64::unsigned_abs));
    let bright = report.phases.iter().filter(|phase| !phase.in_blackout);
    let brownout = bright.map(|phase| phase.duration).sum();
    if over(report.blackout.host, limits.blackout) {
        Some(Breach::Blackout)
    } else if over(error, limits.clock_error) {
        Some(Breach::ClockError)
    } else if over(brownout, limits.brownout) {
        Some(Breach::Brownout)
    } else {
        None
    }
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
