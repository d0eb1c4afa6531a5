//! How long each vCPU is out of its guest, by its own thread's stamps, and for how much of that the
//! thread waits for a core.
//!
//! The host's blackout runs from the first kick to the last entry. Where vCPUs outnumber cores, most of it is one vCPU
//! waiting while another works, or while another's guest already runs: what the host is short of, not what a swap costs. So
//! both are told, for each vCPU.

use std::time::Duration;

use crate::clock;
use crate::clock::steal::RunDelay;

/// A vCPU that came out of its guest.
#[derive(Clone, Copy, Debug, Default)]
pub struct Left {
    /// Host TSC when it did.
    pub tsc: u64,
    /// What its thread waited for a core from then until its state was saved.
    pub queued: Duration,
}

impl Left {
    pub(super) fn now() -> Self {
        Self {
            tsc: clock::host_tsc(),
            queued: Duration::ZERO,
        }
    }
}

/// A vCPU that was let into its guest.
#[derive(Clone, Copy, Debug, Default)]
pub struct Entry {
    /// Host TSC when it was.
    pub tsc: u64,
    /// KVM will tell its guest that it stood still.
    pub told: bool,
    /// What its thread waited for a core since there was something to load.
    pub queued: Duration,
}

/// What a vCPU's thread waits for a core, in a stretch of time that has holes.
#[derive(Debug, Default)]
pub(super) struct Queue {
    delay: RunDelay,
    mark: Duration,
    queued: Duration,
}

impl Queue {
    /// Of the calling thread.
    pub(super) fn of_this_thread() -> Self {
        let delay = RunDelay::of_this_thread();
        Self {
            mark: delay.read(),
            queued: Duration::ZERO,
            delay,
        }
    }

    /// All it has waited in its life.
    pub(super) fn ever(&self) -> Duration {
        self.delay.read()
    }

    /// Counts from now on.
    pub(super) fn restart(&mut self) {
        self.forget();
        self.skip();
    }

    /// What was counted so far counts no more.
    pub(super) fn forget(&mut self) {
        self.queued = Duration::ZERO;
    }

    /// Leaves out what was since the last call of any of these: a thread that stays awake with nothing to do, and yields, is
    /// in the queue too, and wants nothing.
    pub(super) fn skip(&mut self) {
        self.mark = self.delay.read();
    }

    /// What it waited, holes left out, until now.
    pub(super) fn so_far(&mut self) -> Duration {
        let before = self.mark;
        self.skip();
        self.queued += self.mark.saturating_sub(before);
        self.queued
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Works beside another thread on one core, so that both wait for it, until one has for this long.
    fn contend(queue: &mut Queue, until: Duration) {
        let mut set = rustix::thread::CpuSet::new();
        set.set(rustix::thread::sched_getcpu());
        let before = rustix::thread::sched_getaffinity(None).expect("affinity");
        rustix::thread::sched_setaffinity(None, &set).expect("one core");
        let over = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| {
            // Inherits the core.
            scope.spawn(|| {
                while !over.load(std::sync::atomic::Ordering::Relaxed) {
                    std::hint::spin_loop()
                }
            });
            let from = queue.ever();
            let patience = std::time::Instant::now() + Duration::from_secs(20);
            while queue.ever() - from < until && std::time::Instant::now() < patience {}
            over.store(true, std::sync::atomic::Ordering::Relaxed);
        });
        rustix::thread::sched_setaffinity(None, &before).expect("as before");
    }

    #[test]
    fn a_wait_counts_unless_it_is_left_out() {
        let wait = Duration::from_millis(5);
        let mut queue = Queue::of_this_thread();
        queue.restart();
        contend(&mut queue, wait);
        let first = queue.so_far();
        assert!(first >= wait, "{first:?}");
        contend(&mut queue, wait);
        queue.skip();
        contend(&mut queue, wait);
        let both = queue.so_far();
        assert!(both >= first + wait, "{both:?} after {first:?}");
        assert!(both < queue.ever() - wait, "the one in the middle counts");
        queue.restart();
        assert!(queue.so_far() < wait);
    }
}
