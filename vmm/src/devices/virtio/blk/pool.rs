//! Threads that do a disk's I/O, made once and before any blackout.
//!
//! They take orders from one channel, and put what is done into another, with a bell (an eventfd)
//! for the device's thread. A pool that is dropped doesn't wait for its threads: one may hang in a
//! disk that is gone. Each ends when its I/O does.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{Receiver, Sender, TryIter, channel};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use rustix::event::{EventfdFlags, eventfd};

use super::disk::{Disk, Outcome};
use super::request::Io;
use crate::devices::virtio::queue::{Broken, Chain};
use crate::memory::Memory;

/// Threads of each disk: requests that the host's disk sees at once.
const THREADS: usize = 4;

/// A request to be done.
#[derive(Debug)]
pub(super) struct Order {
    pub(super) chain: Chain,
    pub(super) io: Io,
    pub(super) memory: Memory,
}

/// A request that was done, well or not.
#[derive(Debug)]
pub(super) struct Done {
    pub(super) chain: Chain,
    pub(super) outcome: Outcome,
}

#[derive(Debug)]
enum Task {
    Order(Order),
    /// A thread waits until the other end is dropped: a slow disk, for tests.
    #[cfg(test)]
    Stall(Receiver<()>),
}

/// The threads, from outside.
#[derive(Debug)]
pub(super) struct Pool {
    tasks: Sender<Task>,
    done: Receiver<Done>,
    bell: Arc<OwnedFd>,
}

impl Pool {
    /// Starts the threads of a disk.
    pub(super) fn start(name: &str, disk: &Arc<Disk>) -> std::io::Result<Self> {
        let (tasks, waiting) = channel();
        let (finished, done) = channel();
        let bell = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let bell = Arc::new(bell);
        let waiting = Arc::new(Mutex::new(waiting));
        for number in 0..THREADS {
            let thread = Thread {
                disk: Arc::downgrade(disk),
                waiting: Arc::clone(&waiting),
                finished: finished.clone(),
                bell: Arc::clone(&bell),
            };
            std::thread::Builder::new()
                .name(format!("{name}-io{number}"))
                .spawn(move || thread.run())?;
        }
        Ok(Self { tasks, done, bell })
    }

    /// Has something done.
    pub(super) fn order(&self, order: Order) -> Result<(), Broken> {
        let sent = self.tasks.send(Task::Order(order));
        // They end only when this sender does.
        sent.map_err(|_| Broken::Bug("its I/O threads are gone".into()))
    }

    /// What was done since the last call.
    pub(super) fn done(&self) -> TryIter<'_, Done> {
        self.done.try_iter()
    }

    /// Keeps every thread from its work until what is given is dropped.
    #[cfg(test)]
    pub(super) fn stall(&self) -> Vec<Sender<()>> {
        let stall = || {
            let (end, other) = channel();
            self.tasks.send(Task::Stall(other)).expect("threads");
            end
        };
        (0..THREADS).map(|_| stall()).collect()
    }
}

/// The bell.
impl AsFd for Pool {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.bell.as_fd()
    }
}

struct Thread {
    /// So that a disk is closed, and its lock let go, when its device is, and not a moment later.
    disk: Weak<Disk>,
    waiting: Arc<Mutex<Receiver<Task>>>,
    finished: Sender<Done>,
    bell: Arc<OwnedFd>,
}

impl Thread {
    fn run(self) {
        loop {
            // One thread waits in the channel, the others for the lock.
            let next = self
                .waiting
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .recv();
            match next {
                Ok(Task::Order(order)) => self.carry_out(order),
                #[cfg(test)]
                Ok(Task::Stall(end)) => drop(end.recv()),
                Err(_) => return,
            }
        }
    }

    fn carry_out(&self, Order { chain, io, memory }: Order) {
        // Its device is gone, and nobody waits for this.
        let Some(disk) = self.disk.upgrade() else {
            return;
        };
        let perform = AssertUnwindSafe(|| disk.perform(&io, &memory));
        let outcome = catch_unwind(perform).unwrap_or(Outcome { ok: false, read: 0 });
        // What is the guest's is let go before anybody can know that this is done.
        drop((disk, memory));
        let _ = self.finished.send(Done { chain, outcome });
        // Fails only if it was written 2^64 times; it is watched by edges and never read.
        let _ = rustix::io::write(&*self.bell, &1u64.to_ne_bytes());
    }
}
