//! What must be true of every plan, counted the slow and obvious way.

use std::collections::{BTreeSet, HashSet};

use proptest::prelude::*;
use proptest::test_runner::TestCaseError;

use super::super::fleet::{Host, Ix, Set, Vm};
use super::super::layout::Unit;
use super::super::seen::{Gate, Health, Phase, Seen};
use super::super::{Plan, State, Waits, Way, Why};
use super::world::World;
use crate::model::{Moment, Opening, Rung, opening};

type Verdict = Result<(), TestCaseError>;

/// A plan, and the world as it is after it.
struct After<'a> {
    world: &'a World,
    plan: &'a Plan,
    begun: HashSet<Ix<Unit>>,
    members: Vec<Vec<Ix<Vm>>>,
    under_way: HashSet<Ix<Vm>>,
}

impl After<'_> {
    fn seen(&self) -> &Seen {
        &self.world.seen
    }

    /// How far a unit is after the verdicts, and before anything is begun.
    fn judged(&self, ix: Ix<Unit>) -> Phase {
        let verdict = self.plan.verdicts.iter().find(|verdict| verdict.unit == ix);
        verdict.map_or(self.seen().units[ix].phase, |verdict| verdict.phase)
    }

    fn since(&self, ix: Ix<Unit>) -> Moment {
        let judged = self.plan.verdicts.iter().any(|verdict| verdict.unit == ix);
        if judged {
            self.seen().now
        } else {
            self.seen().units[ix].since
        }
    }

    fn in_flight(&self, ix: Ix<Unit>) -> bool {
        self.judged(ix).is_in_flight() || self.begun.contains(&ix)
    }

    fn unit(&self, ix: Ix<Unit>) -> &Unit {
        &self.world.rollout.layout.units[ix]
    }

    fn units(&self) -> impl Iterator<Item = Ix<Unit>> + use<> {
        (0..self.world.rollout.layout.units.len()).map(Ix::from)
    }

    fn members(&self, ix: Ix<Unit>) -> &[Ix<Vm>] {
        &self.members[usize::from(ix)]
    }

    /// The latest stage of which anything was begun, ever.
    fn reached(&self) -> u8 {
        let begun = self.world.ever_begun();
        begun.map(|ix| self.unit(ix).stage).max().unwrap_or(0)
    }

    fn away_by_itself(&self, vm: Ix<Vm>) -> bool {
        let guest = self.seen().vms[vm];
        let host = self.world.fleet.vms[vm].host;
        guest.health != Health::Well || guest.busy || !self.seen().hosts[host].up
    }

    fn away(&self, vm: Ix<Vm>) -> bool {
        self.away_by_itself(vm) || self.under_way.contains(&vm)
    }

    fn domain_in(&self, vm: Ix<Vm>, set: Ix<Set>) -> Option<u8> {
        let seat = self.world.fleet.vms[vm].seat?;
        (seat.set == set).then(|| seat.domain.number())
    }

    fn forward(&self) -> impl Iterator<Item = Ix<Unit>> {
        let begin = self.plan.begin.iter();
        begin.filter(|b| b.way == Way::Forward).map(|b| b.unit)
    }
}

fn members(world: &World, unit: &Unit) -> Vec<Ix<Vm>> {
    let vms = world.fleet.vms.iter_enumerated();
    let mine = vms.filter(|(vm, row)| match unit.vm {
        Some(one) => one == *vm,
        None => row.host == unit.host,
    });
    mine.map(|(vm, _)| vm).collect()
}

