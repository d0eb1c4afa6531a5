//! All vCPUs of a machine: one thread each, steered by broadcast and gather.
//!
//! ```text
//!            Run / Enter                 Stop
//!   Parked ─────────────▶ Running    ──────────▶ Stopped
//!     ▲  ◀───────────────    │
//!     │    Park + kick       │ shutdown, failure
//!     └── Save, Load ──      ▼
//!                          Ended (parks, but never runs again)
//! ```
//!
//! An order is sent to every thread before any answer is awaited, so the pause does not grow with
//! the number of vCPUs while there are cores. A vCPU counts as parked only when `KVM_RUN` came
//! back with `EINTR`: by then KVM has completed every port or memory access that the vCPU was in
//! the middle of (api.rst, KVM_RUN: "pending operations complete after re-entering").

pub mod error;
pub mod hurry;
pub mod load;
pub mod msrs;
pub mod outside;
pub mod placement;
pub mod state;
pub mod timer;

mod answers;
mod exit;
mod orders;
mod run;
mod settle;

use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use kvm_ioctls::VcpuFd;
use stillpoint_state::sections::Vcpu as VcpuSection;
use stillpoint_state::{Unread, Written};

use crate::bus::Bus;
use crate::event::Event;
use crate::memory::Memory;
use answers::{Answers, answers};
use error::VcpuError;
use hurry::Hurry;
use load::{LoadedVcpu, Pause};
use orders::{Answer, Gone, Order, SPIN, wait_for};
use outside::{Entry, Left};
use placement::Home;

/// How long the machine thread leaves the cores to vCPUs that were just let in.
const HEAD_START: Duration = Duration::from_millis(1);

/// How often a vCPU that was kicked is looked at.
const GLANCE: Duration = Duration::from_micros(200);

/// Why not all vCPUs did as they were told.
#[derive(Debug, thiserror::Error)]
pub enum VcpusError {
    /// Some did not answer in time.
    #[error("{missing} of {count} vCPUs did not {what} within {waited:?}")]
    Late {
        /// How many.
        missing: usize,
        /// Of how many.
        count: usize,
        /// What they were told.
        what: &'static str,
        /// How long they were given.
        waited: Duration,
    },
    /// One failed.
    #[error("vCPU {vcpu}: {source}")]
    Vcpu {
        /// Which.
        vcpu: u8,
        /// Why.
        source: VcpuError,
    },
    /// A thread could not be started.
    #[error("cannot start a vCPU thread: {0}")]
    Spawn(std::io::Error),
    /// A thread died.
    #[error("a vCPU thread died")]
    Died,
}

#[derive(Debug)]
struct Thread {
    orders: Sender<Order>,
    handle: Option<JoinHandle<()>>,
    /// Known once it is ready.
    home: Option<Home>,
    turns: Arc<AtomicU64>,
}

/// The vCPUs.
#[derive(Debug)]
pub struct VcpuSet {
    threads: Vec<Thread>,
    answers: Answers,
    /// How long an answer is waited for awake.
    spin: Duration,
}

/// How long answers are waited for.
struct Wait {
    /// What the vCPUs were told, for the error.
    what: &'static str,
    /// Stay awake this long, see [`is_room_to_wait_awake`].
    spin: Duration,
    /// Give up after this.
    patience: Duration,
}

/// Each vCPU that loads holds a sender until it has written to its TSC for the last time.
#[derive(Debug)]
pub struct TscsStand(Receiver<()>, Duration);

impl TscsStand {
    /// Waits until they have, or have failed, or the time is up. What it was shows in
    /// [`VcpuSet::loaded`].
    pub fn wait(self, patience: Duration) {
        let _ = wait_for(&self.0, self.1, Instant::now() + patience);
    }
}

impl From<Gone> for VcpusError {
    fn from(Gone: Gone) -> Self {
        Self::Died
    }
}

/// How the vCPUs were let in.
#[derive(Clone, Debug, Default)]
pub struct Entered {
    /// Host TSC at the last of them.
    pub tsc: u64,
    /// Each of them.
    pub vcpus: Vec<Entry>,
}

