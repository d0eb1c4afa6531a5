//! Budgets: swaps whose successor is slow, by a millisecond more each time, around the most that its
//! budget allows. Each ends in the successor, within the budget, or in the predecessor.
//!
//! All times are the VMMs' own, from the report.

use std::fmt;
use std::ops::RangeInclusive;
use std::time::Duration;

use anyhow::{Context, ensure};
use stillpoint_control::ownership::Owner;
use stillpoint_control::report::{Margin, Outcome, SwapReport};

use crate::releases::Release;
use crate::swap::Terms;
use crate::vm::{Recipe, Vm};

/// How late a predecessor may let its guest go on after the budget has ended: what the machine's scheduler
/// makes of a process that waits for a deadline, on any machine that these tests run on.
pub const SLACK: Duration = Duration::from_secs(2);

/// Where the successor is slow: three points before the word is taken, two after.
pub const POINTS: [Point; 5] = [
    Point::new("load", true),
    Point::new("loaded", true),
    Point::new("take", true),
    Point::new("taken", false),
    Point::new("entered", false),
];

/// A point at which a successor is slow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Point {
    name: &'static str,
    /// The word is not taken there: the guest may still stay.
    may_stay: bool,
}

impl Point {
    const fn new(name: &'static str, may_stay: bool) -> Self {
        Self { name, may_stay }
    }
}

/// One swap, and how it ended.
#[derive(Clone, Debug)]
pub struct Step {
    point: Point,
    slow: Duration,
    budget: Duration,
    outcome: Outcome,
    blackout: Duration,
    margin: Option<Margin>,
    overran: bool,
}

impl Step {
    /// By how much the budget was over when the guest went on where it was.
    pub fn overdue(&self) -> Duration {
        match self.outcome {
            Outcome::Kept => self.blackout.saturating_sub(self.budget),
            _ => Duration::ZERO,
        }
    }

    /// Whether it moved.
    pub fn has_moved(&self) -> bool {
        self.outcome == Outcome::Moved
    }
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ms = |time: Duration| format!("{:.2}", time.as_secs_f64() * 1e3);
        let margin =
            |of: fn(&Margin) -> Duration| self.margin.as_ref().map(of).map_or("–".into(), ms);
        write!(
            f,
            "{:<8} {:>9} {:>9} {:>9} {:>9} {:>9}  {}{}",
            self.point.name,
            ms(self.slow),
            ms(self.budget),
            margin(|margin| margin.used),
            margin(|margin| margin.reserve),
            ms(self.blackout),
            self.outcome,
            if self.overran { ", overran" } else { "" }
        )
    }
}

/// A guest that is swapped, and what that takes where nothing is slow.
#[derive(Debug)]
pub struct Ground {
    vm: Vm,
    usual: Duration,
}

impl Ground {
    /// Boots it, and takes the middle one of three blackouts that nothing makes slow.
    pub fn prepare() -> anyhow::Result<Self> {
        let mut vm = Vm::up(&Recipe::pulse(2, "ram=8M duty=50"))?;
        let mut blackouts = Vec::new();
        for _ in 0..3 {
            blackouts.push(vm.must_move(Release::Current)?.blackout.host);
        }
        blackouts.sort();
        let usual = *blackouts.get(1).context("three blackouts")?;
        Ok(Self { vm, usual })
    }

    /// The guest, and the usual blackout.
    pub fn into_parts(self) -> (Vm, Duration) {
        (self.vm, self.usual)
    }

    /// Swaps the guest as often as there are steps, the successor slow at this point by so many
    /// milliseconds more or less than what the budget leaves. `heard` is told of each. What breaks a
    /// promise is an error.
    pub fn sweep(
        &mut self,
        point: Point,
        steps: RangeInclusive<i64>,
        mut heard: impl FnMut(&Step),
    ) -> anyhow::Result<()> {
        // A machine that is slow today gets a budget in which there is room for what is measured.
        let budget = Duration::from_millis(60) + 2 * self.usual;
        // Of loading as much again is kept for what follows.
        let share = if point.name == "load" { 2 } else { 1 };
        let limit = i64::try_from((budget - self.usual).as_millis())? / share;
        for step in steps {
            let slow = Duration::from_millis(u64::try_from(limit + step).unwrap_or(0));
            heard(&swap(&mut self.vm, point, slow, budget)?);
        }
        // Slower than all of the budget: it can't be given up, on whatever machine.
        if ["load", "loaded"].contains(&point.name) {
            let slow = budget + Duration::from_millis(1);
            let step = swap(&mut self.vm, point, slow, budget)?;
            heard(&step);
            ensure!(!step.has_moved(), "moved all the same: {step}");
        }
        Ok(())
    }

    /// Ends it in order.
    pub fn end(self) -> anyhow::Result<()> {
        self.vm.power_off()
    }
}

fn swap(vm: &mut Vm, point: Point, slow: Duration, budget: Duration) -> anyhow::Result<Step> {
    // A release is named for the life of the tests.
    let fault = format!("{}=slow:{}", point.name, slow.as_millis()).leak();
    let (pid, epoch) = (vm.pid(), vm.owner()?.epoch());
    let report = vm.swap(Release::Faulty(fault), &Terms::budget(budget))?;
    let step = Step {
        point,
        slow,
        budget,
        outcome: report.outcome,
        blackout: report.blackout.host,
        margin: report.margin,
        overran: report.warnings.iter().any(|w| w.contains("overran")),
    };
    judge(&step, &report).with_context(|| format!("{step}: {report:#?}"))?;
    let owner = match step.has_moved() {
        true => Owner::Taken(epoch.next()),
        false => Owner::Held(vm.owner()?.epoch()),
    };
    ensure!(
        vm.owner()? == owner,
        "{step}: the word says {:?}",
        vm.owner()?
    );
    ensure!(
        (vm.pid() == pid) != step.has_moved(),
        "{step}: another process has it"
    );
    vm.is_well().with_context(|| step.to_string())?;
    Ok(step)
}

/// What holds of each, on any machine.
fn judge(step: &Step, report: &SwapReport) -> anyhow::Result<()> {
    let reason = report.reason.as_deref().unwrap_or_default();
    match step.outcome {
        Outcome::Moved => {
            let margin = step
                .margin
                .context("given up without a look at the budget")?;
            ensure!(
                margin.is_within(step.budget),
                "given up in spite of {margin:?}"
            );
            ensure!(
                step.overran == (step.blackout > step.budget),
                "an overrun is reported, and nothing else"
            );
        }
        Outcome::Kept => {
            ensure!(step.point.may_stay, "it was taken, and stayed");
            ensure!(step.blackout <= step.budget + SLACK, "frozen for too long");
            ensure!(!reason.is_empty(), "it stayed for no reason");
            let waited = !reason.contains("taken back") || step.blackout >= step.budget;
            ensure!(
                waited,
                "taken back before its time, or not all of the time is told"
            );
            let refused = reason.contains("would have been broken");
            let within = step.margin.map(|margin| margin.is_within(step.budget));
            ensure!(
                within.is_none_or(|within| within != refused),
                "refused for a budget that was not broken"
            );
        }
        other => anyhow::bail!("it ended as {other}"),
    }
    Ok(())
}
