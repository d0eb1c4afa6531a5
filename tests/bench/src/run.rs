//! The order in which all is measured: ours, control and floor in turns, batch by batch.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use anyhow::Context;
use rustix::process::{Pid, Signal, kill_process};
use stillpoint_tests::vm::Vm;

use crate::brownout::Brownout;
use crate::light::Light;
use crate::many::Many;
use crate::qemu::Peer;
use crate::sample::{Sample, Series, Who};
use crate::scene::{BASE, LARGE, MANY, PAIR, SMALL, Scene, VARIED};
use crate::{Options, control, environment, floor, ours};

/// Of `--only`: more vCPUs.
pub(crate) const GROWTH: &str = "vcpus";
/// Of `--only`: what comes after swaps.
pub(crate) const AFTERWARDS: &str = "brownout";
/// Swaps of each kind after which all of a guest's RAM is written.
const BROWNOUTS: u32 = 8;
/// Swaps of each machine that differs from the smallest by one thing.
const MOST_VARIED: u32 = 20;
/// Swaps before the other side has its turn.
const BATCH: u32 = 10;
/// The same in a quick run.
const QUICK_BATCH: u32 = 5;
/// The same for the machines of two sizes.
const BIG_BATCH: u32 = 5;
/// After a stopped VMM goes on: to be itself again.
const WAKE_MS: u64 = 200;

/// All that was measured.
#[derive(Debug, Default)]
pub(crate) struct Measured {
    /// Every series, in order.
    pub(crate) series: Vec<Series>,
    /// The QEMU that was measured beside us.
    pub(crate) qemu: Option<String>,
    /// After swaps.
    pub(crate) brownout: Brownout,
    /// Many guests on a host.
    pub(crate) many: Option<Many>,
    /// What a VMM weighs.
    pub(crate) light: Light,
    /// What was left out, and why.
    pub(crate) left_out: Vec<String>,
    /// How long it all took.
    pub(crate) took: Duration,
}

impl Measured {
    /// Takes in what was measured in turns, of which so many swaps were asked for.
    fn take(&mut self, series: Vec<Series>, asked: u32) {
        if let Some(first) = series.first() {
            note_short(self, first, asked);
        }
        self.series.extend(series);
    }

    /// One of the series, if it holds anything.
    pub(crate) fn get(&self, scene: &Scene, who: Who) -> Option<&Series> {
        self.series
            .iter()
            .find(|s| s.scene.id == scene.id && s.who == who && !s.samples.is_empty())
    }
}

/// Measures everything that the options ask for.
pub(crate) fn all(options: &Options) -> anyhow::Result<Measured> {
    let began = Instant::now();
    let mut measured = Measured::default();
    let until = |share: f64| began + Duration::from_secs(options.seconds).mul_f64(share);
    let tsc_khz = environment::tsc_khz();
    let shares = match no_room(options) {
        Some(_) => [0.35, 0.65, 0.8, 1.0],
        None => [0.27, 0.5, 0.63, 0.78],
    };
    let qemu = match Peer::find() {
        Ok(qemu) => Some(qemu),
        Err(reason) => {
            measured.left_out.push(format!("QEMU: {reason}"));
            None
        }
    };
    measured.qemu = qemu.as_ref().map(Peer::version);
    if options.only.as_deref() == Some(AFTERWARDS) {
        measured.brownout = brownout(options)?;
        measured.left_out.push("everything else (--only)".into());
        measured.took = began.elapsed();
        return Ok(measured);
    }
    for (scene, share) in [BASE, PAIR].into_iter().zip(shares) {
        if options.only.as_ref().is_some_and(|only| only != scene.id) {
            continue;
        }
        let series = beside_others(scene, options, until(share), tsc_khz, qemu.as_ref())?;
        measured.take(series, options.swaps);
    }
    if options.only.as_deref() == Some(GROWTH) {
        growth(&mut measured, options, until(1.0), tsc_khz)?;
    }
    if options.only.is_some() {
        measured.left_out.push("everything else (--only)".into());
        measured.took = began.elapsed();
        return Ok(measured);
    }
    let swapped = Instant::now();
    measured.light = Light::measure(options.quick, tsc_khz, qemu.as_ref())?;
    measured.many = Some(Many::measure(options.quick).context("many guests")?);
    measured.brownout = brownout(options)?;
    // These take as long as they take: the time that was given is for swaps of one guest.
    let apart = swapped.elapsed();
    let until = |share: f64| until(share) + apart;
    let swaps = options.swaps.min(MOST_VARIED);
    let varied = possible(&mut measured.left_out);
    let series = in_turns(
        "1 vCPU, one thing changed",
        &varied,
        swaps,
        until(shares[2]),
        tsc_khz,
    )?;
    measured.take(series, swaps);
    growth(&mut measured, options, until(shares[3]), tsc_khz)?;
    match no_room(options) {
        Some(reason) => measured.left_out.push(reason),
        None => match two_sizes(options.big_swaps, until(1.0), tsc_khz)? {
            Some(series) => {
                note_short(&mut measured, &series[1], options.big_swaps);
                measured.series.extend(series);
            }
            None => measured.left_out.push(format!(
                "{}: the guest had not touched all of it in time (--seconds)",
                LARGE.title
            )),
        },
    }
    measured.took = began.elapsed();
    Ok(measured)
}

