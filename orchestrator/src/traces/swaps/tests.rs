use std::time::Duration;

use opentelemetry_proto::tonic::common::v1::any_value::Value;
use stillpoint_control::clock::Policy;
use stillpoint_control::report::{Blackout, ClockReceipt, Outcome, ReleaseName};

use super::*;
use crate::model::{
    Health, HostSwapState, JumpPhase, KernelJump, RolloutId, Safeguards, SwapId, VMM, VmName,
};

const MS: u64 = 1_000_000;

fn phase(name: &str, side: Side, in_blackout: bool, ms: u64) -> Phase {
    Phase {
        name: name.into(),
        side,
        in_blackout,
        duration: Duration::from_millis(ms),
    }
}

fn report(started_at_unix_ns: u64) -> SwapReport {
    SwapReport {
        swap: "s".into(),
        vm: "web".into(),
        component: VMM.into(),
        from: ReleaseName::default(),
        to: ReleaseName::default(),
        outcome: Outcome::Moved,
        reason: None,
        started_at_unix_ns,
        vcpus: 2,
        memory_bytes: 1 << 30,
        state_format: 2,
        state_bytes: 1,
        budget: Duration::from_millis(50),
        margin: None,
        phases: vec![
            phase("start", Side::Agent, false, 40),
            phase("build", Side::Successor, false, 20),
            phase("park", Side::Predecessor, true, 1),
            phase("load", Side::Successor, true, 2),
        ],
        blackout: Blackout {
            host: Duration::from_millis(3),
            guest_ns: vec![None, Some(4 * MS)],
            vcpus: Vec::new(),
        },
        clock: Some(ClockReceipt {
            policy: Policy::Advance,
            kvmclock_error_ns: Some(-7),
            ..ClockReceipt::default()
        }),
        recovery: Vec::new(),
        warnings: Vec::new(),
    }
}

/// Asked for at 1 s, handed over from 2 s on, over at 3 s.
fn swap(id: &str) -> SwapRecord {
    SwapRecord {
        id: SwapId(id.into()),
        part_of: None,
        rollout: None,
        vm: VmName::try_from("web".to_owned()).expect("name"),
        component: VMM.into(),
        from: ReleaseName::default(),
        to: ReleaseName::default(),
        state: SwapState::Moved,
        step: "done".into(),
        reason: None,
        budget_ns: None,
        clock: None,
        notice_ns: None,
        no_notice: None,
        safeguards: Safeguards::default(),
        successor: None,
        epoch_before: None,
        asked_at_unix_ns: 1000 * MS,
        ended_at_unix_ns: Some(3000 * MS),
        report: Some(report(2000 * MS)),
    }
}

fn spans(swap: &SwapRecord) -> Vec<(String, u64, u64)> {
    let spans = of_swap(swap).into_iter();
    spans
        .map(|span| {
            (
                span.name,
                span.start_time_unix_nano / MS,
                span.end_time_unix_nano / MS,
            )
        })
        .collect()
}

fn number(span: &Span, key: &str) -> Option<i64> {
    let key = format!("stillpoint.{key}");
    let found = span.attributes.iter().find(|found| found.key == key)?;
    match found.value.as_ref()?.value {
        Some(Value::IntValue(number)) => Some(number),
        _ => None,
    }
}

#[test]
fn phases_lie_one_after_the_other_around_the_moment_when_the_handover_was_asked_for() {
    let told = |name: &str, from, to| (name.to_owned(), from, to);
    let expected = [
        told("swap vmm", 1000, 3000),
        told("wait", 1000, 1960),
        told("start", 1960, 2000),
        told("build", 2000, 2020),
        told("park", 2020, 2021),
        told("load", 2021, 2023),
    ];
    assert_eq!(spans(&swap("s")), expected);
    // Of a predecessor that could not say when: they end with the swap.
    let mut unheard = swap("s");
    unheard.report = Some(report(0));
    let last = spans(&unheard).pop().expect("phases");
    assert_eq!(last, told("load", 2998, 3000));
    // Nothing is known of one that goes on, and of one that never came to a handover its wait alone.
    let mut open = swap("s");
    open.state = SwapState::InDoubt;
    assert_eq!(of_swap(&open), []);
    let mut refused = swap("s");
    (refused.state, refused.report) = (SwapState::Kept, None);
    let expected = [told("swap vmm", 1000, 3000), told("wait", 1000, 3000)];
    assert_eq!(spans(&refused), expected);
}

