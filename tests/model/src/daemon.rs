//! The daemon's acts: `orchestrator/src/execute/{swap,settle}.rs`. It owns nothing: it pairs the two,
//! hears how it ended or finds out, and kills who provably has no guest.

use orchestrator::plan::vm::{self, Verdict};
use stillpoint_control::ownership::{Act, Epoch, Owner};

use crate::{ATTEMPTS, At, Broken, Event, Handover, State};

/// What the predecessor says in the end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Answer {
    /// The guest is the successor's.
    Moved,
    /// The guest is still its own.
    Kept,
}

/// What is on disk of an attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Record {
    /// Nothing.
    NotBegun,
    /// It is under way, or was when the daemon died.
    InProgress,
    /// The successor has the guest.
    Moved,
    /// The predecessor has it.
    Kept,
    /// Nobody has it any more.
    Crashed,
}

/// How far the daemon is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Doing {
    /// Nothing is in progress.
    Idle,
    /// The predecessor was asked.
    Asked,
    /// It finds out how the attempt ended.
    Settling,
    /// Dead; its unit starts it again.
    Down,
}

/// The daemon.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Daemon {
    /// How far it is.
    pub doing: Doing,
    /// What it has heard.
    pub answer: Option<Answer>,
    /// It holds the ownership page: from the process that answered before the attempt. One that
    /// begins anew in the middle is lent it by nobody until somebody runs the guest.
    pub holds_word: bool,
    /// Of each attempt: who was asked. Recorded with it.
    pub predecessor: [usize; ATTEMPTS],
    /// Of each attempt: its epoch. The successor has it from the offer.
    pub epochs: [Epoch; ATTEMPTS],
    /// Of each attempt: the word's epoch before. Recorded with it.
    pub before: [Epoch; ATTEMPTS],
}

impl Default for Daemon {
    fn default() -> Self {
        Self {
            doing: Doing::Idle,
            answer: None,
            holds_word: true,
            predecessor: [0; ATTEMPTS],
            epochs: [Epoch(0); ATTEMPTS],
            before: [Epoch(0); ATTEMPTS],
        }
    }
}

/// An act of the daemon.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Step {
    /// Records an attempt, starts the successor, asks the predecessor.
    Begin,
    /// Acts on the answer.
    Hear,
    /// No answer: the connection broke, or the patience ended.
    Doubt,
    /// Acts on the word and on who lives.
    Settle,
    /// Takes the guest from a predecessor that hangs.
    Revoke,
    /// Kills the predecessor: the guest is not its own any more.
    KillPredecessor,
    /// Its unit starts it again.
    Restart,
}

impl Daemon {
    /// Whether it lives.
    pub fn is_up(&self) -> bool {
        self.doing != Doing::Down
    }

    /// The predecessor's answer comes, if somebody waits for it.
    pub(crate) fn hears(&mut self, answer: Answer) {
        if self.doing == Doing::Asked {
            self.answer = Some(answer);
        }
    }

    /// What it knew and had not written is gone.
    pub(crate) fn dies(&mut self) {
        self.doing = Doing::Down;
        self.answer = None;
        self.holds_word = false;
    }

    /// Grows with every step of its own.
    pub(crate) fn progress(&self, records: &[Record]) -> u64 {
        let over = |r: &&Record| !matches!(r, Record::NotBegun | Record::InProgress);
        let (begun, over) = (
            records.iter().filter(|r| **r != Record::NotBegun).count(),
            records.iter().filter(over).count(),
        );
        let doing = match self.doing {
            Doing::Down => 0,
            Doing::Idle => 1,
            Doing::Asked => 2,
            Doing::Settling => 3,
        };
        (10 * begun + 10 * over) as u64 + doing
    }
}

impl Handover {
    /// What the daemon can do next.
    pub(crate) fn daemon_can(&self, state: &State, events: &mut Vec<Event>) {
        let mut can = |step| events.push(Event::Daemon(step));
        let daemon = &state.daemon;
        match daemon.doing {
            Doing::Down => can(Step::Restart),
            Doing::Idle => {
                if self.next_attempt(state).is_some() {
                    can(Step::Begin);
                }
            }
            Doing::Asked => {
                if daemon.answer.is_some() {
                    can(Step::Hear);
                } else {
                    can(Step::Doubt);
                }
            }
            Doing::Settling => {
                if self.verdict(state).is_some() {
                    can(Step::Settle);
                }
                self.can_relieve(state, &mut can);
            }
        }
    }

    /// What it does about a predecessor that hangs: it can't tell one from a slow one.
    fn can_relieve(&self, state: &State, can: &mut impl FnMut(Step)) {
        let Some((attempt, predecessor)) = state.attempt() else {
            return;
        };
        if self.lacks(Broken::KillTheSilent) && state.procs[predecessor].at.lives() {
            can(Step::KillPredecessor);
        }
        if self.lacks(Broken::NothingRevoked) || !state.daemon.holds_word {
            return;
        }
        let (p, s) = self.alive(state, attempt);
        match vm::revoke(state.daemon.before[attempt], state.word, p, s) {
            Some(_) if matches!(state.word, Owner::Revoked(_)) => can(Step::KillPredecessor),
            // The look and the kill are two steps, and it may wake up between them.
            Some(_) if self.lacks(Broken::KillWithoutTheWord) => can(Step::KillPredecessor),
            Some(_) => can(Step::Revoke),
            None => {}
        }
    }

