//! Rules that are about which of several right answers is given, each shown by a small fleet.

use std::time::Duration;

use super::super::fleet::{Fleet, Ix, Vm};
use super::super::layout::{Layout, Remedy, Unit};
use super::super::seen::{Gate, Health, HostSeen, Phase, Progress, Releases, Seen, VmSeen};
use super::super::{Because, Plan, Rollout, State, Way, Why, plan};
use crate::model::{AtOnce, DomainCount, Moment, Policy, Rung};

/// Two hosts, a set of four VMs in two domains: VMs 0 and 2 in domain 0, on one host each.
struct Small {
    fleet: Fleet,
    rollout: Rollout,
    seen: Seen,
}

const NOW: Moment = Moment(1_795_500_000_000_000_000);

fn small(change: impl FnOnce(&mut Policy)) -> Small {
    let mut fleet = Fleet::default();
    let zone = fleet.add_zone("z");
    let rack = fleet.add_rack("r", zone);
    let hosts = [fleet.add_host("h0", rack), fleet.add_host("h1", rack)];
    let set = fleet.add_set("web", DomainCount::new(2).expect("two"));
    for n in 0..4 {
        fleet.add_vm(format!("web-{n}"), hosts[n / 2], Some((set, None)));
    }
    let mut policy = Policy {
        stages: vec![],
        set_budget: crate::model::Amount::Count(2),
        at_once: AtOnce {
            total: 4,
            per_host: 1,
            per_rack: None,
            per_zone: None,
        },
        ..Policy::default()
    };
    change(&mut policy);
    let remedy = Remedy::contained_in([Rung::Vmm]);
    let layout = Layout::new(&fleet, &remedy, &policy.stages, 0, |_| true).expect("a layout");
    let host = HostSeen {
        up: true,
        releases: Releases::ALL,
        ..Default::default()
    };
    let vm = VmSeen {
        health: Health::Well,
        ..Default::default()
    };
    let seen = Seen {
        now: NOW,
        hosts: vec![host; 2].into(),
        vms: vec![vm; 4].into(),
        units: vec![Progress::default(); 4].into(),
        gates: vec![Gate::Pass],
        breaches: vec![],
    };
    let rollout = Rollout {
        state: State::Running,
        policy,
        layout,
        forgiven: 0,
    };
    Small {
        fleet,
        rollout,
        seen,
    }
}

impl Small {
    fn plan(&self) -> Plan {
        plan(&self.rollout, &self.fleet, &self.seen)
    }

    fn unit(&self, vm: usize) -> Ix<Unit> {
        self.rollout.layout.unit_of[Ix::from(vm)].expect("a unit")
    }

    fn why(&self, vm: usize) -> Why {
        self.plan().whys[self.unit(vm)]
    }

    fn begun(&self) -> Vec<&str> {
        let begin = self.plan().begin;
        let vm = |unit: Ix<Unit>| self.rollout.layout.units[unit].vm.expect("of a VM");
        let names = begin.iter().map(|b| &*self.fleet.vms[vm(b.unit)].name);
        names.collect()
    }

    fn set(&mut self, vm: usize, phase: Phase, ago: u64) {
        let unit = self.unit(vm);
        let tries = u8::from(phase != Phase::Waiting);
        let since = Moment(NOW.0 - ago * 1_000_000_000);
        self.seen.units[unit] = Progress {
            phase,
            tries,
            since,
        };
    }
}

fn vm(number: usize) -> Ix<Vm> {
    Ix::from(number)
}

#[test]
fn a_domain_goes_on_all_its_hosts_at_once_and_the_next_one_after_it() {
    let mut small = small(|_| {});
    assert_eq!(small.begun(), ["web-0", "web-2"]);
    small.set(0, Phase::Watched, 1);
    small.set(2, Phase::Done, 60);
    assert_eq!(small.begun(), [""; 0]);
    assert!(matches!(small.why(1), Why::DomainOpen(_, domain) if domain.number() == 0));
    small.set(0, Phase::Done, 60);
    assert_eq!(small.begun(), ["web-1", "web-3"]);
}

