//! Stock Linux guests: their wall clock, their watchdogs, and what they make of a pause that is held.

mod readings;

use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, ensure};
use rustix::time::{ClockId, Timespec, clock_gettime, clock_settime};
use stillpoint_control::clock::Policy;
use stillpoint_control::report::{ClockReceipt, SwapReport};

use super::{Figure, receipt_of, worst};
use crate::daemon::Daemon;
use crate::linux::images::{Form, Kernel};
use crate::linux::{Linux, Recipe};
use crate::releases::Release;
use readings::Line;

/// What a swap may do to a guest's wall clock, ns.
const WALL_NS: i64 = 5_000;
/// How right it is after a correction by the agent, ns.
const CORRECTED_NS: i64 = 1_000_000;
/// So that the guest's watchdogs look at least once after a pause (Linux: every 4 s).
const WATCHDOG_LOOK: Duration = Duration::from_secs(6);
/// What a watchdog says that was not told.
const COMPLAINTS: &[&str] = &[
    "soft lockup",
    "hard LOCKUP",
    "rcu: INFO",
    "self-detected stall",
    "hung_task",
    "blocked for more than",
    "clocksource",
    "TSC unstable",
    "workqueue lockup",
];
/// What a stock guest of two vCPUs says on a host that is busy, pauses or not: one of them was not
/// quick enough to be asked.
const LOAD: &str = "read timed out";
/// How often the host's clock is set, forth and back.
const TOGGLE: Duration = Duration::from_millis(200);

/// How much is to be done.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// Swaps whose wall clock is judged.
    pub swaps: usize,
    /// Long pauses.
    pub pauses: usize,
    /// What makes a pause long.
    pub fault: &'static str,
    /// The host's clock may be set: it is one that was made for this.
    pub may_set_clock: bool,
}

/// A guest whose clock is watched, under a daemon of its own.
struct Stage<'d> {
    guest: Linux<'d>,
    daemon: &'d Daemon,
    kernel: &'static str,
}

/// Every figure that takes a Linux guest, for one kernel.
pub fn linux(kernel: Kernel, plan: Plan) -> anyhow::Result<Vec<Figure>> {
    let dir = tempfile::tempdir()?;
    let daemon = Daemon::start(dir.path())?;
    for (name, fault) in [("slow", "load=slow:1500"), ("slower", plan.fault)] {
        add_faulty(&daemon, name, fault)?;
    }
    let mut recipe = Recipe::new(kernel, Form::Vmlinux, 2);
    recipe.devices.push("--vmclock".into());
    let guest = Linux::boot(&daemon, "deb", &recipe)?;
    let stage = Stage {
        guest,
        daemon: &daemon,
        kernel: kernel.name(),
    };
    let mut figures = stage.vmclock()?;
    figures.extend(stage.swaps(plan.swaps)?);
    figures.push(stage.host_clock(plan.may_set_clock)?);
    figures.extend(stage.hold()?);
    figures.extend(stage.long_pauses(plan.pauses)?);
    Ok(figures)
}

fn add_faulty(daemon: &Daemon, name: &str, fault: &str) -> anyhow::Result<()> {
    let binary = Release::Faulty("").binary()?.display().to_string();
    let args = ["--as", name, "--arg", "--fault", "--arg", fault];
    daemon
        .must(&[&["release", "add", &binary], &args[..]].concat())
        .map(drop)
}

