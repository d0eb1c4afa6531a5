//! One step of one rollout, from a look: what is heard, what the planner says, what is to be written.
//! Pure.

use crate::fleet::driver::gates::PENDING;
use crate::fleet::look::{Look, Versioned};
use crate::fleet::record::{Answer, Far, HistoryStep, Order, RolloutRecord, UnitRecord};
use crate::fleet::{ANSWERS, ORDERS, keys, written};
use crate::model::{GateSaid, HostName, Moment, SwapId, SwapRecord};
use crate::plan::rollout::evidence::Worst;
use crate::plan::rollout::fleet::{Fleet, Ix, Vm};
use crate::plan::rollout::seen::{Breach, Phase};
use crate::plan::rollout::{Begin, Plan, Saw, State, Turn, Verdict, Way, plan};
use crate::store::shared::{Change, Expect};

/// The most swaps that are begun in one commit: etcd takes 128 changes.
const MOST: usize = 50;

/// What is to be written, and what was decided.
#[derive(Clone, Debug, Default)]
pub struct Step {
    /// To be committed as a whole; nothing if nothing changed.
    pub changes: Vec<Change>,
    /// What the rollout is with that, if anything changed.
    pub record: Option<RolloutRecord>,
    /// What was done and why, for people.
    pub lines: Vec<String>,
    /// Whether any unit got on: what gates said before says nothing of that.
    pub moved: bool,
    /// When time alone may change the answer.
    pub look_again: Option<Moment>,
}

/// The next step of a rollout; `None` if it is over.
pub fn step(
    look: &Look,
    rollout: &Versioned<RolloutRecord>,
    now: Moment,
    me: &HostName,
    epoch: u64,
    gates: &[GateSaid],
) -> Option<Step> {
    let mut record = rollout.record.clone();
    if record.state.is_over() {
        return None;
    }
    let mut lines = hear(look, &mut record, now);
    let heard = !lines.is_empty();
    let tables = look.tables(Some(&record));
    let asked = tables.rollout(&record);
    let mut seen = look.seen(&tables, &record, now);
    seen.gates = gates.iter().map(|said| said.verdict).collect();
    note_gates(&mut record, gates, &mut lines);
    let mut planned = plan(&asked, &tables.fleet, &seen);
    planned.begin.truncate(MOST);
    let ordered = apply(&tables.fleet, &mut record, &planned, now, &mut lines);
    let mut step = Step {
        changes: Vec::new(),
        record: None,
        moved: heard || !ordered.is_empty() || !planned.verdicts.is_empty(),
        look_again: planned.look_again,
        lines,
    };
    orders(look, &record, &ordered, epoch, &mut step.changes);
    if record == rollout.record && step.changes.is_empty() {
        return Some(step);
    }
    if !step.lines.is_empty() {
        record.steps += 1;
        let history = HistoryStep {
            at: now,
            by: format!("the driver on {me}"),
            lines: step.lines.clone(),
        };
        let key = keys::step(&record.id, record.steps);
        step.changes
            .push(Change::put(key, Expect::Absent, written(&history)));
    }
    let (key, seen) = (keys::rollout(&record.id), Expect::Version(rollout.version));
    step.changes.push(Change::put(key, seen, written(&record)));
    step.record = Some(record);
    Some(step)
}

/// Takes note of what hosts have answered.
pub(in crate::fleet) fn hear(look: &Look, record: &mut RolloutRecord, now: Moment) -> Vec<String> {
    let mut lines = Vec::new();
    for at in 0..record.units.len() {
        let Some(answer) = look.answer(record, at) else {
            continue;
        };
        let unit = &mut record.units[at];
        note(unit, answer);
        let is_back = unit.phase == Phase::BackBegun;
        if !is_back && unit.phase != Phase::Begun {
            continue;
        }
        let reason = answer.reason.as_deref().unwrap_or("no reason is known");
        let name = said(unit);
        let phase = match answer.far {
            Far::UnderWay => continue,
            Far::Refused | Far::Kept | Far::Failed if is_back => Phase::BackWaiting,
            Far::Refused | Far::Kept => Phase::Waiting,
            Far::There | Far::Settled | Far::Lost if is_back => Phase::BackWatched,
            Far::There | Far::Settled | Far::Lost | Far::Failed => Phase::Watched,
        };
        lines.push(match answer.far {
            Far::Refused => format!("{name} could not be begun: {reason}"),
            Far::Kept => format!("{name} was kept: {reason}"),
            Far::Lost => format!("{name} was lost: {reason}"),
            Far::Failed => format!("the swap of {name} failed: {reason}"),
            _ if is_back => format!("{name} is back on {}", unit.from),
            _ => format!("{name} runs on {}, and is watched", record.to),
        });
        unit.phase = phase;
        unit.since = now;
    }
    lines
}

