//! Every target for some seconds, two at a time. The seed is new each time, and printed;
//! `STILLPOINT_SEED` gives one.

use std::time::Duration;

use stillpoint_fuzz::{TARGETS, Target, mutate};

/// For each target.
const TIME: Duration = Duration::from_secs(8);

#[test]
fn no_target_has_a_finding() {
    let given = std::env::var("STILLPOINT_SEED").ok();
    let seed = given.and_then(|seed| seed.parse().ok());
    let seed = seed.unwrap_or_else(|| fastrand::u64(..));
    println!("STILLPOINT_SEED={seed}");
    let run = |target: &'static Target| mutate::run(target, seed, TIME);
    let clean = TARGETS.chunks(2).map(|pair| {
        std::thread::scope(|scope| {
            let each: Vec<_> = pair.iter().map(|t| scope.spawn(move || run(t))).collect();
            // A thread that panics is a finding too.
            let clean: Vec<_> = each
                .into_iter()
                .map(|t| t.join().unwrap_or(false))
                .collect();
            !clean.contains(&false)
        })
    });
    let clean: Vec<bool> = clean.collect();
    assert!(!clean.contains(&false), "see above");
}