/// Checks a plan that is to be carried out.
pub(super) fn check(world: &World, plan: &Plan) -> Verdict {
    let mut after = After {
        world,
        plan,
        begun: plan.begin.iter().map(|begin| begin.unit).collect(),
        members: world
            .rollout
            .layout
            .units
            .iter()
            .map(|unit| members(world, unit))
            .collect(),
        under_way: HashSet::new(),
    };
    let under_way = after.units().filter(|&ix| after.in_flight(ix));
    after.under_way = under_way
        .flat_map(|ix| after.members(ix).to_vec())
        .collect();
    prop_assert_eq!(after.begun.len(), plan.begin.len(), "begun twice");
    only_what_can_be_begun(&after)?;
    one_domain_at_a_time(&after)?;
    budgets(&after)?;
    limits(&after)?;
    stages(&after)?;
    only_what_is_well(&after)?;
    gates_and_windows(&after)?;
    verdicts(&after)?;
    stops(&after)?;
    says_why(&after)?;
    ends_as_it_says(&after)
}

fn only_what_can_be_begun(after: &After<'_>) -> Verdict {
    let world = after.world;
    for begin in &after.plan.begin {
        let phase = world.seen.units[begin.unit].phase;
        let rolling_back = world.rollout.state == State::RollingBack;
        match begin.way {
            Way::Forward => {
                prop_assert_eq!(phase, Phase::Waiting);
                prop_assert_eq!(world.rollout.state, State::Running);
                let tries = world.times_begun(begin.unit);
                prop_assert!(
                    tries < world.rollout.policy.tries.into(),
                    "tried {} times",
                    tries
                );
                let rung = after.unit(begin.unit).rung;
                prop_assert!(matches!(rung, Rung::Vmm | Rung::Kvm | Rung::Kernel));
            }
            Way::Back => {
                prop_assert!(
                    world.times_begun(begin.unit) > 0,
                    "never touched, and put back"
                );
                let failed = matches!(phase, Phase::Spoilt | Phase::BackWaiting);
                prop_assert!(
                    failed || (rolling_back && phase == Phase::Done),
                    "{phase:?}"
                );
                prop_assert!(rolling_back || world.rollout.policy.roll_back);
            }
        }
    }
    Ok(())
}

fn one_domain_at_a_time(after: &After<'_>) -> Verdict {
    for set in after.world.fleet.sets.keys() {
        let domains = |wanted: &dyn Fn(Ix<Unit>) -> bool| -> BTreeSet<u8> {
            let units = after.units().filter(|&ix| wanted(ix));
            let members = units.flat_map(|ix| after.members(ix));
            members.filter_map(|&vm| after.domain_in(vm, set)).collect()
        };
        let under_way = domains(&|ix| after.in_flight(ix));
        prop_assert!(
            under_way.len() <= 1,
            "{set:?} has domains {under_way:?} under way"
        );
        // What this rollout touched, and isn't well again, or is still to be put back.
        let forward = domains(&|ix| after.forward().any(|begun| begun == ix));
        let mut open = BTreeSet::new();
        for ix in after.units() {
            let phase = after.judged(ix);
            let touched = phase.is_touched() && !after.begun.contains(&ix);
            let put_back = matches!(phase, Phase::Spoilt | Phase::BackWaiting)
                && after.world.rollout.policy.roll_back;
            let members = after.members(ix).iter();
            let hurt = members.filter(|&&vm| touched && (put_back || after.away_by_itself(vm)));
            open.extend(hurt.filter_map(|&vm| after.domain_in(vm, set)));
        }
        prop_assert!(
            forward.is_empty() || open.is_subset(&forward),
            "{set:?}: domains {open:?} aren't well, and {forward:?} is begun"
        );
    }
    Ok(())
}