/// Takes note of what gates say, if it is news.
fn note_gates(record: &mut RolloutRecord, gates: &[GateSaid], lines: &mut Vec<String>) {
    for (at, said) in gates.iter().enumerate() {
        let is_same = |last: &GateSaid| last.verdict == said.verdict && last.why == said.why;
        if said.why == PENDING || record.gates.get(at).is_some_and(is_same) {
            continue;
        }
        lines.push(said.words());
        match record.gates.get_mut(at) {
            Some(last) => *last = said.clone(),
            None => {
                // Those before it that are asked still have no word of their own yet.
                let missing = record.gates.len()..at;
                record.gates.extend(missing.map(|at| gates[at].clone()));
                record.gates.push(said.clone());
            }
        }
    }
}

fn note(unit: &mut UnitRecord, answer: &Answer) {
    unit.note.clone_from(&answer.reason);
    let of_one = || answer.swap.as_ref().map(|swap| Worst::of([swap]));
    let measured = answer.worst.or_else(of_one);
    // What the way back measured is not the release's.
    let (Some(worst), false) = (
        measured.filter(|worst| worst.guests > 0),
        unit.phase.is_back(),
    ) else {
        return;
    };
    unit.blackout_ns = worst.blackout_ns;
    unit.clock_error_ns = worst.clock_error_ns;
    unit.brownout_ns = worst.brownout_ns;
}

fn ns(duration: std::time::Duration) -> Option<u64> {
    u64::try_from(duration.as_nanos()).ok()
}

/// Makes the record what the plan says it is; the units that are begun.
fn apply(
    fleet: &Fleet,
    record: &mut RolloutRecord,
    plan: &Plan,
    now: Moment,
    lines: &mut Vec<String>,
) -> Vec<(usize, Way)> {
    for &Verdict { unit, phase, saw } in &plan.verdicts {
        let unit = &mut record.units[usize::from(unit)];
        unit.phase = phase;
        unit.since = now;
        lines.push(verdict(fleet, unit, saw));
    }
    if let Some((state, turn)) = plan.becomes {
        record.state = state;
        record.reason = Some(turned(state, turn));
        if state.is_over() {
            record.ended_at = Some(now);
        }
        lines.push(format!("the rollout is {state}: {}", turned(state, turn)));
    }
    let mut ordered = Vec::new();
    for &Begin {
        unit, way, because, ..
    } in &plan.begin
    {
        let at = usize::from(unit);
        let (id, to) = (record.id.clone(), record.to.clone());
        let unit = &mut record.units[at];
        let again = matches!(unit.phase, Phase::Waiting | Phase::BackWaiting);
        unit.tries = if again { unit.tries + 1 } else { 1 };
        let letter = match way {
            Way::Forward => 'f',
            Way::Back => 'b',
        };
        unit.order = Some(SwapId(format!("{id}-{at}{letter}{}", unit.tries)));
        (unit.phase, unit.since) = match way {
            Way::Forward => (Phase::Begun, now),
            Way::Back => (Phase::BackBegun, now),
        };
        let to = match way {
            Way::Forward => &to,
            Way::Back => &unit.from,
        };
        lines.push(format!("{} is begun, to {to}: {because}", said(unit)));
        ordered.push((at, way));
    }
    ordered
}

/// Orders for what is begun; orders of another driver taken over; orders of what is over removed.
fn orders(
    look: &Look,
    record: &RolloutRecord,
    begun: &[(usize, Way)],
    epoch: u64,
    changes: &mut Vec<Change>,
) {
    for (at, unit) in record.units.iter().enumerate() {
        let vm = unit.vm.as_ref();
        let key = keys::of_unit(ORDERS, &unit.host, vm);
        let standing = look.orders.get(&unit.subject());
        let standing = standing.filter(|order| order.rollout == record.id);
        if let Some(&(_, way)) = begun.iter().find(|(begun, _)| *begun == at) {
            if let Some(order) = order(record, unit, way, epoch) {
                changes.push(Change::put(key, Expect::Anything, written(&order)));
            }
            continue;
        }
        let Some(order) = standing else {
            continue;
        };
        if !unit.phase.is_in_flight() {
            changes.push(Change::remove(key, Expect::Anything));
            let key = keys::of_unit(ANSWERS, &unit.host, vm);
            changes.push(Change::remove(key, Expect::Anything));
        } else if order.epoch != epoch {
            // Of a driver that is gone: hosts act on it as on one of this driver's own.
            let order = Order {
                epoch,
                ..order.clone()
            };
            changes.push(Change::put(key, Expect::Anything, written(&order)));
        }
    }
}

