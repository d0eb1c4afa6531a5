//! The planner's rules, over thousands of random fleets in which all kinds of things go wrong.
//!
//! A [`world::World`] is a small fleet that does what the planner says, badly: swaps are kept, hang
//! or break their guests, hosts vanish, operators cordon, exclude, pause and resume. After every plan
//! [`laws`] checks it against counts of its own, made the slow and obvious way, which share
//! no line with the planner's.
//!
//! `PROPTEST_CASES=20000` tries more; a failure prints the case, which can be tried again by itself.

mod examples;
mod laws;
mod world;

use proptest::prelude::*;

use super::State;
use super::seen::Phase;
use world::{Case, World};

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 1000,
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    /// Every plan keeps the laws, and in the end all is over or says what it waits for.
    #[test]
    fn whatever_goes_wrong_the_laws_are_kept(case in world::case()) {
        let mut world = World::new(&case);
        for turn in 0..case.storm + 600 {
            if turn == case.storm {
                world.calm();
            }
            let plan = world.turn();
            laws::check(&world, &plan)?;
            world.carry_out(&plan);
            if world.rollout.state.is_over() {
                break;
            }
        }
        laws::ended_or_waits(&world)?;
    }

    /// A good release in good weather reaches all that it should.
    #[test]
    fn in_good_weather_a_good_release_is_finished(mut case in world::case()) {
        case.weather = world::Weather::default();
        // A host that runs two update domains of a set, or too many of its members, is never
        // swapped as a whole, whatever the weather.
        case.whole_hosts = false;
        let world = run(&case);
        prop_assert_eq!(world.rollout.state, State::Finished);
        prop_assert!(world.seen.units.iter().all(|unit| unit.phase == Phase::Done));
    }

    /// A release that breaks every guest is stopped by its first stage, and nobody else is touched.
    #[test]
    fn a_bad_release_touches_its_canaries_only(mut case in world::case()) {
        case.weather = world::Weather { bad_release: 1.0, ..Default::default() };
        case.whole_hosts = false;
        case.policy.roll_back = true;
        let world = run(&case);
        if world.rollout.layout.stages > 1 && !world.seen.units.is_empty() {
            prop_assert_eq!(world.rollout.state, State::RolledBack);
            let touched = world.ever_begun();
            let beyond = touched.filter(|&ix| world.rollout.layout.units[ix].stage > 0);
            prop_assert_eq!(beyond.count(), 0);
        }
        let on_new = world.seen.units.keys().filter(|&ix| world.runs_new(ix));
        prop_assert!(world.rollout.state != State::RolledBack || on_new.count() == 0);
    }
}

fn run(case: &Case) -> World {
    let mut world = World::new(case);
    world.calm();
    for _ in 0..1500 {
        let plan = world.turn();
        world.carry_out(&plan);
        if world.rollout.state.is_over() {
            break;
        }
    }
    world
}
