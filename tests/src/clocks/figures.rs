//! Promises about clocks, measured: each with its bound beside it.

use std::time::Duration;

use anyhow::ensure;
use serde::Serialize;
use stillpoint_control::clock::{ClockSpec, Correction, Policy};
use stillpoint_control::report::{ClockReceipt, Outcome};

use super::page::Page;
use super::{Seen, Watched};
use crate::console::Console;
use crate::guest::Snapshot;
use crate::patience::{PATIENCE, wait_for};
use crate::releases::Release;
use crate::swap::{CLOCK_BOUND_NS, Terms};
use crate::vm::{Recipe, Vm};

/// The bound of kvmclock's discontinuity in each swap, ns.
const DISCONTINUITY_NS: u64 = 12;
/// CPU time of the loop that sets it, at the 99th percentile.
const LOOP_CPU: Duration = Duration::from_micros(200);
/// Its tries.
const TRIES: u32 = 200;
/// Rounding of one page against another of one clock, ns.
const ROUNDING_NS: u64 = 2;
/// How far a periodic timer's phase may move in a swap.
const PHASE: Duration = Duration::from_micros(100);
/// pulse's periodic timer.
const PERIOD_US: u64 = 2000;
/// Ticks looked at for a phase.
const TICKS: usize = 20;

/// Whether a bound was kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// It was.
    Kept,
    /// It was not.
    Broken,
    /// It could not be measured here; the note says why.
    Skipped,
}

/// A promise, measured.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Figure {
    /// What was measured, on what.
    pub name: String,
    /// What it must be.
    pub bound: String,
    /// What it was.
    pub measured: String,
    /// Whether that is good.
    pub verdict: Verdict,
}

impl Figure {
    fn new(name: &str, bound: impl Into<String>, measured: impl Into<String>, good: bool) -> Self {
        Self {
            name: name.to_owned(),
            bound: bound.into(),
            measured: measured.into(),
            verdict: match good {
                true => Verdict::Kept,
                false => Verdict::Broken,
            },
        }
    }

    /// One that can't be measured here.
    pub fn skipped(name: &str, bound: &str, why: &str) -> Self {
        Self {
            name: name.to_owned(),
            bound: bound.to_owned(),
            measured: why.to_owned(),
            verdict: Verdict::Skipped,
        }
    }
}

/// Insists that no bound is broken.
pub fn must_keep(figures: &[Figure]) -> anyhow::Result<()> {
    let broken = |figure: &&Figure| figure.verdict == Verdict::Broken;
    let broken: Vec<_> = figures.iter().filter(broken).collect();
    ensure!(broken.is_empty(), "{broken:#?}");
    Ok(())
}

fn receipts(seen: &[Seen]) -> Vec<&ClockReceipt> {
    seen.iter()
        .filter_map(|s| s.report.clock.as_ref())
        .collect()
}

fn worst(errors: impl Iterator<Item = i64>) -> i64 {
    errors.max_by_key(|e| e.unsigned_abs()).unwrap_or(0)
}

fn percentile<T: Ord + Copy + Default>(mut values: Vec<T>, percent: usize) -> T {
    values.sort_unstable();
    let at = (values.len() * percent).div_ceil(100).saturating_sub(1);
    values.get(at).copied().unwrap_or_default()
}