fn budgets(after: &After<'_>) -> Verdict {
    let world = after.world;
    let policy = &world.rollout.policy;
    let taken: Vec<Ix<Vm>> = after
        .begun
        .iter()
        .flat_map(|&ix| after.members(ix))
        .copied()
        .filter(|&vm| !after.away_by_itself(vm))
        .collect();
    for (set, row) in world.fleet.sets.iter_enumerated() {
        let in_set = |vm: &Ix<Vm>| after.domain_in(*vm, set).is_some();
        if taken.iter().any(in_set) {
            let away = world
                .fleet
                .vms
                .keys()
                .filter(in_set)
                .filter(|&vm| after.away(vm));
            let allowed = policy.set_budget.at_most(row.members).max(1) as usize;
            let away = away.count();
            prop_assert!(
                away <= allowed,
                "{away} of {set:?} are away, {allowed} may be"
            );
        }
    }
    if let Some(budget) = policy.fleet_budget
        && !taken.is_empty()
    {
        let total = u32::try_from(world.fleet.vms.len()).expect("few");
        let away = world.fleet.vms.keys().filter(|&vm| after.away(vm)).count();
        prop_assert!(
            away <= budget.at_most(total).max(1) as usize,
            "{away} are away"
        );
    }
    Ok(())
}

fn limits(after: &After<'_>) -> Verdict {
    let at_once = after.world.rollout.policy.at_once;
    let fleet = &after.world.fleet;
    let host = |ix| after.unit(ix).host;
    let rack = |host: Ix<Host>| fleet.hosts[host].rack;
    let count = |near: &dyn Fn(Ix<Host>) -> bool| {
        after
            .units()
            .filter(|&ix| after.in_flight(ix) && near(host(ix)))
            .count()
    };
    for &ix in &after.begun {
        let here = host(ix);
        prop_assert!(count(&|_| true) <= at_once.total as usize);
        prop_assert!(count(&|at| at == here) <= at_once.per_host as usize);
        if let Some(most) = at_once.per_rack {
            prop_assert!(count(&|at| rack(at) == rack(here)) <= most as usize);
        }
        if let Some(most) = at_once.per_zone {
            let zone = fleet.zone_of(here);
            prop_assert!(count(&|at| fleet.zone_of(at) == zone) <= most as usize);
        }
    }
    Ok(())
}

fn stages(after: &After<'_>) -> Verdict {
    let reached = after.reached();
    for ix in after.forward() {
        for stage in reached..after.unit(ix).stage {
            let all: Vec<_> = after
                .units()
                .filter(|&ix| after.unit(ix).stage == stage)
                .collect();
            if !all.is_empty() {
                a_stage_is_through(after, stage, &all)?;
            }
        }
    }
    Ok(())
}

fn a_stage_is_through(after: &After<'_>, stage: u8, all: &[Ix<Unit>]) -> Verdict {
    let settled: Vec<_> = all
        .iter()
        .filter(|&&ix| after.judged(ix) != Phase::Waiting)
        .collect();
    let wanted = all.iter().filter(|&&ix| {
        let whys = &after.plan.whys;
        !whys[ix].is_left_out()
    });
    prop_assert!(!settled.is_empty() && settled.len() * 2 >= wanted.count());
    let bake = after.world.rollout.policy.stages[usize::from(stage)].bake;
    for &&ix in &settled {
        prop_assert!(
            !after.in_flight(ix),
            "{ix:?} of an earlier stage is under way"
        );
        prop_assert!(after.since(ix).after(bake) <= after.seen().now, "not baked");
        let ill = |vm: &Ix<Vm>| after.seen().vms[*vm].health == Health::Ill;
        let done = after.judged(ix) == Phase::Done;
        prop_assert!(!done || !after.members(ix).iter().any(ill), "an ill canary");
    }
    for &ix in all.iter().filter(|ix| !settled.contains(ix)) {
        prop_assert!(is_out_of_reach(after, ix), "{ix:?} could still be tried");
    }
    Ok(())
}

fn is_out_of_reach(after: &After<'_>, ix: Ix<Unit>) -> bool {
    let unit = after.unit(ix);
    let host = after.seen().hosts[unit.host];
    let members = after.members(ix);
    let guest = |vm: &Ix<Vm>| after.seen().vms[*vm];
    let stands_out = |vm: &Ix<Vm>| {
        let off = unit.vm.is_some() && guest(vm).health == Health::Off;
        guest(vm).excluded || guest(vm).busy || guest(vm).health == Health::Ill || off
    };
    let never = matches!(after.plan.whys[ix], Why::TwoDomains(_) | Why::NeverFits(_));
    let host_is_out = host.cordoned || !host.up || host.clock_off || !host.releases.has(unit.rung);
    host_is_out || never || members.iter().any(stands_out)
}

