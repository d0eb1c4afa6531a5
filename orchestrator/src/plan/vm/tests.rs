use stillpoint_control::message::ProcessId;
use stillpoint_control::report::ReleaseName;
use stillpoint_control::secret::Secret;
use stillpoint_control::spec::MachineSpec;

use super::*;
use crate::model::{Safeguards, VmName};

fn vm(state: VmState, wanted: Wanted) -> VmRecord {
    let spec = MachineSpec::from_json(r#"{"name":"a","kernel":{"path":"/k"}}"#).expect("spec");
    VmRecord {
        name: VmName::try_from("a".to_owned()).expect("name"),
        spec,
        release: "0.1.0".into(),
        profile: crate::model::Profile::default(),
        wanted,
        state,
        reason: None,
        process: None,
        secret: Secret::from_bytes(&[7; 32]).expect("secret"),
        swaps: 0,
        created_at_unix_ns: 0,
        changed_at_unix_ns: 0,
    }
}

fn swap(state: SwapState) -> SwapRecord {
    SwapRecord {
        id: SwapId("1".into()),
        part_of: None,
        rollout: None,
        vm: VmName::try_from("a".to_owned()).expect("name"),
        component: "vmm".into(),
        from: ReleaseName::default(),
        to: ReleaseName::default(),
        state,
        step: String::new(),
        reason: None,
        budget_ns: None,
        clock: None,
        notice_ns: None,
        no_notice: None,
        safeguards: Safeguards::default(),
        successor: Some(ProcessId {
            pid: 2,
            start_ticks: 3,
            boot_id: "b".into(),
        }),
        epoch_before: Some(0),
        asked_at_unix_ns: 0,
        ended_at_unix_ns: None,
        report: None,
    }
}

const SEEN: fn() -> [Seen; 5] = || {
    [
        Seen::Nothing,
        Seen::Alive,
        Seen::Ended(Ending::PoweredOff),
        Seen::Ended(Ending::Failed("died".into())),
        Seen::Unreachable("mute".into()),
    ]
};
const STATES: [VmState; 7] = [
    VmState::Starting,
    VmState::Running,
    VmState::Swapping,
    VmState::Stopped,
    VmState::Crashed,
    VmState::Failed,
    VmState::Lost,
];

fn step(vm: &VmRecord, swap: Option<&SwapRecord>, seen: &Seen) -> Step {
    next(vm, swap, seen).step
}

#[test]
fn a_new_vm_is_started_once() {
    let wanted = Wanted::Running;
    assert_eq!(
        step(&vm(VmState::Starting, wanted), None, &Seen::Nothing),
        Step::Start
    );
    for state in STATES
        .into_iter()
        .filter(|&state| state != VmState::Starting)
    {
        // A guest that was running and is gone must never be started from nothing by itself.
        assert_ne!(
            step(&vm(state, wanted), None, &Seen::Nothing),
            Step::Start,
            "{state}"
        );
    }
}

#[test]
fn an_unfinished_swap_comes_before_all_else() {
    for state in STATES {
        for wanted in [Wanted::Running, Wanted::Stopped] {
            for seen in SEEN() {
                for unfinished in [SwapState::InProgress, SwapState::InDoubt] {
                    let swap = swap(unfinished);
                    let settle = Step::Settle(swap.id.clone());
                    assert_eq!(step(&vm(state, wanted), Some(&swap), &seen), settle);
                }
            }
        }
    }
}

#[test]
fn a_swap_begins_only_on_a_living_vm_that_is_wanted() {
    let swap = swap(SwapState::Wanted);
    for wanted in [Wanted::Running, Wanted::Stopped] {
        for seen in SEEN() {
            let begins = seen == Seen::Alive && wanted == Wanted::Running;
            let expected = if begins {
                Step::Swap(swap.id.clone())
            } else {
                Step::Refuse(swap.id.clone())
            };
            assert_eq!(
                step(&vm(VmState::Running, wanted), Some(&swap), &seen),
                expected
            );
        }
    }
}

#[test]
fn endings_are_recorded_as_what_they_are() {
    let running = vm(VmState::Running, Wanted::Running);
    let off = Seen::Ended(Ending::PoweredOff);
    let died = Seen::Ended(Ending::Failed("signal 9".into()));
    assert_eq!(step(&running, None, &off), Step::Record(VmState::Stopped));
    let planned = next(&running, None, &died);
    assert_eq!(planned.step, Step::Record(VmState::Crashed));
    assert_eq!(planned.why, "signal 9");
    // A kill at the end of a stop is what was wanted.
    let stopping = vm(VmState::Running, Wanted::Stopped);
    assert_eq!(step(&stopping, None, &died), Step::Record(VmState::Stopped));
    assert_eq!(
        step(&running, None, &Seen::Nothing),
        Step::Record(VmState::Crashed)
    );
}

#[test]
fn what_can_not_be_spoken_to_is_never_declared_dead() {
    for state in STATES {
        for wanted in [Wanted::Running, Wanted::Stopped] {
            let seen = Seen::Unreachable("mute".into());
            assert_eq!(step(&vm(state, wanted), None, &seen), Step::LookAgain);
        }
    }
}

#[test]
fn every_way_of_things_comes_to_rest() {
    // Carrying out what is planned, as far as it changes the record, ends in rest.
    for state in STATES {
        for wanted in [Wanted::Running, Wanted::Stopped] {
            for seen in [Seen::Nothing, Seen::Alive, Seen::Ended(Ending::PoweredOff)] {
                let (mut vm, mut seen) = (vm(state, wanted), seen.clone());
                let rests = (0..5).any(|_| {
                    match step(&vm, None, &seen) {
                        Step::Rest => return true,
                        Step::Record(state) => vm.state = state,
                        Step::Start => {
                            vm.state = VmState::Running;
                            seen = Seen::Alive;
                        }
                        Step::PowerOff => seen = Seen::Ended(Ending::PoweredOff),
                        other => panic!("{other:?} without a swap"),
                    }
                    false
                });
                assert!(rests, "{state} {wanted:?} {seen:?}");
            }
        }
    }
}

#[test]
fn a_swap_is_settled_by_the_word_and_who_lives() {
    let e = Epoch;
    let before = e(4);
    let cases = [
        (Owner::Taken(e(5)), true, true, Verdict::Moved),
        (Owner::Taken(e(5)), false, true, Verdict::Moved),
        // It took the guest and died: the predecessor's state is old and must not run again.
        (Owner::Taken(e(5)), true, false, Verdict::Crashed),
        (Owner::Held(e(5)), true, true, Verdict::Kept),
        (Owner::Held(e(5)), true, false, Verdict::Kept),
        (Owner::Held(e(4)), true, false, Verdict::Kept),
        (Owner::Taken(e(4)), true, true, Verdict::Kept),
        // Died running, never sealed: nothing that the successor may run.
        (Owner::Held(e(4)), false, true, Verdict::Crashed),
        (Owner::Taken(e(4)), false, true, Verdict::Crashed),
        (Owner::Sealed(e(5)), true, true, Verdict::Wait),
        (Owner::Sealed(e(5)), false, true, Verdict::Wait),
        (Owner::GivenUp(e(5)), true, false, Verdict::Wait),
        (Owner::Sealed(e(5)), false, false, Verdict::Crashed),
        (Owner::GivenUp(e(5)), false, false, Verdict::Crashed),
    ];
    for (word, predecessor, successor, verdict) in cases {
        let settled = settle(before, word, predecessor, successor);
        assert_eq!(settled, verdict, "{word:?} {predecessor} {successor}");
    }
}

/// A guest's part of a swap of its host holds up nothing that becomes of the guest itself.
#[test]
fn a_part_of_a_swap_of_the_host_is_left_to_the_host() {
    for swap_state in [SwapState::Wanted, SwapState::InProgress, SwapState::InDoubt] {
        let part = SwapRecord {
            component: crate::model::HOST.into(),
            part_of: Some(SwapId("0".into())),
            ..swap(swap_state)
        };
        let running = vm(VmState::Running, Wanted::Running);
        assert_eq!(
            next(&running, Some(&part), &Seen::Alive).step,
            Step::Rest,
            "{swap_state}"
        );
        for wanted in [Wanted::Running, Wanted::Stopped] {
            for state in STATES {
                for seen in SEEN() {
                    if (wanted, &seen) == (Wanted::Running, &Seen::Alive) {
                        continue;
                    }
                    let vm = vm(state, wanted);
                    let with = next(&vm, Some(&part), &seen);
                    assert_eq!(with, next(&vm, None, &seen), "{state} {wanted:?} {seen:?}");
                }
            }
        }
    }
}
