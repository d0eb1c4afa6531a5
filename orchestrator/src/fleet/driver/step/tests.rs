//! Steps from looks that were made by hand: what is written, and what never is.

use super::*;
use crate::fleet::ask::{NewRollout, lay_out};
use crate::fleet::record::{Alive, HostCard, RolloutId, VmCard};
use crate::model::{Labels, Policy, VmName, VmState};
use crate::plan::rollout::seen::Health;

const NOW: Moment = Moment(1_000_000_000_000);

fn host(name: &str) -> HostName {
    HostName::try_from(name.to_owned()).expect("name")
}

fn vm(name: &str) -> VmName {
    VmName::try_from(name.to_owned()).expect("name")
}

/// A host `h` that is heard and has `next`, with guests `a` and `b`, both well on `good`.
fn look() -> Look {
    let mut look = Look::default();
    let of_host = look.hosts.entry(host("h")).or_default();
    of_host.card = Some(HostCard {
        zone: "z".into(),
        fault_domain: "r".into(),
        labels: Labels::new(),
        releases: vec!["good".into(), "next".into()],
        daemon: "0".into(),
    });
    of_host.alive = Some(Alive {
        since: Moment(1),
        clock: None,
    });
    for name in ["a", "b"] {
        let card = VmCard {
            set: Some("s".into()),
            domain: u16::from(name == "b"),
            state: VmState::Running,
            release: "good".into(),
            health: Health::Well,
            ailment: None,
            since: Moment(1),
            swap: None,
            busy: false,
        };
        look.vms.insert((host("h"), vm(name)), card);
    }
    look
}

fn rollout(look: &Look) -> Versioned<RolloutRecord> {
    let new = NewRollout {
        component: "vmm".into(),
        to: "next".into(),
        policy: Policy::default(),
        sets: Vec::new(),
        hosts: Vec::new(),
        labels: Labels::new(),
        vms: Vec::new(),
        exclude: Vec::new(),
        allow_downgrade: false,
        dry_run: false,
    };
    let record = lay_out(look, &new, RolloutId("r".into()), NOW).expect("a layout");
    Versioned { record, version: 7 }
}

fn orders_of(step: &Step) -> Vec<Order> {
    let of = |change: &Change| match &change.to {
        crate::store::shared::Become::Value(value, _) if change.key.starts_with(ORDERS) => {
            Some(serde_json::from_slice(value).expect("an order"))
        }
        _ => None,
    };
    step.changes.iter().filter_map(of).collect()
}

/// The record that a step writes.
fn after(step: &Step) -> Versioned<RolloutRecord> {
    let change = step
        .changes
        .iter()
        .find(|change| change.key == "live/rollouts/r");
    let change = change.expect("the record is written");
    assert_eq!(change.expect, Expect::Version(7));
    let crate::store::shared::Become::Value(value, _) = &change.to else {
        panic!("it is removed");
    };
    let record = serde_json::from_slice(value).expect("a rollout");
    Versioned { record, version: 7 }
}

#[test]
fn what_is_begun_is_on_record_in_the_commit_that_orders_it_and_begun_once() {
    let look = look();
    let first = step(&look, &rollout(&look), NOW, &host("h"), 5, &[]).expect("a step");
    let orders = orders_of(&first);
    assert_eq!(orders.len(), 1, "one canary: {:?}", first.lines);
    assert_eq!((orders[0].epoch, orders[0].to.as_str()), (5, "next"));
    let after = after(&first);
    let begun = after
        .record
        .units
        .iter()
        .filter(|u| u.phase == Phase::Begun);
    let begun: Vec<_> = begun.collect();
    assert_eq!(begun.len(), 1);
    assert_eq!(begun[0].order.as_ref(), Some(&orders[0].id));
    // Who takes over in this moment, with or without the order in sight, orders nothing else.
    let again = step(&look, &after, NOW, &host("h"), 9, &[]).expect("a step");
    assert_eq!(again.changes, [], "{:?}", again.lines);
}

#[test]
fn who_takes_over_takes_over_the_orders() {
    let mut look = look();
    let first = step(&look, &rollout(&look), NOW, &host("h"), 5, &[]).expect("a step");
    let order = orders_of(&first).remove(0);
    let after = after(&first);
    let unit = after.record.units.iter().find(|unit| unit.order.is_some());
    let place = unit.map(|unit| (unit.host.clone(), unit.vm.clone()));
    look.orders.insert(place.expect("a unit"), order.clone());
    let same = step(&look, &after, NOW, &host("h"), 5, &[]).expect("a step");
    assert_eq!(same.changes, []);
    let next = step(&look, &after, NOW, &host("h"), 9, &[]).expect("a step");
    let taken = orders_of(&next);
    assert_eq!(taken, [Order { epoch: 9, ..order }]);
}

#[test]
fn a_host_that_is_not_heard_keeps_its_guests_from_being_taken_for_removed() {
    let mut look = look();
    let planned = rollout(&look);
    look.hosts.entry(host("h")).or_default().alive = None;
    look.vms.clear();
    let waits = step(&look, &planned, NOW, &host("h"), 5, &[]).expect("a step");
    assert_eq!(waits.changes, [], "{:?}", waits.lines);
    // Once it is heard and has no such guests they are gone, and nothing is left to be done.
    look.hosts.entry(host("h")).or_default().alive = Some(Alive {
        since: Moment(1),
        clock: None,
    });
    let gone = step(&look, &planned, NOW, &host("h"), 5, &[]).expect("a step");
    assert_eq!(after(&gone).record.state, State::Finished);
}

#[test]
fn what_was_kept_is_tried_again_by_another_order() {
    let mut look = look();
    let first = step(&look, &rollout(&look), NOW, &host("h"), 5, &[]).expect("a step");
    let order = orders_of(&first).remove(0);
    let begun = after(&first);
    let unit = begun.record.units.iter().find(|unit| unit.order.is_some());
    let unit = unit.expect("a unit");
    let answer = Answer {
        order: order.id.clone(),
        far: Far::Kept,
        reason: Some("the disk was slow".into()),
        swap: None,
    };
    look.answers
        .insert((unit.host.clone(), unit.vm.clone()), answer);
    let kept = step(&look, &begun, NOW, &host("h"), 5, &[]).expect("a step");
    assert_eq!(orders_of(&kept), [], "not at once");
    assert!(
        kept.lines[0].contains("the disk was slow"),
        "{:?}",
        kept.lines
    );
    let kept = after(&kept);
    let later = NOW.after(kept.record.policy.retry_after);
    let again = step(&look, &kept, later, &host("h"), 5, &[]).expect("a step");
    let second = orders_of(&again);
    assert_eq!(second.len(), 1);
    assert_ne!(
        second[0].id, order.id,
        "or its answer would be taken for the new one's"
    );
}
