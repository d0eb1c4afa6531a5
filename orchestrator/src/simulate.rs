//! A rollout over a fleet that isn't there: the real planner, and an executor of pretended hosts.
//!
//! ```text
//!   Scenario ─▶ place (a fleet) ─▶ world: events ─▶ Seen ─▶ plan::rollout::plan ─┐
//!                                    ▲                                           │
//!                                    └── executor: swaps, approvals, failures ◀──┘
//!                                              └─▶ Outcome ─▶ table, JSON, charts
//! ```
//!
//! Time is simulated, and so is every failure: they follow from the seed, and the same seed is
//! the same run. What is real is the planner and what it costs; that is measured in processor time,
//! and is the one thing that differs from run to run.

pub mod charts;
pub mod cost;

mod events;
mod place;
mod scenario;
mod world;

pub use scenario::{Release, Scenario, Size, standard};
pub use world::{Outcome, Sample, run};

/// Runs scenarios on as many threads as there are processors; the outcomes come in their order.
pub fn run_all(scenarios: &[Scenario]) -> Vec<Outcome> {
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let next = std::sync::atomic::AtomicUsize::new(0);
    let (done, outcomes) = std::sync::mpsc::channel();
    std::thread::scope(|scope| {
        for _ in 0..threads.min(scenarios.len()) {
            let done = done.clone();
            scope.spawn(|| {
                let done = done;
                loop {
                    let at = next.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                    let Some(scenario) = scenarios.get(at) else {
                        return;
                    };
                    // The receiver outlives the scope.
                    let _ = done.send((at, run(scenario)));
                }
            });
        }
    });
    drop(done);
    let mut outcomes: Vec<_> = outcomes.into_iter().collect();
    outcomes.sort_by_key(|&(at, _)| at);
    outcomes.into_iter().map(|(_, outcome)| outcome).collect()
}

#[cfg(test)]
mod tests;
