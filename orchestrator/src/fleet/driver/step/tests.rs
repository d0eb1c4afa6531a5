//! Steps from looks that were made by hand: what is written, and what never is.

use super::*;
use crate::fleet::ask::{NewRollout, lay_out};
use crate::fleet::record::{Alive, RolloutId, samples};
use crate::model::{Labels, Policy, Rung, VmName};

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
    of_host.card = Some(samples::host());
    of_host.alive = Some(Alive {
        since: Moment(1),
        clock: None,
    });
    for name in ["a", "b"] {
        let card = samples::guest(Some("s"), u16::from(name == "b"));
        look.vms.insert((host("h"), vm(name)), card);
    }
    look
}

fn rollout(look: &Look) -> Versioned<RolloutRecord> {
    rollout_of(look, "vmm", None)
}

fn rollout_of(look: &Look, component: &str, budget_ns: Option<u64>) -> Versioned<RolloutRecord> {
    let new = NewRollout {
        component: component.into(),
        budget_ns,
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
        worst: None,
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

/// What a host answers to the order of a look's only unit.
fn answered(look: &mut Look, order: &Order, far: Far, blackout_ns: u64) {
    let answer = Answer {
        order: order.id.clone(),
        far,
        reason: None,
        swap: None,
        worst: Some(Worst {
            guests: 2,
            blackout_ns: Some(blackout_ns),
            ..Worst::default()
        }),
    };
    look.answers.insert((host("h"), None), answer);
}

/// Both guests in one domain, so that their host can be swapped as a whole.
fn look_of_one_domain() -> Look {
    let mut look = look();
    for card in look.vms.values_mut() {
        card.domain = 0;
    }
    look
}

const BUDGET: Option<u64> = Some(5_000_000_000);

fn of_host(look: &Look) -> Versioned<RolloutRecord> {
    let mut rollout = rollout_of(look, "kvm", BUDGET);
    rollout.record.policy.set_budget = crate::model::Amount::Count(2);
    rollout.record.policy.limits.blackout = Some(std::time::Duration::from_millis(50));
    rollout
}

#[test]
fn a_host_is_ordered_as_a_whole_and_its_guests_parts_are_its_own_doing() {
    let mut look = look_of_one_domain();
    let first = step(&look, &of_host(&look), NOW, &host("h"), 5, &[]).expect("a step");
    let orders = orders_of(&first);
    assert_eq!(orders.len(), 1, "{:?}", first.lines);
    assert_eq!((orders[0].rung, orders[0].budget_ns), (Rung::Kvm, BUDGET));
    let key = first
        .changes
        .iter()
        .find(|change| change.key.starts_with(ORDERS));
    assert_eq!(
        key.map(|change| change.key.as_str()),
        Some("live/orders/h/@host")
    );
    let begun = after(&first);
    let unit = &begun.record.units[0];
    assert_eq!((unit.vm.as_ref(), unit.guests.len()), (None, 2));
    assert_eq!(unit.from, "as booted");
    // Its guests have swaps that aren't over: parts of this one. Nobody else has them.
    look.orders.insert((host("h"), None), orders[0].clone());
    for ((_, name), card) in &mut look.vms {
        card.swap = Some(SwapId(format!("{}.{name}", orders[0].id)));
    }
    let tables = look.tables(Some(&begun.record));
    let seen = look.seen(&tables, &begun.record, NOW);
    assert!(seen.vms.iter().all(|vm| !vm.busy), "{:?}", seen.vms);
    answered(&mut look, &orders[0], Far::Settled, 49_000_000);
    let moved = step(&look, &begun, NOW, &host("h"), 5, &[]).expect("a step");
    let unit = after(&moved).record.units.remove(0);
    assert_eq!(
        (unit.phase, unit.blackout_ns),
        (Phase::Watched, Some(49_000_000))
    );
}

#[test]
fn the_guest_of_a_host_that_fared_worst_is_evidence_and_the_host_is_put_back() {
    for (far, blackout_ns, why) in [
        (Far::Settled, 51_000_000, "beyond the limit"),
        (Far::Failed, 1, "did not succeed"),
    ] {
        let mut look = look_of_one_domain();
        let first = step(&look, &of_host(&look), NOW, &host("h"), 5, &[]).expect("a step");
        let order = orders_of(&first).remove(0);
        answered(&mut look, &order, far, blackout_ns);
        let failed = step(&look, &after(&first), NOW, &host("h"), 5, &[]).expect("a step");
        assert!(failed.lines.join("; ").contains(why), "{:?}", failed.lines);
        let record = after(&failed);
        assert_eq!(record.record.state, State::RollingBack);
        let back = step(&look, &record, NOW, &host("h"), 5, &[]).expect("a step");
        let back = orders_of(&back).remove(0);
        assert_eq!((back.way, back.rung), (Way::Back, Rung::Kvm));
        assert_eq!(back.to, "as booted");
    }
}

#[test]
fn a_host_that_runs_two_domains_of_a_set_is_never_begun_and_says_why() {
    let look = look();
    let rollout = of_host(&look);
    let waits = step(&look, &rollout, NOW, &host("h"), 5, &[]).expect("a step");
    assert_eq!(orders_of(&waits), []);
    let why = crate::fleet::explain::explain(&look, &(host("h"), vm("a")), NOW);
    assert!(why.contains("is in no rollout"), "{why}");
    let mut look = look;
    look.rollouts.push(rollout);
    let why = crate::fleet::explain::explain(&look, &(host("h"), vm("a")), NOW);
    for said in [
        "VM a stands still with all guests of its host for its kvm",
        "two update domains of set s",
    ] {
        assert!(why.contains(said), "{said}: {why}");
    }
}
