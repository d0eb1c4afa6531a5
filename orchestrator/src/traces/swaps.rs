//! Spans of a swap that is over: itself, and what it was made of. Pure.
//!
//! ```text
//!  swap vmm ├───────────────────────────────────────────────────────┤
//!  wait     ├───────────────────────┤  notice, approvals, rehearsal
//!  start, build, populate           ├──┤├────┤├──┤          beside the guest
//!  park, save, load, enter                         ├┤├┤├┤├┤ while it stands still
//!  watch                                                    ├────────────────▶
//! ```
//!
//! How long each phase took is measured, by clocks that both processes share; the wall clock is read once, when the
//! handover is asked for. Phases lie one after the other from there. What passes between two of them is in none:
//! microseconds for a message, and more where a side waits for a core; so they may add up to less than the pause.

use std::time::Duration;

use opentelemetry_proto::tonic::trace::v1::Span;
use stillpoint_control::report::{Phase, Side, SwapReport};

use super::ids;
use super::span::Draft;
use crate::model::{HOST, HealthState, HostSwap, HostSwapState, KVM, Share, SwapRecord, SwapState};

/// What is known of a swap, once it is over.
pub(super) fn of_swap(swap: &SwapRecord) -> Vec<Span> {
    let Some(ended) = swap.ended_at_unix_ns.filter(|_| swap.state.is_over()) else {
        return Vec::new();
    };
    let report = swap.report.as_ref();
    let phases = report.map_or(Vec::new(), |report| placed(report, ended));
    let begun = phases.iter().map(|(_, from, _)| *from).min();
    let begun = begun.unwrap_or(ended);
    let (trace, parent) = ids::place(swap);
    let whole = ids::swap(&swap.id);
    // A guest's part has waited with the whole.
    let (name, from) = match &swap.part_of {
        Some(_) => ("stand still".to_owned(), begun),
        None => (format!("swap {}", swap.component), swap.asked_at_unix_ns),
    };
    let draft = Draft::new(name, trace.clone(), whole.clone(), parent);
    let mut spans = vec![described(swap, draft).over(from, ended).done()];
    let part = |name: &str, id: &str| {
        let id = ids::part(&swap.id, id);
        Draft::new(name, trace.clone(), id, Some(whole.clone()))
    };
    if swap.part_of.is_none() {
        spans.push(part("wait", "wait").over(from, begun).done());
    }
    for (at, (phase, from, to)) in phases.into_iter().enumerate() {
        let span = part(&phase.name, &format!("{at} {}", phase.name))
            .text("side", side(phase.side))
            .flag("in_blackout", phase.in_blackout)
            .over(from, to);
        spans.push(span.done());
    }
    spans
}

/// How the guest was afterwards, once that is known.
pub(super) fn of_watch(swap: &SwapRecord) -> Option<Span> {
    let (ended, health) = (swap.ended_at_unix_ns?, swap.safeguards.health.as_ref()?);
    if health.state.is_open() || swap.state != SwapState::Moved {
        return None;
    }
    let (trace, _) = ids::place(swap);
    let id = ids::part(&swap.id, "watch");
    let problems = health.problems.join("; ");
    let unwell = (health.state == HealthState::Unwell).then_some(problems.as_str());
    let span = Draft::new("watch", trace, id, Some(ids::swap(&swap.id)))
        .text("vm", swap.vm.as_str())
        .text("swap", &swap.id.0)
        .text("health", health.state.to_string())
        .maybe_text("remedy", health.remedy.as_deref())
        .failed(unwell)
        .over(ended, health.since_unix_ns);
    Some(span.done())
}

