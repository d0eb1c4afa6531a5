//! Swaps of ours: the current release to itself, each in a new process.

use std::time::{Duration, Instant};

use anyhow::ensure;
use stillpoint_control::rehearsal::Verdict;
use stillpoint_control::report::SwapReport;
use stillpoint_tests::releases::Release;
use stillpoint_tests::vm::Vm;

use crate::sample::Sample;
use crate::scene::Scene;

/// For the guest to touch its RAM: some 5 s for each GiB, and others may be busy.
const TOUCH_PATIENCE: Duration = Duration::from_secs(300);
/// The time between swaps varies as the floor's does, or it might march in step with timers.
const BETWEEN_MS: u64 = 30;
const SPREAD_MS: u64 = 21;

/// A guest that has touched all its RAM, if it is to.
pub(crate) fn boot(scene: &Scene) -> anyhow::Result<Vm> {
    let vm = boot_untouched(scene)?;
    if scene.touched {
        vm.pulse.wait_touched(TOUCH_PATIENCE)?;
    }
    Ok(vm)
}

/// The same, unless it takes longer than until then.
pub(crate) fn boot_until(scene: &Scene, until: Instant) -> anyhow::Result<Option<Vm>> {
    let vm = boot_untouched(scene)?;
    let left = until.saturating_duration_since(Instant::now());
    Ok(vm.pulse.wait_touched(left).is_ok().then_some(vm))
}

fn boot_untouched(scene: &Scene) -> anyhow::Result<Vm> {
    let vm = Vm::boot(&scene.recipe())?;
    vm.pulse.wait_online(scene.vcpus.into())?;
    Ok(vm)
}

/// So many swaps, each after a rehearsal or without one.
pub(crate) fn swaps(vm: &mut Vm, count: u32, rehearsed: bool) -> anyhow::Result<Vec<Sample>> {
    (0..count)
        .map(|number| {
            if rehearsed {
                let told = vm.rehearse(Release::Current, true)?;
                ensure!(told.verdict == Verdict::Passed, "{told:?}");
            }
            pause(BETWEEN_MS + u64::from(number) * 7 % SPREAD_MS);
            vm.must_move(Release::Current).map(|report| sample(&report))
        })
        .collect()
}

/// What the guest found wrong.
pub(crate) fn faults(vm: &Vm) -> anyhow::Result<Vec<String>> {
    Ok(vm.pulse.look()?.faults())
}

/// Sleeps.
pub(crate) fn pause(ms: u64) {
    std::thread::sleep(Duration::from_millis(ms));
}

/// For figures.
pub(crate) fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

/// Phases within the blackout. Those of the two processes overlap a little: the new one may load
/// before the old one notes that `seal` is done. The last ends where the blackout does: what the report counts
/// further is the wait until the new process notices that its vCPUs run.
fn within(report: &SwapReport) -> Vec<(String, u64)> {
    let mut left = report.blackout.host;
    let phases = report.phases.iter().filter(|phase| phase.in_blackout);
    phases
        .map(|phase| {
            let took = phase.duration.min(left);
            left -= took;
            (phase.name.clone(), nanos(took))
        })
        .collect()
}

fn sample(report: &SwapReport) -> Sample {
    let before = report.phases.iter().filter(|phase| !phase.in_blackout);
    Sample {
        host_ns: nanos(report.blackout.host),
        unqueued_ns: report
            .blackout
            .vcpus
            .iter()
            .map(|vcpu| nanos(vcpu.unqueued()))
            .collect(),
        guest_ns: report
            .blackout
            .guest_ns
            .iter()
            .map(|gap| gap.unwrap_or(0))
            .collect(),
        phases: within(report),
        brownout: before
            .map(|phase| (phase.name.clone(), nanos(phase.duration)))
            .collect(),
    }
}