impl Entered {
    /// For each vCPU: whether its guest will hear that it stood still.
    pub fn told(&self) -> Vec<bool> {
        self.vcpus.iter().map(|entry| entry.told).collect()
    }
}

/// A vCPU's state, and how it came to rest.
#[derive(Debug)]
pub struct SavedVcpu {
    /// Its state, as its thread wrote it.
    pub section: Written<VcpuSection>,
    /// How it came to rest.
    pub left: Left,
}

/// What every vCPU thread shares.
#[derive(Clone, Debug)]
pub struct Surroundings {
    /// Guest RAM.
    pub memory: Memory,
    /// The machine thread's queue.
    pub events: Sender<Event>,
}

/// Whether who waits for a word that is microseconds away may stay awake for it. It must not keep anybody from what is waited
/// for: so there is a core that no vCPU needs, or each has one and all are real-time threads, among which who waits
/// yields to who works at once.
fn is_room_to_wait_awake(vcpus: usize) -> bool {
    let cores = placement::cores();
    cores > vcpus || (cores == vcpus && Hurry::is_allowed())
}

impl VcpuSet {
    /// Starts a thread for each, parked.
    pub fn start(fds: Vec<VcpuFd>, around: &Surroundings) -> Result<Self, VcpusError> {
        let (answer, answers) = answers();
        let spin = match is_room_to_wait_awake(fds.len()) {
            true => SPIN,
            false => Duration::ZERO,
        };
        let mut set = Self {
            threads: Vec::with_capacity(fds.len()),
            answers,
            spin,
        };
        for (id, fd) in (0u8..).zip(fds) {
            let (orders, inbox) = channel();
            let around = around.clone();
            let turns = Arc::new(AtomicU64::new(0));
            let ends = run::Ends {
                orders: inbox,
                answers: answer.clone(),
                turns: Arc::clone(&turns),
                spin,
            };
            let thread = std::thread::Builder::new().name(format!("vcpu{id}"));
            let handle = thread
                .spawn(move || {
                    let events = around.events.clone();
                    let runner = run::Runner::new(id, fd, around, ends);
                    // A bug here must not cost the guest a processor in silence.
                    if catch_unwind(AssertUnwindSafe(|| runner.run())).is_err() {
                        let failure = Some("its thread panicked, which is a bug".to_owned());
                        let _ = events.send(Event::VcpuOver { vcpu: id, failure });
                    }
                })
                .map_err(VcpusError::Spawn)?;
            set.threads.push(Thread {
                orders,
                handle: Some(handle),
                home: None,
                turns,
            });
        }
        // Each thread primes its vCPU first: KVM binds it to the thread (a first KVM_RUN from
        // another one waits for an RCU grace period) and consumes requests left by its creation.
        let ready = Duration::from_secs(10);
        let homes = set.gather(
            Wait {
                what: "get ready",
                spin: Duration::ZERO,
                patience: ready,
            },
            |answer| match answer {
                Answer::Ready(result) => Some(result),
                _ => None,
            },
        )?;
        for (thread, home) in set.threads.iter_mut().zip(homes) {
            thread.home = Some(home);
        }
        Ok(set)
    }

    /// Lets the threads run wherever they were allowed to before they were spread.
    pub fn release_cpus(&self) {
        for home in self.homes() {
            home.return_to();
        }
    }

    fn homes(&self) -> impl Iterator<Item = &Home> {
        self.threads
            .iter()
            .filter_map(|thread| thread.home.as_ref())
    }

    /// Has the calling thread, which leads, and the vCPUs' go before all others.
    pub fn hurry(&self) -> Hurry {
        let threads: Vec<_> = self.homes().map(Home::thread).collect();
        Hurry::with(&threads)
    }

    /// How many.
    pub fn count(&self) -> usize {
        self.threads.len()
    }

    fn tell(&self, order: impl FnMut(usize) -> Order) -> Result<(), VcpusError> {
        self.tell_each((0..self.count()).map(order))
    }

    /// One order for each, in order.
    fn tell_each(&self, orders: impl Iterator<Item = Order>) -> Result<(), VcpusError> {
        self.answers.expect(self.count());
        for (thread, order) in self.threads.iter().zip(orders) {
            thread.orders.send(order).map_err(|_| VcpusError::Died)?;
        }
        Ok(())
    }

