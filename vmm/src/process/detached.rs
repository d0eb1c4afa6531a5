//! A guest whose process lets go of KVM, so that the kernel's modules can be exchanged under it.
//!
//! ```text
//!  Running ──Detach──▶ freeze, save ══▶ Apart ──Rebuild──▶ Built ──Resume, the ceiling──▶ Running
//!     ▲                     │           ▲   │ ▲               │
//!     └────── any error ────┘           └───┘ └─── Detach ────┘
//!                                   KVM isn't there, or refuses
//! ```
//!
//! Up to `══▶` every error ends in the drop of the freeze's guard, and so in a running guest. Behind it
//! there is no machine to run on, and the way back is another: one is built from the saved state, on
//! whatever KVM is there, and tried again until there is one. That state is the guest, however often it is
//! loaded, because a machine that was built has not run: it is entered once, and with that the state
//! is gone. RAM, the devices' files, the doors and the ownership word stay in this process all the while.
//!
//! Who asked may die: at the ceiling the guest is rebuilt and runs on by itself.

use std::ops::ControlFlow;
use std::os::fd::OwnedFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use stillpoint_control::clock::Policy;
use stillpoint_control::message::{GuestState, Reply, Request};
use stillpoint_control::report::{
    Blackout, ClockReceipt, Outcome, Phase, ReleaseName, Side, SwapReport, WallClock,
};
use stillpoint_control::spec::{MAX_BUDGET, MachineSpec};
use stillpoint_state::Unclaimed;

use super::{ENTER_PATIENCE, End, Process, TELL_PATIENCE, power_off, refusal};
use crate::clock;
use crate::clock::page::Page;
use crate::devices::virtio::backend;
use crate::event::{Event, Job};
use crate::handover::correct;
use crate::handover::incoming::{pages_before, wall_before};
use crate::handover::lend::Borrowed;
use crate::handover::measure::{self, Evidence};
use crate::machine::build::{Blank, BuildError, Loaded};
use crate::machine::frozen::{Aside, Guest};
use crate::machine::vcpus::Promise;
use crate::machine::{FreezeError, Machine, Timing};
use crate::memory::GuestRam;
use crate::vcpu::hurry::Hurry;

/// How long vCPUs may take to load their state.
const LOAD_PATIENCE: Duration = Duration::from_secs(60);
/// Between two tries to rebuild a guest whose ceiling is over.
const RETRY: Duration = Duration::from_millis(250);

