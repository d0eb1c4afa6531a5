//! Many swaps of a guest that reads its clock and arms timers all the time.

use std::time::Duration;

use anyhow::{Context, ensure};
use stillpoint_control::report::Outcome;
use stillpoint_guest_abi::pulse::Report;

use super::{DISCONTINUITY_NS, Figure, percentile, receipts, worst};
use crate::clocks::{Seen, Watched};
use crate::guest::Snapshot;
use crate::releases::Release;
use crate::swap::{CLOCK_BOUND_NS, Terms};

/// CPU time of the loop that sets kvmclock, at the 99th percentile.
const LOOP_CPU: Duration = Duration::from_micros(200);
/// How far apart host and guest may be about a pause.
const APART: Duration = Duration::from_micros(100);
/// TSC-deadline timers looked at before the first swap, and how long they may take: some seconds, but
/// on a machine that is busy with other things.
const CONTROL: u64 = 2000;
const CONTROL_PATIENCE: Duration = Duration::from_secs(180);
/// Its tries.
const TRIES: u32 = 200;

/// What many swaps showed.
#[derive(Debug)]
pub struct Swaps {
    /// What holds however busy the machine is.
    pub figures: Vec<Figure>,
    /// What depends on how busy it is, and how fast: the loop's cost, and how host and guest agree on
    /// the pause, of which a guest that waits for its cores sees more.
    pub costs: Vec<Figure>,
}

/// `count` swaps of a guest with two vCPUs and timers of both kinds, to another release and back.
/// Every tenth stands still so long that every timer is overdue. `progress` hears of each.
pub fn swaps(count: usize, mut progress: impl FnMut(usize)) -> anyhow::Result<Swaps> {
    let mut guest = Watched::up(2, "ram=4M")?;
    let control = undisturbed(&guest)?;
    let mut seen = Vec::with_capacity(count);
    for swap in 0..count {
        let to = match (swap % 10, swap % 2) {
            (9, _) => Release::Faulty("loaded=slow:5"),
            (_, 0) => Release::Compat,
            _ => Release::Current,
        };
        let swapped = guest.swap(to, &Terms::default());
        let swapped = swapped.with_context(|| {
            format!("swap {swap} of {count}, to {to:?}; {}", guest.last_words())
        })?;
        let report = &swapped.report;
        ensure!(
            report.outcome == Outcome::Moved,
            "swap {swap} of {count}: {:?}",
            report.reason
        );
        seen.push(swapped);
        progress(swap + 1);
    }
    guest.is_well()?;
    let end = guest.vm.pulse.look()?;
    let mut figures = of_clock(&seen);
    figures.extend(of_guest(&end, &control, count));
    guest.vm.power_off()?;
    Ok(Swaps {
        figures,
        costs: vec![of_loop(&seen), of_pauses(&seen)],
    })
}

/// What the guest counts before any swap: on an emulated host KVM itself fires some timers early.
fn undisturbed(guest: &Watched) -> anyhow::Result<Snapshot> {
    let armed = |s: &Snapshot| s.vcpus.iter().map(|v| v.deadline.armed).sum::<u64>();
    guest
        .vm
        .pulse
        .wait("timers before any swap", CONTROL_PATIENCE, |s| {
            armed(s) >= CONTROL
        })
}

