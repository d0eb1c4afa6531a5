//! The vCPU thread: a state machine of a few phases, and nothing else.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender};
use std::time::{Duration, Instant};

use kvm_ioctls::VcpuFd;
use stillpoint_state::sections::Vcpu as VcpuSection;
use stillpoint_state::{Unread, Written};

use super::answers::Teller;
use super::error::VcpuError;
use super::exit::{self, Exit};
use super::load::{Known, LoadedVcpu, Pause};
use super::msrs::{self, Late, Passed};
use super::orders::{Answer, Order, wait_for};
use super::outside::{Entry, Left, Queue};
use super::placement::Home;
use super::settle::{arm, disarm, settle, take_up_requests};
use super::state;
use super::{SavedVcpu, Surroundings};
use crate::bus::Bus;
use crate::clock;
use crate::clock::steal;
use crate::event::Event;
use crate::faults::{self, Spoilt};
use crate::{raw, warm};

enum Phase {
    Parked,
    Running,
    /// The guest is over on this vCPU; it still parks when told.
    Ended,
    Stopped,
}

/// One vCPU and its thread's state.
pub(super) struct Runner {
    id: u8,
    fd: VcpuFd,
    around: Surroundings,
    /// Where exits go; known when the guest is entered, since a successor's devices are made
    /// from the saved state.
    bus: Arc<Bus>,
    orders: Receiver<Order>,
    answers: Teller,
    /// MSRs this vCPU can be asked for.
    msrs: Vec<u32>,
    /// What is known of it.
    known: Known,
    /// MSRs to load once the guest is ours.
    late: Late,
    /// The pause that it was loaded after.
    pause: Pause,
    tsc_khz: u32,
    /// What its thread waits for a core.
    queue: Queue,
    /// When it came out of the guest.
    left: Left,
    ended: bool,
    /// How often it came back from the guest.
    turns: Arc<AtomicU64>,
    /// How long it stays awake for an order that is microseconds away.
    spin: Duration,
    /// How long it stays awake for the next one.
    awake: Duration,
}

/// What connects a vCPU's thread with the machine thread.
pub(super) struct Ends {
    pub(super) orders: Receiver<Order>,
    pub(super) answers: Teller,
    /// How often it came back from the guest.
    pub(super) turns: Arc<AtomicU64>,
    /// How long to stay awake for an order that is microseconds away.
    pub(super) spin: Duration,
}

impl Runner {
    pub(super) fn new(id: u8, fd: VcpuFd, around: Surroundings, ends: Ends) -> Self {
        let Ends {
            orders,
            answers,
            turns,
            spin,
        } = ends;
        let (bus, late) = (Arc::default(), Late::default());
        Self {
            id,
            fd,
            around,
            bus,
            orders,
            answers,
            msrs: Vec::new(),
            known: Known::default(),
            late,
            pause: Pause::default(),
            tsc_khz: 0,
            queue: Queue::default(),
            left: Left::default(),
            ended: false,
            turns,
            spin,
            awake: Duration::ZERO,
        }
    }

    pub(super) fn run(mut self) {
        let ready = self.prime();
        self.answer(Answer::Ready(ready));
        let mut phase = Phase::Parked;
        loop {
            phase = match phase {
                Phase::Parked => self.parked(),
                Phase::Running => self.running(),
                Phase::Ended => self.ended(),
                Phase::Stopped => return,
            };
        }
    }

    fn answer(&self, answer: Answer) {
        self.answers.tell(self.id, answer);
    }

    fn come_to_rest(&mut self) {
        self.left = Left::now();
        self.answer(Answer::Parked);
        self.begin_to_wait(self.spin);
    }

    /// An order comes soon, and what this thread waits for a core counts from now on; where it stays awake for the order, from
    /// that on.
    fn begin_to_wait(&mut self, awake: Duration) {
        self.queue.forget();
        if awake.is_zero() {
            self.queue.skip();
        }
        self.awake = awake;
    }

    fn prime(&mut self) -> Result<Home, VcpuError> {
        state::warm_up();
        self.queue = Queue::of_this_thread();
        arm(&self.fd)?;
        match faults::is_spoilt(Spoilt::Latecomers) {
            true => settle(&mut self.fd)?,
            false => take_up_requests(&mut self.fd)?,
        }
        self.msrs = msrs::readable(&self.fd)?;
        self.known = Known::of(&self.fd);
        warm::up();
        Ok(Home::spread(self.id))
    }

