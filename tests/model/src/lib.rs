//! The handover as a model: predecessor, successor and daemon, as states and acts, and every order
//! in which they can go on, be slow, hang or die. A checker (stateright) goes through all of them.
//!
//! States and acts are named as in the code they stand for, and what can be shared is shared: the
//! acts on the ownership word ([`Act`]) and what the daemon makes of it
//! (`orchestrator::plan`) are the code itself. Who changes `vmm/src/handover`, `machine/frozen.rs`,
//! `orchestrator/src/execute/{swap,settle}.rs` or the word changes this too (RFD 0010).
//!
//! ```text
//!  predecessor (predecessor.rs)                successor (successor.rs)
//!  Running ─ask▶ Preparing ─▶ Frozen           Adopting ─▶ Adopted ─▶ Loaded ─▶ Taken ─▶ Running
//!     ▲              │           │ seal            │          │          │
//!     │◀─────────────┴───────────┤                 └──────────┴────┬─────┘
//!     │           unseal         ▼                                 ▼
//!     ├◀────────────────────── Sealed ─▶ Retired            Left, Failed
//!     │           reclaim        │ give up
//!     └◀────────────────────── GivenUp ─▶ Retired      anyone, anywhere: Dead, Killed, hung
//! ```
//!
//! What is assumed: messages between two processes arrive in their order, at any time, or never if
//! the reader is gone (a `SOCK_SEQPACKET` pair); a pidfd tells no death that hasn't happened; any
//! timer may fire at any moment at which its process waits, with one exception, that a successor
//! that has loaded outlasts the daemon's patience with a predecessor that hangs.

mod broken;
mod daemon;
mod predecessor;
mod properties;
mod successor;

use stateright::{Model, Property};
use stillpoint_control::ownership::{Act, Epoch, Owner, OwnershipError};

pub use broken::Broken;
pub use daemon::{Daemon, Record};

/// Attempts to swap the guest that the daemon makes, one after the other.
pub const ATTEMPTS: usize = 2;
/// The process that boots the guest, and a successor for each attempt.
pub const PROCS: usize = ATTEMPTS + 1;

/// Where a process is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum At {
    /// Not started.
    Absent,
    /// Successor: builds its machine.
    Adopting,
    /// Successor: waits for the saved state.
    Adopted,
    /// Successor: has loaded; waits for the word.
    Loaded,
    /// Successor: owns the guest, has entered no vCPU yet.
    Taken,
    /// Runs the guest.
    Running,
    /// Predecessor: runs the guest, and waits for the successor to adopt.
    Preparing,
    /// Predecessor: the guest stands still.
    Frozen,
    /// Predecessor: the saved state is complete.
    Sealed,
    /// Predecessor: has given the guest up.
    GivenUp,
    /// Predecessor: the guest is not its own any more; ended.
    Retired,
    /// Successor: ended because there was nothing to take.
    Left,
    /// Successor: ended by an error of its own.
    Failed,
    /// Died.
    Dead,
    /// Killed by the daemon.
    Killed,
}

impl At {
    /// Whether the process is there.
    pub fn lives(self) -> bool {
        !matches!(
            self,
            Self::Absent | Self::Retired | Self::Left | Self::Failed | Self::Dead | Self::Killed
        )
    }

    /// Whether the guest's vCPUs run in it.
    pub fn runs(self) -> bool {
        matches!(self, Self::Running | Self::Preparing)
    }
}

/// A process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Proc {
    /// Where it is.
    pub at: At,
    /// It never acts again, and lives.
    pub hung: bool,
    /// What the word says while the guest is its own.
    pub owner: Option<Owner>,
    /// What it is about to say: it can die between an act and the word about it.
    pub says: Option<Message>,
}

/// A message of the handover (`vmm/src/handover.rs`), as far as it matters here.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Message {
    /// The successor waits for state.
    Adopted,
    /// The state lies sealed.
    State,
    /// It is loaded.
    Loaded,
    /// The guest may be taken.
    GiveUp,
    /// It runs.
    Running,
    /// One side can't go on.
    Refused,
}

/// What is on the wire of an attempt.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Wire {
    /// For the successor, oldest first.
    pub to_successor: Vec<Message>,
    /// For the predecessor.
    pub to_predecessor: Vec<Message>,
}

