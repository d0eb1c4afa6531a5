//! The model holds, and each rule of it is needed.

use stateright::{Checker, Model};
use stillpoint_model::{Broken, Handover};

const WHOLE: Handover = Handover {
    broken: None,
    careless_daemon: false,
    faults: 3,
    daemon_deaths: 2,
};

fn holds(model: Handover) {
    let checker = model.checker().threads(2).spawn_bfs().join();
    checker.assert_properties();
    println!("{model:?}: {} states", checker.unique_state_count());
}

#[test]
fn at_most_one_runs_the_guest_and_none_is_stranded() {
    holds(WHOLE);
}

#[test]
fn a_successor_that_nobody_killed_takes_no_later_attempt() {
    holds(Handover {
        careless_daemon: true,
        ..WHOLE
    });
}

#[test]
fn each_rule_is_needed() {
    for (broken, property) in Broken::ALL {
        let model = Handover {
            broken: Some(broken),
            careless_daemon: broken == Broken::Epochs,
            ..WHOLE
        };
        let checker = model.checker().threads(2).spawn_bfs().join();
        let found = checker.discovery(property);
        assert!(found.is_some(), "without {broken:?}: `{property}` holds");
    }
}
