//! Whose units two rollouts may have, over random fleets; and what is refused.

use proptest::prelude::*;

use super::*;
use crate::fleet::record::samples;
use crate::model::{Labels, Policy, VmName};

const NOW: Moment = Moment(1_000_000_000_000);

fn host(number: usize) -> HostName {
    HostName::try_from(format!("h{number}")).expect("a name")
}

/// Hosts with so many guests each, in one of two sets or in none.
fn look(guests: &[usize]) -> Look {
    let mut look = Look::default();
    for (number, &many) in guests.iter().enumerate() {
        let of_host = look.hosts.entry(host(number)).or_default();
        of_host.card = Some(samples::host());
        for guest in 0..many {
            let set = [None, Some("a"), Some("b")][(number + guest) % 3];
            let card = samples::guest(set, 0);
            let name = VmName::try_from(format!("vm{number}-{guest}")).expect("a name");
            look.vms.insert((host(number), name), card);
        }
    }
    look
}

/// A rollout of a component over hosts of these numbers, or over sets.
fn new(component: &str, hosts: &[usize], sets: &[&str]) -> NewRollout {
    let is_whole = component != "vmm";
    NewRollout {
        component: component.into(),
        budget_ns: is_whole.then_some(1_000_000_000),
        to: "next".into(),
        policy: Policy::default(),
        sets: sets.iter().map(|&set| set.to_owned()).collect(),
        hosts: hosts
            .iter()
            .map(|&number| host(number).to_string())
            .collect(),
        labels: Labels::new(),
        vms: Vec::new(),
        exclude: Vec::new(),
        allow_downgrade: false,
        dry_run: false,
    }
}

/// The VMs that a rollout takes away, the slow and obvious way: each as often as it does.
fn taken(look: &Look, record: &RolloutRecord) -> Vec<Place> {
    let mut taken = Vec::new();
    for unit in &record.units {
        let of_unit = |place: &&Place| {
            place.0 == unit.host && unit.vm.as_ref().is_none_or(|vm| *vm == place.1)
        };
        taken.extend(look.vms.keys().filter(of_unit).cloned());
    }
    taken
}

type Asked = (bool, Vec<usize>, bool);

fn asked(hosts: usize) -> impl Strategy<Value = Asked> {
    (
        any::<bool>(),
        proptest::collection::vec(0..hosts, 0..3),
        any::<bool>(),
    )
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 1000,
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    /// Whatever two rollouts ask for: none has a host twice or a guest twice, and no guest is in both, nor a
    /// guest in one whose host is in the other.
    #[test]
    fn no_guest_is_in_two_rollouts_nor_twice_in_one(
        guests in proptest::collection::vec(0..4_usize, 4),
        first in asked(4),
        second in asked(4),
    ) {
        let mut look = look(&guests);
        let mut records = Vec::new();
        for (at, (whole, hosts, of_set)) in [first, second].into_iter().enumerate() {
            let sets: &[&str] = if of_set { &["a"] } else { &[] };
            let component = if whole { "kvm" } else { "vmm" };
            let id = RolloutId(format!("r{at}"));
            let Ok(record) = lay_out(&look, &new(component, &hosts, sets), id, NOW) else {
                continue;
            };
            let mut hosts: Vec<_> = record.units.iter().filter(|unit| unit.vm.is_none()).collect();
            hosts.dedup_by_key(|unit| &unit.host);
            prop_assert!(!whole || hosts.len() == record.units.len());
            let mut all = taken(&look, &record);
            let many = all.len();
            all.sort();
            all.dedup();
            prop_assert_eq!(all.len(), many, "a guest twice");
            records.push((record.clone(), all));
            look.rollouts.push(Versioned { record, version: 1 });
        }
        if let [(one, first), (other, second)] = &records[..] {
            prop_assert!(first.iter().all(|place| !second.contains(place)), "a guest in both");
            let whole = |record: &RolloutRecord| -> Vec<HostName> {
                let units = record.units.iter().filter(|unit| unit.vm.is_none());
                units.map(|unit| unit.host.clone()).collect()
            };
            for host in whole(one) {
                prop_assert!(other.units.iter().all(|unit| unit.host != host), "{host} in both");
            }
            for host in whole(other) {
                prop_assert!(one.units.iter().all(|unit| unit.host != host), "{host} in both");
            }
        }
    }
}