/// Everything.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct State {
    /// The ownership word.
    pub word: Owner,
    /// The processes.
    pub procs: [Proc; PROCS],
    /// The sockets between them, one for each attempt.
    pub wires: [Wire; ATTEMPTS],
    /// The daemon.
    pub daemon: Daemon,
    /// Its records, one for each attempt; they outlive it.
    pub records: [Record; ATTEMPTS],
    /// Faults that may still come: deaths, hangs and errors of processes.
    pub faults: u8,
    /// Deaths of the daemon that may still come.
    pub daemon_deaths: u8,
    /// For each attempt: a state was saved, and the guest has not run since.
    pub fresh: [bool; ATTEMPTS],
    /// A guest was taken from saved state after it had run on: never.
    pub stale: bool,
    /// A step was taken that goes back: then an execution might never end.
    pub went_back: bool,
}

/// What can happen next.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Event {
    /// A process does its next act.
    Step(usize, Step),
    /// A process dies.
    Dies(usize),
    /// A process hangs.
    Hangs(usize),
    /// The daemon does its next act.
    Daemon(daemon::Step),
    /// The daemon dies.
    DaemonDies,
}

/// An act of a predecessor or successor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Step {
    /// Sends what it is about to say.
    Say,
    /// Brings the guest to rest: the successor has adopted.
    Freeze,
    /// Saves, and seals.
    Seal,
    /// The successor has loaded: gives up.
    GiveUp,
    /// The deadline, a refusal or the end of the other side: calls the attempt off.
    CallOff,
    /// The successor says that it runs.
    Retire,
    /// Has built its machine.
    Adopt,
    /// Loads the state that came.
    Load,
    /// The predecessor is dead: looks at the word, and loads what is sealed.
    LoadFromDead,
    /// Takes what was given up.
    Take,
    /// Takes from a dead predecessor.
    TakeFromDead,
    /// Enters the vCPUs.
    Enter,
    /// Hears that there is nothing to take.
    Leave,
    /// Fails by an error of its own.
    Fail,
}

/// The model; with `broken` it is one of those that must not hold.
#[derive(Clone, Copy, Debug, Default)]
pub struct Handover {
    /// A rule that is left out.
    pub broken: Option<Broken>,
    /// The daemon kills no successor whose attempt was called off: the epoch alone must do.
    pub careless_daemon: bool,
    /// Faults of processes.
    pub faults: u8,
    /// Deaths of the daemon.
    pub daemon_deaths: u8,
}

impl Handover {
    /// Whether a rule is left out.
    pub(crate) fn lacks(&self, broken: Broken) -> bool {
        self.broken == Some(broken)
    }
}

impl State {
    /// The attempt of which this process is the successor.
    pub fn attempt_of(&self, successor: usize) -> Option<usize> {
        successor.checked_sub(1)
    }

    /// The attempt that is under way or was the last, and the process it moves the guest from.
    pub fn attempt(&self) -> Option<(usize, usize)> {
        let attempt = self.records.iter().rposition(|r| *r != Record::NotBegun)?;
        Some((attempt, self.daemon.predecessor[attempt]))
    }

    /// Whether this process can act.
    pub(crate) fn acts(&self, proc: usize) -> bool {
        self.procs[proc].at.lives() && !self.procs[proc].hung
    }

    /// One act on the word. Epochs don't count up where that is broken.
    pub(crate) fn act(&mut self, model: &Handover, act: Act) -> Result<Owner, OwnershipError> {
        let word = self.word.word();
        let done = act.apply(|from, _| if from == word { Ok(word) } else { Err(word) })?;
        self.word = match done {
            Owner::Sealed(_) if model.lacks(Broken::Epochs) => Owner::Sealed(Epoch(1)),
            done => done,
        };
        Ok(self.word)
    }

    /// The guest runs in this process from here on: whatever was saved is old.
    pub(crate) fn run(&mut self, proc: usize, says: Message) {
        self.procs[proc].at = At::Running;
        self.procs[proc].says = Some(says);
        self.fresh = [false; ATTEMPTS];
    }

    /// It ends.
    pub(crate) fn end(&mut self, proc: usize, at: At) {
        self.procs[proc].at = at;
        self.procs[proc].says = None;
    }