/// Why there is no machine yet.
#[derive(Debug, thiserror::Error)]
enum RebuildError {
    /// The devices' files.
    #[error("out of file descriptors: {0}")]
    Files(#[from] std::io::Error),
    /// The machine, or its state.
    #[error(transparent)]
    Build(#[from] BuildError),
    /// A bug.
    #[error("rebuilding the guest panicked, which is a bug")]
    Panicked,
}

/// A guest without a machine: all that it is.
struct Apart {
    spec: MachineSpec,
    ram: Arc<GuestRam>,
    promise: Promise,
    state: Vec<u8>,
    files: Borrowed,
    viewers: Vec<OwnedFd>,
}

/// A machine with the guest in it, which has not run.
struct Built {
    machine: Machine,
    loaded: Loaded,
    pages: Vec<Option<Page>>,
    wall: Option<clock::wall::WallClock>,
    timing: Timing,
}

/// What a pause is, and what was seen of it until the guest was apart.
struct Seen {
    swap: String,
    aside: Aside,
    ceiling: Duration,
    format: u32,
    state_bytes: u64,
    wall_error_ns: Option<i64>,
    started_at_unix_ns: u64,
}

/// What goes on around a guest that is apart.
struct Around {
    events: Receiver<Event>,
    sender: Sender<Event>,
    dir: String,
}

/// Why a guest does not stand still any longer.
enum Ended {
    /// Somebody asked, who waits for the report.
    Asked(Box<Built>, Job),
    /// It stood still as long as it may.
    Ceiling(Box<Built>),
    /// It is to end, and has no machine.
    PowerOff(Job),
}

impl Process {
    /// Has the guest stand still without a machine, until it is to run on. An error is its end: its vCPUs
    /// were let in, and did not come in.
    pub(super) fn detach(mut self, job: Job) -> anyhow::Result<ControlFlow<End, Self>> {
        let (apart, mut seen) = match self.leave(&job) {
            Ok((left, seen)) => (left, seen),
            Err(refused) => {
                let _ = job.reply.send(refused);
                return Ok(ControlFlow::Continue(self));
            }
        };
        self.desk.set_state(GuestState::Frozen);
        let around = Around {
            events: self.events,
            sender: self.sender,
            dir: self.dir,
        };
        let Guest {
            machine,
            ownership,
            owner,
            peeked: _,
        } = self.guest;
        // The last of KVM goes with it.
        drop(machine);
        seen.aside.timing.mark("let go");
        let _ = job.reply.send(Reply::Detached);
        // The caller's thread reads to the end of replies.
        drop(job);
        let (built, asked) = match apart.await_end(&around, &mut seen) {
            Ended::Asked(built, job) => (*built, Some(job)),
            Ended::Ceiling(built) => (*built, None),
            Ended::PowerOff(job) => {
                let end = power_off(&self.desk, &around.dir);
                let _ = job.reply.send(Reply::Done);
                drop(job.reply);
                let _ = job.told.map(|told| told.recv_timeout(TELL_PATIENCE));
                return Ok(ControlFlow::Break(end));
            }
        };
        let (mut machine, evidence) = built.enter(&seen.aside)?;
        // The state was the guest until here; now the machine is.
        let viewers = apart.viewers;
        let console = self.doors.console.try_clone();
        let opened = console.and_then(|doors| machine.open_console(doors, viewers));
        if let Err(error) = opened {
            tracing::error!(%error, "the guest runs, and nobody reads its console");
        }
        machine.release_cpus();
        self.desk.set_state(GuestState::Running);
        let process = Self {
            guest: Guest::new(machine, ownership, owner),
            doors: self.doors,
            desk: self.desk,
            events: around.events,
            sender: around.sender,
            waiting: self.waiting,
            dir: around.dir,
        };
        process.tell_of(&seen, &evidence, asked);
        Ok(ControlFlow::Continue(process))
    }

    /// Brings the guest to rest and saves it. On an error it runs on.
    fn leave(&mut self, job: &Job) -> Result<(Apart, Seen), Reply> {
        let Request::Detach { swap, ceiling } = &job.request else {
            return Err(refusal("bad_request", "not a request to let go".into()));
        };
        if ceiling.is_zero() || *ceiling > MAX_BUDGET {
            let message = format!("a pause of {ceiling:?} is not more than 0 and at most 30 s");
            return Err(refusal("bad_request", message));
        }
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        let wall_error_ns = correct::ask_error(&self.guest.machine, &self.dir);
        let failed = |error: FreezeError| refusal("failed", error.to_string());
        let mut frozen = self.guest.freeze(*ceiling).map_err(failed)?;
        let format = frozen.machine().formats(Policy::Advance);
        let format = format.first().copied().unwrap_or_default();
        let state = frozen.save(format, Policy::Advance).map_err(failed)?;
        let machine = frozen.machine();
        let (viewers, files) = machine
            .belongings()
            .map_err(|error| failed(FreezeError::Lend(error)))?;
        self.waiting.extend(self.events.try_iter());
        let over = |event: &Event| !matches!(event, Event::Control(_));
        if self.waiting.iter().any(over) {
            let message = "the guest switched itself off or reset meanwhile".into();
            return Err(refusal("not_running", message));
        }
        let apart = Apart {
            spec: machine.spec().clone(),
            ram: Arc::clone(machine.ram()),
            promise: Promise {
                cpuid: Some(machine.cpuid().to_vec()),
                tsc_khz: Some(machine.tsc_khz()),
                tsc_offset: machine.tsc_offset(),
                hold: false,
            },
            state,
            files,
            viewers,
        };
        let seen = Seen {
            swap: swap.clone(),
            ceiling: *ceiling,
            format,
            state_bytes: apart.state.len() as u64,
            wall_error_ns,
            started_at_unix_ns: now.map_or(0, |d| u64::try_from(d.as_nanos()).unwrap_or(0)),
            aside: frozen.set_aside(),
        };
        Ok((apart, seen))
    }

    /// Makes the report of a pause that is over.
    fn tell_of(&self, seen: &Seen, evidence: &Evidence, asked: Option<Job>) {
        let machine = &self.guest.machine;
        let reason = asked.is_none().then(|| {
            format!(
                "nobody had it run on within {:?}: it did so by itself",
                seen.ceiling
            )
        });
        let us = self.desk.release();
        let swap = measure::Swap {
            id: &seen.swap,
            us,
            dir: Path::new(&self.dir),
        };
        let told = seen.told(machine, us);
        let report = SwapReport {
            outcome: Outcome::Resumed,
            reason,
            ..measure::report(evidence, machine, Some(told), swap)
        };
        self.desk.set_last_swap(&report.swap);
        self.desk.set_report(report.clone());
        if let Some(job) = asked {
            let report = Box::new(report);
            let _ = job.reply.send(Reply::Resumed { report });
        }
    }
}

impl Apart {
    /// Waits until the guest is to run on, or to end; it has a machine again in the first case.
    fn await_end(&self, around: &Around, seen: &mut Seen) -> Ended {
        let mut built: Option<Box<Built>> = None;
        let mut tries = 0;
        loop {
            let left = seen
                .aside
                .deadline
                .saturating_duration_since(Instant::now());
            // Beyond the ceiling nothing is waited for but KVM.
            let patience = if tries > 0 { left.max(RETRY) } else { left };
            let Ok(event) = around.events.recv_timeout(patience) else {
                tries += 1;
                match self.build_once(built.take(), around, seen) {
                    Ok(built) => return Ended::Ceiling(built),
                    Err(error) if tries == 1 => {
                        tracing::error!(%error, "the guest waits for KVM, beyond its ceiling");
                    }
                    Err(_) => {}
                }
                continue;
            };
            // Whatever else the old machine's threads had to say is about a machine that is no more.
            let Event::Control(job) = event else { continue };
            let of = match &job.request {
                Request::Resume { swap }
                | Request::Rebuild { swap }
                | Request::Detach { swap, .. } => Some(swap),
                _ => None,
            };
            let is_meant = of.is_some_and(|of| *of == seen.swap);
            let said = match &job.request {
                Request::PowerOff => return Ended::PowerOff(job),
                Request::Detach { .. } if is_meant => {
                    built = None;
                    Reply::Detached
                }
                Request::Rebuild { .. } | Request::Resume { .. } if is_meant => {
                    match (self.build_once(built.take(), around, seen), &job.request) {
                        (Ok(now), Request::Resume { .. }) => return Ended::Asked(now, job),
                        (Ok(now), _) => {
                            built = Some(now);
                            Reply::Rebuilt
                        }
                        (Err(error), _) => refusal("failed", error.to_string()),
                    }
                }
                _ => {
                    let message = format!(
                        "this guest stands still for {}, while KVM is exchanged under it",
                        seen.swap
                    );
                    refusal("busy", message)
                }
            };
            let _ = job.reply.send(said);
        }
    }

    /// The machine that is there, or a new one.
    fn build_once(
        &self,
        built: Option<Box<Built>>,
        around: &Around,
        seen: &mut Seen,
    ) -> Result<Box<Built>, RebuildError> {
        if let Some(built) = built {
            return Ok(built);
        }
        seen.stood();
        // What panics in here has let nothing run.
        let attempt = AssertUnwindSafe(|| self.build(around));
        let built = catch_unwind(attempt).unwrap_or(Err(RebuildError::Panicked));
        built.map(Box::new)
    }

    /// A machine with the guest's state in it. It writes no byte of RAM, and runs nothing.
    fn build(&self, around: &Around) -> Result<Built, RebuildError> {
        let mut timing = Timing::start();
        let mut files = self.files.try_clone()?;
        let plugs = backend::adopt(&self.spec, Path::new(&around.dir), &mut files)
            .map_err(BuildError::from)?;
        let promise = self.promise.clone();
        let (spec, ram) = (&self.spec, &self.ram);
        let blank = Blank::new(spec, ram, &around.sender, plugs, promise, |_| Ok(()))?;
        timing.mark("build");
        let state = Unclaimed::decode(&self.state).map_err(BuildError::from)?;
        let (machine, loaded) = blank.load(state, &mut files, LOAD_PATIENCE)?;
        timing.mark("load");
        Ok(Built {
            pages: pages_before(&machine, &loaded),
            wall: wall_before(&machine, &loaded),
            machine,
            loaded,
            timing,
        })
    }
}

impl Built {
    /// Lets the guest in.
    fn enter(mut self, aside: &Aside) -> anyhow::Result<(Machine, Evidence)> {
        self.timing.mark("await");
        let began = clock::host_tsc();
        self.machine.tell_of_swap(self.loaded.has_disturbed_tsc());
        let entered = self.machine.enter(Hurry::default(), ENTER_PATIENCE)?;
        let cycles = entered.tsc.saturating_sub(began);
        let took = clock::duration(cycles, self.machine.tsc_khz());
        self.timing.marks.push(("enter", took));
        let evidence = Evidence {
            kicked_tsc: aside.kicked_tsc,
            left: Vec::new(),
            entered,
            loaded: self.loaded,
            pages: self.pages,
            wall: self.wall,
            brownout: Vec::new(),
            blackout: self.timing.marks,
        };
        Ok((self.machine, evidence))
    }
}

impl Seen {
    /// It has stood still, or tried in vain to do otherwise, until now.
    fn stood(&mut self) {
        self.aside.timing.mark("stand");
        let marks = &mut self.aside.timing.marks;
        if let [.., (before, first), (_, second)] = marks.as_mut_slice()
            && *before == "stand"
        {
            *first += *second;
            marks.pop();
        }
    }

    /// The report as far as it is known before the guest runs.
    fn told(&self, machine: &Machine, release: &ReleaseName) -> SwapReport {
        let phase = |(name, duration): &(&'static str, Duration)| Phase {
            name: (*name).to_owned(),
            side: Side::Predecessor,
            in_blackout: true,
            duration: *duration,
        };
        SwapReport {
            swap: self.swap.clone(),
            vm: machine.spec().name.clone(),
            component: "kvm".into(),
            from: release.clone(),
            to: release.clone(),
            outcome: Outcome::Resumed,
            reason: None,
            started_at_unix_ns: self.started_at_unix_ns,
            vcpus: u32::try_from(machine.vcpu_count()).unwrap_or(u32::MAX),
            memory_bytes: machine.ram().size(),
            state_format: self.format,
            state_bytes: self.state_bytes,
            budget: self.ceiling,
            margin: None,
            phases: self.aside.timing.marks.iter().map(phase).collect(),
            blackout: Blackout::default(),
            clock: Some(ClockReceipt {
                wall_clock: WallClock {
                    error_before_ns: self.wall_error_ns,
                    ..WallClock::default()
                },
                ..ClockReceipt::default()
            }),
            recovery: Vec::new(),
            warnings: Vec::new(),
        }
    }
}