#[test]
fn a_kernel_goes_to_hosts_with_guests_and_never_back() {
    let look = look(&[2, 0]);
    let mut new = new("kernel", &[], &[]);
    new.policy.roll_back = false;
    let record = lay_out(&look, &new, RolloutId("r".into()), NOW).expect("a layout");
    let hosts: Vec<_> = record
        .units
        .iter()
        .map(|unit| (unit.host.as_str(), unit.from.as_str()))
        .collect();
    assert_eq!(hosts, [("h0", "6.1.0")]);
}

#[test]
fn hosts_go_as_a_whole_by_name_or_by_whose_guests_they_run_and_without_guests_too() {
    let look = look(&[2, 0, 1]);
    let hosts = |new: &NewRollout| -> Vec<(String, usize)> {
        let record = lay_out(&look, new, RolloutId("r".into()), NOW).expect("a layout");
        let mut hosts: Vec<_> = record
            .units
            .iter()
            .map(|u| (u.host.to_string(), u.guests.len()))
            .collect();
        hosts.sort();
        hosts
    };
    let all = [("h0".into(), 2), ("h1".into(), 0), ("h2".into(), 1)];
    assert_eq!(hosts(&new("kvm", &[], &[])), all);
    assert_eq!(hosts(&new("kvm", &[1], &[])), all[1..2]);
    // The guests of host 0 are in no set and in `a`, that of host 2 is in `b`.
    assert_eq!(hosts(&new("kvm", &[], &["a"])), all[..1]);
}

#[test]
fn what_can_not_go_with_hosts_as_a_whole_is_refused() {
    let mut look = look(&[2, 0]);
    let refused = |look: &Look, new: NewRollout| {
        let refused = lay_out(look, &new, RolloutId("r".into()), NOW);
        refused.expect_err("refused").message
    };
    let kvm = || new("kvm", &[], &[]);
    for (new, says) in [
        (
            NewRollout {
                component: "vm".into(),
                ..kvm()
            },
            "none of backend, vmm, kvm, kernel",
        ),
        (
            NewRollout {
                component: "kernel".into(),
                ..kvm()
            },
            "has no way back; say --no-roll-back",
        ),
        (
            NewRollout {
                component: "kernel".into(),
                hosts: vec!["h1".into()],
                policy: Policy {
                    roll_back: false,
                    ..Policy::default()
                },
                ..kvm()
            },
            "without guests boot the other kernel as ever",
        ),
        (
            NewRollout {
                component: "backend".into(),
                budget_ns: None,
                ..kvm()
            },
            "devices run inside the VMM",
        ),
        (
            NewRollout {
                component: "vmm".into(),
                ..kvm()
            },
            "`budget_ns`: each guest has its own",
        ),
        (
            NewRollout {
                budget_ns: None,
                ..kvm()
            },
            "how long the guests of a host may stand still",
        ),
        (
            NewRollout {
                vms: vec!["vm0-0".into()],
                ..kvm()
            },
            "takes all guests of a host together",
        ),
        (
            NewRollout {
                exclude: vec!["vm0-0".into()],
                ..kvm()
            },
            "takes all guests of a host together",
        ),
        (
            NewRollout {
                to: "other".into(),
                ..kvm()
            },
            "`stillpointd --kvm-dir`",
        ),
    ] {
        let message = refused(&look, new);
        assert!(message.contains(says), "{says}: {message}");
    }
    for host in look.hosts.values_mut() {
        host.card.as_mut().expect("a card").kvm.runs = "next".into();
    }
    let message = refused(&look, kvm());
    assert!(
        message.contains("all 2 hosts that were asked for run release next already"),
        "{message}"
    );
}