fn growth(
    measured: &mut Measured,
    options: &Options,
    until: Instant,
    tsc_khz: u64,
) -> anyhow::Result<()> {
    let series = in_turns("1 to 8 vCPUs", &MANY, options.swaps, until, tsc_khz)?;
    measured.take(series, options.swaps);
    Ok(())
}

fn brownout(options: &Options) -> anyhow::Result<Brownout> {
    let count = if options.quick { 2 } else { BROWNOUTS };
    Brownout::measure(count, options.touched_mib).context("brownouts")
}

/// A busy machine takes longer than there is time for.
fn note_short(measured: &mut Measured, series: &Series, asked: u32) {
    let done = series.samples.len() + series.unseen.len();
    if done < asked as usize {
        measured.left_out.push(format!(
            "{}: {} of {asked} swaps, for want of time (--seconds)",
            series.scene.title,
            asked as usize - done
        ));
    }
}

fn no_room(options: &Options) -> Option<String> {
    if options.big_swaps < 2 {
        return Some(format!("{}: not asked for", LARGE.title));
    }
    let lacks = environment::lacks(LARGE.memory_mib, LARGE.pages)?;
    Some(format!("{}: {lacks}", LARGE.title))
}

/// Batches of `batch` that add up to `count`.
fn batches(count: u32, batch: u32) -> impl Iterator<Item = u32> {
    (0..count.div_ceil(batch)).map(move |n| batch.min(count - n * batch))
}

/// The middle host blackout of a batch: the length of a window without a swap.
pub(crate) fn middle(samples: &[Sample]) -> u64 {
    let mut host: Vec<u64> = samples.iter().map(|sample| sample.host_ns).collect();
    host.sort_unstable();
    host.get(host.len() / 2).copied().unwrap_or(1_000_000)
}

/// Ours, nobody, ours without a rehearsal, the floor and QEMU, in turns.
fn beside_others(
    scene: Scene,
    options: &Options,
    until: Instant,
    tsc_khz: u64,
    qemu: Option<&Peer>,
) -> anyhow::Result<Vec<Series>> {
    let swaps = options.swaps;
    let batch = if options.quick { QUICK_BATCH } else { BATCH };
    let mut all = Who::ALL.map(|who| Series::new(scene, who));
    let [own, whole, bare, moved, stopped, none] = &mut all;
    let mut done = 0;
    for count in batches(swaps, batch) {
        if done > 0 && Instant::now() > until {
            break;
        }
        progress(scene.title, done, swaps);
        small_batch(own, Some((none, tsc_khz)), count)?;
        small_batch(whole, None, count)?;
        let taken = floor::swaps(&scene, count).context("a batch of the floor")?;
        bare.extend(taken);
        if let Some(qemu) = qemu {
            let mut guest = qemu.boot(&scene, tsc_khz).context("a guest in QEMU")?;
            moved.extend(qemu.transfers(&mut guest, count).context("QEMU cpr")?);
            stopped.extend(guest.stops(count).context("QEMU stop and cont")?);
            guest.is_whole()?;
        }
        done += count;
    }
    progress(scene.title, done, done);
    Ok(all.into_iter().filter(|s| !s.samples.is_empty()).collect())
}

