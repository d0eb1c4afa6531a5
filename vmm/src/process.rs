//! The process around a guest: the machine thread's loop, and the control socket before it.
//!
//! Control connections have threads of their own. What only asks is answered from the
//! [`desk`]; what changes the guest becomes an event of the machine thread, which is the only
//! one to change anything.

pub mod desk;
mod detached;
mod jump;
mod rehearse;
mod revive;
mod serve;
mod standstill;

use std::collections::VecDeque;
use std::ops::ControlFlow;
use std::os::fd::OwnedFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

use stillpoint_control::message::{GuestState, Handover, Reply, Request};
use stillpoint_control::ownership::{Epoch, Owner, Ownership};
use stillpoint_control::recovery::Recovery;
use stillpoint_control::report::ReleaseName;
use stillpoint_control::secret::Secret;
use stillpoint_control::spec::{MAX_BUDGET, MachineSpec};

use crate::boot::Images;
use crate::devices::virtio::backend;
use crate::doors::{CONTROL_SOCKET, Doors};
use crate::event::{Event, Job};
use crate::handover::incoming::{self, Arrived};
use crate::handover::outgoing::{self, Errand};
pub use crate::handover::record::Source;
use crate::handover::{Channel, measure, recovery};
use crate::machine::Machine;
use crate::machine::frozen::Guest;
use crate::memory::GuestRam;
use crate::vcpu::hurry::Hurry;
use desk::Desk;

/// How long a vCPU may take to enter at a cold boot.
const ENTER_PATIENCE: Duration = Duration::from_secs(10);
/// How long a guest that has a driver for its power button may take to look at it.
const BUTTON_PATIENCE: Duration = Duration::from_secs(1);
/// How long whoever asked for the end may take to be told of it.
const TELL_PATIENCE: Duration = Duration::from_secs(2);

/// How a process ends that had a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// The guest ended as it wanted, or as was asked.
    PoweredOff,
    /// The guest lives on in a successor.
    Moved,
}

/// What a process is told at its start beside the machine itself.
#[derive(Debug)]
pub struct Start {
    /// This process's release.
    pub release: ReleaseName,
    /// The VM's secret.
    pub secret: Option<Secret>,
}

/// Ends a guest, in order.
fn power_off(desk: &Desk, dir: &str) -> End {
    desk.set_state(GuestState::Stopped);
    // A guest that ended leaves no control socket; one that is found without its process
    // tells of a crash, also to a daemon that was not there.
    let _ = std::fs::remove_file(Path::new(dir).join(CONTROL_SOCKET));
    End::PoweredOff
}

fn refusal(code: &str, message: String) -> Reply {
    let code = code.to_owned();
    Reply::Error { code, message }
}

/// A process with its guest.
#[derive(Debug)]
pub struct Process {
    guest: Guest,
    doors: Doors,
    desk: Arc<Desk>,
    events: Receiver<Event>,
    sender: Sender<Event>,
    /// Events that came while the machine thread was busy with a handover.
    waiting: VecDeque<Event>,
    dir: String,
}

impl Process {
    /// Boots a guest.
    pub fn boot(spec: &MachineSpec, dir: &Path, start: Start) -> anyhow::Result<Self> {
        let mut images = Images::open(&spec.kernel)?;
        let doors = Doors::open(dir)?;
        let ram = Arc::new(GuestRam::create(&spec.memory)?);
        let (sender, events) = channel();
        let plugs = backend::open(spec, dir)?;
        let mut machine = Machine::boot(spec, &ram, &mut images, plugs, &sender)?;
        machine.open_console(doors.console.try_clone()?, Vec::new())?;
        let owner = Owner::Held(Epoch::default());
        let guest = Guest::new(machine, Ownership::create()?, owner);
        let desk = Desk::new(spec.clone(), start.release, start.secret, 0, (&guest, dir))?;
        let dir = dir.display().to_string();
        let process = Self {
            guest,
            doors,
            desk,
            events,
            sender,
            waiting: VecDeque::new(),
            dir,
        };
        process.open()?;
        process
            .guest
            .machine
            .enter(Hurry::default(), ENTER_PATIENCE)?;
        process.guest.machine.release_cpus();
        Ok(process)
    }