/// A swap of the host as a whole; its guests' parts are swaps of their own.
pub(super) fn of_host_swap(swap: &HostSwap) -> Vec<Span> {
    let Some(ended) = swap.ended_at_unix_ns.filter(|_| swap.state.is_over()) else {
        return Vec::new();
    };
    let (what, from, to) = match (&swap.kernel, &swap.kvm) {
        (Some(jump), _) => ("kernel", Some(jump.from.as_str()), jump.to.as_deref()),
        (None, Some(kvm)) => (KVM, kvm.from.as_deref(), kvm.release.as_deref()),
        (None, None) => (HOST, None, None),
    };
    let (rollout, whole) = (swap.rollout.as_ref(), ids::swap(&swap.id));
    let trace = ids::trace(rollout, &swap.id);
    let step = rollout.map(|_| ids::step(&swap.id));
    let went_wrong = swap.state != HostSwapState::Done;
    let draft = Draft::new(format!("swap {what}"), trace.clone(), whole.clone(), step)
        .text("swap", &swap.id.0)
        .text("component", what)
        .text("guests", swap.guests())
        .text("outcome", swap.state.to_string())
        .maybe_text("reason", swap.reason.as_deref())
        .maybe_text("from", from)
        .maybe_text("to", to)
        .number("budget_ns", Some(swap.budget_ns))
        .number("pause_ns", swap.pause_ns)
        .failed(swap.reason.as_deref().filter(|_| went_wrong))
        .over(swap.asked_at_unix_ns, ended);
    let mut spans = vec![draft.done()];
    let phases = swap.kernel.as_ref().map_or(&[][..], |jump| &jump.phases);
    let all: u64 = phases.iter().map(|phase| phase.duration_ns).sum();
    // They end with the swap, and no clock runs on from one kernel to the next that says more.
    let mut from = ended.saturating_sub(all);
    for (at, phase) in phases.iter().enumerate() {
        let id = ids::part(&swap.id, &format!("{at} {}", phase.name));
        let to = from + phase.duration_ns;
        let ours = phase.share == Share::Ours;
        let span = Draft::new(&phase.name, trace.clone(), id, Some(whole.clone()))
            .text("share", if ours { "ours" } else { "kernel" })
            .flag("in_blackout", phase.in_blackout)
            .over(from, to);
        spans.push(span.done());
        from = to;
    }
    spans
}

/// What is to be known of a swap without looking further.
fn described(swap: &SwapRecord, draft: Draft) -> Draft {
    let report = swap.report.as_ref();
    let clock = report.and_then(|report| report.clock.as_ref());
    let pause = report.map(|report| report.blackout.host.as_nanos());
    let seen = report.and_then(|report| report.blackout.guest_worst());
    let policy = clock.map(|clock| clock.policy.to_string());
    let went_wrong = !matches!(swap.state, SwapState::Moved | SwapState::Resumed);
    draft
        .text("vm", swap.vm.as_str())
        .text("swap", &swap.id.0)
        .maybe_text("rollout", swap.rollout.as_ref().map(|id| id.0.as_str()))
        .text("component", &swap.component)
        .text("release.from", &swap.from.version)
        .text("release.to", &swap.to.version)
        .text("outcome", swap.state.to_string())
        .maybe_text("reason", swap.reason.as_deref())
        .number("pause_ns", pause)
        .number("pause_guest_ns", seen.map(|seen| seen.as_nanos()))
        .number("budget_ns", report.map(|report| report.budget.as_nanos()))
        .maybe_text("clock.policy", policy.as_deref())
        .number("clock.error_ns", clock.and_then(|c| c.kvmclock_error_ns))
        .number("vcpus", report.map(|report| report.vcpus))
        .number("memory_bytes", report.map(|report| report.memory_bytes))
        .failed(went_wrong.then(|| swap.reason.as_deref().unwrap_or("no reason is known")))
}

fn side(side: Side) -> &'static str {
    match side {
        Side::Predecessor => "predecessor",
        Side::Successor => "successor",
        Side::Agent => "daemon",
    }
}

/// Every phase, and from when to when it was.
fn placed<'a>(report: &'a SwapReport, ended: u64) -> Vec<(&'a Phase, u64, u64)> {
    let all = |phases: &[Phase]| phases.iter().map(|phase| ns(phase.duration)).sum::<u64>();
    // The daemon's own are over when the handover is asked for.
    let is_before = |phase: &&Phase| phase.side == Side::Agent;
    let before = report.phases.iter().take_while(is_before).count();
    let (before, after) = report.phases.split_at(before);
    let asked = match report.started_at_unix_ns {
        // Of a predecessor that died before it could say.
        0 => ended.saturating_sub(all(after)),
        asked => asked,
    };
    let mut from = asked.saturating_sub(all(before));
    let mut place = |phase: &'a Phase| {
        let to = from + ns(phase.duration);
        (phase, std::mem::replace(&mut from, to), to)
    };
    before.iter().chain(after).map(&mut place).collect()
}

fn ns(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests;