/// `count` swaps of a guest with two vCPUs and timers of both kinds, to another release and back.
/// Every tenth stands still so long that every timer is overdue. `progress` hears of each.
pub fn swaps(count: usize, mut progress: impl FnMut(usize)) -> anyhow::Result<Vec<Figure>> {
    let mut guest = Watched::up(2, "ram=4M")?;
    let mut seen = Vec::with_capacity(count);
    for swap in 0..count {
        let to = match (swap % 10, swap % 2) {
            (9, _) => Release::Faulty("loaded=slow:5"),
            (_, 0) => Release::Compat,
            _ => Release::Current,
        };
        let swapped = guest.swap(to, &Terms::default())?;
        let report = &swapped.report;
        ensure!(
            report.outcome == Outcome::Moved,
            "swap {swap} of {count}: {:?}",
            report.reason
        );
        seen.push(swapped);
        progress(swap + 1);
    }
    guest.vm.is_well()?;
    let mut figures = of_clock(&seen);
    figures.extend(of_guest(&guest.vm.pulse.look()?, count));
    figures.push(of_pauses(&seen));
    guest.vm.power_off()?;
    Ok(figures)
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
    let cpu = percentile(receipts.iter().map(|r| r.loop_cpu).collect(), 99);
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
            "loop in the blackout, p99 of CPU time",
            format!("at most {LOOP_CPU:?}"),
            format!("{cpu:?}"),
            cpu <= LOOP_CPU,
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

fn of_guest(seen: &Snapshot, count: usize) -> Vec<Figure> {
    let sum = |of: fn(&stillpoint_guest_abi::pulse::Report) -> u64| -> u64 {
        seen.vcpus.iter().map(of).sum()
    };
    let (reads, backwards) = (sum(|v| v.clock_reads), sum(|v| v.clock_backwards));
    let warps = seen.globals.warps;
    let armed = sum(|v| v.oneshot.armed + v.deadline.armed);
    let lost = sum(|v| {
        let lost = |armed: u64, fired: u64| armed.saturating_sub(fired).saturating_sub(1);
        lost(v.oneshot.armed, v.oneshot.fired) + lost(v.deadline.armed, v.deadline.fired)
    });
    let doubled = sum(|v| v.oneshot.doubled + v.deadline.doubled);
    let early = sum(|v| v.oneshot.early + v.deadline.early);
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
            "none lost, doubled or early",
            format!("{lost} lost, {doubled} doubled, {early} early of {armed}"),
            lost + doubled + early == 0 && kinds,
        ),
    ]
}

/// The pause as host and guest saw it.
fn of_pauses(seen: &[Seen]) -> Figure {
    let apart = |s: &Seen| {
        let guest = s.report.blackout.guest_worst()?;
        Some(s.report.blackout.host.abs_diff(guest))
    };
    let apart: Vec<_> = seen.iter().filter_map(apart).collect();
    let (median, measured) = (percentile(apart.clone(), 50), apart.len());
    // A guest that shares its cores sees more than the pause; most see nothing else.
    Figure::new(
        "pause, host against guest, median",
        "within 100 µs",
        format!("{median:?} apart ({measured} measured)"),
        median <= Duration::from_micros(100) && measured * 2 > seen.len(),
    )
}

/// The phase of a periodic timer over `count` swaps.
pub fn periodic(count: usize) -> anyhow::Result<Vec<Figure>> {
    let mut guest = Watched::up(1, "timers=periodic ram=4M")?;
    let period = guest.page(0)?.cycles(PERIOD_US);
    // Phases lie around the middle of a period then, and never at its edge.
    let base = guest.last_tick(0)?.wrapping_sub(period / 2);
    let phase = |guest: &Watched| -> anyhow::Result<i64> {
        let mut least = u64::MAX;
        let mut last = 0;
        for _ in 0..TICKS {
            last = wait_for("a periodic tick", PATIENCE, || {
                Ok(Some(guest.last_tick(0)?).filter(|&tick| tick != last))
            })?;
            // Ticks are late by what the vCPU waited for its core, never early.
            least = least.min(last.wrapping_sub(base) % period);
        }
        Ok(least.cast_signed())
    };
    let per_us = guest.page(0)?.cycles(1).cast_signed();
    let mut shifts = Vec::new();
    let mut quiet = Vec::new();
    for swap in 0..count {
        let control = phase(&guest)?;
        let before = phase(&guest)?;
        quiet.push((before - control) / per_us);
        let to = [Release::Compat, Release::Current][swap % 2];
        let seen = guest.swap(to, &Terms::default())?;
        ensure!(
            seen.report.outcome == Outcome::Moved,
            "{:?}",
            seen.report.reason
        );
        shifts.push((phase(&guest)? - before) / per_us);
    }
    guest.vm.is_well()?;
    guest.vm.power_off()?;
    let (shift, noise) = (worst(shifts.into_iter()), worst(quiet.into_iter()));
    let bound = i64::try_from(PHASE.as_micros())? + noise.abs();
    Ok(vec![Figure::new(
        &format!("periodic timer's phase, {count} swaps"),
        format!("moves at most {PHASE:?} and what it does without a swap"),
        format!("worst {shift} µs; without a swap {noise} µs"),
        shift.abs() <= bound,
    )])
}

