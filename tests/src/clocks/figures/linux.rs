//! Stock Linux guests: their wall clock, their watchdogs, and what they make of a pause that is held.
//!
//! | module | what it holds |
//! |---|---|
//! | [`readings`] | a guest's clocks on the line that its TSC draws |
//! | [`vmclock`] | vmclock and ptp_kvm |
//! | [`hosts_clock`] | a host whose clock is set and slewed meanwhile |
//! | [`pauses`] | long pauses, and time stolen |
//! | [`mod@ptp`] | a guest that corrects its clock by itself |

mod hosts_clock;
mod pauses;
mod ptp;
mod readings;
mod vmclock;

use std::cell::Cell;
use std::time::Duration;

use anyhow::{Context, ensure};
use stillpoint_agent::protocol::{Correction, Manner};
use stillpoint_control::clock::Policy;
use stillpoint_control::report::{ClockReceipt, SwapReport};

use super::{Figure, Pause, or_broken, receipt_of, worst};
use crate::daemon::Daemon;
use crate::linux::images::{Form, Kernel};
use crate::linux::{Linux, Recipe};
use crate::releases::Release;
pub use ptp::ptp;
use readings::Line;

/// What a swap may do to a guest's wall clock, ns.
const WALL_NS: i64 = 5_000;
/// How right it is after a correction by the agent, ns.
const CORRECTED_NS: i64 = 1_000_000;
/// What a clock is slewed by to see that it can be, ns, and how long that takes at the most.
const SLEWED_NS: i64 = 1_000_000;
/// How exact that is. The kernel changes its rate at a tick, so one that comes late slews on until then:
/// 500 ns too far for each millisecond. The agent sees to it that a tick comes, but an emulated host's
/// processor is taken away at times, and with it the guest's.
const SLEW_NS: i64 = 500_000;
const SLEWING: Duration = Duration::from_secs(5);
/// A release that takes its time to load.
const SLOW: Slow = Slow {
    name: "slow",
    fault: "load=slow:1500",
    least: Duration::from_millis(1500),
};
/// One that makes a long pause.
const LONG: &str = "slower";
/// And one that doesn't tell the guest of it.
const DEAF: &str = "deaf";
/// How often a swap may be called off for its budget, and what it says then.
const CALLED_OFF: usize = 3;
const OVER_BUDGET: [&str; 3] = [
    "the blackout budget",
    "loading in the successor: no answer in time",
    "the successor did not take the guest within the budget",
];

/// A release that makes a pause.
struct Slow {
    name: &'static str,
    fault: &'static str,
    least: Duration,
}

/// What is to be measured of a guest, which a host of its own may do each.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Part {
    /// Swaps, a host's clock that is set meanwhile, a pause that is held, vmclock, ptp_kvm.
    Swaps,
    /// Long pauses.
    Pauses,
    /// A guest that corrects its clock by itself.
    Ptp,
}

/// How much is to be done.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// What; all of it if `None`.
    pub part: Option<Part>,
    /// Swaps whose wall clock is judged.
    pub swaps: usize,
    /// Long pauses.
    pub pauses: usize,
    /// How long.
    pub pause: Pause,
    /// Also a pause of 30 s of which the guest is not told.
    pub with_control: bool,
    /// Pauses count as stolen from the guest.
    pub steal: bool,
    /// The host's clock may be set: it is one that was made for this.
    pub may_set_clock: bool,
}

/// A guest whose clock is watched, under a daemon of its own.
struct Stage<'d> {
    guest: Linux<'d>,
    daemon: &'d Daemon,
    kernel: &'static str,
    called_off: Cell<usize>,
}

