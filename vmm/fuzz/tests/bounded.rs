//! Every target for some seconds. The seed is new each time, and printed; `STILLPOINT_SEED` gives one.

use std::time::Duration;

use stillpoint_fuzz::{TARGETS, mutate};

#[test]
fn no_target_has_a_finding() {
    let given = std::env::var("STILLPOINT_SEED").ok();
    let seed = given.and_then(|seed| seed.parse().ok());
    let seed = seed.unwrap_or_else(|| fastrand::u64(..));
    println!("STILLPOINT_SEED={seed}");
    let run = |target| mutate::run(target, seed, Duration::from_secs(8));
    let clean: Vec<bool> = TARGETS.iter().map(run).collect();
    assert!(!clean.contains(&false), "see above");
}
