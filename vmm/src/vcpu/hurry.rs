//! Who goes first while a guest stands still.
//!
//! A blackout is a relay of short steps: each thread wakes, works for some microseconds, and wakes the
//! next. One that wakes on a busy core may have to wait there for a slice of the scheduler (3 to 4 ms), several
//! times the rest of the pause. So for as long as a guest stands still, and until its vCPUs have
//! begun, its threads go before all others (SCHED_FIFO, see sched(7)). That takes CAP_SYS_NICE or an RLIMIT_RTPRIO of
//! 2; a process without them stays where it is. Threads that an operator has
//! made real-time ones keep what they were given.
#![allow(unsafe_code)] // Scheduler calls that rustix does not have.

use std::time::Duration;

use rustix::thread::{Pid, gettid};

use super::placement::{self, Home};

/// Everybody of the relay alike: who waits awake yields to its equals ([`super::orders::wait_for`]), and
/// only to them.
const EQUAL: i32 = 1;
/// Who stops vCPUs, or lets them in. They may be on all cores, and yield to nobody of their own accord: an equal that
/// once lets go of its core beside them never has it again.
const ABOVE: i32 = 2;

/// Long enough for each core to have switched to the thread that was raised.
const EFFECT: Duration = Duration::from_micros(300);
/// Long enough for another process to wake up on a core that rests, and to wake its own threads.
const HEARING: Duration = Duration::from_micros(100);

/// Threads in a hurry, until it is dropped. The default are none.
#[must_use]
#[derive(Debug, Default)]
pub struct Hurry {
    /// Of those that could be hurried: the one that leads, and the vCPUs'.
    lead: Option<Hurried>,
    vcpus: Vec<Hurried>,
    /// vCPUs' threads that are kept on cores of their own meanwhile.
    apart: Vec<Home>,
}

#[derive(Clone, Copy, Debug)]
struct Hurried {
    thread: Pid,
    /// Its policy before.
    policy: i32,
}

impl Hurry {
    /// The calling thread, above these, which are kept apart. Best effort; where it can't be above them, nobody is raised: they would keep it
    /// from ending that.
    pub(super) fn with(vcpus: &[Pid]) -> Self {
        let apart = placement::keep_apart(vcpus);
        let lead = Hurried::new(gettid(), ABOVE);
        let vcpus = vcpus
            .iter()
            .filter(|_| lead.is_some())
            .filter_map(|&thread| Hurried::new(thread, EQUAL));
        Self {
            vcpus: vcpus.collect(),
            lead,
            apart,
        }
    }

    /// Whether this process may hurry.
    pub(super) fn is_allowed() -> bool {
        Self::with(&[]).lead.is_some()
    }

    /// Leaves the cores to the vCPUs until each of those that want one has it. One that is kicked while it waits for its
    /// turn stands still from the moment it began to wait; and to raise a thread may take its core from another.
    pub(crate) fn take_effect(&self) {
        self.leave_cores_for(EFFECT);
    }

    /// Leaves the cores that the vCPUs don't want to who was told that they are about to stand still.
    pub(crate) fn let_be_heard(&self) {
        self.leave_cores_for(HEARING);
    }

    fn leave_cores_for(&self, time: Duration) {
        if !self.vcpus.is_empty() {
            std::thread::sleep(time);
        }
    }

    /// The vCPUs stand still: who leads is one among them.
    pub fn among(&self) {
        self.lead_at(EQUAL);
    }

    /// The vCPUs are about to run their guest: who leads is above them again, and can end their hurry.
    pub(super) fn above(&self) {
        self.lead_at(ABOVE);
    }

    fn lead_at(&self, priority: i32) {
        if let Some(lead) = self.lead {
            let _ = set(lead.thread, libc::SCHED_FIFO, priority);
        }
    }
}

impl Drop for Hurry {
    fn drop(&mut self) {
        for hurried in self.vcpus.iter().chain(&self.lead) {
            // Gives up what the kernel lets everybody give up.
            let _ = set(hurried.thread, hurried.policy, 0);
        }
        self.apart.iter().for_each(Home::return_to);
    }
}