    /// Waits for an answer of each vCPU that `pick` takes; others are late ones of a gather that was
    /// given up on, and are dropped.
    fn gather<T>(
        &self,
        wait: Wait,
        mut pick: impl FnMut(Answer) -> Option<Result<T, VcpuError>>,
    ) -> Result<Vec<T>, VcpusError> {
        let Wait {
            what,
            spin,
            patience,
        } = wait;
        let (began, count) = (Instant::now(), self.count());
        let mut got: Vec<Option<T>> = (0..count).map(|_| None).collect();
        let mut missing = count;
        let mut failure = None;
        while missing > 0 {
            let Some((vcpu, answer)) = self.answers.next(spin, began + patience)? else {
                return Err(VcpusError::Late {
                    missing,
                    count,
                    what,
                    waited: began.elapsed(),
                });
            };
            match pick(answer) {
                Some(Ok(value)) => got[usize::from(vcpu)] = Some(value),
                Some(Err(source)) => failure = Some(VcpusError::Vcpu { vcpu, source }),
                None => continue,
            }
            missing -= 1;
        }
        match failure {
            Some(error) => Err(error),
            None => Ok(got.into_iter().flatten().collect()),
        }
    }

    /// Brings every vCPU to rest; who leads is one among them then. On an error some may be parked: call [`VcpuSet::unpark`].
    pub fn park(&self, hurry: &Hurry, patience: Duration) -> Result<(), VcpusError> {
        self.tell(|_| Order::Park)?;
        self.kick();
        // Who waits awake must be one among them by now: one that slept may have been woken to this very core, and others
        // stay awake on the rest.
        if self.may_stay_awake() {
            hurry.among();
        }
        self.gather(
            Wait {
                what: "park",
                spin: self.spin,
                patience,
            },
            |answer| matches!(answer, Answer::Parked).then_some(Ok(())),
        )?;
        if !self.may_stay_awake() {
            hurry.among();
        }
        Ok(())
    }

    fn kick(&self) {
        for thread in &self.threads {
            if let Some(handle) = &thread.handle {
                settle::kick(handle);
            }
        }
    }

    /// Lets every vCPU run on after a freeze that was called off.
    pub fn unpark(&self) -> Result<(), VcpusError> {
        self.tell(|_| Order::Run)
    }

    /// Lets every vCPU run on after a pause in place, of which `stolen` counts as such.
    pub fn resume(
        &self,
        stolen: Duration,
        hurry: Hurry,
        patience: Duration,
    ) -> Result<Entered, VcpusError> {
        hurry.above();
        self.tell(|_| Order::Resume { stolen })?;
        self.entered(hurry, patience)
    }

    /// Tells every vCPU to save itself for `format`; [`VcpuSet::saved`] waits for it.
    pub fn save(&self, format: u32) -> Result<(), VcpusError> {
        self.tell(|_| Order::Save { format })
    }

    /// What every vCPU saved, in order.
    pub fn saved(&self, patience: Duration) -> Result<Vec<SavedVcpu>, VcpusError> {
        self.gather(
            Wait {
                what: "save their state",
                spin: self.spin,
                patience,
            },
            |answer| match answer {
                Answer::Saved(result) => Some(result),
                _ => None,
            },
        )
    }

    /// Whether who waits may stay awake for it.
    pub fn may_stay_awake(&self) -> bool {
        !self.spin.is_zero()
    }

    /// Wakes the threads ahead of an order that comes within this time, where they may stay awake for it.
    pub fn stand_by(&self, awake: Duration) -> Result<(), VcpusError> {
        match self.may_stay_awake() {
            true => self.tell(|_| Order::StandBy(awake)),
            false => Ok(()),
        }
    }

    /// Has the first vCPU fill the machine's second-level page tables for a range of guest-physical addresses.
    pub fn pre_fault(&self, range: &Range<u64>, patience: Duration) -> Result<(), VcpusError> {
        self.tell(|id| match id {
            0 => Order::PreFault(range.clone()),
            _ => Order::PreFault(0..0),
        })?;
        self.gather(
            Wait {
                what: "fill the guest's page tables",
                spin: Duration::ZERO,
                patience,
            },
            |answer| match answer {
                Answer::PreFaulted(result) => Some(result),
                _ => None,
            },
        )
        .map(drop)
    }