fn only_what_is_well(after: &After<'_>) -> Verdict {
    let policy = &after.world.rollout.policy;
    for begin in &after.plan.begin {
        let host = after.seen().hosts[after.unit(begin.unit).host];
        prop_assert!(host.up && !host.cordoned);
        prop_assert!(begin.way == Way::Back || !host.clock_off);
        for &vm in after.members(begin.unit) {
            let guest = after.seen().vms[vm];
            prop_assert!(!guest.busy);
            if begin.way == Way::Forward {
                prop_assert!(!guest.excluded && guest.health != Health::Ill);
                let well = guest.health == Health::Well;
                prop_assert!(well || after.unit(begin.unit).vm.is_none());
                let for_long_enough = guest.since.after(policy.well_for) <= after.seen().now;
                prop_assert!(!well || for_long_enough);
            }
        }
        if begin.way == Way::Forward {
            prop_assert!(host.releases.has(after.unit(begin.unit).rung));
            prop_assert!(host.since.after(policy.well_for) <= after.seen().now);
        }
    }
    Ok(())
}

fn gates_and_windows(after: &After<'_>) -> Verdict {
    if after.forward().next().is_none() {
        return Ok(());
    }
    prop_assert!(after.seen().gates.iter().all(|&gate| gate == Gate::Pass));
    let policy = &after.world.rollout.policy;
    match opening(&policy.windows, after.seen().now) {
        Opening::OpenUntil(closes) => {
            prop_assert!(after.seen().now.after(policy.deadline) <= closes);
        }
        Opening::ClosedUntil(_) => prop_assert!(false, "begun outside of all windows"),
    }
    Ok(())
}

fn verdicts(after: &After<'_>) -> Verdict {
    let policy = &after.world.rollout.policy;
    let now = after.seen().now;
    for verdict in &after.plan.verdicts {
        let before = after.seen().units[verdict.unit];
        if matches!(verdict.phase, Phase::Done | Phase::Back) {
            prop_assert!(before.since.after(policy.well_for) <= now, "too early");
            for &vm in after.members(verdict.unit) {
                let guest = after.seen().vms[vm];
                prop_assert!(guest.health != Health::Ill, "ill, and done");
                let well = guest.health == Health::Well;
                prop_assert!(!well || guest.since.after(policy.well_for) <= now);
            }
        }
        if verdict.phase == Phase::Done {
            prop_assert_eq!(before.phase, Phase::Watched);
            prop_assert!(after.seen().gates.iter().all(|&gate| gate == Gate::Pass));
            let breach = after
                .seen()
                .breaches
                .iter()
                .any(|&(ix, _)| ix == verdict.unit);
            prop_assert!(!breach, "beyond a limit, and done");
        }
    }
    // And none is missing: nothing is under way for ever.
    for ix in after.units().filter(|&ix| after.judged(ix).is_in_flight()) {
        let too_late = after.seen().units[ix].since.after(policy.deadline);
        let mute = after.seen().gates.contains(&Gate::Mute);
        let watched = after.judged(ix) == Phase::Watched;
        prop_assert!(now < too_late || (watched && mute), "{ix:?} is overdue");
    }
    Ok(())
}