/// Every figure that takes a Linux guest with an agent's correction, for one kernel.
pub fn linux(kernel: Kernel, plan: Plan) -> anyhow::Result<Vec<Figure>> {
    let dir = tempfile::tempdir()?;
    let daemon = Daemon::start(dir.path())?;
    let deaf = format!("{},spoil=watchdogs", Pause::LONG.fault);
    let long = plan.pause.fault;
    for (name, fault) in [(SLOW.name, SLOW.fault), (LONG, long), (DEAF, &deaf)] {
        add_faulty(&daemon, name, fault)?;
    }
    let mut recipe = Recipe::new(kernel, Form::Vmlinux, 2);
    recipe.devices.push("--vmclock".into());
    recipe.devices.extend(plan.steal.then(|| "--steal".into()));
    let guest = Linux::boot(&daemon, "deb", &recipe)?;
    let stage = Stage::new(guest, &daemon, kernel);
    let wants = |part| plan.part.is_none_or(|wanted| wanted == part);
    // One part after the other: one that fails is a broken row, and the next is measured all the same.
    let mut figures = Vec::new();
    let mut take = |what: &str, part: anyhow::Result<Vec<Figure>>| {
        figures.extend(or_broken(&stage.name(what), part));
    };
    let one = |part: anyhow::Result<Figure>| part.map(|figure| vec![figure]);
    take("boots", one(stage.boots()));
    if wants(Part::Swaps) {
        take("vmclock", stage.vmclock());
        take("wall clock over swaps", stage.swaps(plan.swaps));
        take(
            "host's clock set",
            one(stage.host_clock(plan.may_set_clock)),
        );
        take("stolen time", one(stage.stolen(plan.steal)));
        take("hold", stage.hold());
        take("ptp_kvm", one(stage.ptp_kvm()));
        take("slew", one(stage.slewed()));
    }
    if wants(Part::Pauses) {
        take("long pauses", stage.long_pauses(plan));
        if plan.with_control {
            take("a pause it is not told of", one(stage.untold()));
        }
    }
    Ok(figures)
}

fn add_faulty(daemon: &Daemon, name: &str, fault: &str) -> anyhow::Result<()> {
    let binary = Release::Faulty("").binary()?.display().to_string();
    let args = ["--as", name, "--arg", "--fault", "--arg", fault];
    daemon
        .must(&[&["release", "add", "--unsigned", &binary], &args[..]].concat())
        .map(drop)
}

impl<'d> Stage<'d> {
    fn new(guest: Linux<'d>, daemon: &'d Daemon, kernel: Kernel) -> Self {
        Self {
            guest,
            daemon,
            kernel: kernel.name(),
            called_off: Cell::new(0),
        }
    }

    fn name(&self, what: &str) -> String {
        format!("{}: {what}", self.kernel)
    }

    /// Swaps; a pause that would have overrun its budget, which is called off, is tried again: this
    /// host may be a slow one.
    fn swap(&self, to: &str, policy: Policy) -> anyhow::Result<SwapReport> {
        let (name, policy) = (self.guest.name.as_str(), policy.as_str());
        let args = ["swap", "vmm", name, "--to", to, "--clock", policy];
        let args = [
            &args[..],
            &["--budget", "30s", "--no-rehearsal", "--watch", "0s"],
        ]
        .concat();
        let mut answer = self.daemon.stillpoint(&args)?;
        for _ in 0..CALLED_OFF {
            let reason = answer.json["report"]["reason"].as_str().unwrap_or_default();
            if answer.success || !OVER_BUDGET.iter().any(|words| reason.starts_with(words)) {
                break;
            }
            eprintln!("{}: called off: {reason}", self.kernel);
            self.called_off.set(self.called_off.get() + 1);
            answer = self.daemon.stillpoint(&args)?;
        }
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
                && told > 0,
        )])
    }

    /// A pause that is held: left out of the clocks, and the wall clock corrected.
    fn hold(&self) -> anyhow::Result<Vec<Figure>> {
        let marker = self.vmclock_page()?.map(|page| page.1);
        let line = Line::of(&self.guest)?;
        let report = self.swap(SLOW.name, Policy::Hold)?;
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
                    && held >= SLOW.least
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

    /// The other way to correct a clock: it runs faster for a while.
    fn slewed(&self) -> anyhow::Result<Figure> {
        let line = Line::of(&self.guest)?;
        let corrected = self.guest.agent()?.correct(Correction {
            id: "slewed".into(),
            by_ns: SLEWED_NS,
            how: Manner::Slew,
        })?;
        // 500 ppm is a millisecond in two seconds; the kernel begins at its next second.
        std::thread::sleep(SLEWING);
        let moved = line.moved(&self.guest)?;
        let off = moved.realtime - SLEWED_NS;
        Ok(Figure::new(
            &self.name("wall clock slewed by the agent"),
            format!("by 1 ms, within {} µs", SLEW_NS / 1000),
            format!("{} ns, made before: {}", moved.realtime, corrected.again),
            off.abs() <= SLEW_NS && !corrected.again,
        ))
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
