//! The successor's acts: `vmm/src/handover/incoming.rs`.

use stillpoint_control::ownership::{Act, Epoch, Owner, OwnershipError};

use crate::{At, Broken, Event, Handover, Message, State, Step};

impl Handover {
    /// What a successor can do next.
    pub(crate) fn successor_can(&self, state: &State, proc: usize, events: &mut Vec<Event>) {
        let Some(attempt) = state.attempt_of(proc) else {
            return;
        };
        let heard = state.wires[attempt].to_successor.first();
        let predecessor = state.procs[state.daemon.predecessor[attempt]];
        // By the pidfd: dead, and has left nothing unread.
        let dead =
            heard.is_none() && (!predecessor.at.lives() || self.lacks(Broken::TakeFromTheLiving));
        let mut can = |step| events.push(Event::Step(proc, step));
        match state.procs[proc].at {
            At::Adopting => can(Step::Adopt),
            At::Adopted => match heard {
                Some(Message::State) => can(Step::Load),
                Some(_) => can(Step::Leave),
                None if dead => can(Step::LoadFromDead),
                None => {}
            },
            At::Loaded => match heard {
                Some(Message::GiveUp) => can(Step::Take),
                Some(_) => can(Step::Leave),
                None if dead => can(Step::TakeFromDead),
                None => {}
            },
            At::Taken => can(Step::Enter),
            _ => {}
        }
    }

    /// It does it.
    pub(crate) fn successor_steps(&self, state: &mut State, proc: usize, step: Step) {
        let Some(attempt) = state.attempt_of(proc) else {
            return;
        };
        let epoch = state.daemon.epochs[attempt];
        match step {
            Step::Adopt => {
                state.procs[proc].at = At::Adopted;
                state.procs[proc].says = Some(Message::Adopted);
            }
            Step::Load => {
                state.wires[attempt].to_successor.remove(0);
                state.procs[proc].at = At::Loaded;
                state.procs[proc].says = Some(Message::Loaded);
            }
            Step::LoadFromDead => {
                let sealed = matches!(
                    state.word,
                    Owner::Sealed(e) | Owner::Revoked(e) if e == epoch
                );
                let sealed = sealed && !self.lacks(Broken::NothingFromTheDead);
                state.procs[proc].at = if sealed { At::Loaded } else { At::Left };
            }
            Step::Take => {
                state.wires[attempt].to_successor.remove(0);
                self.take(state, proc, attempt, Act::Take(epoch));
            }
            Step::TakeFromDead if self.lacks(Broken::NothingFromTheDead) => {
                state.procs[proc].at = At::Left;
            }
            Step::TakeFromDead => self.take(state, proc, attempt, Act::TakeFromDead(epoch)),
            Step::Enter => state.run(proc, Message::Running),
            Step::Leave => {
                state.wires[attempt].to_successor.clear();
                state.procs[proc].at = At::Left;
            }
            _ => {}
        }
    }

    fn take(&self, state: &mut State, proc: usize, attempt: usize, act: Act) {
        match state.act(self, act) {
            Ok(taken) => {
                state.stale |= !state.fresh[attempt];
                state.procs[proc].owner = Some(taken);
                state.procs[proc].at = At::Taken;
            }
            // Given up, and revoked since: it waits for the predecessor's end.
            Err(OwnershipError::Lost {
                found: Owner::Revoked(epoch),
                ..
            }) if epoch == state.daemon.epochs[attempt] && !self.lacks(Broken::RevokedIsLost) => {}
            Err(_) if self.lacks(Broken::TakeWithoutTheWord) => {
                let Epoch(epoch) = state.daemon.epochs[attempt];
                state.procs[proc].owner = Some(Owner::Taken(Epoch(epoch)));
                state.procs[proc].at = At::Taken;
            }
            Err(_) => state.procs[proc].at = At::Left,
        }
    }

    /// Whether an error of its own can end it.
    pub(crate) fn can_fail(&self, state: &State, proc: usize) -> bool {
        let at = state.procs[proc].at;
        state.acts(proc) && matches!(at, At::Adopting | At::Adopted | At::Loaded)
    }

    /// An error of its own: it says so, and ends.
    pub(crate) fn fail(&self, state: &mut State, proc: usize) {
        state.end(proc, At::Failed);
        self.tell_predecessor(state, proc, Message::Refused);
    }

    /// A message for the predecessor, if it still listens.
    pub(crate) fn tell_predecessor(&self, state: &mut State, successor: usize, message: Message) {
        let Some(attempt) = state.attempt_of(successor) else {
            return;
        };
        let predecessor = state.daemon.predecessor[attempt];
        let waits = matches!(
            state.procs[predecessor].at,
            At::Preparing | At::Frozen | At::Sealed | At::GivenUp
        );
        let current = state.attempt() == Some((attempt, predecessor));
        if waits && current {
            state.wires[attempt].to_predecessor.push(message);
        }
    }
}