fn order(record: &RolloutRecord, unit: &UnitRecord, way: Way, epoch: u64) -> Option<Order> {
    let notice = record.policy.notice;
    let notice_ns = notice.and_then(ns);
    let urgent = || match way {
        Way::Back => Some(format!("the way back of rollout {}", record.id)),
        Way::Forward if notice_ns == Some(0) => Some(format!("rollout {}", record.id)),
        Way::Forward => None,
    };
    let no_notice = urgent();
    Some(Order {
        id: unit.order.clone()?,
        rollout: record.id.clone(),
        rung: unit.rung,
        epoch,
        budget_ns: record.budget_ns,
        to: match way {
            Way::Forward => record.to.clone(),
            Way::Back => unit.from.clone(),
        },
        way,
        notice_ns: notice_ns.filter(|_| no_notice.is_none()),
        no_notice,
        way_back: way == Way::Forward && record.policy.roll_back,
        allow_downgrade: record.allow_downgrade || way == Way::Back,
    })
}

/// A unit's name.
fn said(unit: &UnitRecord) -> String {
    match &unit.set {
        Some(set) => format!("{} (set {set}, domain {})", unit.name(), unit.domain),
        None => unit.name(),
    }
}

fn verdict(fleet: &Fleet, unit: &UnitRecord, saw: Saw) -> String {
    let name = said(unit);
    let guest = |vm: Ix<Vm>| &fleet.vms[vm].name;
    let why = match saw {
        Saw::Well => return format!("{name} is {}", unit.phase.words()),
        Saw::TooLong => "its swap took longer than the deadline".into(),
        Saw::NotWell(vm) => format!("the guest of {} was not well in time", guest(vm)),
        Saw::HostDown => "its host was not well in time".into(),
        Saw::Flapping => "it was never well for long enough in time".into(),
        Saw::Gate => "a gate failed until it was too late".into(),
        Saw::Breach(breach) => breached(unit, breach),
        Saw::KeptTooOften => "it was kept too often".into(),
        Saw::FellIll(vm) => format!("the guest of {} fell ill while it was watched", guest(vm)),
        Saw::Recalled => "the rollout was stopped while it was watched".into(),
    };
    format!("{name} is {}: {why}", unit.phase.words())
}

fn breached(unit: &UnitRecord, breach: Breach) -> String {
    let note = unit.note.as_deref().unwrap_or("no more is known");
    match breach {
        Breach::Failed => format!("its swap did not succeed: {note}"),
        Breach::Unwell => format!("its guest was not well after the swap: {note}"),
        Breach::Blackout => format!(
            "its blackout of {} ns is beyond the limit",
            unit.blackout_ns.unwrap_or(0)
        ),
        Breach::ClockError => format!(
            "its clock's error of {} ns is beyond the limit",
            unit.clock_error_ns.unwrap_or(0)
        ),
        Breach::Brownout => format!(
            "its brownout of {} ns is beyond the limit",
            unit.brownout_ns.unwrap_or(0)
        ),
    }
}

fn turned(state: State, turn: Turn) -> String {
    match (turn, state) {
        (Turn::Failures { failed, allowed }, State::Stopped) => format!(
            "{failed} failed, and {allowed} may; `stillpoint rollout resume` goes on all the same, \
             `abort` ends it"
        ),
        (Turn::Failures { failed, allowed }, _) => format!("{failed} failed, and {allowed} may"),
        (Turn::NothingLeft, State::Stuck) => {
            "something could not be brought back, and needs a hand".into()
        }
        (Turn::NothingLeft, _) => "nothing is left to be done".into(),
    }
}

/// What an answer's reason is, from the swap.
pub(crate) fn reason(swap: &SwapRecord) -> Option<String> {
    let health = swap.safeguards.health.as_ref();
    let problems = health.map(|health| health.problems.join("; "));
    let problems = problems.filter(|problems| !problems.is_empty());
    swap.reason.clone().or(problems)
}

#[cfg(test)]
mod tests;
