use super::*;
use crate::model::Rung;

const SIZE: Size = Size {
    hosts: 200,
    vms: 2_000,
};

fn ordinary() -> Scenario {
    Scenario::ordinary(SIZE, 42)
}

/// All that a run says and that doesn't depend on this host.
fn facts(outcome: &Outcome) -> String {
    let told = Outcome {
        plan_ms: [0.0; 2],
        took_s: 0.0,
        ..outcome.clone()
    };
    serde_json::to_string(&told).expect("JSON")
}

#[test]
fn a_good_release_reaches_all_and_never_two_domains_of_a_set() {
    let outcome = run(&ordinary());
    assert_eq!(outcome.ended, "finished");
    let last = outcome.samples.last().expect("samples");
    assert_eq!((last.on_new, last.held, last.broken), (SIZE.vms, 0, 0));
    assert_eq!((outcome.touched, outcome.broken), (SIZE.vms, 0));
    assert_eq!(outcome.sets_with_two_domains, 0);
    assert!(outcome.most_held <= SIZE.vms / 100, "{}", outcome.most_held);
    assert!(
        outcome.kept > 0,
        "nothing was ever kept, so nothing was ever tried again"
    );
}

#[test]
fn the_same_seed_is_the_same_run_and_another_is_not() {
    let first = facts(&run(&ordinary()));
    assert_eq!(first, facts(&run(&ordinary())));
    let other = Scenario {
        seed: 43,
        ..ordinary()
    };
    assert_ne!(first, facts(&run(&other)));
}

#[test]
fn a_bad_release_is_rolled_back_and_its_guests_are_well_again() {
    let outcome = run(&ordinary().but("bad", |s| s.release.breaks = 1.0));
    assert_eq!(outcome.ended, "rolled back");
    let last = outcome.samples.last().expect("samples");
    assert_eq!((last.on_new, last.held, last.broken), (0, 0, 0));
    assert!(
        (1..=SIZE.vms / 1_000).contains(&outcome.touched),
        "{}",
        outcome.touched
    );
    assert_eq!(outcome.broken, outcome.touched);
    assert!(outcome.vm_hours_lost > 0.0);
}

#[test]
fn stages_make_the_blast_smaller() {
    let bad = |s: &mut Scenario| s.release.breaks = 0.5;
    let staged = run(&ordinary().but("staged", bad));
    let unstaged = run(&ordinary().but("", bad).without_stages("unstaged"));
    assert_eq!(unstaged.ended, "rolled back");
    assert!(
        staged.broken < unstaged.broken,
        "{} {}",
        staged.broken,
        unstaged.broken
    );
}

#[test]
fn guests_that_are_asked_take_longer_and_end_as_well() {
    let asked = run(&standard(SIZE, 42)[1]);
    assert_eq!(asked.ended, "finished");
    assert_eq!(asked.sets_with_two_domains, 0);
    assert!(asked.touched == SIZE.vms);
}

#[test]
fn a_host_is_swapped_with_all_its_guests() {
    // Hosts that run two domains of a set are never swapped whole; here no set is large enough.
    let outcome = run(&ordinary().but("kernel", |s| {
        s.rung = Rung::Kernel;
        s.set_size = 1;
        s.host_fails.0 = std::time::Duration::MAX;
    }));
    assert_eq!(outcome.ended, "finished");
    assert_eq!(outcome.touched, SIZE.vms);
    assert!(outcome.most_held >= 10, "{}", outcome.most_held);
}

/// A host runs ten guests of ten sets, and waits for all of them; none has two domains away by it.
#[test]
fn hosts_go_with_all_their_guests_and_no_set_has_two_domains_away() {
    let outcome = run(&ordinary().of(Rung::Kvm));
    assert_eq!(outcome.ended, "finished");
    assert_eq!(outcome.touched, SIZE.vms);
    assert_eq!(outcome.sets_with_two_domains, 0);
    let bad = ordinary()
        .of(Rung::Kernel)
        .but("", |s| s.release.breaks = 1.0);
    let outcome = run(&bad);
    // A jump has no way back: the rollout stops, within its canaries.
    assert_eq!(outcome.ended, "stopped");
    assert!(
        outcome.touched <= SIZE.vms / 100 * 10,
        "{}",
        outcome.touched
    );
}

#[test]
fn outcomes_come_in_the_order_of_their_scenarios() {
    let scenarios = standard(SIZE, 7);
    let outcomes = run_all(&scenarios);
    let names = |name: fn(&Outcome) -> &str| outcomes.iter().map(name).collect::<Vec<_>>();
    let asked: Vec<&str> = scenarios.iter().map(|s| s.name.as_str()).collect();
    assert_eq!(names(|outcome| &outcome.name), asked);
}

#[test]
fn an_empty_fleet_is_finished_at_once() {
    let size = Size { hosts: 0, vms: 0 };
    let outcome = run(&Scenario::ordinary(size, 1));
    assert_eq!((outcome.ended.as_str(), outcome.touched), ("finished", 0));
}