fn stops(after: &After<'_>) -> Verdict {
    let world = after.world;
    if world.rollout.state != State::Running {
        return Ok(());
    }
    let failed = after
        .units()
        .filter(|&ix| after.judged(ix).is_failure())
        .count();
    let tried: Vec<_> = after
        .units()
        .filter(|&ix| after.judged(ix) != Phase::Waiting)
        .collect();
    let early = after.reached() + 1 < world.rollout.layout.stages;
    let count = u32::try_from(tried.len()).expect("few");
    let allowed = if early {
        0
    } else {
        world.rollout.policy.failures.at_most(count)
    };
    let has_to = failed > (world.rollout.forgiven + allowed) as usize;
    let stops = matches!(
        after.plan.becomes,
        Some((State::Stopped | State::RollingBack, _))
    );
    prop_assert_eq!(stops, has_to, "{} failed, {} may", failed, allowed);
    prop_assert!(
        !stops || after.plan.begin.is_empty(),
        "begun beside the verdict"
    );
    Ok(())
}

fn says_why(after: &After<'_>) -> Verdict {
    prop_assert_eq!(after.plan.whys.len(), after.world.seen.units.len());
    for ix in after.units() {
        let why = after.plan.whys[ix];
        prop_assert_eq!(why == Why::Begun, after.begun.contains(&ix));
        if after.judged(ix) == Phase::Waiting {
            prop_assert_ne!(why, Why::Phase(Phase::Waiting), "no reason");
        }
        let sentence = why.sentence(&after.world.fleet, after.unit(ix), after.seen().now);
        prop_assert!(sentence.contains(' ') && !sentence.contains('\n'));
    }
    Ok(())
}

/// It never waits for itself, and is over only when it is.
fn ends_as_it_says(after: &After<'_>) -> Verdict {
    let world = after.world;
    let under_way = after.units().any(|ix| after.in_flight(ix));
    let is_still = !under_way && after.plan.verdicts.is_empty() && after.plan.becomes.is_none();
    if is_still && !world.rollout.state.is_over() {
        let waits = after.plan.waits();
        // To wait for an earlier stage or domain is to wait for what that waits for.
        let others = waits.time + waits.outside + waits.hand;
        prop_assert!(
            waits.own == 0 || others > 0,
            "waits for itself: {:?}",
            after.plan.whys
        );
        let full = |why: &Why| {
            matches!(
                why,
                Why::Full | Why::HostFull(_) | Why::RackFull(_) | Why::ZoneFull(_)
            )
        };
        prop_assert!(!after.plan.whys.iter().any(full), "full of nothing");
        let is_held = matches!(world.rollout.state, State::Paused | State::Stopped);
        prop_assert!(is_held || waits != Waits::default(), "waits for nothing");
        prop_assert!(waits.time == 0 || after.plan.look_again.is_some());
    }
    let Some((state, _)) = after.plan.becomes else {
        return Ok(());
    };
    prop_assert!(!state.is_over() || !under_way);
    for ix in after.units() {
        let phase = after.judged(ix);
        let guest = after.members(ix).iter().map(|&vm| after.seen().vms[vm]);
        let left_out = guest.clone().any(|g| g.excluded || g.health == Health::Off);
        match state {
            State::Finished => prop_assert!(phase != Phase::Waiting || left_out),
            State::RolledBack => prop_assert!(!phase.is_touched() && !world.runs_new(ix)),
            State::Stuck => prop_assert!(!phase.is_touched() || phase == Phase::Stuck),
            _ => {}
        }
    }
    Ok(())
}

/// After the storm: over, or held, or waiting for what only others can change.
pub(super) fn ended_or_waits(world: &World) -> Verdict {
    if world.rollout.state.is_over() {
        return Ok(());
    }
    let plan = world.turn();
    let waits = plan.waits();
    let under_way = world
        .seen
        .units
        .iter()
        .any(|unit| unit.phase.is_in_flight());
    let is_held = matches!(world.rollout.state, State::Stopped);
    let later = waits.time > 0 && plan.look_again.is_some_and(|at| at > world.seen.now);
    prop_assert!(
        is_held || under_way || !plan.begin.is_empty() || waits.hand + waits.outside > 0 || later,
        "{:?}: neither over nor waiting for anybody: {:?}",
        world.rollout.state,
        plan.whys
    );
    Ok(())
}
