//! The vCPU thread: a state machine of a few phases, and nothing else.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender};
use std::time::{Duration, Instant};

use kvm_ioctls::VcpuFd;

use super::Surroundings;
use super::error::VcpuError;
use super::exit::{self, Exit};
use super::msrs::{self, Late};
use super::orders::{Answer, Order, SPIN, wait_for};
use super::placement::Home;
use super::settle::{arm, disarm, settle};
use super::state;
use crate::bus::Bus;
use crate::clock;
use crate::event::Event;

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
        arm(&self.fd)?;
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
        disarm();
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
