//! The thread behind a device, and how it comes to rest.
//!
//! ```text
//!            install            start                 drain
//!   Vacant ──────────▶ Still ──────────▶ Running ──────────────▶ Draining
//!                        ▲  ◀── freeze ─────┘  ◀──── start ──────────┘ │
//!                        └───────────────── freeze ───────────────────┘
//!   any ── drop ──▶ Over
//! ```
//!
//! The thread sleeps in `epoll_wait` without a lock and works with the lock held, in short turns.
//! So whoever has the lock knows that the device is between two turns: a freeze is taking the
//! lock and writing a word, and no thread has to be woken for it. Requests that a kind passed on to
//! threads of its own are *in flight*; a drain waits for them, while the guest still runs, and
//! takes no new ones meanwhile.
//!
//! Kicks are watched edge-triggered and their counters never read: after every start each queue is
//! looked at once, so a kick that nobody saw is not lost.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, TryLockError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, epoll, eventfd};
use std::os::fd::OwnedFd;
use virtio_queue::Queue;

use super::complaints::Complaints;
use super::poller::{Poller, Watch};
use super::queue::{Broken, CONFIG, Interrupt, Queues, USED};
use super::{FIRST_TOKEN, Kind};
use crate::devices::Busy;
use crate::faults::{self, Spoilt};
use crate::irq::Kick;
use crate::memory::Memory;

/// Token of the wake-up eventfd; below it are the queues, and [`FIRST_TOKEN`] and above are the
/// kind's own.
const WAKE: u64 = FIRST_TOKEN - 1;

/// How often a device's lock is tried by whoever only looks.
const GLANCE: Duration = Duration::from_micros(100);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    /// Nothing is installed yet.
    Vacant,
    /// Nothing is done.
    Still,
    /// At work.
    Running,
    /// What is in flight ends; nothing new is taken.
    Draining,
    /// The thread ends.
    Over,
}

/// What the lock protects.
#[derive(Debug)]
pub(super) struct Work {
    pub(super) phase: Phase,
    pub(super) kind: Option<Box<dyn Kind>>,
    pub(super) queues: Vec<Option<Queue>>,
    /// The driver has said DRIVER_OK, and the device has not failed since.
    pub(super) live: bool,
    /// Queues to be looked at, kicked or not, one bit for each.
    again: u64,
    /// Queues with requests given back of which the driver was not told yet.
    untold: u64,
}

#[derive(Debug)]
struct Shared {
    work: Mutex<Work>,
    /// Told when the phase changes, and when the last request in flight has ended.
    changed: Condvar,
    interrupt: Interrupt,
    memory: Memory,
    poller: Poller,
    wake: OwnedFd,
    name: String,
    complaints: Complaints,
}

/// A device's thread.
#[derive(Debug)]
pub(super) struct Worker {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Worker {
    /// Starts a thread that watches `kicks`; it does nothing until a kind is installed.
    pub(super) fn start(
        name: &str,
        kicks: &[Kick],
        interrupt: Interrupt,
        memory: Memory,
    ) -> std::io::Result<Self> {
        let poller = Poller::new()?;
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        for (queue, kick) in kicks.iter().enumerate() {
            poller.add(kick, queue as u64, Watch::IN | Watch::ET)?;
        }
        poller.add(&wake, WAKE, Watch::IN | Watch::ET)?;
        let shared = Arc::new(Shared {
            work: Mutex::new(Work {
                phase: Phase::Vacant,
                kind: None,
                queues: Vec::new(),
                live: false,
                again: 0,
                untold: 0,
            }),
            changed: Condvar::new(),
            interrupt,
            memory,
            poller,
            wake,
            name: name.to_owned(),
            complaints: Complaints::default(),
        });
        let own = Arc::clone(&shared);
        let thread = std::thread::Builder::new()
            .name(name.to_owned())
            .spawn(move || own.run())?;
        Ok(Self {
            shared,
            thread: Some(thread),
        })
    }

    pub(super) fn interrupt(&self) -> &Interrupt {
        &self.shared.interrupt
    }

    pub(super) fn memory(&self) -> &Memory {
        &self.shared.memory
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Work> {
        self.shared.lock()
    }

    /// What is at work there, if the device's thread lets go of it within `patience`.
    pub(super) fn lock_within(&self, patience: Duration) -> Option<MutexGuard<'_, Work>> {
        let deadline = Instant::now() + patience;
        loop {
            match self.shared.work.try_lock() {
                Ok(work) => return Some(work),
                Err(TryLockError::Poisoned(held)) => return Some(held.into_inner()),
                Err(TryLockError::WouldBlock) if Instant::now() < deadline => {
                    std::thread::sleep(GLANCE);
                }
                Err(TryLockError::WouldBlock) => return None,
            }
        }
    }

    /// Puts the device in its place: it stands still.
    pub(super) fn install(&self, mut kind: Box<dyn Kind>, queues: Vec<Option<Queue>>, live: bool) {
        let mut work = self.lock();
        if let Err(error) = kind.watch(&self.shared.poller) {
            tracing::error!(device = self.shared.name, %error, "cannot watch the device's files");
            self.shared.interrupt.set_failed(true);
        }
        work.kind = Some(kind);
        work.queues = queues;
        work.live = live && !self.shared.interrupt.has_failed();
        work.phase = Phase::Still;
    }

