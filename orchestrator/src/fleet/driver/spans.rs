//! Spans of a rollout, from its record before and after a step. Pure.
//!
//! ```text
//!  rollout ├──────────────────────────────────────────────────┤
//!  step    ├────────────────┤   from the order to its answer; the swap is its part, told by the guest's own host
//!  settle                   ├──────────┤   until it was well for long enough, or was not
//!  step                                ├───────────┤
//! ```
//!
//! Each is told by the driver whose commit ended it: a driver that is replaced told of what ended before.

use crate::fleet::record::{RolloutRecord, UnitRecord};
use crate::plan::rollout::State;
use crate::plan::rollout::seen::Phase;
use crate::traces::{Draft, Span, ids};

/// What ended with the step that made `after` of `before`.
pub(super) fn of_step(before: &RolloutRecord, after: &RolloutRecord) -> Vec<Span> {
    let units = before.units.iter().zip(&after.units);
    let units = units.filter_map(|(before, now)| of_unit(after, before, now));
    let mut spans: Vec<Span> = units.collect();
    spans.extend(of_end(before, after));
    spans
}

fn of_unit(rollout: &RolloutRecord, before: &UnitRecord, after: &UnitRecord) -> Option<Span> {
    let order = before.order.as_ref()?;
    if before.phase == after.phase {
        return None;
    }
    let (name, id) = match before.phase {
        Phase::Begun | Phase::BackBegun => ("step", ids::step(order)),
        Phase::Watched | Phase::BackWatched => ("settle", ids::part(order, "settle")),
        _ => return None,
    };
    let went_wrong = matches!(after.phase, Phase::Failed | Phase::Spoilt | Phase::Stuck)
        || (name == "step" && matches!(after.phase, Phase::Waiting | Phase::BackWaiting));
    let why = after.note.as_deref().unwrap_or("no reason is known");
    let parent = ids::rollout(&rollout.id);
    let trace = ids::rollout_trace(&rollout.id);
    let span = Draft::new(name, trace, id, Some(parent))
        .text("rollout", &rollout.id.0)
        .text("swap", &order.0)
        .text("host", before.host.as_str())
        .maybe_text("vm", before.vm.as_ref().map(|vm| vm.as_str()))
        .maybe_text("set", before.set.as_deref())
        .number("domain", before.set.as_ref().map(|_| before.domain))
        .number("stage", Some(before.stage))
        .number("try", Some(before.tries))
        .text(
            "way",
            if before.phase.is_back() {
                "back"
            } else {
                "forward"
            },
        )
        .text("outcome", after.phase.words())
        .number("pause_ns", after.blackout_ns)
        .number("clock.error_ns", after.clock_error_ns)
        .failed(went_wrong.then_some(why))
        .over(before.since.0, after.since.0);
    Some(span.done())
}

fn of_end(before: &RolloutRecord, after: &RolloutRecord) -> Option<Span> {
    let ended = after.ended_at.filter(|_| before.ended_at.is_none())?;
    let id = &after.id;
    let count = |is: fn(Phase) -> bool| {
        let units = after.units.iter();
        Some(units.filter(|unit| is(unit.phase)).count())
    };
    let went_wrong = after.state != State::Finished;
    let why = after.reason.as_deref().unwrap_or("no reason is known");
    let span = Draft::new("rollout", ids::rollout_trace(id), ids::rollout(id), None)
        .text("rollout", &id.0)
        .text("component", &after.component)
        .text("release.to", &after.to)
        .text("outcome", after.state.to_string())
        .maybe_text("reason", after.reason.as_deref())
        .number("units", Some(after.units.len()))
        .number("units.done", count(|phase| phase == Phase::Done))
        .number("units.failed", count(Phase::is_failure))
        .number("steps", Some(after.steps))
        .failed(went_wrong.then_some(why))
        .over(after.asked_at.0, ended.0);
    Some(span.done())
}
