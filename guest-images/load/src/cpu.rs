//! Spins on every CPU, and checks that nothing of a thread's state is lost.
//!
//! Each thread holds known values in its registers for about a millisecond at a time, without a
//! memory access or a call, and looks at them afterwards (`registers`); in between it computes a
//! chain of floating-point operations whose outcome it knows. Whoever stops the CPU in the middle
//! and forgets a register shows.

use std::time::{Duration, Instant};

use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
use serde::Serialize;

use crate::registers::{self, Registers};
use crate::report::Report;
use crate::term;

/// What to spin.
#[derive(clap::Args, Debug)]
pub(crate) struct Args {
    /// Threads, each on a CPU of its own as far as there are; without it, one a CPU.
    #[arg(long, value_name = "N")]
    threads: Option<usize>,
    /// For how long.
    #[arg(long, value_name = "S", default_value_t = 10)]
    seconds: u64,
}

/// What came of it.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub(crate) struct CpuReport {
    load: &'static str,
    ok: bool,
    /// Whether the registers were AVX's; SSE's otherwise.
    avx: bool,
    seed: u64,
    /// Rounds of each thread.
    iterations: Vec<u64>,
    /// Rounds after which registers or results were wrong; and which, of the first few.
    wrong: u64,
    complaints: Vec<String>,
}

impl Report for CpuReport {
    fn ok(&self) -> bool {
        self.ok
    }

    fn sentence(&self) -> String {
        let Self {
            iterations, wrong, ..
        } = self;
        format!("cpu: {iterations:?} rounds, {wrong} of them wrong")
    }
}

/// Spins until the time is up.
pub(crate) fn run(args: &Args) -> anyhow::Result<CpuReport> {
    let allowed = sched_getaffinity(None)?;
    let cpus: Vec<usize> = (0..CpuSet::MAX_CPU)
        .filter(|cpu| allowed.is_set(*cpu))
        .collect();
    let threads = args.threads.unwrap_or(cpus.len());
    let end = Instant::now() + Duration::from_secs(args.seconds);
    let mut report = CpuReport {
        load: "cpu",
        avx: registers::have_avx(),
        seed: fastrand::u64(..),
        ..CpuReport::default()
    };
    let seed = report.seed;
    let counts: Vec<_> = std::thread::scope(|scope| {
        let spawn = |(index, cpu): (usize, &usize)| {
            let cpu = *cpu;
            scope.spawn(move || spin(seed.wrapping_add(index as u64), cpu, end))
        };
        let threads: Vec<_> = cpus
            .iter()
            .cycle()
            .take(threads)
            .enumerate()
            .map(spawn)
            .collect();
        threads
            .into_iter()
            .map(std::thread::ScopedJoinHandle::join)
            .collect()
    });
    for count in counts {
        let count = count.map_err(|_| anyhow::anyhow!("a thread panicked"))?;
        report.iterations.push(count.iterations);
        report.wrong += count.wrong;
        report.complaints.extend(count.complaint);
    }
    report.ok = report.wrong == 0 && report.iterations.iter().all(|rounds| *rounds > 0);
    Ok(report)
}

#[derive(Default)]
struct Count {
    iterations: u64,
    wrong: u64,
    complaint: Option<String>,
}

fn spin(seed: u64, cpu: usize, end: Instant) -> Count {
    let mut only = CpuSet::new();
    only.set(cpu);
    // One that is not to be had is shared with whoever is there.
    let _ = sched_setaffinity(None, &only);
    let mut random = fastrand::Rng::with_seed(seed);
    let mut count = Count::default();
    let expected = chain(seed);
    while term::goes_on(end) || count.iterations == 0 {
        let given = Registers::random(&mut random);
        let kept = registers::hold(&given);
        let difference = given.difference(&kept);
        let result = chain(std::hint::black_box(seed));
        count.iterations += 1;
        if difference.is_some() || result.to_bits() != expected.to_bits() {
            count.wrong += 1;
            let what = difference.unwrap_or_else(|| format!("chain: {result}, not {expected}"));
            count
                .complaint
                .get_or_insert(format!("CPU {cpu}, round {}: {what}", count.iterations));
        }
    }
    count
}

/// Every step depends on all before it, and none of the bits ever settle.
fn chain(seed: u64) -> f64 {
    let mut x = (seed % 1000 + 1) as f64 / 1002.0;
    for _ in 0..20_000 {
        x = 3.99 * x * (1.0 - x);
    }
    x
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_machine_loses_no_registers() {
        let report = run(&Args {
            threads: Some(3),
            seconds: 0,
        });
        let report = report.unwrap();
        assert!(report.ok() && report.iterations.len() == 3, "{report:?}");
    }
}