    /// Grows with every step: so every execution ends.
    fn progress(&self) -> u64 {
        let stage = |at: At| match at {
            At::Absent => 0,
            At::Adopting | At::Preparing => 1,
            At::Adopted | At::Frozen => 2,
            At::Loaded | At::Sealed => 3,
            At::GivenUp => 4,
            At::Taken => 5,
            At::Running => 6,
            _ => 9,
        };
        // A predecessor begins anew with each attempt it is asked for.
        let asked = |proc: usize| {
            let begun = self.records.iter().zip(&self.daemon.predecessor);
            begun
                .filter(|(r, p)| **r != Record::NotBegun && **p == proc)
                .count() as u64
        };
        let procs: u64 = (0..PROCS)
            .map(|p| {
                let Proc { at, hung, says, .. } = self.procs[p];
                let said = u64::from(says.is_none());
                4 * stage(at) + 2 * said + 40 * asked(p) + u64::from(hung)
            })
            .sum();
        // A message sent is one still to be heard.
        let unheard = |w: &Wire| w.to_successor.len() + w.to_predecessor.len();
        let unheard: usize = self.wires.iter().map(unheard).sum();
        let revoked = u64::from(matches!(self.word, Owner::Revoked(_)));
        let deaths = u64::from(self.daemon_deaths);
        let acted = procs + revoked + self.daemon.progress(&self.records);
        acted + 1000 * (100 - deaths) - unheard as u64
    }
}

impl Model for Handover {
    type State = State;
    type Action = Event;

    fn init_states(&self) -> Vec<State> {
        let first = Owner::Held(Epoch(0));
        let proc = |n| Proc {
            at: if n == 0 { At::Running } else { At::Absent },
            hung: false,
            owner: (n == 0).then_some(first),
            says: None,
        };
        vec![State {
            word: first,
            procs: std::array::from_fn(proc),
            wires: Default::default(),
            daemon: Daemon::default(),
            records: [Record::NotBegun; ATTEMPTS],
            faults: self.faults,
            daemon_deaths: self.daemon_deaths,
            fresh: [false; ATTEMPTS],
            stale: false,
            went_back: false,
        }]
    }

    fn actions(&self, state: &State, events: &mut Vec<Event>) {
        self.good_events(state, events);
        if state.faults > 0 {
            let lives = (0..PROCS).filter(|&p| state.procs[p].at.lives());
            for proc in lives {
                events.push(Event::Dies(proc));
                if !state.procs[proc].hung {
                    events.push(Event::Hangs(proc));
                }
                if self.can_fail(state, proc) {
                    events.push(Event::Step(proc, Step::Fail));
                }
            }
        }
        if state.daemon_deaths > 0 && state.daemon.is_up() {
            events.push(Event::DaemonDies);
        }
    }

    fn next_state(&self, last: &State, event: Event) -> Option<State> {
        let mut state = last.clone();
        match event {
            Event::Dies(proc) => {
                state.faults -= 1;
                state.end(proc, At::Dead);
            }
            Event::Hangs(proc) => {
                state.faults -= 1;
                state.procs[proc].hung = true;
            }
            Event::Step(proc, Step::Fail) => {
                state.faults -= 1;
                self.fail(&mut state, proc);
            }
            Event::Step(proc, step) => match step {
                Step::Say => self.say(&mut state, proc),
                Step::Freeze | Step::Seal | Step::GiveUp | Step::CallOff | Step::Retire => {
                    self.predecessor_steps(&mut state, proc, step);
                }
                _ => self.successor_steps(&mut state, proc, step),
            },
            Event::Daemon(step) => self.daemon_steps(&mut state, step),
            Event::DaemonDies => {
                state.daemon_deaths -= 1;
                state.daemon.dies();
            }
        }
        state.went_back |= state.progress() <= last.progress();
        Some(state)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        properties::all()
    }
}

impl Handover {
    /// Sends what this process is about to say, to whom it is for.
    fn say(&self, state: &mut State, proc: usize) {
        let (Some(message), Some((attempt, predecessor))) =
            (state.procs[proc].says.take(), state.attempt())
        else {
            return;
        };
        if proc == predecessor {
            self.tell_successor(state, attempt, message);
        } else {
            self.tell_predecessor(state, proc, message);
        }
    }

    /// What happens without a fault.
    pub(crate) fn good_events(&self, state: &State, events: &mut Vec<Event>) {
        for proc in (0..PROCS).filter(|&p| state.acts(p)) {
            if state.procs[proc].says.is_some() {
                events.push(Event::Step(proc, Step::Say));
                continue;
            }
            self.predecessor_can(state, proc, events);
            self.successor_can(state, proc, events);
        }
        self.daemon_can(state, events);
    }
}
