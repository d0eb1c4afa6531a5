//! What a swap did to the guest, measured after it: the blackout as host and guest saw it, and
//! the error of its clock.
//!
//! Runs beside the guest, when nothing is urgent any more.

use std::ops::Range;
use std::path::Path;
use std::time::{Duration, Instant};

use stillpoint_control::clock::Policy;
use stillpoint_control::report::{
    Blackout, ClockReceipt, Outcome, Outside, Phase, ReleaseName, Side, SwapReport,
    WallClock as WallClockReceipt,
};
use stillpoint_state::sections::Clock;
use vm_memory::GuestAddress;

use super::correct;
use crate::clock;
use crate::clock::page::Page;
use crate::clock::wall::WallClock;
use crate::devices::probe;
use crate::machine::Machine;
use crate::machine::build::Loaded;
use crate::vcpu::Entered;
use crate::vcpu::outside::Left;

/// How long a guest may take to log the gap it saw, and KVM to write the clock pages.
const PATIENCE: Duration = Duration::from_millis(300);
/// How often they are looked at meanwhile.
const GLANCE: Duration = Duration::from_millis(2);
/// The clock's hard bound, ns; beyond it the report warns.
const CLOCK_BOUND_NS: u64 = 50;
/// Of a pause of this length a guest's watchdogs may complain if nobody told them (Linux: 20 s for
/// a soft lockup, kernel/watchdog.c; 21 s for an RCU stall).
const WATCHDOGS: Duration = Duration::from_secs(20);