    fn alive(&self, state: &State, attempt: usize) -> (bool, bool) {
        let alive = |proc: usize| state.procs[proc].at.lives();
        (alive(state.daemon.predecessor[attempt]), alive(attempt + 1))
    }

    /// The attempt that may begin, and the process that runs the guest.
    fn next_attempt(&self, state: &State) -> Option<(usize, usize)> {
        let attempt = state.records.iter().position(|r| *r == Record::NotBegun)?;
        let runs = |p: &crate::Proc| p.at == At::Running && !p.hung && p.says.is_none();
        let predecessor = state.procs.iter().position(runs)?;
        Some((attempt, predecessor))
    }

    /// What `settle` makes of what is seen; nothing as long as it waits.
    fn verdict(&self, state: &State) -> Option<Verdict> {
        let (attempt, predecessor) = state.attempt()?;
        let (p, s) = self.alive(state, attempt);
        let before = state.daemon.before[attempt];
        match vm::settle(before, state.word, p, s) {
            Verdict::Wait => None,
            // Only the predecessor's own word that it runs the guest ends it.
            Verdict::Kept => {
                let at = state.procs[predecessor].at;
                (at == At::Running && !state.procs[predecessor].hung).then_some(Verdict::Kept)
            }
            // Found at the control socket: it answers there when it runs.
            Verdict::Moved => {
                let at = state.procs[attempt + 1].at;
                (at == At::Running).then_some(Verdict::Moved)
            }
            Verdict::Crashed => {
                let both = !p && !s;
                (both || state.daemon.holds_word).then_some(Verdict::Crashed)
            }
        }
    }

    /// It does it.
    pub(crate) fn daemon_steps(&self, state: &mut State, step: Step) {
        match step {
            Step::Begin => self.begin(state),
            Step::Hear => self.hear(state),
            Step::Doubt => state.daemon.doing = Doing::Settling,
            Step::Settle => {
                if let Some(verdict) = self.verdict(state) {
                    self.end(state, verdict);
                }
            }
            Step::Revoke => {
                if let Some((attempt, _)) = state.attempt() {
                    let epoch = state.daemon.epochs[attempt];
                    // Lost: it woke up, and the next look sees what became of it.
                    let _ = state.act(self, Act::Revoke(epoch));
                }
            }
            Step::KillPredecessor => {
                if let Some((_, predecessor)) = state.attempt() {
                    state.end(predecessor, At::Killed);
                }
            }
            Step::Restart => {
                let open = state.records.contains(&Record::InProgress);
                if open && self.lacks(Broken::Forget) {
                    state.daemon.doing = Doing::Idle;
                } else {
                    state.daemon.doing = if open { Doing::Settling } else { Doing::Idle };
                }
            }
        }
    }

    fn begin(&self, state: &mut State) {
        let Some((attempt, predecessor)) = self.next_attempt(state) else {
            return;
        };
        state.records[attempt] = Record::InProgress;
        let before = state.word.epoch();
        let daemon = &mut state.daemon;
        daemon.doing = Doing::Asked;
        daemon.answer = None;
        daemon.holds_word = true;
        daemon.predecessor[attempt] = predecessor;
        daemon.before[attempt] = before;
        daemon.epochs[attempt] = self.next(before);
        state.procs[attempt + 1].at = At::Adopting;
        state.procs[predecessor].at = At::Preparing;
    }

    fn hear(&self, state: &mut State) {
        let Some((attempt, _)) = state.attempt() else {
            return;
        };
        let taken = matches!(state.word, Owner::Taken(e) if e > state.daemon.before[attempt]);
        match state.daemon.answer.take() {
            Some(Answer::Kept) => self.end(state, Verdict::Kept),
            Some(Answer::Moved) if self.lacks(Broken::BelieveMoved) => {
                self.end(state, Verdict::Moved);
            }
            // Its successor is looked for at the control socket: it may be dead, or hang.
            Some(Answer::Moved) if taken && state.procs[attempt + 1].at == At::Running => {
                self.end(state, Verdict::Moved);
            }
            _ => state.daemon.doing = Doing::Settling,
        }
    }

    /// Kills who has no guest, and records.
    fn end(&self, state: &mut State, verdict: Verdict) {
        let Some((attempt, predecessor)) = state.attempt() else {
            return;
        };
        let (record, killed) = match verdict {
            Verdict::Moved => (Record::Moved, vec![predecessor]),
            Verdict::Kept if self.careless_daemon => (Record::Kept, vec![]),
            Verdict::Kept => (Record::Kept, vec![attempt + 1]),
            Verdict::Crashed => (Record::Crashed, vec![predecessor, attempt + 1]),
            Verdict::Wait => return,
        };
        for proc in killed {
            if state.procs[proc].at.lives() {
                state.end(proc, At::Killed);
            }
        }
        state.records[attempt] = record;
        state.daemon.doing = Doing::Idle;
    }
}