    /// Adopts a guest from a predecessor.
    pub fn adopt(socket: OwnedFd, release: ReleaseName) -> anyhow::Result<Self> {
        let (sender, events) = channel();
        let mut channel = Channel::new(socket);
        let arrived = incoming::adopt(&mut channel, &sender)?;
        let Arrived {
            guest,
            doors,
            secret,
            dir,
            swaps,
            swap,
            mut evidence,
        } = arrived;
        let spec = guest.machine.spec().clone();
        let desk = Desk::new(spec, release, secret, swaps, (&guest, Path::new(&dir)))?;
        desk.set_last_swap(&swap);
        let process = Self {
            guest,
            doors,
            desk,
            events,
            sender,
            waiting: VecDeque::new(),
            dir,
        };
        // Callers first: they may ask while the report is still being measured.
        process.open()?;
        process.guest.machine.release_cpus();
        let since = evidence.since_entry(&process.guest.machine);
        let recovery = process.watch_recovery(&swap, since);
        let (told, left) = incoming::hear_predecessor(&mut channel);
        evidence.left = left;
        let us = process.desk.release();
        let dir = Path::new(&process.dir);
        let swap = measure::Swap { id: &swap, us, dir };
        let report = measure::report(&evidence, &process.guest.machine, told, swap);
        let before = report.recovery.clone();
        process.desk.set_report(report);
        // Without a thread for it nobody hears it.
        let _ = recovery.send(before);
        Ok(process)
    }

    /// Watches, in a thread beside the guest, how soon it gets as much done as before; what that is comes by the
    /// channel. It becomes part of the swap's report.
    fn watch_recovery(&self, swap: &str, since: Duration) -> Sender<Vec<Recovery>> {
        let watch = recovery::Watch::begin(&self.guest.machine, since);
        let (sender, before) = channel();
        let (desk, swap) = (Arc::clone(&self.desk), swap.to_owned());
        let is_ours = move || desk.state() == GuestState::Running;
        let desk = Arc::clone(&self.desk);
        let watcher = std::thread::Builder::new()
            .name("recovery".into())
            .spawn(move || desk.set_recovery(&swap, watch.watch(&before, is_ours)));
        if let Err(error) = watcher {
            // The guest runs here, whatever is known of it.
            tracing::warn!(%error, "no thread to watch how soon the guest is as fast as before");
        }
        sender
    }

    fn open(&self) -> anyhow::Result<()> {
        let control = self.doors.control.try_clone()?;
        Ok(serve::start(
            control,
            Arc::clone(&self.desk),
            self.sender.clone(),
        )?)
    }

    /// Runs until the guest ends or lives elsewhere.
    pub fn run(mut self) -> anyhow::Result<End> {
        loop {
            let event = match self.waiting.pop_front() {
                Some(event) => event,
                None => self.events.recv()?,
            };
            match event {
                Event::PowerOff => return Ok(power_off(&self.desk, &self.dir)),
                Event::Reset => {
                    tracing::info!("the guest resets itself");
                    self.reset()?;
                }
                Event::VcpuOver {
                    vcpu,
                    failure: None,
                } => {
                    tracing::warn!(
                        vcpu,
                        "the guest shut down by a triple fault, which resets it"
                    );
                    self.reset()?;
                }
                Event::VcpuOver {
                    vcpu,
                    failure: Some(failure),
                } => {
                    self.desk.set_state(GuestState::Stopped);
                    anyhow::bail!("vCPU {vcpu}: {failure}");
                }
                Event::Control(job) if matches!(job.request, Request::Detach { .. }) => {
                    match self.detach(job)? {
                        ControlFlow::Continue(process) => self = process,
                        ControlFlow::Break(end) => return Ok(end),
                    }
                }
                Event::Control(mut job) => {
                    let told = job.told.take();
                    if let Some(end) = self.carry_out(job) {
                        // The process ends with this thread, and would take the reply with it.
                        let _ = told.map(|told| told.recv_timeout(TELL_PATIENCE));
                        return Ok(end);
                    }
                }
            }
        }
    }

    /// The machine begins anew: same RAM file, same doors and viewers, fresh everything else.
    fn reset(&mut self) -> anyhow::Result<()> {
        let spec = self.guest.machine.spec().clone();
        let ram = Arc::clone(self.guest.machine.ram());
        let mut images = Images::open(&spec.kernel)?;
        let (viewers, mut files) = self.guest.machine.stop()?;
        ram.clear()?;
        // The same disks, taps and listeners: a lock is never let go.
        let plugs = backend::begin_anew(&spec, Path::new(&self.dir), &mut files)?;
        let mut machine = Machine::boot(&spec, &ram, &mut images, plugs, &self.sender)?;
        machine.open_console(self.doors.console.try_clone()?, viewers)?;
        self.guest.machine = machine;
        // What the old vCPUs had still to say is about a machine that is no more.
        self.waiting.extend(self.events.try_iter());
        self.waiting
            .retain(|event| matches!(event, Event::Control(_)));
        self.guest.machine.enter(Hurry::default(), ENTER_PATIENCE)?;
        self.guest.machine.release_cpus();
        Ok(())
    }