/// A vCPU that idles and one that is not started, woken `wait` after a swap to `to`: the step that
/// makes in vCPU 0's clock, ns, and how far theirs are from it then.
fn wake_late(to: Release, wait: Duration) -> anyhow::Result<(i64, i64)> {
    let mut guest = Watched {
        vm: Vm::boot(&Recipe::pulse(3, "online=2 mode1=idle ram=4M"))?,
    };
    guest.vm.pulse.wait_online(2)?;
    let swapped = guest.swap(to, &Terms::default())?;
    let report = &swapped.report;
    ensure!(report.outcome == Outcome::Moved, "{:?}", report.reason);
    let before = guest.page(0)?;
    std::thread::sleep(wait);
    let mut console = Console::open(&guest.vm)?;
    console.ask("mode 1 spin", "mode 1 spin")?;
    console.ask("start 2", "started 2")?;
    guest.vm.pulse.wait_progress(&[0, 1, 2], 20)?;
    let now: Vec<Page> = (0..3)
        .map(|v| guest.page(v))
        .collect::<anyhow::Result<_>>()?;
    let step = now[0].error_to(&before);
    let apart = worst(now.iter().map(|page| page.error_to(&now[0])));
    guest.vm.power_off()?;
    Ok((step, apart))
}

/// Latecomers step no clock, and without our measure they do.
pub fn latecomers(wait: Duration) -> anyhow::Result<Vec<Figure>> {
    let (step, apart) = wake_late(Release::Current, wait)?;
    let (control, _) = wake_late(Release::Faulty("spoil=latecomers"), wait)?;
    let within = |ns: i64| ns.unsigned_abs() <= ROUNDING_NS;
    Ok(vec![
        Figure::new(
            &format!("vCPUs halted and offline for {wait:?} after a swap"),
            format!("step the clock by at most {ROUNDING_NS} ns"),
            format!("{step} ns; apart {apart} ns"),
            within(step) && within(apart),
        ),
        Figure::new(
            "control: the same without the early masterclock",
            "caught",
            format!("{control} ns"),
            !within(control),
        ),
    ])
}

/// Swaps to builds that leave out one measure each: the checks must see it.
pub fn controls() -> anyhow::Result<Vec<Figure>> {
    let spoilt = |how| -> anyhow::Result<Seen> {
        let mut guest = Watched::up(2, "ram=4M")?;
        let seen = guest.swap(Release::Faulty(how), &Terms::default())?;
        ensure!(
            seen.report.outcome == Outcome::Moved,
            "{:?}",
            seen.report.reason
        );
        Ok(seen)
    };
    let error = |seen: &Seen| {
        let clock = seen.report.clock.as_ref();
        clock.and_then(|c| c.kvmclock_error_ns).unwrap_or(0)
    };
    let warned = |seen: &Seen, word: &str| seen.report.warnings.iter().any(|w| w.contains(word));
    let mut figures = Vec::new();
    for (name, how) in [
        ("control: kvmclock set once", "spoil=loop"),
        ("control: kvmclock set 1 µs off", "spoil=clock"),
    ] {
        let seen = spoilt(how)?;
        let (error, warned) = (error(&seen), warned(&seen, "kvmclock is off"));
        let caught = error.unsigned_abs() > CLOCK_BOUND_NS && warned;
        figures.push(Figure::new(name, "caught", format!("{error} ns"), caught));
    }
    let seen = spoilt("spoil=watchdogs")?;
    let silent = seen.told.iter().all(|&told| !told);
    let text = format!("vCPUs told: {:?}", seen.told);
    figures.push(Figure::new(
        "control: no KVMCLOCK_CTRL",
        "caught",
        text,
        silent,
    ));
    let seen = spoilt("spoil=offset")?;
    let clock = seen.report.clock.as_ref();
    let deltas = clock
        .map(|c| c.tsc_offset_delta.clone())
        .unwrap_or_default();
    let name = "control: TSC offset 1000 cycles off";
    figures.push(match deltas.iter().all(|&delta| delta == 0) {
        // It says yes and stays where it is: nothing was skewed.
        true => Figure::skipped(name, "caught", "this KVM ignores TSC offsets"),
        false => {
            let caught = warned(&seen, "TSC");
            Figure::new(name, "caught", format!("{deltas:?} cycles"), caught)
        }
    });
    Ok(figures)
}

