//! The vCPU thread: a state machine of three phases, and nothing else.
//!
//! The kick is a signal that the thread keeps blocked and KVM unblocks inside `KVM_RUN`
//! (KVM_SET_SIGNAL_MASK): it can't be lost between a check and an entry, and it stays pending
//! while the vCPU is parked. That makes a second thing possible: *settling*, a `KVM_RUN` with the
//! kick pending, in which KVM handles its own requests and injects expired timers, and returns
//! without having run one guest instruction.
#![allow(unsafe_code)] // Signals by number.

use std::os::unix::thread::JoinHandleExt;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use kvm_ioctls::VcpuFd;
use vmm_sys_util::signal::{SIGRTMIN, block_signal, clear_signal};

use super::exit::{self, Exit};
use super::msrs::{self, Late};
use super::placement::Home;
use super::state::{self, VcpuError};
use super::{Answer, Order, SPIN, Surroundings, wait_for};
use crate::bus::Bus;
use crate::clock;
use crate::machine::Event;
use crate::raw;

fn kick_signal() -> i32 {
    SIGRTMIN() + 1
}

/// Makes a vCPU thread leave the guest, or not enter it.
pub(super) fn kick(thread: &JoinHandle<()>) {
    // SAFETY: the handle is not joined yet, so the thread id is valid; the signal is blocked in
    // the thread, so it only ends a KVM_RUN.
    unsafe { libc::pthread_kill(thread.as_pthread_t(), kick_signal()) };
}

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
    answers: Sender<(u8, Answer)>,
    /// MSRs this vCPU can be asked for.
    msrs: Vec<u32>,
    /// MSRs to load once the guest is ours.
    late: Late,
    ended: bool,
    /// Whether the next order is microseconds away, so that it pays to stay awake.
    awake: bool,
}

impl Runner {
    pub(super) fn new(
        id: u8,
        fd: VcpuFd,
        around: Surroundings,
        orders: Receiver<Order>,
        answers: Sender<(u8, Answer)>,
    ) -> Self {
        let (bus, late) = (Arc::default(), Late::default());
        Self {
            id,
            fd,
            around,
            bus,
            orders,
            answers,
            msrs: Vec::new(),
            late,
            ended: false,
            awake: false,
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
        // The machine thread may have given up on us; then there is nobody to tell.
        let _ = self.answers.send((self.id, answer));
    }

    fn come_to_rest(&mut self) {
        self.answer(Answer::Parked);
        self.awake = true;
    }

    fn prime(&mut self) -> Result<Home, VcpuError> {
        state::warm_up();
        let kick = kick_signal();
        block_signal(kick).map_err(|_| VcpuError::Signal)?;
        raw::set_signal_mask(&self.fd, 0).map_err(VcpuError::kvm("set the signal mask"))?;
        // SAFETY: sends the blocked signal to this very thread.
        unsafe { libc::pthread_kill(libc::pthread_self(), kick) };
        settle(&mut self.fd)?;
        self.msrs = msrs::readable(&self.fd)?;
        Ok(Home::spread(self.id))
    }

    fn parked(&mut self) -> Phase {
        let spin = if std::mem::take(&mut self.awake) {
            SPIN
        } else {
            Duration::ZERO
        };
        let far = Instant::now() + Duration::from_secs(3600);
        let order = match wait_for(&self.orders, spin, far) {
            Ok(Some(order)) => order,
            Ok(None) => return Phase::Parked,
            Err(_) => return Phase::Stopped,
        };
        match order {
            Order::Stop => return Phase::Stopped,
            Order::Park => self.come_to_rest(),
            Order::StandBy => self.awake = true,
            Order::Save { format } => {
                let saved = state::save(&mut self.fd, &mut self.msrs, format);
                self.answer(Answer::Saved(saved.map(Box::new)));
            }
            Order::Load(section) => {
                let loaded = state::load(&mut self.fd, &section);
                let loaded = loaded.map(|(loaded, late)| {
                    self.late = late;
                    loaded
                });
                self.answer(Answer::Loaded(loaded));
                self.awake = true;
            }
            Order::Run => return self.enter(),
            Order::Enter(bus) => {
                self.bus = bus;
                let late = std::mem::take(&mut self.late);
                if let Err(error) = late.load(&self.fd, &self.around.memory) {
                    self.answer(Answer::Entering(Err(error)));
                    return Phase::Parked;
                }
                let phase = self.enter();
                self.answer(Answer::Entering(Ok(clock::host_tsc())));
                return phase;
            }
        }
        Phase::Parked
    }

    fn enter(&mut self) -> Phase {
        // The guest's watchdogs are told that it stood still. Refused where the guest has no
        // kvmclock, which is no failure.
        let _ = self.fd.kvmclock_ctrl();
        let _ = clear_signal(kick_signal());
        if self.ended {
            Phase::Ended
        } else {
            Phase::Running
        }
    }

    fn running(&mut self) -> Phase {
        loop {
            match exit::run_once(&mut self.fd, &self.bus) {
                Exit::Handled => {}
                Exit::Kicked => match self.orders.try_recv() {
                    Ok(Order::Park) => {
                        self.come_to_rest();
                        return Phase::Parked;
                    }
                    Ok(Order::Stop) => return Phase::Stopped,
                    // A kick that came late for an order already carried out.
                    _ => drop(clear_signal(kick_signal())),
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

/// See the module. The kick must be pending.
pub(super) fn settle(fd: &mut VcpuFd) -> Result<(), VcpuError> {
    for _ in 0..8 {
        match fd.run() {
            Err(e) if e.errno() == libc::EINTR => return Ok(()),
            // A vCPU that waits for its SIPI says so instead.
            Err(e) if e.errno() == libc::EAGAIN => {}
            Err(source) => return Err(VcpuError::kvm("settle")(source)),
            Ok(_) => return Err(VcpuError::Unsettled),
        }
    }
    Ok(())
}