/// What was seen while the guest stood still.
#[derive(Clone, Debug)]
pub struct Evidence {
    /// Host TSC at the kick; 0 if the predecessor died before it could say.
    pub kicked_tsc: u64,
    /// How each vCPU came to rest; empty if nobody told.
    pub left: Vec<Left>,
    /// How the vCPUs were let in.
    pub entered: Entered,
    /// What loading showed.
    pub loaded: Loaded,
    /// Each vCPU's clock page of before.
    pub pages: Vec<Option<Page>>,
    /// The wall clock structure of before.
    pub wall: Option<WallClock>,
    /// Phases before the freeze.
    pub brownout: Vec<(&'static str, Duration)>,
    /// Phases within the blackout.
    pub blackout: Vec<(&'static str, Duration)>,
}

impl Evidence {
    /// How long ago the guest was let in.
    pub fn since_entry(&self, machine: &Machine) -> Duration {
        let cycles = clock::host_tsc().saturating_sub(self.entered.tsc);
        clock::duration(cycles, machine.tsc_khz())
    }
}

/// Which swap it was.
#[derive(Clone, Copy, Debug)]
pub struct Swap<'a> {
    /// Its id.
    pub id: &'a str,
    /// The successor's release.
    pub us: &'a ReleaseName,
    /// The guest's directory.
    pub dir: &'a Path,
}

/// Makes the report. `told` is the predecessor's part, if it came.
pub fn report(
    evidence: &Evidence,
    machine: &Machine,
    told: Option<SwapReport>,
    swap: Swap<'_>,
) -> SwapReport {
    let Swap { id, us, dir } = swap;
    let mut report = told.unwrap_or_else(|| unheard(machine, id));
    report.to = us.clone();
    report.outcome = Outcome::Moved;
    report.phases = phases(evidence, std::mem::take(&mut report.phases));
    let khz = machine.tsc_khz();
    if evidence.kicked_tsc != 0 {
        let cycles = evidence.entered.tsc.saturating_sub(evidence.kicked_tsc);
        report.blackout.host = clock::duration(cycles, khz);
    }
    let before = evidence.loaded.tsc_offset_before().unwrap_or(0);
    let window = (evidence.kicked_tsc != 0).then(|| {
        let offset = machine.tsc_offset().unwrap_or(0);
        evidence.kicked_tsc.wrapping_add_signed(before)
            ..evidence.entered.tsc.wrapping_add_signed(offset)
    });
    report.blackout.guest_ns = guest_gaps(machine, window);
    report.blackout.vcpus = outside(evidence, khz);
    let before = report.clock.take().unwrap_or_default().wall_clock;
    let mut receipt = receipt(evidence, machine);
    // First: until it is done, the guest's wall clock is late.
    let pause = correct::Pause {
        id,
        policy: receipt.policy,
        held: receipt.held,
        error_before_ns: before.error_before_ns,
    };
    let after = correct::after(machine, dir, pause);
    receipt.steps = after.steps;
    receipt.wall_clock = match after.error_ns {
        Some(error) => WallClockReceipt {
            of: "agent".into(),
            error_before_ns: before.error_before_ns,
            error_after_ns: Some(error),
        },
        None => by_kvmclock(evidence, machine),
    };
    report.clock = Some(receipt);
    report.warnings = warnings(&report);
    report
}

/// A report for a swap whose predecessor died before it could tell its part.
fn unheard(machine: &Machine, swap: &str) -> SwapReport {
    SwapReport {
        swap: swap.to_owned(),
        vm: machine.spec().name.clone(),
        component: "vmm".into(),
        from: ReleaseName::default(),
        to: ReleaseName::default(),
        outcome: Outcome::Moved,
        reason: Some("the predecessor died after its state was sealed".into()),
        started_at_unix_ns: 0,
        vcpus: u32::try_from(machine.vcpu_count()).unwrap_or(u32::MAX),
        memory_bytes: machine.ram().size(),
        state_format: 0,
        state_bytes: 0,
        budget: machine.spec().blackout_budget,
        margin: None,
        phases: Vec::new(),
        blackout: Blackout::default(),
        clock: None,
        recovery: Vec::new(),
        warnings: Vec::new(),
    }
}

/// Both sides' phases in the order in which they happened.
fn phases(evidence: &Evidence, told: Vec<Phase>) -> Vec<Phase> {
    let own = |marks: &[(&'static str, Duration)], in_blackout| -> Vec<Phase> {
        let phase = |(name, duration): &(&'static str, Duration)| Phase {
            name: (*name).to_owned(),
            side: Side::Successor,
            in_blackout,
            duration: *duration,
        };
        marks.iter().map(phase).collect()
    };
    let mut all = own(&evidence.brownout, false);
    // The predecessor saw our load as one wait; ours is the finer account of it.
    let frozen = told
        .into_iter()
        .filter(|p| p.in_blackout && p.side == Side::Predecessor);
    all.extend(frozen);
    all.extend(own(&evidence.blackout, true));
    all
}

/// What each vCPU was out of the guest, in both processes.
fn outside(evidence: &Evidence, khz: u32) -> Vec<Outside> {
    let pairs = evidence.left.iter().zip(&evidence.entered.vcpus);
    let outside = pairs.map(|(left, entry)| Outside {
        out: clock::duration(entry.tsc.saturating_sub(left.tsc), khz),
        queued: left.queued + entry.queued,
    });
    outside.collect()
}

/// The gap that each vCPU saw which overlaps `window`, in the guest's TSC.
pub(crate) fn guest_gaps(machine: &Machine, window: Option<Range<u64>>) -> Vec<Option<u64>> {
    let count = machine.vcpu_count();
    let (Some(table), Some(window)) = (machine.probe().table(), window) else {
        return vec![None; count];
    };
    let khz = machine.tsc_khz();
    let gap = |vcpu: u8| {
        let cycles = probe::gap_over(machine.ram().map(), table, vcpu, window.clone())?;
        u64::try_from(clock::duration(cycles, khz).as_nanos()).ok()
    };
    let deadline = Instant::now() + PATIENCE;
    loop {
        let gaps: Vec<_> = (0..count)
            .map(|vcpu| u8::try_from(vcpu).ok().and_then(gap))
            .collect();
        if gaps.iter().all(Option::is_some) || Instant::now() > deadline {
            return gaps;
        }
        std::thread::sleep(GLANCE);
    }
}

fn receipt(evidence: &Evidence, machine: &Machine) -> ClockReceipt {
    let loaded = &evidence.loaded;
    let deltas: Vec<_> = loaded
        .vcpus
        .iter()
        .map(|vcpu| vcpu.tsc_offset_delta)
        .collect();
    let before = clock::is_master(loaded.saved_clock.flags);
    let ignored = deltas.iter().flatten().any(|&delta| delta != 0);
    let fallback = if ignored {
        Some("this KVM ignores TSC offsets; the guest's TSC is the host's")
    } else if deltas.iter().any(Option::is_none) {
        Some("this kernel has no TSC offset attribute (before 5.16)")
    } else if !loaded.clock.master {
        Some("no masterclock: kvmclock was set once, right to microseconds")
    } else {
        None
    };
    let khz = machine.tsc_khz();
    let pause = evidence.entered.tsc.saturating_sub(loaded.pause.from_tsc);
    ClockReceipt {
        policy: match loaded.saved_clock.hold {
            true => Policy::Hold,
            false => Policy::Advance,
        },
        pause: clock::duration(pause, khz),
        held: clock::duration(loaded.pause.held, khz),
        tsc_offset_delta: deltas
            .iter()
            .copied()
            .collect::<Option<_>>()
            .unwrap_or_default(),
        kvmclock_error_ns: page_error(evidence, machine),
        loop_error_ns: loaded.clock.error_ns,
        tries: loaded.clock.tries,
        loop_time: loaded.clock.took,
        loop_cpu: loaded.clock.cpu,
        masterclock_before: before,
        masterclock_after: loaded.clock.master,
        told_of_pause: evidence.entered.told(),
        wall_clock: WallClockReceipt::default(),
        steps: Vec::new(),
        fallback: fallback.map(str::to_owned),
    }
}

/// The wall clock that KVM keeps for the guest, against the host's: at one TSC each, KVM's own.
fn by_kvmclock(evidence: &Evidence, machine: &Machine) -> WallClockReceipt {
    let error = |wall: Option<WallClock>, clock: &Clock| {
        let guest = wall?.epoch_ns()?.checked_add(clock.clock)?;
        (clock.realtime != 0).then(|| guest.wrapping_sub(clock.realtime).cast_signed())
    };
    let loaded = &evidence.loaded;
    let Some(before) = error(evidence.wall, &loaded.saved_clock) else {
        return WallClockReceipt::default();
    };
    let at = GuestAddress(loaded.wall_clock());
    let now = machine.clock().ok();
    let wall = WallClock::read(machine.ram().map(), at);
    WallClockReceipt {
        of: "kvmclock".into(),
        error_before_ns: Some(before),
        error_after_ns: now.and_then(|now| error(wall, &now)),
    }
}

/// The worst error of any vCPU's clock page against the page of before, at one guest TSC.
fn page_error(evidence: &Evidence, machine: &Machine) -> Option<i64> {
    let offset = machine.tsc_offset().unwrap_or(0);
    let memory = machine.ram().map();
    let deadline = Instant::now() + PATIENCE;
    let mut worst: Option<i64> = None;
    for (before, msr) in evidence.pages.iter().zip(evidence.loaded.system_time()) {
        let Some(before) = before else { continue };
        // KVM writes the page at the vCPU's first entry; one that stays halted, and has no timer
        // to wake it, makes none until something else does.
        let after = loop {
            match Page::read(memory, GuestAddress(msr & !1)) {
                Some(page) if page.version != before.version => break Some(page),
                _ if Instant::now() > deadline => break None,
                _ => std::thread::sleep(GLANCE),
            }
        };
        if let Some(after) = after {
            let now = clock::host_tsc().wrapping_add_signed(offset);
            let error = after.error_to(before, now);
            worst = Some(worst.filter(|w| w.abs() >= error.abs()).unwrap_or(error));
        }
    }
    worst
}

/// What an operator should read of it.
pub(crate) fn warnings(report: &SwapReport) -> Vec<String> {
    let mut warnings = Vec::new();
    let Blackout { host, .. } = report.blackout;
    if host > report.budget {
        let budget = report.budget;
        warnings.push(format!(
            "the blackout of {host:?} overran its budget of {budget:?}"
        ));
    }
    if let Some(clock) = &report.clock {
        if let Some(error) = clock
            .kvmclock_error_ns
            .filter(|e| e.unsigned_abs() > CLOCK_BOUND_NS)
        {
            warnings.push(format!(
                "kvmclock is off by {error} ns, bound {CLOCK_BOUND_NS} ns"
            ));
        }
        if clock.masterclock_before && !clock.masterclock_after {
            warnings.push("the masterclock was on before the swap and is off now".into());
        }
        warnings.extend(clock.fallback.clone());
        let pause = clock.pause.saturating_sub(clock.held);
        if pause > WATCHDOGS && clock.told_of_pause.contains(&false) {
            warnings.push(format!(
                "the guest has no kvmclock by which to tell its watchdogs of a pause of {pause:?}: \
                 they may complain of lockups that are none"
            ));
        }
        let problems = clock.steps.iter().filter_map(|step| step.problem.clone());
        warnings.extend(problems);
    }
    warnings
}
