//! The predecessor's acts: `vmm/src/handover/outgoing.rs` and `vmm/src/machine/frozen.rs`.

use stillpoint_control::ownership::{Act, Owner};

use crate::daemon::Answer;
use crate::{At, Broken, Event, Handover, Message, State, Step};

impl Handover {
    /// What a predecessor can do next.
    pub(crate) fn predecessor_can(&self, state: &State, proc: usize, events: &mut Vec<Event>) {
        let Some((attempt, predecessor)) = state.attempt() else {
            return;
        };
        if predecessor != proc {
            return;
        }
        let heard = state.wires[attempt].to_predecessor.first();
        let mut can = |step| events.push(Event::Step(proc, step));
        match state.procs[proc].at {
            At::Preparing => {
                if heard == Some(&Message::Adopted) {
                    can(Step::Freeze);
                }
                can(Step::CallOff);
            }
            At::Frozen => {
                can(Step::Seal);
                can(Step::CallOff);
            }
            At::Sealed => {
                if heard == Some(&Message::Loaded) {
                    can(Step::GiveUp);
                }
                can(Step::CallOff);
            }
            At::GivenUp => {
                if heard == Some(&Message::Running) {
                    can(Step::Retire);
                }
                if !self.lacks(Broken::NoReclaim) {
                    can(Step::CallOff);
                }
            }
            _ => {}
        }
    }

    /// It does it.
    pub(crate) fn predecessor_steps(&self, state: &mut State, proc: usize, step: Step) {
        let Some((attempt, _)) = state.attempt() else {
            return;
        };
        let epoch = |state: &State| state.procs[proc].owner.map(Owner::epoch);
        match step {
            Step::Freeze => {
                state.wires[attempt].to_predecessor.remove(0);
                state.procs[proc].at = At::Frozen;
            }
            Step::Seal => {
                let current = state.procs[proc].owner.unwrap_or(state.word);
                match state.act(self, Act::Seal(current)) {
                    Ok(_) => {
                        state.procs[proc].at = At::Sealed;
                        state.fresh[attempt] = true;
                        state.procs[proc].says = Some(Message::State);
                    }
                    Err(_) => self.keep(state, proc, attempt),
                }
            }
            Step::GiveUp => {
                state.wires[attempt].to_predecessor.remove(0);
                let Some(epoch) = epoch(state) else { return };
                match state.act(self, Act::GiveUp(self.next(epoch))) {
                    Ok(_) => {
                        state.procs[proc].at = At::GivenUp;
                        state.procs[proc].says = Some(Message::GiveUp);
                    }
                    Err(_) => self.still(state, proc),
                }
            }
            Step::Retire => {
                state.wires[attempt].to_predecessor.remove(0);
                state.procs[proc].at = At::Retired;
                state.daemon.hears(Answer::Moved);
            }
            Step::CallOff => self.call_off(state, proc, attempt),
            _ => {}
        }
    }

    /// `drop` of `Frozen`, or `reclaim` of `GivenUp`.
    fn call_off(&self, state: &mut State, proc: usize, attempt: usize) {
        let Some(owner) = state.procs[proc].owner else {
            return;
        };
        let epoch = self.next(owner.epoch());
        match state.procs[proc].at {
            At::Sealed if self.lacks(Broken::UnsealWithoutTheWord) => {
                self.keep(state, proc, attempt);
            }
            At::GivenUp if self.lacks(Broken::ReclaimWithoutTheWord) => {
                self.keep(state, proc, attempt);
            }
            At::Sealed => match state.act(self, Act::Unseal(epoch)) {
                Ok(held) => {
                    state.procs[proc].owner = Some(held);
                    self.keep(state, proc, attempt);
                }
                Err(_) => self.still(state, proc),
            },
            At::GivenUp => match state.act(self, Act::Reclaim(epoch)) {
                Ok(held) => {
                    state.procs[proc].owner = Some(held);
                    self.keep(state, proc, attempt);
                }
                Err(_) => {
                    state.procs[proc].at = At::Retired;
                    state.daemon.hears(Answer::Moved);
                }
            },
            _ => self.keep(state, proc, attempt),
        }
    }

    /// The guest runs on here, and then both are told.
    fn keep(&self, state: &mut State, proc: usize, attempt: usize) {
        state.run(proc, Message::Refused);
        state.wires[attempt].to_predecessor.clear();
    }

    /// The word was lost: the guest stays still here, and the process ends.
    fn still(&self, state: &mut State, proc: usize) {
        state.end(proc, At::Retired);
        state.daemon.hears(Answer::Moved);
    }

    /// A message for the successor; the last one is for the daemon too.
    pub(crate) fn tell_successor(&self, state: &mut State, attempt: usize, message: Message) {
        if message == Message::Refused {
            state.daemon.hears(Answer::Kept);
        }
        // A closed socket takes nothing.
        if state.procs[attempt + 1].at.lives() {
            state.wires[attempt].to_successor.push(message);
        }
    }

    /// The attempt after this one, where epochs count up.
    pub(crate) fn next(
        &self,
        epoch: stillpoint_control::ownership::Epoch,
    ) -> stillpoint_control::ownership::Epoch {
        if self.lacks(Broken::Epochs) {
            stillpoint_control::ownership::Epoch(1)
        } else {
            epoch.next()
        }
    }
}
