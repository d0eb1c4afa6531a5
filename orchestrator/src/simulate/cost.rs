//! What one plan costs, by the size of the fleet, in processor time of this host: by a clock on the
//! wall it would be a measure of who else is at work there.

use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};
use serde::Serialize;

use super::place;
use super::scenario::{Scenario, Size};
use crate::model::{Moment, Rung};
use crate::plan::rollout::layout::{Layout, LayoutError, Remedy};
use crate::plan::rollout::seen::{Health, HostSeen, Releases, Seen, VmSeen};
use crate::plan::rollout::{Rollout, State, plan};

/// What one plan costs for a fleet of a size.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Cost {
    /// Hosts.
    pub hosts: u32,
    /// VMs.
    pub vms: u32,
    /// When a hundredth of the fleet may be under way, in milliseconds.
    pub usual_ms: f64,
    /// When there is no such limit, so that every VM is looked into, in milliseconds.
    pub worst_ms: f64,
}

/// Measures fleets of up to `largest`, ten VMs a host, each about three times the one before.
///
/// # Errors
/// None that a test would not have found: the rung is built.
pub fn measure(largest: Size) -> Result<Vec<Cost>, LayoutError> {
    let mut costs = Vec::new();
    let mut vms = largest.vms;
    while vms >= 1_000 && costs.len() < 7 {
        let hosts = (vms / 10).max(1);
        costs.push(measure_one(Size { hosts, vms })?);
        vms = vms * 10 / 32;
    }
    costs.reverse();
    Ok(costs)
}

/// The processor time of the thread that asks.
pub(super) fn processor_time() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    let seconds = u64::try_from(time.tv_sec).unwrap_or(0);
    Duration::from_secs(seconds) + Duration::from_nanos(u64::try_from(time.tv_nsec).unwrap_or(0))
}

fn measure_one(size: Size) -> Result<Cost, LayoutError> {
    let scenario = Scenario::ordinary(size, 1).without_stages("cost");
    let fleet = place::fleet(&scenario);
    let remedy = Remedy::contained_in([Rung::Vmm]);
    let layout = Layout::new(&fleet, &remedy, &[], 1, |_| true)?;
    let vm = VmSeen {
        health: Health::Well,
        ..VmSeen::default()
    };
    let host = HostSeen {
        up: true,
        releases: Releases::ALL,
        ..HostSeen::default()
    };
    let seen = Seen {
        now: Moment(1_795_521_600_000_000_000),
        hosts: vec![host; fleet.hosts.len()].into(),
        vms: vec![vm; fleet.vms.len()].into(),
        units: vec![Default::default(); layout.units.len()].into(),
        ..Seen::default()
    };
    let mut rollout = Rollout {
        state: State::Running,
        policy: scenario.policy.clone(),
        layout,
        forgiven: 0,
    };
    // The shortest of a few: others share the host's caches.
    let mut shortest = |total: u32| {
        rollout.policy.at_once.total = total;
        let took = (0..5).map(|_| {
            let began = processor_time();
            let plan = plan(&rollout, &fleet, &seen);
            let took = processor_time().saturating_sub(began);
            drop(std::hint::black_box(plan));
            took
        });
        took.min().unwrap_or(Duration::ZERO).as_secs_f64() * 1e3
    };
    Ok(Cost {
        hosts: size.hosts,
        vms: size.vms,
        usual_ms: shortest((size.vms / 100).max(1)),
        worst_ms: shortest(u32::MAX),
    })
}