#[test]
fn pause_and_clock_are_told_as_the_report_has_them() {
    let span = of_swap(&swap("s")).remove(0);
    for (key, expected) in [
        ("pause_ns", 3_000_000),
        ("pause_guest_ns", 4_000_000),
        ("budget_ns", 50_000_000),
        ("clock.error_ns", -7),
        ("vcpus", 2),
        ("memory_bytes", 1 << 30),
    ] {
        assert_eq!(number(&span, key), Some(expected), "{key}");
    }
}

#[test]
fn all_spans_of_one_cause_are_one_trace() {
    let first = swap("s");
    let mut back = swap("s-back");
    back.safeguards.way_back_of = Some(first.id.clone());
    let (first, back) = (of_swap(&first).remove(0), of_swap(&back).remove(0));
    assert_eq!(back.trace_id, first.trace_id);
    assert_eq!(back.parent_span_id, first.span_id);
    assert_ne!(of_swap(&swap("t")).remove(0).trace_id, first.trace_id);
    // Of a rollout, the way back too.
    let mut ordered = swap("r1-0f1");
    ordered.rollout = Some(RolloutId("r1".into()));
    let mut back = swap("r1-0f1-back");
    back.rollout = Some(RolloutId("r1".into()));
    back.safeguards.way_back_of = Some(ordered.id.clone());
    let (step, own) = (ids::step(&ordered.id), ids::swap(&ordered.id));
    let (ordered, back) = (of_swap(&ordered).remove(0), of_swap(&back).remove(0));
    assert_eq!(
        ordered.trace_id,
        ids::rollout_trace(&RolloutId("r1".into()))
    );
    assert_eq!(ordered.parent_span_id, step);
    assert_eq!(
        (back.trace_id, back.parent_span_id),
        (ordered.trace_id, own)
    );
}

#[test]
fn a_watch_is_told_once_its_end_is_known() {
    let mut watched = swap("s");
    assert_eq!(of_watch(&watched), None);
    let health = |state| Some(Health::new(state, vec!["it is mute".into()], 5000 * MS));
    watched.safeguards.health = health(HealthState::WellSoFar);
    assert_eq!(of_watch(&watched), None);
    watched.safeguards.health = health(HealthState::Unwell);
    let watch = of_watch(&watched).expect("its end is known");
    assert_eq!(watch.parent_span_id, ids::swap(&watched.id));
    assert_eq!(watch.start_time_unix_nano, 3000 * MS);
    assert_eq!(watch.end_time_unix_nano, 5000 * MS);
    assert_eq!(watch.status.expect("unwell").message, "it is mute");
}

#[test]
fn a_swap_of_the_kernel_is_told_with_its_phases_and_its_guests_as_parts_of_it() {
    let mut whole = HostSwap::wanted(SwapId("k".into()), Vec::new(), 9, 1000 * MS);
    assert_eq!(of_host_swap(&whole), []);
    let of = |name: &str, share, in_blackout, ms| JumpPhase {
        name: name.into(),
        share,
        in_blackout,
        duration_ns: ms * MS,
    };
    whole.kernel = Some(KernelJump {
        image: "/k".into(),
        initrd: None,
        command_line: String::new(),
        nonce: "n".into(),
        rehearse: true,
        from: "6.1".into(),
        to: Some("6.12".into()),
        phases: vec![
            of("store", Share::Ours, true, 10),
            of("kernel", Share::Kernel, true, 700),
        ],
        clock: None,
    });
    whole.state = HostSwapState::Done;
    whole.ended_at_unix_ns = Some(3000 * MS);
    let told = of_host_swap(&whole);
    let names: Vec<_> = told.iter().map(|span| span.name.as_str()).collect();
    assert_eq!(names, ["swap kernel", "store", "kernel"]);
    assert_eq!(told[1].start_time_unix_nano, 2290 * MS);
    assert_eq!(told[2].end_time_unix_nano, 3000 * MS);
    assert_eq!(told[2].parent_span_id, told[0].span_id);
    let mut part = swap("k.web");
    part.part_of = Some(whole.id.clone());
    let part = of_swap(&part).remove(0);
    assert_eq!(part.name, "stand still");
    assert_eq!(part.start_time_unix_nano, 1960 * MS);
    assert_eq!(
        (&part.trace_id, &part.parent_span_id),
        (&told[0].trace_id, &told[0].span_id)
    );
}
