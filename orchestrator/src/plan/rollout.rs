//! What is next in a rollout over a fleet: a function of the rollout and of what is seen.
//!
//! ```text
//!   Rollout (policy, layout, state) ─┐         ┌─ verdicts: what has ended, and how
//!   Fleet   (who stands where)      ─┼─ plan ─▶├─ begin:    the next steps, each with its reason
//!   Seen    (health, progress, now) ─┘         ├─ whys:     for every other unit, why not now
//!                                              ├─ becomes:  what the rollout is from now on
//!                                              └─ look again at the latest then
//! ```
//!
//! Whoever drives a rollout looks, plans, records what was planned, does it, and looks again. There is
//! nothing else to keep: a driver that takes over in the middle plans the same. The rules, and
//! why they are these, are in RFD 0009; in short:
//!
//! 1. One update domain of an availability set at a time. One that was touched and isn't well
//!    again keeps the others of its set from beginning, whatever the policy.
//! 2. Whoever is away counts against the budget, whatever made it so. A step that takes nobody away,
//!    because its guest is away already, needs none: that is how a broken guest is brought back.
//! 3. What is not known to be well is not touched; what was touched and isn't well in time has failed.
//! 4. Too many failures stop the rollout, and in the same plan: nothing begins beside the verdict.
//! 5. The way back touches what was touched and nothing else, under rules 1 and 2.
//! 6. Every unit that isn't begun has a reason, and each reason says what has to happen first.
//!
//! Must never: read a clock, a file or a random number; depend on the order of anything but the
//! layout; say nothing about a unit.

pub mod evidence;
pub mod fleet;
pub mod layout;
pub mod seen;

mod choose;
mod judge;
mod state;
mod tally;
mod why;

#[cfg(test)]
mod tests;

use std::time::Duration;

use fleet::{Column, Fleet, Ix, Vm};
use layout::{Layout, Unit};
use seen::{Breach, Phase, Seen};

use crate::model::{Moment, Policy};

pub use state::State;
pub use why::{Cause, Why};

/// A rollout: what is to be swapped, and how.
#[derive(Clone, Debug)]
pub struct Rollout {
    /// What it is as a whole.
    pub state: State,
    /// How it goes about it.
    pub policy: Policy,
    /// What it swaps, by which rung, and in which order.
    pub layout: Layout,
    /// How many failures a hand has forgiven, by resuming it after a stop.
    pub forgiven: u32,
}

/// In which direction a unit is swapped.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, serde::Serialize, serde::Deserialize,
)]
#[serde(rename_all = "snake_case")]
pub enum Way {
    /// To the release that is rolled out.
    Forward,
    /// To what it ran on before.
    Back,
}

/// A step to begin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Begin {
    /// What to swap.
    pub unit: Ix<Unit>,
    /// In which direction.
    pub way: Way,
    /// Why this one, now.
    pub because: Because,
    /// How long before its pause each of its guests hears of it, where the rollout says so.
    pub notice: Option<Duration>,
}

/// Why a step is begun.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Because {
    /// It is of an early stage, and is to show whether the release is good.
    Canary,
    /// Its turn has come, and nothing stands in the way.
    Turn,
    /// It failed, and is put back.
    Repair,
    /// All that was touched is put back.
    RollBack,
}

impl std::fmt::Display for Because {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(match self {
            Self::Canary => "it is a canary, and nothing stands in the way",
            Self::Turn => "its turn has come, and nothing stands in the way",
            Self::Repair => "it failed, and is put back on what it ran on before",
            Self::RollBack => "the rollout failed, and all that it touched is put back",
        })
    }
}

/// What has ended, and how. To be recorded as it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// The unit.
    pub unit: Ix<Unit>,
    /// How far it is from now on.
    pub phase: Phase,
    /// What was seen.
    pub saw: Saw,
}

/// What a verdict rests on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Saw {
    /// All was well for long enough.
    Well,
    /// It was under way for longer than a step may take.
    TooLong,
    /// That guest wasn't well in time.
    NotWell(Ix<Vm>),
    /// The host wasn't well in time.
    HostDown,
    /// All was well again and again, and never for long enough.
    Flapping,
    /// A gate failed until it was too late.
    Gate,
    /// Its report was beyond a limit.
    Breach(Breach),
    /// It was kept, again and again.
    KeptTooOften,
    /// That guest was well, and fell ill while its stage was watched.
    FellIll(Ix<Vm>),
    /// The rollout was stopped while it was watched.
    Recalled,
}

/// Why a rollout becomes something else.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Turn {
    /// More swaps failed than may.
    Failures {
        /// Those that failed.
        failed: u32,
        /// Those that may, so far.
        allowed: u32,
    },
    /// Nothing is left to be done.
    NothingLeft,
}

/// What is next.
#[derive(Clone, Debug, Default)]
pub struct Plan {
    /// What has ended, and how.
    pub verdicts: Vec<Verdict>,
    /// What to begin.
    pub begin: Vec<Begin>,
    /// What the rollout is from now on, when that is something else, and why.
    pub becomes: Option<(State, Turn)>,
    /// For each unit, why it isn't begun.
    pub whys: Column<Unit, Why>,
    /// When time alone may change the answer.
    pub look_again: Option<Moment>,
}

/// What is next in `rollout`.
///
/// `seen` has a row for every host, VM and unit, as `fleet` and the layout have; it says nothing
/// of swaps of this rollout's own under `busy`.
pub fn plan(rollout: &Rollout, fleet: &Fleet, seen: &Seen) -> Plan {
    let mut plan = Plan::default();
    if rollout.state.is_over() {
        plan.whys = vec![Why::Held(rollout.state); rollout.layout.units.len()].into();
        return plan;
    }
    let tally = judge::judge(rollout, fleet, seen, &mut plan);
    plan.becomes = tally.stop(rollout);
    choose::choose(rollout, fleet, seen, tally, &mut plan);
    plan
}

impl Plan {
    /// How many units wait for which cause; those begun, under way or over aren't counted.
    pub fn waits(&self) -> Waits {
        let mut waits = Waits::default();
        for why in &self.whys {
            match why.cause() {
                Cause::None => {}
                Cause::Own => waits.own += 1,
                Cause::Time(_) => waits.time += 1,
                Cause::Outside => waits.outside += 1,
                Cause::Hand => waits.hand += 1,
            }
        }
        waits
    }

    /// In one sentence, why a VM isn't being updated now.
    pub fn explain(&self, rollout: &Rollout, fleet: &Fleet, seen: &Seen, vm: Ix<Vm>) -> String {
        let Some(ix) = rollout.layout.unit_of[vm] else {
            return format!("VM {} is not part of the rollout", fleet.vms[vm].name);
        };
        self.whys[ix].sentence(fleet, &rollout.layout.units[ix], seen.now)
    }
}

/// How many units wait for what.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Waits {
    /// For other units of the rollout.
    pub own: u32,
    /// For a time to come.
    pub time: u32,
    /// For something outside.
    pub outside: u32,
    /// For a hand.
    pub hand: u32,
}