    fn carry_out(&mut self, job: Job) -> Option<End> {
        match job.request {
            Request::PressPowerButton => {
                let heard = self.guest.machine.press_power_button(BUTTON_PATIENCE);
                let _ = job.reply.send(Reply::Pressed { heard });
                None
            }
            Request::PowerOff => {
                let end = power_off(&self.desk, &self.dir);
                let _ = job.reply.send(Reply::Done);
                Some(end)
            }
            Request::HandOver { .. } => self.hand_over(job),
            Request::Freeze { .. } | Request::Store { .. } => self.stand_still(job),
            Request::AwaitJump { swap, .. } => {
                let _ = job.reply.send(jump::runs(&swap));
                None
            }
            Request::Resume { swap } => {
                let _ = job.reply.send(self.desk.resumed(&swap));
                None
            }
            Request::Rebuild { .. } => {
                let message = "this guest has not let go of KVM: there is nothing to rebuild";
                let _ = job.reply.send(refusal("bad_request", message.into()));
                None
            }
            Request::Rehearse { .. } => {
                self.rehearse(job);
                None
            }
            Request::Signs => {
                let signs = self.guest.machine.signs();
                let _ = job.reply.send(Reply::Signs(Box::new(signs)));
                None
            }
            _ => None,
        }
    }

    fn hand_over(&mut self, job: Job) -> Option<End> {
        let reply = job.reply.clone();
        let errand = match self.errand(job) {
            Ok(errand) => errand,
            Err(message) => {
                let code = "bad_request".to_owned();
                let _ = reply.send(Reply::Error { code, message });
                return None;
            }
        };
        self.desk.set_state(GuestState::Swapping);
        self.desk.close();
        let (events, waiting) = (&self.events, &mut self.waiting);
        let ended = || {
            waiting.extend(events.try_iter());
            let over = |e: &Event| !matches!(e, Event::Control(_));
            waiting.iter().any(over)
        };
        let mut channel = match errand.socket.try_clone() {
            Ok(socket) => Channel::new(socket),
            Err(error) => {
                let message = format!("out of file descriptors: {error}");
                let _ = reply.send(Reply::Error {
                    code: "failed".into(),
                    message,
                });
                self.stay();
                return None;
            }
        };
        let progress = |phase: &_| drop(reply.send(Reply::Progress(Clone::clone(phase))));
        // A bug must not cost the guest: unwinding runs the guard, and the guest goes on here.
        let attempt = AssertUnwindSafe(|| {
            outgoing::hand_over(&mut self.guest, &errand, &mut channel, progress, ended)
        });
        let Ok(outcome) = catch_unwind(attempt) else {
            if !self.guest.is_ours() {
                return Some(End::Moved);
            }
            let message =
                "the handover panicked, which is a bug; the guest goes on here".to_owned();
            channel.refuse(&message);
            let code = "failed".to_owned();
            let _ = reply.send(Reply::Error { code, message });
            self.stay();
            return None;
        };
        let moved = outcome == Handover::Moved;
        if let Handover::Kept { report } = &outcome {
            self.desk.set_last_swap(&errand.swap);
            self.desk.set_report((**report).clone());
            self.stay();
        }
        let _ = reply.send(Reply::Handover(outcome));
        // Callers read to the end of replies; they need not wait for our retirement.
        drop(reply);
        moved.then(|| {
            outgoing::retire(channel);
            End::Moved
        })
    }

    fn stay(&self) {
        self.desk.set_epoch(self.guest.owner.epoch());
        self.desk.set_state(GuestState::Running);
        self.desk.reopen();
    }

    fn errand(&self, job: Job) -> Result<Errand, String> {
        let Request::HandOver {
            swap,
            to,
            budget_ns,
            brownout,
            clock,
        } = job.request
        else {
            return Err("not a handover".into());
        };
        let [socket, state]: [OwnedFd; 2] = job.fds.try_into().map_err(|fds: Vec<_>| {
            format!(
                "a handover comes with 2 file descriptors, this one with {}",
                fds.len()
            )
        })?;
        let own = self.guest.machine.spec().blackout_budget;
        let budget = budget_ns.map_or(own, Duration::from_nanos);
        if budget.is_zero() || budget > MAX_BUDGET {
            return Err(format!(
                "a budget of {budget:?} is not more than 0 and at most 30 s"
            ));
        }
        let doors = self
            .doors
            .duplicate()
            .map_err(|e| format!("out of file descriptors: {e}"))?;
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        Ok(Errand {
            swap,
            from: self.desk.release().clone(),
            to,
            socket,
            state,
            doors,
            budget,
            brownout,
            clock: clock.unwrap_or(self.guest.machine.spec().clock.policy),
            secret: self.desk.secret_bytes(),
            swaps: self.desk.swaps(),
            dir: self.dir.clone(),
            started_at_unix_ns: now.map_or(0, |d| u64::try_from(d.as_nanos()).unwrap_or(0)),
        })
    }
}
