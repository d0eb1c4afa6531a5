use stillpoint_control::health::{QueueSign, VcpuSign};
use stillpoint_control::report::{ClockReceipt, Outcome};

use super::*;

fn at(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

/// A guest with two vCPUs and a disk, `ms` after its resume, that does all it should.
fn well(ms: u64) -> Signs {
    let vcpu = VcpuSign {
        turns: ms + 1,
        beat: Some(1_000 + ms),
    };
    Signs {
        vcpus: vec![vcpu; 2],
        devices: vec![DeviceSign {
            name: "disk0".into(),
            queues: vec![QueueSign {
                queue: 0,
                waiting: 3,
                taken: u16::try_from(ms / 10 + 1).expect("small"),
            }],
            ..DeviceSign::default()
        }],
        agent: Some(true),
        recovery: Vec::new(),
    }
}

fn seen_before() -> Before {
    before(&well(0), &well(50))
}

/// Looks once in 100 ms at what `signs` makes of a guest that is well.
fn watch(until_ms: u64, before: Before, signs: impl Fn(u64) -> Signs) -> Vec<Verdict> {
    let mut watch = Watch::begin(before, at(0));
    let times = (1..=until_ms / 100).map(|n| n * 100);
    times.map(|ms| watch.look(signs(ms), at(ms))).collect()
}

#[test]
fn a_guest_that_goes_on_is_well_from_the_second_look_on() {
    let verdicts = watch(20_000, seen_before(), well);
    assert!(
        matches!(&verdicts[0], Verdict::Wait(_)),
        "a beat takes two looks"
    );
    assert!(
        verdicts[1..].iter().all(|v| *v == Verdict::Well),
        "{verdicts:?}"
    );
}

/// Whoever stands still from the resume on is told of after its patience, and not before.
fn stands_still(change: impl Fn(&mut Signs), patience: Duration, what: &str) {
    let signs = |ms| {
        let mut signs = well(ms);
        change(&mut signs);
        signs
    };
    let verdicts = watch(20_000, seen_before(), signs);
    let first = verdicts
        .iter()
        .position(|v| matches!(v, Verdict::Unwell(_)));
    let first = first.expect("unwell in the end");
    let ms = (first as u64 + 1) * 100;
    assert!(
        at(ms) > patience && at(ms) <= patience + at(200),
        "{what}: after {ms} ms"
    );
    let Verdict::Unwell(problems) = &verdicts[first] else {
        unreachable!("looked for")
    };
    assert!(
        problems.len() == 1 && problems[0].contains(what),
        "{problems:?}"
    );
}

#[test]
fn each_sign_that_stands_still_is_named_in_time() {
    stands_still(
        |s| s.vcpus[1].turns = 0,
        STANDSTILL,
        "vCPU 1 makes no progress",
    );
    stands_still(
        |s| s.vcpus.iter_mut().for_each(|v| v.beat = Some(7)),
        STANDSTILL,
        "lost its heartbeat",
    );
    stands_still(
        |s| s.devices[0].queues[0].taken = 9,
        STANDSTILL,
        "queue 0 of disk0 stands still, with 3 requests",
    );
    stands_still(
        |s| s.devices[0].failed = true,
        STANDSTILL,
        "disk0 has failed",
    );
    stands_still(|s| s.devices[0].stuck = true, STANDSTILL, "disk0 hangs");
    stands_still(|s| s.agent = Some(false), SILENCE, "agent does not answer");
}

#[test]
fn a_pause_of_a_sign_is_no_standstill() {
    // A busy host leaves out looks, and a vCPU is not seen to come back, for four seconds.
    let verdicts = watch(20_000, seen_before(), |ms| {
        let mut signs = well(ms);
        if (5_000..9_000).contains(&ms) {
            signs.vcpus[0].turns = 1;
        }
        signs
    });
    assert!(!verdicts.iter().any(|v| matches!(v, Verdict::Unwell(_))));
    assert_eq!(verdicts.last(), Some(&Verdict::Well));
}

#[test]
fn what_was_missing_before_is_not_missed() {
    let idle = Before {
        failed: vec!["disk0".into()],
        ..Before::default()
    };
    let verdicts = watch(20_000, idle, |ms| {
        let mut signs = well(ms);
        signs.agent = Some(false);
        signs.vcpus.iter_mut().for_each(|v| v.beat = None);
        signs.devices[0].failed = true;
        signs
    });
    assert!(
        verdicts[1..].iter().all(|v| *v == Verdict::Well),
        "{verdicts:?}"
    );
}

#[test]
fn requests_that_wait_for_a_slow_disk_are_not_the_releases_doing() {
    let verdicts = watch(20_000, Before::default(), |ms| {
        let mut signs = well(ms);
        signs.devices[0].in_flight = 256;
        signs.devices[0].queues[0].taken = 9;
        signs
    });
    assert!(!verdicts.iter().any(|v| matches!(v, Verdict::Unwell(_))));
}

#[test]
fn a_vmm_that_is_mute_for_too_long_is_a_problem() {
    let mut watch = Watch::begin(Before::default(), at(0));
    assert!(matches!(
        watch.mute("no answer", at(14_000)),
        Verdict::Wait(_)
    ));
    assert!(matches!(
        watch.mute("no answer", at(15_001)),
        Verdict::Unwell(_)
    ));
    assert!(
        matches!(watch.look(well(15_100), at(15_100)), Verdict::Wait(_)),
        "it came back, and one look says little of a queue"
    );
    assert_eq!(watch.look(well(15_200), at(15_200)), Verdict::Well);
}

#[test]
fn a_clock_beyond_its_bound_is_a_problem() {
    let of = |error, after| {
        let clock = ClockReceipt {
            kvmclock_error_ns: error,
            masterclock_before: true,
            masterclock_after: after,
            ..ClockReceipt::default()
        };
        of_clock(&report(clock))
    };
    assert_eq!(of(Some(100_000), true), None);
    assert_eq!(of(None, true), None, "not measured is not wrong");
    assert!(
        of(Some(-100_001), true)
            .expect("off")
            .contains("-100001 ns")
    );
    assert!(of(None, false).expect("lost").contains("masterclock"));
}

fn report(clock: ClockReceipt) -> SwapReport {
    SwapReport {
        swap: "s".into(),
        vm: "web-1".into(),
        component: "vmm".into(),
        from: Default::default(),
        to: Default::default(),
        outcome: Outcome::Moved,
        reason: None,
        started_at_unix_ns: 0,
        vcpus: 2,
        memory_bytes: 0,
        state_format: 3,
        state_bytes: 0,
        budget: at(1_000),
        margin: None,
        phases: Vec::new(),
        blackout: Default::default(),
        clock: Some(clock),
        recovery: Vec::new(),
        warnings: Vec::new(),
    }
}
