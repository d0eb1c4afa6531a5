//! The probe for gaps: a thread on each CPU that looks at the clock as often as it can.
//!
//! What it finds is what any program of the guest would have felt: a pause of the whole guest
//! (which the guest's clock includes, or doesn't, by the VM's policy), a vCPU that its host did
//! not run, and the guest's own scheduler. A CPU that can't be had (offline meanwhile) is left
//! out of the answer.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
use rustix::time::{ClockId, clock_gettime};
use stillpoint_agent::protocol::{CpuGaps, Gap, Gaps, GapsSpec};

use super::clocks::nanos;

/// Gaps that are kept of each CPU.
const KEPT: usize = 16;
/// In each of these the threads look first, and then sleep.
const PERIOD_NS: u64 = 10_000_000;
/// A probe ends by itself after this long at most.
const LONGEST: Duration = Duration::from_secs(3600);

/// A probe that was started.
#[derive(Debug)]
pub(super) struct Probe {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<Option<CpuGaps>>>,
}

impl Probe {
    /// Starts a thread on every CPU that this process may run on.
    pub(super) fn start(spec: GapsSpec) -> io::Result<Self> {
        let allowed = sched_getaffinity(None)?;
        let mut probe = Self {
            stop: Arc::default(),
            threads: Vec::new(),
        };
        for cpu in (0..CpuSet::MAX_CPU).filter(|cpu| allowed.is_set(*cpu)) {
            let stop = Arc::clone(&probe.stop);
            let thread = std::thread::Builder::new()
                .name(format!("gaps-{cpu}"))
                .spawn(move || look(cpu, spec, &stop))?;
            probe.threads.push(thread);
        }
        Ok(probe)
    }

    /// What was found: now, or after the probe's whole time.
    pub(super) fn collect(mut self, wait: bool) -> Gaps {
        if !wait {
            self.stop.store(true, Ordering::Relaxed);
        }
        let threads = std::mem::take(&mut self.threads);
        let cpus = threads.into_iter().filter_map(|thread| thread.join().ok());
        Gaps {
            cpus: cpus.flatten().collect(),
        }
    }
}

impl Drop for Probe {
    /// A probe that was only half started must not go on.
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

fn look(cpu: usize, spec: GapsSpec, stop: &AtomicBool) -> Option<CpuGaps> {
    let mut only = CpuSet::new();
    only.set(cpu);
    sched_setaffinity(None, &only).ok()?;
    let mut found = CpuGaps {
        cpu: u32::try_from(cpu).ok()?,
        ..CpuGaps::default()
    };
    let threshold = spec.threshold_us.saturating_mul(1000);
    let awake = PERIOD_NS / 100 * u64::from(spec.duty_percent.clamp(1, 100));
    let duration = Duration::from_millis(spec.duration_ms).min(LONGEST);
    let begin = monotonic();
    let end = begin + u64::try_from(duration.as_nanos()).unwrap_or_default();
    let mut expected = begin;
    let mut sleep_at = begin + awake;
    loop {
        let now = monotonic();
        found.looks += 1;
        match now.checked_sub(expected) {
            None => found.backwards += 1,
            Some(ns) if ns > threshold => keep(
                &mut found.longest,
                Gap {
                    at_ns: expected,
                    ns,
                },
            ),
            Some(_) => {}
        }
        if now >= end || stop.load(Ordering::Relaxed) {
            return Some(found);
        }
        expected = now;
        if awake < PERIOD_NS && now >= sleep_at {
            std::thread::sleep(Duration::from_nanos(PERIOD_NS - awake));
            // It was not meant to look before this; a clock that has not come so far yet (the
            // sleep was cut short) is not one that went backwards.
            expected = (now + PERIOD_NS - awake).min(monotonic());
            sleep_at = monotonic() + awake;
        }
    }
}

fn monotonic() -> u64 {
    nanos(clock_gettime(ClockId::Monotonic))
}

/// Keeps the longest, longest first.
fn keep(longest: &mut Vec<Gap>, gap: Gap) {
    let at = longest.partition_point(|kept| kept.ns >= gap.ns);
    if at < KEPT {
        longest.truncate(KEPT - 1);
        longest.insert(at, gap);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_are_kept_in_order() {
        let mut longest = Vec::new();
        for ns in [5, 9, 1, 7].into_iter().chain(100..130) {
            keep(&mut longest, Gap { at_ns: 0, ns });
        }
        let lengths: Vec<u64> = longest.iter().map(|gap| gap.ns).collect();
        assert_eq!(lengths, (114..130).rev().collect::<Vec<_>>());
    }

    #[test]
    fn a_probe_looks_on_every_cpu_until_it_is_collected() {
        let spec = |duty_percent| GapsSpec {
            duration_ms: 600_000,
            duty_percent,
            threshold_us: 0,
        };
        let probes = [100, 10].map(|duty| Probe::start(spec(duty)).unwrap());
        // Only after each of the threads ran is there something to say of all.
        std::thread::sleep(Duration::from_millis(50));
        let cpus = sched_getaffinity(None).unwrap().count();
        for probe in probes {
            let gaps = probe.collect(false);
            assert_eq!(gaps.cpus.len(), usize::try_from(cpus).unwrap());
            for cpu in gaps.cpus {
                assert!(cpu.looks > 0 && cpu.backwards == 0, "{cpu:?}");
            }
        }
    }
}