/// Those of [`VARIED`] for which this host has what they need.
fn possible(left_out: &mut Vec<String>) -> Vec<Scene> {
    let lacks = |scene: &Scene| environment::lacks(scene.memory_mib, scene.pages);
    let mut varied = VARIED.to_vec();
    varied.retain(|scene| match lacks(scene) {
        Some(reason) => {
            left_out.push(format!("{}: {reason}", scene.title));
            false
        }
        None => true,
    });
    varied
}

/// Ours on several machines, in turns; each with windows of no swap.
fn in_turns(
    what: &str,
    scenes: &[Scene],
    swaps: u32,
    until: Instant,
    tsc_khz: u64,
) -> anyhow::Result<Vec<Series>> {
    let both = |scene: &Scene| [Who::Ours, Who::NoSwap].map(|who| Series::new(*scene, who));
    let mut all: Vec<_> = scenes.iter().map(both).collect();
    let batch = swaps.min(BATCH);
    let mut done = 0;
    for count in batches(swaps, batch) {
        if done > 0 && Instant::now() > until {
            break;
        }
        progress(what, done, swaps);
        for [own, none] in &mut all {
            small_batch(own, Some((none, tsc_khz)), count)?;
        }
        done += count;
    }
    progress(what, done, done);
    Ok(all.into_iter().flatten().collect())
}

/// A fresh guest, a batch of swaps, and the same number of windows without.
fn small_batch(
    series: &mut Series,
    control: Option<(&mut Series, u64)>,
    count: u32,
) -> anyhow::Result<()> {
    let scene = series.scene;
    let context = || format!("a batch of ours, {}", scene.title);
    let mut vm = ours::boot(&scene).with_context(context)?;
    let rehearsed = series.who == Who::Ours;
    let samples = ours::swaps(&mut vm, count, rehearsed).with_context(context)?;
    if let Some((none, tsc_khz)) = control {
        let window = middle(&samples);
        none.extend(control::windows(&vm, count, window, tsc_khz).with_context(context)?);
    }
    series.extend(samples);
    series.faults.extend(ours::faults(&vm)?);
    vm.power_off().with_context(context)
}

/// Ours with little and with much RAM, in turns. The large guest is booted and touches its RAM
/// once, and is stopped while it isn't its turn: it would take a core from the other.
fn two_sizes(swaps: u32, until: Instant, tsc_khz: u64) -> anyhow::Result<Option<[Series; 3]>> {
    let mut small = Series::new(SMALL, Who::Ours);
    let mut large = Series::new(LARGE, Who::Ours);
    let mut none = Series::new(LARGE, Who::NoSwap);
    progress("touching 8 GiB", 0_u32, 1_u32);
    let booted = ours::boot_until(&LARGE, until).context("the guest with 8 GiB")?;
    let Some(mut vm) = booted else {
        return Ok(None);
    };
    let mut done = 0;
    for count in batches(swaps, BIG_BATCH) {
        if done > 0 && Instant::now() > until {
            break;
        }
        progress(LARGE.title, done, swaps);
        signal(&vm, Signal::STOP)?;
        small_batch(&mut small, None, count)?;
        signal(&vm, Signal::CONT)?;
        ours::pause(WAKE_MS);
        let samples =
            ours::swaps(&mut vm, count, true).context("a batch of the guest with 8 GiB")?;
        none.extend(control::windows(&vm, count, middle(&samples), tsc_khz)?);
        large.extend(samples);
        done += count;
    }
    progress(LARGE.title, done, done);
    large.faults = ours::faults(&vm)?;
    vm.power_off()?;
    Ok(Some([small, large, none]))
}

/// Stops or continues our own child.
fn signal(vm: &Vm, signal: Signal) -> anyhow::Result<()> {
    let pid = i32::try_from(vm.pid()).ok().and_then(Pid::from_raw);
    kill_process(pid.context("the VMM's pid")?, signal).context("stop or continue the VMM")
}

/// Says how far it is, to a person who watches.
pub(crate) fn progress(what: &str, done: impl Into<u64>, of: impl Into<u64>) {
    let (done, of) = (done.into(), of.into());
    if std::io::stderr().is_terminal() {
        let end = if done == of { "\n" } else { "" };
        eprint!("\r\x1b[K  {what}: {done}/{of}{end}");
    } else if done == 0 || done == of {
        eprintln!("  {what}: {done}/{of}");
    }
}