    /// Loads ahead what stands of these sections until the last word is loaded.
    pub fn load_ahead(
        &self,
        sections: Vec<Unread<VcpuSection>>,
        patience: Duration,
    ) -> Result<(), VcpusError> {
        self.tell_each(sections.into_iter().map(Order::LoadAhead))?;
        self.gather(
            Wait {
                what: "load a state ahead",
                spin: Duration::ZERO,
                patience,
            },
            |answer| match answer {
                Answer::LoadedAhead(result) => Some(result),
                _ => None,
            },
        )
        .map(drop)
    }

    /// Tells every vCPU to load its section; [`VcpuSet::loaded`] waits for it.
    pub fn load(
        &self,
        sections: Vec<Unread<VcpuSection>>,
        pause: Pause,
    ) -> Result<TscsStand, VcpusError> {
        let (sender, receiver) = channel();
        let order = |section| Order::Load(section, pause, sender.clone());
        self.tell_each(sections.into_iter().map(order))?;
        Ok(TscsStand(receiver, self.spin))
    }

    /// Waits till every vCPU has loaded.
    pub fn loaded(&self, patience: Duration) -> Result<Vec<LoadedVcpu>, VcpusError> {
        self.gather(
            Wait {
                what: "load their state",
                spin: self.spin,
                patience,
            },
            |answer| match answer {
                Answer::Loaded(result) => Some(result),
                _ => None,
            },
        )
    }

    /// In a rehearsal: loads what may write guest memory, which is a view of it, and runs nothing.
    pub fn load_rest(&self, patience: Duration) -> Result<(), VcpusError> {
        self.tell(|_| Order::LoadRest)?;
        self.gather(
            Wait {
                what: "load the rest of their state",
                spin: self.spin,
                patience,
            },
            |answer| match answer {
                Answer::LoadedRest(result) => Some(result),
                _ => None,
            },
        )
        .map(drop)
    }

    /// How often each came back from the guest; has each come back once more, and waits for that no
    /// longer than `patience`.
    pub fn turns(&self, patience: Duration) -> Vec<u64> {
        let turns = || self.threads.iter().map(|t| t.turns.load(Ordering::Relaxed));
        let before: Vec<u64> = turns().collect();
        // One that is parked keeps the kick for its next entry, where it costs a turn.
        self.kick();
        let deadline = Instant::now() + patience;
        loop {
            let now: Vec<u64> = turns().collect();
            let all = now.iter().zip(&before).all(|(now, before)| now != before);
            if all || Instant::now() >= deadline {
                return now;
            }
            std::thread::sleep(GLANCE);
        }
    }

    /// The guest is ours: every vCPU loads what may write guest memory, and runs.
    pub fn enter(
        &self,
        bus: &Arc<Bus>,
        hurry: Hurry,
        patience: Duration,
    ) -> Result<Entered, VcpusError> {
        hurry.above();
        self.tell(|_| Order::Enter(Arc::clone(bus)))?;
        self.entered(hurry, patience)
    }

    fn entered(&self, hurry: Hurry, patience: Duration) -> Result<Entered, VcpusError> {
        // Their answers would wake this thread on the very cores they are about to use.
        std::thread::sleep(HEAD_START);
        drop(hurry);
        let entries = self.gather(
            Wait {
                what: "enter the guest",
                spin: Duration::ZERO,
                patience,
            },
            |a| match a {
                Answer::Entering(result) => Some(result),
                _ => None,
            },
        )?;
        Ok(Entered {
            tsc: entries.iter().map(|entry| entry.tsc).max().unwrap_or(0),
            vcpus: entries,
        })
    }
}

impl Drop for VcpuSet {
    fn drop(&mut self) {
        for thread in &self.threads {
            let _ = thread.orders.send(Order::Stop);
        }
        self.kick();
        for thread in &mut self.threads {
            if let Some(handle) = thread.handle.take() {
                let _ = handle.join();
            }
        }
    }
}

#[cfg(test)]
mod tests;