    fn parked(&mut self) -> Phase {
        let spin = std::mem::take(&mut self.awake);
        let far = Instant::now() + Duration::from_secs(3600);
        let order = match wait_for(&self.orders, spin, far) {
            Ok(Some(order)) => order,
            Ok(None) => return Phase::Parked,
            Err(_) => return Phase::Stopped,
        };
        if !spin.is_zero() {
            self.queue.skip();
        }
        match order {
            Order::Stop => return Phase::Stopped,
            Order::Park => self.come_to_rest(),
            Order::StandBy(awake) => self.begin_to_wait(awake),
            Order::Save { format } => {
                let khz = self.known.tsc_khz;
                let saved = state::save(&mut self.fd, &mut self.msrs, format, khz);
                self.left.queued = self.queue.so_far();
                let left = self.left;
                let saved = saved.map(|(section, version)| SavedVcpu {
                    section: Written::of(&section, version),
                    left,
                });
                self.answer(Answer::Saved(saved));
            }
            Order::PreFault(range) => {
                let filled = raw::pre_fault(&self.fd, range);
                let filled = filled.map_err(|error| VcpuError::Kvm {
                    what: "fill the guest's page tables",
                    source: error.into(),
                });
                self.answer(Answer::PreFaulted(filled));
                self.queue.restart();
            }
            Order::LoadAhead(section) => {
                let loaded = section.read().map_err(VcpuError::from);
                let loaded = loaded.and_then(|section| self.known.load_ahead(&self.fd, &section));
                self.answer(Answer::LoadedAhead(loaded));
                self.queue.restart();
            }
            Order::Load(section, pause, tsc_stands) => {
                let loaded = self.load(section, pause, tsc_stands);
                self.answer(Answer::Loaded(loaded));
                self.queue.so_far();
                self.awake = self.spin;
            }
            Order::LoadRest => {
                let loaded = self.load_late();
                self.answer(Answer::LoadedRest(loaded));
                self.awake = self.spin;
            }
            Order::Run => {
                self.tell_of_pause();
                return self.enter();
            }
            Order::Resume { stolen } => {
                // An account that can't be read is none that could be carried.
                if let Ok(Some(account)) = msrs::steal_time(&self.fd) {
                    steal::carry(&self.around.memory, account, stolen, Duration::ZERO);
                }
                return self.enter_and_tell();
            }
            Order::Enter(bus) => {
                self.bus = bus;
                if let Err(error) = self.load_late() {
                    self.answer(Answer::Entering(Err(error)));
                    return Phase::Parked;
                }
                return self.enter_and_tell();
            }
        }
        Phase::Parked
    }

    fn load(
        &mut self,
        unread: Unread<VcpuSection>,
        pause: Pause,
        tsc_stands: Sender<()>,
    ) -> Result<LoadedVcpu, VcpuError> {
        let section = unread.read()?;
        // The machine thread's memory: given back later, it would have the allocator in the moment in which that thread
        // goes on.
        drop(unread);
        let known = &mut self.known;
        let (loaded, late) = known.load(&mut self.fd, &section, pause, tsc_stands)?;
        self.late = match self.id {
            0 => late,
            _ => late.without_wall_clock(),
        };
        (self.pause, self.tsc_khz) = (pause, section.tsc_khz);
        Ok(loaded)
    }

    fn enter_and_tell(&mut self) -> Phase {
        let told = self.tell_of_pause();
        let phase = self.enter();
        let queued = self.queue.so_far();
        let tsc = clock::host_tsc();
        self.answer(Answer::Entering(Ok(Entry { tsc, told, queued })));
        phase
    }

    fn load_late(&mut self) -> Result<(), VcpuError> {
        let late = std::mem::take(&mut self.late);
        let Pause {
            from_tsc,
            held,
            steal,
        } = self.pause;
        let duration = |cycles| clock::duration(cycles, self.tsc_khz);
        let mut passed = Passed {
            held: duration(held),
            stolen: Duration::ZERO,
            waited: Duration::ZERO,
        };
        if late.has_steal_time() {
            passed.waited = self.queue.ever();
            if steal {
                let pause = clock::host_tsc().saturating_sub(from_tsc);
                passed.stolen = duration(pause.saturating_sub(held));
            }
        }
        late.load(&self.fd, &self.around.memory, passed)
    }

    /// The guest's watchdogs are told that it stood still: a flag in its pvclock page, which Linux
    /// looks at before it cries (kernel/watchdog.c, `kvm_check_and_clear_guest_paused`). For every
    /// vCPU, and after the MSR of its page; refused where the guest has no kvmclock, which is no
    /// failure.
    fn tell_of_pause(&self) -> bool {
        !faults::is_spoilt(Spoilt::Watchdogs) && self.fd.kvmclock_ctrl().is_ok()
    }

    fn enter(&mut self) -> Phase {
        disarm();
        if self.ended {
            Phase::Ended
        } else {
            Phase::Running
        }
    }

    fn running(&mut self) -> Phase {
        // One that was loaded knows the rate of its guest's TSC.
        if faults::is_spoilt(Spoilt::Vcpu) && self.tsc_khz != 0 {
            return self.stand_in_the_way();
        }
        loop {
            let exit = exit::run_once(&mut self.fd, &self.bus);
            self.turns.fetch_add(1, Ordering::Relaxed);
            match exit {
                Exit::Handled => {}
                Exit::Kicked => match self.orders.try_recv() {
                    Ok(Order::Park) => {
                        self.come_to_rest();
                        return Phase::Parked;
                    }
                    Ok(Order::Stop) => return Phase::Stopped,
                    // A kick that came late for an order already carried out.
                    _ => disarm(),
                },
                Exit::Over(failure) => {
                    self.ended = true;
                    let _ = self.around.events.send(Event::VcpuOver {
                        vcpu: self.id,
                        failure,
                    });
                    return Phase::Ended;
                }
            }
        }
    }

    /// A thread that runs no guest, and does as it is told otherwise.
    fn stand_in_the_way(&mut self) -> Phase {
        loop {
            match self.orders.recv() {
                Ok(Order::Park) => {
                    self.come_to_rest();
                    return Phase::Parked;
                }
                Ok(Order::Stop) | Err(_) => return Phase::Stopped,
                Ok(_) => {}
            }
        }
    }

    fn ended(&mut self) -> Phase {
        match self.orders.recv() {
            Ok(Order::Park) => {
                self.answer(Answer::Parked);
                Phase::Parked
            }
            Ok(Order::Stop) | Err(_) => Phase::Stopped,
            Ok(_) => Phase::Ended,
        }
    }
}