/// A pause of about as long as `fault` says, within a budget of 30 s.
pub fn long_pause(fault: &'static str, least: Duration) -> anyhow::Result<Vec<Figure>> {
    let mut guest = Watched::up(2, "ram=4M")?;
    let terms = Terms::budget(stillpoint_control::spec::MAX_BUDGET);
    let before = guest.page(0)?;
    let seen = guest.swap(Release::Faulty(fault), &terms)?;
    ensure!(
        seen.report.outcome == Outcome::Moved,
        "{:?}",
        seen.report.reason
    );
    let continued = guest.page(0)?.error_to(&before);
    guest.vm.is_well()?;
    guest.vm.power_off()?;
    let pause = receipts(&[seen])
        .first()
        .map_or(Duration::ZERO, |clock| clock.pause);
    Ok(vec![Figure::new(
        &format!("a pause of {pause:.1?}"),
        format!("clock within {DISCONTINUITY_NS} ns, timers once"),
        format!("{continued} ns"),
        continued.unsigned_abs() <= DISCONTINUITY_NS && pause >= least,
    )])
}

/// Policy *hold*: on a host that can't move a guest's TSC it is refused, and says so; on others
/// the guest's clocks leave out the pause.
pub fn hold() -> anyhow::Result<Vec<Figure>> {
    let recipe = Recipe::pulse(2, "ram=4M");
    let clock = ClockSpec {
        correction: Some(Correction::Ptp),
        ..ClockSpec::default()
    };
    let mut guest = Watched {
        vm: Vm::up(&Recipe { clock, ..recipe })?,
    };
    let terms = Terms {
        clock: Some(Policy::Hold),
        ..Terms::default()
    };
    let before = guest.page(0)?;
    let seen = guest.swap(Release::Faulty("loaded=slow:500"), &terms)?;
    let after = guest.page(0)?;
    guest.vm.is_well()?;
    guest.vm.power_off()?;
    let report = &seen.report;
    if report.outcome == Outcome::Kept {
        let why = report.reason.clone().unwrap_or_default();
        let clear = why.contains("hold") && why.contains("ignores TSC offsets");
        return Ok(vec![
            Figure::new("hold where TSC offsets are ignored", "refused", why, clear),
            Figure::skipped(
                "hold: the pause left out",
                "kvmclock exact, pause unseen",
                "this KVM ignores TSC offsets",
            ),
        ]);
    }
    let receipt = report.clock.clone().unwrap_or_default();
    let gap = report.blackout.guest_worst().unwrap_or_default();
    let error = after.error_to(&before);
    let most = Duration::from_millis(5) + receipt.pause.saturating_sub(receipt.held);
    let good = receipt.policy == Policy::Hold
        && receipt.held >= Duration::from_millis(500)
        && gap <= most
        && error.unsigned_abs() <= DISCONTINUITY_NS;
    let held = receipt.held;
    let measured = format!("{held:?} left out, the guest saw {gap:?}; kvmclock {error} ns");
    let bound = format!("seen at most {most:?}; kvmclock within {DISCONTINUITY_NS} ns");
    Ok(vec![Figure::new(
        "hold: the pause left out",
        bound,
        measured,
        good,
    )])
}
