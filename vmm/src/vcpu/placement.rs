//! Where vCPU threads run while they are being started, or read.
//!
//! Threads that wake together often land on one core, and the second then waits for a tick of
//! the scheduler (4 ms at 250 Hz), or for the first, while another core idles. So each vCPU thread starts bound to a
//! core of its own, as far as there are cores, and is let go again when the guest runs; and those of a guest that is about to
//! stand still are kept apart until it runs again. And a
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
    /// Binds the calling thread to the core that the vCPU `id` should start on: for each process from another one on, or
    /// the first vCPUs of all guests that are swapped at once would meet. Best effort: a
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
        let first = rustix::process::getpid().as_raw_nonzero().get();
        let first = usize::try_from(first).unwrap_or(0);
        Self::bind(allowed, cores[(first + usize::from(id)) % cores.len()])
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
        Self::bind_other(gettid(), allowed, core)
    }

    fn bind_other(thread: Pid, allowed: CpuSet, core: usize) -> Self {
        let mut one = CpuSet::new();
        one.set(core);
        let bound = sched_setaffinity(Some(thread), &one);
        Self {
            thread,
            allowed: bound.ok().map(|()| allowed),
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

/// A thread of ours.
#[derive(Clone, Copy, Debug)]
struct Seen {
    thread: Pid,
    /// It runs, or waits for its core.
    runs: bool,
    /// The core that it is on, or was last.
    core: usize,
    allowed: CpuSet,
}

impl Seen {
    /// `None` of one that is gone.
    fn look(thread: Pid) -> Option<Self> {
        let path = format!("/proc/self/task/{}/stat", thread.as_raw_nonzero());
        let stat = std::fs::read_to_string(path).ok()?;
        // Behind the name, which may hold anything (proc_pid_stat(5)): state is field 3, processor field 39.
        let (_, fields) = stat.rsplit_once(')')?;
        let mut fields = fields.split_ascii_whitespace();
        let runs = fields.next()? == "R";
        Some(Self {
            thread,
            runs,
            core: fields.nth(35)?.parse().ok()?,
            allowed: sched_getaffinity(Some(thread)).ok()?,
        })
    }
}

/// Binds each of these threads to a core of its own, as far as there are cores: the one that it is on, if none of the others
/// is there. Best effort, like all of this. Gives those that were bound.
pub(super) fn keep_apart(threads: &[Pid]) -> Vec<Home> {
    let seen = threads.iter().copied().filter_map(Seen::look);
    let mut seen: Vec<Seen> = seen.collect();
    // To be moved costs a guest that runs some time, and one that sleeps nothing.
    seen.sort_by_key(|seen| !seen.runs);
    let bound = seen.iter().zip(apart(&seen));
    let bound = bound.filter(|(seen, _)| seen.allowed.count() > 1);
    bound
        .map(|(seen, core)| Home::bind_other(seen.thread, seen.allowed, core))
        .collect()
}

/// A core for each: the one that it is on, unless there is another with fewer of them.
fn apart(threads: &[Seen]) -> Vec<usize> {
    let mut crowds = vec![0_u32; CpuSet::MAX_CPU];
    let place = |seen: &Seen| {
        let all = 0..CpuSet::MAX_CPU;
        // From its own on, so that not all guests of a host go to the first.
        let from_here = all.map(|step| (seen.core + step) % CpuSet::MAX_CPU);
        let core = from_here
            .filter(|&core| seen.allowed.is_set(core))
            .min_by_key(|&core| crowds[core])
            .unwrap_or(seen.core % CpuSet::MAX_CPU);
        crowds[core] += 1;
        core
    };
    threads.iter().map(place).collect()
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

#[cfg(test)]
mod tests {
    use super::*;

    fn set(cores: &[usize]) -> CpuSet {
        let mut set = CpuSet::new();
        cores.iter().for_each(|&core| set.set(core));
        set
    }

    fn on(core: usize, allowed: &[usize]) -> Seen {
        Seen {
            thread: gettid(),
            runs: false,
            core,
            allowed: set(allowed),
        }
    }

    #[test]
    fn who_has_a_core_of_its_own_stays_there() {
        let four = [0, 1, 2, 3];
        let places = |cores: &[usize]| {
            let threads: Vec<_> = cores.iter().map(|&core| on(core, &four)).collect();
            apart(&threads)
        };
        assert_eq!(places(&[3, 1, 2]), [3, 1, 2]);
        assert_eq!(places(&[1, 1]), [1, 2]);
        assert_eq!(places(&[3, 3, 3]), [3, 0, 1]);
        // More of them than cores: as many on each.
        let mut many = places(&[0; 8]);
        many.sort_unstable();
        assert_eq!(many, [0, 0, 1, 1, 2, 2, 3, 3]);
    }

    #[test]
    fn nobody_is_put_where_it_may_not_be() {
        let threads = [on(1, &[0, 1]), on(1, &[1]), on(5, &[0, 1])];
        assert_eq!(apart(&threads), [1, 1, 0]);
        assert_eq!(apart(&[on(7, &[])]), [7]);
    }

    #[test]
    fn threads_are_let_go_again() {
        let own = sched_getaffinity(None).expect("affinity");
        if own.count() < 2 {
            eprintln!("SKIPPED placement: one core");
            return;
        }
        let (tell, told) = std::sync::mpsc::channel();
        let end = std::sync::Barrier::new(3);
        std::thread::scope(|scope| {
            for _ in 0..2 {
                let (tell, end) = (tell.clone(), &end);
                scope.spawn(move || {
                    tell.send(gettid()).expect("heard");
                    end.wait();
                });
            }
            let threads: Vec<Pid> = told.iter().take(2).collect();
            let of = |thread: Pid| sched_getaffinity(Some(thread)).expect("affinity");
            let homes = keep_apart(&threads);
            let [one, other] = [of(threads[0]), of(threads[1])];
            assert_eq!((one.count(), other.count()), (1, 1));
            assert_ne!(one, other);
            homes.iter().for_each(Home::return_to);
            threads
                .iter()
                .for_each(|&thread| assert_eq!(of(thread), own));
            end.wait();
        });
    }
}