    /// Lets it work, from a look at every queue on.
    pub(super) fn go(&self) {
        let mut work = self.lock();
        work.phase = Phase::Running;
        work.again = u64::MAX;
        if work.live || self.shared.interrupt.has_failed() {
            // Whatever the guest has not acknowledged, and whatever it was told of by an edge
            // that got lost between two machines: at worst it looks in vain.
            let why = if work.live { USED } else { CONFIG };
            self.shared.interrupt.raise(why);
        }
        drop(work);
        self.shared.changed.notify_all();
        self.shared.wake_up();
    }

    /// Takes nothing new, and waits until nothing is in flight.
    pub(super) fn drain(&self, deadline: Instant) -> Result<(), Busy> {
        let mut work = self.lock();
        if work.phase != Phase::Running {
            return Ok(());
        }
        work.phase = Phase::Draining;
        self.await_quiet(work, deadline).map(drop)
    }

    /// Waits until nothing is in flight. The device's thread goes on meanwhile.
    pub(super) fn await_quiet<'w>(
        &'w self,
        mut work: MutexGuard<'w, Work>,
        deadline: Instant,
    ) -> Result<MutexGuard<'w, Work>, Busy> {
        while work.in_flight() > 0 {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(self.busy(&work));
            }
            let waited = self.shared.changed.wait_timeout(work, left);
            work = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        Ok(work)
    }

    fn busy(&self, work: &Work) -> Busy {
        Busy {
            device: self.shared.name.clone(),
            in_flight: work.in_flight(),
        }
    }

    /// From its return to [`Worker::go`] the device does nothing.
    pub(super) fn freeze(&self, deadline: Instant) -> Result<(), Busy> {
        loop {
            match self.shared.work.try_lock() {
                Ok(mut work) => return self.freeze_locked(&mut work),
                Err(TryLockError::Poisoned(held)) => {
                    return self.freeze_locked(&mut held.into_inner());
                }
                // A turn lasts microseconds; its length must not become the guest's pause.
                Err(TryLockError::WouldBlock) if Instant::now() < deadline => {
                    std::thread::yield_now();
                }
                Err(TryLockError::WouldBlock) => {
                    let device = self.shared.name.clone();
                    return Err(Busy {
                        device,
                        in_flight: 1,
                    });
                }
            }
        }
    }

    fn freeze_locked(&self, work: &mut Work) -> Result<(), Busy> {
        if work.in_flight() > 0 {
            return Err(self.busy(work));
        }
        if matches!(work.phase, Phase::Running | Phase::Draining) {
            work.phase = Phase::Still;
        }
        Ok(())
    }

    /// What is wrong with the device is shown to its driver, once.
    pub(super) fn fail(&self, work: &mut Work, why: &Broken) {
        self.shared.fail(work, why);
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.lock().phase = Phase::Over;
        self.shared.changed.notify_all();
        self.shared.wake_up();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Work {
    pub(super) fn in_flight(&self) -> usize {
        self.kind.as_ref().map_or(0, |kind| kind.in_flight())
    }
}

impl Shared {
    fn wake_up(&self) {
        // Fails only if it was written 2^64 times and never read.
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
    }

    fn lock(&self) -> MutexGuard<'_, Work> {
        self.work.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn run(&self) {
        let mut at_once = false;
        loop {
            let events = self.poller.wait(at_once);
            let mut work = self.lock();
            while matches!(work.phase, Phase::Vacant | Phase::Still) {
                let waited = self.changed.wait(work);
                work = waited.unwrap_or_else(PoisonError::into_inner);
            }
            if work.phase == Phase::Over {
                return;
            }
            let turn = catch_unwind(AssertUnwindSafe(|| self.turn(&mut work, &events)));
            let result = turn.unwrap_or_else(|_| Err(Broken::Bug("it panicked".into())));
            if let Err(why) = result {
                self.fail(&mut work, &why);
            }
            if work.in_flight() == 0 {
                self.changed.notify_all();
            }
            at_once = work.again != 0 && work.live && work.phase == Phase::Running;
        }
    }

    /// One turn, with the lock held.
    fn turn(&self, work: &mut Work, events: &[epoll::Event]) -> Result<(), Broken> {
        if faults::is_spoilt(Spoilt::Queue) {
            return Ok(());
        }
        let Work {
            phase,
            kind: Some(kind),
            queues,
            live,
            again,
            untold,
        } = work
        else {
            return Ok(());
        };
        let looked_for = match *live && *phase == Phase::Running {
            true => std::mem::take(again),
            false => 0,
        };
        let mut queues = Queues {
            memory: &self.memory,
            queues,
            interrupt: &self.interrupt,
            again,
            untold,
        };
        // What is in flight ends, whether the device is drained, failed, or being reset.
        for token in events.iter().map(|event| event.data.u64()) {
            if token >= FIRST_TOKEN {
                kind.ready(token, *live, &mut queues)?;
            }
        }
        if !*live || *phase != Phase::Running {
            return Ok(());
        }
        for queue in 0..queues.count() {
            let kicked = || events.iter().any(|event| event.data.u64() == queue as u64);
            if looked_for & 1 << queue != 0 || kicked() {
                kind.serve(queue, &mut queues)?;
            }
        }
        Ok(())
    }

    fn fail(&self, work: &mut Work, why: &Broken) {
        if !std::mem::replace(&mut work.live, false) {
            return;
        }
        // A driver may reset it and have it fail again, for ever.
        if let Some(more) = self.complaints.due() {
            tracing::warn!(
                device = self.name, %why, more,
                "the device failed; it waits for a reset by its driver",
            );
        }
        self.interrupt.set_failed(true);
        self.interrupt.raise(CONFIG);
    }
}