impl Stage<'_> {
    fn name(&self, what: &str) -> String {
        format!("{}: {what}", self.kernel)
    }

    fn swap(&self, to: &str, policy: Policy) -> anyhow::Result<SwapReport> {
        let (name, policy) = (self.guest.name.as_str(), policy.as_str());
        let args = ["swap", "vmm", name, "--to", to, "--clock", policy];
        let answer = self
            .daemon
            .stillpoint(&[&args[..], &["--budget", "30s"]].concat())?;
        ensure!(
            answer.success,
            "the guest was not moved to {to}: {:#}\n{}",
            answer.json,
            answer.error
        );
        serde_json::from_value(answer.json["report"].clone()).context("the swap's report")
    }

    /// The release that the daemon came with.
    fn current(&self) -> anyhow::Result<String> {
        let releases = self.daemon.must(&["release", "ls"])?;
        let versions = releases.as_array().into_iter().flatten();
        let mut versions = versions.filter_map(|release| release["version"].as_str());
        let ours = versions.find(|version| version.contains('.'));
        Ok(ours.context("no release of the tree")?.to_owned())
    }

    /// Sequence and marker of the guest's vmclock; `None` where its kernel has no driver.
    fn vmclock_page(&self) -> anyhow::Result<Option<(u32, u64)>> {
        let script = "test -e /dev/vmclock0 && od -An -tu4 -j12 -N4 /dev/vmclock0 && \
                      od -An -tu8 -j16 -N8 /dev/vmclock0 || true";
        let said = self.guest.must_run("sh", &["-c", script])?;
        let mut words = said.split_ascii_whitespace();
        Ok(match (words.next(), words.next()) {
            (Some(sequence), Some(marker)) => Some((sequence.parse()?, marker.parse()?)),
            _ => None,
        })
    }

    /// vmclock over a swap, and ptp_kvm.
    fn vmclock(&self) -> anyhow::Result<Vec<Figure>> {
        let before = self.vmclock_page()?;
        self.swap(&self.current()?, Policy::Advance)?;
        let after = self.vmclock_page()?;
        let name = self.name("vmclock over a swap");
        let bound = "sequence on by two, marker the same";
        let vmclock = match (before, after) {
            (Some(before), Some(after)) => {
                let good = after == (before.0.wrapping_add(2), before.1);
                Figure::new(&name, bound, format!("{before:?}, {after:?}"), good)
            }
            _ => Figure::skipped(&name, bound, "this kernel has no driver for it"),
        };
        let script = "cat /sys/class/ptp/*/clock_name";
        let clocks = self.guest.must_run("sh", &["-c", script])?;
        let found = clocks.trim().replace('\n', ", ");
        let good = clocks.contains("KVM virtual PTP");
        let ptp = Figure::new(&self.name("ptp_kvm"), "there", found, good);
        Ok(vec![vmclock, ptp])
    }

    /// The wall clock over swaps, by the guest alone and against the host.
    fn swaps(&self, count: usize) -> anyhow::Result<Vec<Figure>> {
        let to = self.current()?;
        let (mut own, mut against, mut monotonic) = (Vec::new(), Vec::new(), Vec::new());
        for _ in 0..count {
            let line = Line::of(&self.guest)?;
            let report = self.swap(&to, Policy::Advance)?;
            let moved = line.moved(&self.guest)?;
            own.push(moved.realtime);
            monotonic.push(moved.monotonic);
            against.extend(change_of(&report)?);
        }
        let told = against.len();
        let (own, against) = (worst(own.into_iter()), worst(against.into_iter()));
        let monotonic = worst(monotonic.into_iter());
        let bound = format!("changes by at most {} µs", WALL_NS / 1000);
        Ok(vec![Figure::new(
            &self.name(&format!("wall clock over {count} swaps")),
            bound,
            format!(
                "{own} ns on its TSC, {against} ns against the host ({told} told); monotonic \
                 {monotonic} ns"
            ),
            [own, against, monotonic]
                .iter()
                .all(|ns| ns.abs() <= WALL_NS)
                && told * 2 > count,
        )])
    }

    /// The host's clock set forth and back by 10 s, and slewed by 500 ppm, all through a pause.
    fn host_clock(&self, may_set: bool) -> anyhow::Result<Figure> {
        let name = self.name("host's clock set ±10 s and slewed in a pause");
        let bound = format!("moves nothing beyond {} µs", WALL_NS / 1000);
        if !may_set {
            let why = "only on a host that was made for it: the rig";
            return Ok(Figure::skipped(&name, &bound, why));
        }
        let line = Line::of(&self.guest)?;
        let report = {
            let _disturbed = Disturbed::begin()?;
            self.swap("slow", Policy::Advance)?
        };
        let moved = line.moved(&self.guest)?;
        let receipt = receipt_of(&report)?;
        let kvmclock = receipt.kvmclock_error_ns.unwrap_or(0);
        let good = moved.realtime.abs() <= WALL_NS
            && moved.monotonic.abs() <= WALL_NS
            && kvmclock.unsigned_abs() <= super::DISCONTINUITY_NS
            && receipt.pause >= Duration::from_millis(1500);
        let measured = format!(
            "wall clock {} ns, monotonic {} ns, kvmclock {kvmclock} ns",
            moved.realtime, moved.monotonic
        );
        Ok(Figure::new(&name, bound, measured, good))
    }

    /// A pause that is held: left out of the clocks, and the wall clock corrected.
    fn hold(&self) -> anyhow::Result<Vec<Figure>> {
        let marker = self.vmclock_page()?.map(|page| page.1);
        let line = Line::of(&self.guest)?;
        let report = self.swap("slow", Policy::Hold)?;
        let moved = line.moved(&self.guest)?;
        let receipt = receipt_of(&report)?;
        let held = receipt.held;
        let steps = &receipt.steps;
        let stepped = steps.iter().all(|step| step.problem.is_none()) && steps.len() == 1;
        let change = change_of(&report)?.context("the agent told no error")?;
        let later = self.vmclock_page()?.map(|page| page.1);
        let counted = marker
            .zip(later)
            .is_none_or(|(before, after)| before != after);
        Ok(vec![
            Figure::new(
                &self.name("hold: a pause left out"),
                format!("monotonic on its TSC within {} µs", WALL_NS / 1000),
                format!(
                    "{held:.3?} left out ({:.3?} by the host's clock); monotonic {} ns off; marker \
                     {marker:?}, {later:?}",
                    moved.left_out, moved.monotonic
                ),
                moved.monotonic.abs() <= WALL_NS
                    && held >= Duration::from_millis(1500)
                    && (moved.left_out.0..=moved.left_out.1).contains(&held)
                    && counted,
            ),
            Figure::new(
                &self.name("hold: wall clock corrected by the agent"),
                "within 1 ms",
                format!("{change} ns off; {steps:?}"),
                change.abs() <= CORRECTED_NS && stepped,
            ),
        ])
    }

    /// Long pauses, and not a word of a watchdog's.
    fn long_pauses(&self, count: usize) -> anyhow::Result<Vec<Figure>> {
        let clocksource =
            || -> anyhow::Result<String> { Ok(self.guest.health()?.clocksource.current) };
        let (before, mut longest) = (clocksource()?, Duration::ZERO);
        let earlier = self.guest.dmesg()?.last().map_or(0, |line| line.seq);
        let mut changes = Vec::new();
        for _ in 0..count {
            let report = self.swap("slower", Policy::Advance)?;
            let receipt = receipt_of(&report)?;
            longest = longest.max(receipt.pause);
            changes.extend(change_of(&report)?);
            std::thread::sleep(WATCHDOG_LOOK);
        }
        let complaints = self.complaints(earlier)?;
        let after = clocksource()?;
        let told = changes.len();
        let change = worst(changes.into_iter());
        let first = complaints.first().cloned().unwrap_or_default();
        Ok(vec![
            Figure::new(
                &self.name(&format!("{count} pauses of up to {longest:.1?}")),
                "no complaint, the same clocksource",
                format!("{} complaints {first}; {before}, {after}", complaints.len()),
                complaints.is_empty() && before == after,
            ),
            Figure::new(
                &self.name("wall clock over each of them"),
                format!("changes by at most {} µs", WALL_NS / 1000),
                format!("{change} ns against the host ({told} told)"),
                change.abs() <= WALL_NS && told * 2 >= count,
            ),
        ])
    }

    /// What the guest's kernel has logged about lost time since.
    fn complaints(&self, since: u64) -> anyhow::Result<Vec<String>> {
        let lines = self.guest.dmesg()?.into_iter();
        let bad =
            |text: &str| COMPLAINTS.iter().any(|word| text.contains(word)) && !text.contains(LOAD);
        let new = lines.filter(|line| line.seq > since && bad(&line.text));
        Ok(new.map(|line| line.text).collect())
    }
}