fn of_clock(seen: &[Seen]) -> Vec<Figure> {
    let receipts = receipts(seen);
    let count = receipts.len();
    let errors: Vec<_> = receipts.iter().map(|r| r.kvmclock_error_ns).collect();
    let unseen = errors.iter().filter(|e| e.is_none()).count();
    let error = worst(errors.iter().flatten().copied());
    let sizes = errors.iter().flatten().map(|e| e.unsigned_abs()).collect();
    let median = percentile(sizes, 50);
    let close = error.unsigned_abs() <= DISCONTINUITY_NS && unseen == 0;
    let over = |bound: u64| {
        let over = |e: &&i64| e.unsigned_abs() > bound;
        errors.iter().flatten().filter(over).count()
    };
    let deltas = receipts.iter().flat_map(|r| &r.tsc_offset_delta);
    let moved = worst(deltas.copied());
    let tries = receipts.iter().map(|r| r.tries).max().unwrap_or(0);
    let master = receipts
        .iter()
        .filter(|r| r.masterclock_before && r.masterclock_after)
        .count();
    let stable = seen
        .iter()
        .filter(|s| s.stable.iter().all(|&on| on))
        .count();
    let told = seen.iter().filter(|s| s.told.iter().all(|&told| told));
    let told = told.count();
    let walls = seen.iter().filter(|s| s.wall_clock_kept).count();
    let all = |n: usize| format!("{n} of {count}");
    vec![
        Figure::new(
            &format!("kvmclock discontinuity, {count} swaps"),
            format!("each at most {DISCONTINUITY_NS} ns"),
            format!(
                "worst {error} ns, median {median} ns, {} beyond, {unseen} not seen",
                over(DISCONTINUITY_NS)
            ),
            close,
        ),
        Figure::new(
            "kvmclock discontinuity, hard bound",
            format!("none beyond {CLOCK_BOUND_NS} ns"),
            format!("{} beyond", over(CLOCK_BOUND_NS)),
            over(CLOCK_BOUND_NS) == 0 && unseen < count,
        ),
        Figure::new(
            "TSC offset, read back",
            "0 cycles",
            format!("{moved} cycles"),
            moved == 0,
        ),
        Figure::new(
            "loop in the blackout, tries",
            format!("at most {TRIES}"),
            format!("{tries}"),
            tries <= TRIES && tries > 0,
        ),
        Figure::new(
            "masterclock on before and after; pages stable",
            all(count),
            format!("{master}; {stable}"),
            master == count && stable == count,
        ),
        Figure::new(
            "every vCPU told that it stood still",
            all(count),
            all(told),
            told == count,
        ),
        Figure::new(
            "wall clock structure, 12 bytes kept",
            all(count),
            all(walls),
            walls == count,
        ),
    ]
}

fn of_guest(seen: &Snapshot, control: &Snapshot, count: usize) -> Vec<Figure> {
    let sum = |of: fn(&Report) -> u64| seen.vcpus.iter().map(of).sum::<u64>();
    let (reads, backwards) = (sum(|v| v.clock_reads), sum(|v| v.clock_backwards));
    let warps = seen.globals.warps;
    let armed = sum(|v| v.oneshot.armed + v.deadline.armed);
    let lost = sum(|v| {
        let lost = |armed: u64, fired: u64| armed.saturating_sub(fired).saturating_sub(1);
        lost(v.oneshot.armed, v.oneshot.fired) + lost(v.deadline.armed, v.deadline.fired)
    });
    let doubled = sum(|v| v.oneshot.doubled + v.deadline.doubled);
    let early = sum(|v| v.oneshot.early + v.deadline.early);
    let of_control = |of: fn(&Report) -> u64| control.vcpus.iter().map(of).sum::<u64>();
    let early_before = of_control(|v| v.oneshot.early + v.deadline.early);
    let armed_before = of_control(|v| v.oneshot.armed + v.deadline.armed);
    // As rare as before, or where there was none, none.
    let allowed = 2 * early_before * armed.div_ceil(armed_before.max(1));
    let kinds = sum(|v| v.oneshot.fired) > 0 && sum(|v| v.deadline.fired) > 0;
    vec![
        Figure::new(
            &format!("clock read by two vCPUs in turn, {count} swaps"),
            "never backwards",
            format!("{} backwards of {reads} reads", warps + backwards),
            warps + backwards == 0 && reads > 0,
        ),
        Figure::new(
            &format!("one-shot and deadline timers, {count} swaps"),
            "none lost, doubled, or early more often than before",
            format!(
                "{lost} lost, {doubled} doubled, {early} early of {armed}; before: {early_before} \
                 early of {armed_before}"
            ),
            lost + doubled == 0 && early <= allowed && kinds,
        ),
    ]
}

/// What setting the clock cost.
fn of_loop(seen: &[Seen]) -> Figure {
    let costs = receipts(seen).iter().map(|r| r.loop_cpu).collect();
    let cpu: Duration = percentile(costs, 99);
    Figure::new(
        "loop in the blackout, p99 of CPU time",
        format!("at most {LOOP_CPU:?}"),
        format!("{cpu:?}"),
        cpu <= LOOP_CPU,
    )
}

/// The pause as host and guest saw it.
fn of_pauses(seen: &[Seen]) -> Figure {
    let apart = |s: &Seen| {
        let guest = s.report.blackout.guest_worst()?;
        Some(s.report.blackout.host.abs_diff(guest))
    };
    let apart: Vec<_> = seen.iter().filter_map(apart).collect();
    let closest = apart.iter().min().copied().unwrap_or(Duration::MAX);
    let (median, measured) = (percentile(apart.clone(), 50), apart.len());
    // A guest that shares its cores sees more than the pause; it is one that did not wait which tells.
    Figure::new(
        "pause, host against guest",
        format!("the closest within {APART:?}"),
        format!("{closest:?} apart, median {median:?} ({measured} measured)"),
        closest <= APART && measured * 2 > seen.len(),
    )
}