impl Hurried {
    fn new(thread: Pid, priority: i32) -> Option<Self> {
        // SAFETY: reads a number of a thread of ours.
        let policy = unsafe { libc::sched_getscheduler(thread.as_raw_nonzero().get()) };
        let is_ordinary = matches!(
            policy & !libc::SCHED_RESET_ON_FORK,
            libc::SCHED_OTHER | libc::SCHED_BATCH | libc::SCHED_IDLE
        );
        let hurried = is_ordinary && set(thread, libc::SCHED_FIFO, priority);
        hurried.then_some(Self { thread, policy })
    }
}

/// The nice value stays what it is, and counts again when the policy does (`sched_setscheduler`).
fn set(thread: Pid, policy: i32, priority: i32) -> bool {
    let param = libc::sched_param {
        sched_priority: priority,
    };
    // SAFETY: a plain integer structure; the thread is one of this process's, or gone.
    unsafe { libc::sched_setscheduler(thread.as_raw_nonzero().get(), policy, &param) == 0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn policy() -> (i32, i32) {
        policy_of(gettid())
    }

    fn policy_of(thread: Pid) -> (i32, i32) {
        let thread = thread.as_raw_nonzero().get();
        let mut param = libc::sched_param { sched_priority: 0 };
        // SAFETY: both read of a thread of ours.
        unsafe {
            libc::sched_getparam(thread, &mut param);
            (libc::sched_getscheduler(thread), param.sched_priority)
        }
    }

    /// Runs `test` beside another thread.
    fn beside(test: impl FnOnce(Pid)) {
        let (tell, told) = std::sync::mpsc::channel();
        let (end, ended) = std::sync::mpsc::channel::<()>();
        std::thread::scope(|scope| {
            scope.spawn(move || {
                tell.send(gettid()).expect("heard");
                let _ = ended.recv();
            });
            test(told.recv().expect("a thread"));
            drop(end);
        });
    }

    #[test]
    fn a_hurry_ends_where_it_began() {
        let us = gettid();
        if !set(us, libc::SCHED_FIFO, ABOVE) {
            eprintln!("SKIPPED hurry: this user may not raise a thread");
            return;
        }
        for before in [libc::SCHED_OTHER, libc::SCHED_BATCH] {
            assert!(set(us, before, 0));
            beside(|vcpu| {
                let own = policy_of(vcpu);
                assert!(Hurry::is_allowed());
                let hurry = Hurry::with(&[vcpu]);
                assert_eq!(policy(), (libc::SCHED_FIFO, ABOVE));
                assert_eq!(policy_of(vcpu), (libc::SCHED_FIFO, EQUAL));
                hurry.among();
                assert_eq!(policy(), (libc::SCHED_FIFO, EQUAL));
                hurry.above();
                assert_eq!(policy(), (libc::SCHED_FIFO, ABOVE));
                drop(hurry);
                assert_eq!((policy(), policy_of(vcpu)), ((before, 0), own));
            });
        }
    }

    #[test]
    fn where_who_leads_is_not_raised_nobody_is() {
        let us = gettid();
        beside(|vcpu| {
            if !set(us, libc::SCHED_RR, EQUAL) {
                eprintln!("SKIPPED hurry: this user may not raise a thread");
                return;
            }
            // New threads inherit the policy, so it is given after.
            let own = policy_of(vcpu);
            assert_eq!(own, (libc::SCHED_OTHER, 0));
            let hurry = Hurry::with(&[vcpu]);
            assert_eq!((policy(), policy_of(vcpu)), ((libc::SCHED_RR, EQUAL), own));
            assert!(!Hurry::is_allowed());
            drop(hurry);
            set(us, libc::SCHED_OTHER, 0);
        });
    }

    #[test]
    fn who_was_given_real_time_keeps_it() {
        let us = gettid();
        if !set(us, libc::SCHED_RR, 7) {
            eprintln!("SKIPPED hurry: this user may not raise a thread");
            return;
        }
        let hurry = Hurry::with(&[us]);
        hurry.among();
        assert_eq!(policy(), (libc::SCHED_RR, 7));
        drop(hurry);
        assert_eq!(policy(), (libc::SCHED_RR, 7));
        set(us, libc::SCHED_OTHER, 0);
    }
}