#[test]
fn a_domain_of_which_one_is_tried_again_in_a_moment_keeps_its_turn() {
    let mut small = small(|_| {});
    small.set(0, Phase::Waiting, 10);
    let unit = small.unit(0);
    small.seen.units[unit].tries = 1;
    small.set(2, Phase::Done, 60);
    assert!(matches!(small.why(0), Why::TryAgain(_)));
    assert!(matches!(small.why(1), Why::DomainFirst(_, domain) if domain.number() == 0));
    let again = NOW.after(Duration::from_secs(50));
    assert_eq!(small.plan().look_again, Some(again));
}

#[test]
fn a_domain_of_which_one_is_out_of_reach_does_not_keep_the_others_waiting() {
    let mut small = small(|_| {});
    small.seen.hosts[Ix::from(0)].cordoned = true;
    small.set(2, Phase::Done, 60);
    assert_eq!(small.why(0), Why::Cordoned);
    assert_eq!(small.begun(), ["web-3"]);
}

#[test]
fn what_was_touched_and_fell_ill_long_after_keeps_its_set_waiting() {
    let mut small = small(|_| {});
    small.set(0, Phase::Done, 5_000);
    small.set(2, Phase::Done, 5_000);
    small.seen.vms[vm(2)].health = Health::Ill;
    assert!(matches!(small.why(1), Why::DomainOpen(..)));
    assert_eq!(small.begun(), [""; 0]);
}

#[test]
fn members_that_are_away_for_whatever_reason_use_up_the_budget() {
    let mut small = small(|policy| policy.set_budget = crate::model::Amount::Count(1));
    small.seen.vms[vm(3)].health = Health::Off;
    assert!(matches!(small.why(0), Why::SetBudget(_)));
    small.seen.vms[vm(3)].health = Health::Well;
    assert_eq!(small.begun(), ["web-0"]);
}

#[test]
fn a_broken_guest_is_put_back_though_the_budget_is_used_up() {
    let mut small = small(|policy| {
        policy.set_budget = crate::model::Amount::Count(1);
        policy.failures = crate::model::Amount::Count(1);
    });
    small.set(0, Phase::Spoilt, 1);
    small.seen.vms[vm(0)].health = Health::Ill;
    small.seen.vms[vm(3)].health = Health::Ill;
    let plan = small.plan();
    let begun: Vec<_> = plan
        .begin
        .iter()
        .map(|b| (b.unit, b.way, b.because))
        .collect();
    assert_eq!(begun, [(small.unit(0), Way::Back, Because::Repair)]);
}

#[test]
fn a_rollout_of_which_only_excluded_vms_are_left_ends_though_a_gate_fails() {
    let mut small = small(|_| {});
    for done in 0..3 {
        small.set(done, Phase::Done, 60);
    }
    small.seen.gates = vec![Gate::Fail];
    assert_eq!(small.plan().becomes, None);
    assert_eq!(small.why(3), Why::Gate(0));
    small.seen.vms[vm(3)].excluded = true;
    let ended = small.plan().becomes.map(|(state, _)| state);
    assert_eq!(ended, Some(State::Finished));
}

#[test]
fn between_two_domains_there_is_a_pause() {
    let pause = Duration::from_secs(600);
    let mut small = small(|policy| policy.between_domains = pause);
    small.set(0, Phase::Done, 100);
    small.set(2, Phase::Done, 400);
    let until = NOW.after(Duration::from_secs(500));
    assert!(matches!(small.why(1), Why::BetweenDomains(_, at) if at == until));
    assert_eq!(small.plan().look_again, Some(until));
}

#[test]
fn every_vm_is_explained_in_a_sentence() {
    let mut small = small(|_| {});
    small.set(0, Phase::Begun, 1);
    let plan = small.plan();
    let explain = |n| plan.explain(&small.rollout, &small.fleet, &small.seen, vm(n));
    assert_eq!(explain(0), "VM web-0 is being swapped");
    assert_eq!(
        explain(1),
        "VM web-1 waits: update domain 0 of set web is being swapped or isn't well again, and one \
         goes at a time"
    );
    assert_eq!(explain(2), "VM web-2 is begun now");
}

#[test]
fn a_step_takes_the_notice_of_its_rollout_along() {
    let an_hour = Some(Duration::from_secs(3600));
    for notice in [None, an_hour] {
        let small = small(|policy| {
            policy.notice = notice;
            policy.deadline = Duration::from_secs(7200);
        });
        let begin = small.plan().begin;
        assert!(!begin.is_empty());
        assert!(begin.iter().all(|step| step.notice == notice), "{begin:?}");
    }
}
