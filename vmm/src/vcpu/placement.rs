//! Where vCPU threads run while they are being started, or read.
//!
//! Threads that wake together often land on one core, and the second then waits for a tick of
//! the scheduler (4 ms at 250 Hz) while another core idles. So each vCPU thread starts bound to a
//! core of its own, as far as there are cores, and is let go again when the guest runs. And a
//! predecessor that retires has milliseconds of clearing up to do, in the very moment in which the
//! guest starts elsewhere: it does that with time nobody else wants. Nothing but this process's
//! own threads is touched.
#![allow(unsafe_code)] // One scheduler call that rustix does not have.

use rustix::thread::{CpuSet, Pid, gettid, sched_getaffinity, sched_getcpu, sched_setaffinity};

/// A thread, and the cores it was allowed if it was bound to one of them.
#[derive(Clone, Copy, Debug)]
pub struct Home {
    thread: Pid,
    allowed: Option<CpuSet>,
}

impl Home {
    /// Binds the calling thread to the core that the vCPU `id` should start on. Best effort: a
    /// process that may not do so has the scheduler's own placement.
    pub(super) fn spread(id: u8) -> Self {
        let Ok(allowed) = sched_getaffinity(None) else {
            return Self::unbound();
        };
        let cores: Vec<usize> = (0..CpuSet::MAX_CPU)
            .filter(|&core| allowed.is_set(core))
            .collect();
        if cores.len() < 2 {
            return Self::unbound();
        }
        Self::bind(allowed, cores[usize::from(id) % cores.len()])
    }

    /// Binds the calling thread to the core that it is on. Best effort, too.
    pub(super) fn stay() -> Self {
        match sched_getaffinity(None) {
            Ok(allowed) => Self::bind(allowed, sched_getcpu()),
            Err(_) => Self::unbound(),
        }
    }

    fn unbound() -> Self {
        Self {
            thread: gettid(),
            allowed: None,
        }
    }

    fn bind(allowed: CpuSet, core: usize) -> Self {
        let mut one = CpuSet::new();
        one.set(core);
        Self {
            thread: gettid(),
            allowed: sched_setaffinity(None, &one).ok().map(|()| allowed),
        }
    }

    /// The thread.
    pub(super) fn thread(&self) -> Pid {
        self.thread
    }

    /// Gives the thread its old freedom back.
    pub(super) fn return_to(&self) {
        if let Some(allowed) = &self.allowed {
            let _ = sched_setaffinity(Some(self.thread), allowed);
        }
    }
}

/// How many cores this process may use; none if nobody tells.
pub(super) fn cores() -> usize {
    sched_getaffinity(None).map_or(0, |set| set.count() as usize)
}

/// Lets everything else run before the calling thread (SCHED_IDLE, and the least share for its
/// session where the kernel groups by session). Lowering oneself needs no privilege. A session
/// that others are in, the successor among them perhaps, is left as it is.
pub fn stand_back() {
    // SAFETY: a plain integer structure; pid 0 is the calling thread.
    unsafe {
        libc::sched_setscheduler(
            0,
            libc::SCHED_IDLE,
            &libc::sched_param { sched_priority: 0 },
        )
    };
    let us = rustix::process::getpid();
    if rustix::process::getsid(None).is_ok_and(|leader| leader == us) {
        let _ = std::fs::write("/proc/self/autogroup", "19");
    }
}