/// How much further the guest's wall clock is from the host's than before, by its agent; `None` if
/// that did not answer in time, as happens on a host that is busy.
fn change_of(report: &SwapReport) -> anyhow::Result<Option<i64>> {
    let ClockReceipt { wall_clock, .. } = receipt_of(report)?;
    let both = wall_clock.error_after_ns.zip(wall_clock.error_before_ns);
    let both = both.filter(|_| wall_clock.of == "agent");
    Ok(both.map(|(after, before)| after - before))
}

/// A host whose clock is set forth and back, and slewed, as long as this lives.
struct Disturbed {
    over: std::sync::Arc<AtomicBool>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Disturbed {
    fn begin() -> anyhow::Result<Self> {
        slew(500)?;
        let over = std::sync::Arc::new(AtomicBool::new(false));
        let seen = std::sync::Arc::clone(&over);
        let thread = std::thread::spawn(move || {
            for step in [10, -10].into_iter().cycle() {
                let is_back = step > 0;
                if is_back && seen.load(Ordering::Relaxed) {
                    return;
                }
                set_by(step);
                std::thread::sleep(TOGGLE);
            }
        });
        Ok(Self {
            over,
            thread: Some(thread),
        })
    }
}

impl Drop for Disturbed {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
        let _ = self.thread.take().map(std::thread::JoinHandle::join);
        let _ = slew(0);
    }
}

/// Has the host's clock run fast by so many millionths.
fn slew(ppm: i64) -> anyhow::Result<()> {
    // adjtimex(2) counts in 2^-16 ppm.
    let frequency = (ppm << 16).to_string();
    let done = Command::new(Path::new("busybox"))
        .args(["adjtimex", "-f", &frequency])
        .output()
        .context("busybox adjtimex")?;
    ensure!(done.status.success(), "busybox adjtimex: {done:?}");
    Ok(())
}

fn set_by(seconds: i64) {
    let Timespec { tv_sec, tv_nsec } = clock_gettime(ClockId::Realtime);
    let tv_sec = tv_sec + seconds;
    // Refused only to those who are not root, who have no rig either.
    let _ = clock_settime(ClockId::Realtime, Timespec { tv_sec, tv_nsec });
}
