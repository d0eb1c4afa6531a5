//! What is next for one VM on its host, from what is wanted and what is seen.
//!
//! Two questions are answered here: the next step for a VM ([`next`]), and who runs the guest
//! after a swap that ended without a word ([`settle`]).

use stillpoint_control::ownership::{Epoch, Owner};

use crate::model::{SwapId, SwapRecord, SwapState, VmRecord, VmState, Wanted};

/// What can be seen of a VM's process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Seen {
    /// There is provably none.
    Nothing,
    /// It is held: it answered, proved itself, and lives.
    Alive,
    /// It ended while it was watched, or was found dead.
    Ended(Ending),
    /// Something is there that can't be spoken to, or isn't the VMM that was started.
    Unreachable(String),
}

/// How a process ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ending {
    /// The guest powered off.
    PoweredOff,
    /// It failed; the text says how.
    Failed(String),
}

/// What to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Nothing until something changes.
    Rest,
    /// Start its process.
    Start,
    /// End its process.
    PowerOff,
    /// Hand it to a successor.
    Swap(SwapId),
    /// Find out how a swap ended that nobody watched to its end.
    Settle(SwapId),
    /// End a swap that can't begin.
    Refuse(SwapId),
    /// Write down what it is now.
    Record(VmState),
    /// Write down that it can't be found now, and look again later.
    LookAgain,
}

/// A step and the reason for it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Planned {
    /// What to do.
    pub step: Step,
    /// Why, for logs and records.
    pub why: String,
}

fn planned(step: Step, why: impl Into<String>) -> Planned {
    let why = why.into();
    Planned { step, why }
}

/// The next step for `vm`; `swap` is its swap that isn't over, if there is one.
pub fn next(vm: &VmRecord, swap: Option<&SwapRecord>, seen: &Seen) -> Planned {
    // A guest's part of a swap of its host is the host's to carry out, and the VM's own way goes on:
    // it may end, or be ended.
    if let Some(part) = swap
        && part.part_of.is_some()
    {
        return match (seen, vm.wanted) {
            (Seen::Alive, Wanted::Running) => planned(Step::Rest, "its host is being swapped"),
            _ => next(vm, None, seen),
        };
    }
    if let Some(swap) = swap
        && matches!(swap.state, SwapState::InProgress | SwapState::InDoubt)
    {
        // Before all else: until it is settled nobody knows which process is the VM's.
        return planned(Step::Settle(swap.id.clone()), "a swap was left unfinished");
    }
    if let Some(refusal) = refuse_swap(vm, swap, seen) {
        return refusal;
    }
    match seen {
        Seen::Alive => next_alive(vm, swap),
        Seen::Nothing => next_nothing(vm),
        Seen::Ended(ending) if vm.state.is_active() => record_end(vm.wanted, ending),
        Seen::Ended(_) => planned(Step::Rest, "its end is recorded"),
        Seen::Unreachable(why) => planned(Step::LookAgain, why.clone()),
    }
}

fn refuse_swap(vm: &VmRecord, swap: Option<&SwapRecord>, seen: &Seen) -> Option<Planned> {
    let swap = swap?;
    let why = match (seen, vm.wanted) {
        (Seen::Alive, Wanted::Running) => return None,
        (_, Wanted::Stopped) => "the VM was to be stopped before the swap began",
        (Seen::Nothing | Seen::Ended(_), _) => "the VM's process ended before the swap began",
        (Seen::Unreachable(_), _) => "the VM's process could not be spoken to",
    };
    Some(planned(Step::Refuse(swap.id.clone()), why))
}

fn next_alive(vm: &VmRecord, swap: Option<&SwapRecord>) -> Planned {
    match (vm.wanted, swap) {
        (Wanted::Stopped, _) => planned(Step::PowerOff, "it is wanted off"),
        (Wanted::Running, Some(swap)) => {
            planned(Step::Swap(swap.id.clone()), "another release is wanted")
        }
        (Wanted::Running, None) if vm.state != VmState::Running => {
            planned(Step::Record(VmState::Running), "its process was found")
        }
        (Wanted::Running, None) => planned(Step::Rest, "it is as wanted"),
    }
}

fn next_nothing(vm: &VmRecord) -> Planned {
    match (vm.state, vm.wanted) {
        (VmState::Starting, Wanted::Running) => {
            planned(Step::Start, "it is wanted and has no process")
        }
        (state, Wanted::Stopped) if state.is_active() => {
            planned(Step::Record(VmState::Stopped), "it was to be stopped")
        }
        (state, Wanted::Running) if state.is_active() => planned(
            Step::Record(VmState::Crashed),
            "its process was gone when the daemon looked for it",
        ),
        _ => planned(Step::Rest, "its end is recorded"),
    }
}

fn record_end(wanted: Wanted, ending: &Ending) -> Planned {
    match (ending, wanted) {
        (Ending::PoweredOff, Wanted::Running) => planned(
            Step::Record(VmState::Stopped),
            "the guest powered itself off",
        ),
        (_, Wanted::Stopped) => planned(Step::Record(VmState::Stopped), "it was to be stopped"),
        (Ending::Failed(how), Wanted::Running) => {
            planned(Step::Record(VmState::Crashed), how.clone())
        }
    }
}

/// Who runs the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The successor.
    Moved,
    /// The predecessor.
    Kept,
    /// Nobody any more.
    Crashed,
    /// It is between the two, and they are still at it.
    Wait,
}

/// Settles a swap from the ownership word and from who lives. `before` is the word's epoch when
/// the handover was asked for; never guesses.
pub fn settle(
    before: Epoch,
    word: Owner,
    predecessor_alive: bool,
    successor_alive: bool,
) -> Verdict {
    match word {
        // Only a successor makes a Taken of a later epoch, and only before its first visible act.
        Owner::Taken(epoch) if epoch > before => alive_or_crashed(successor_alive, Verdict::Moved),
        // Never sealed, or called off: the saved state is not to be run, so only the
        // predecessor can have the guest.
        Owner::Taken(_) | Owner::Held(_) => alive_or_crashed(predecessor_alive, Verdict::Kept),
        // The predecessor may unseal or reclaim, the successor may take: whoever lives acts.
        Owner::Sealed(_) | Owner::GivenUp(_) if predecessor_alive || successor_alive => {
            Verdict::Wait
        }
        Owner::Sealed(_) | Owner::GivenUp(_) => Verdict::Crashed,
        // The predecessor never runs it again; the successor takes it when that one is dead.
        Owner::Revoked(_) if successor_alive => Verdict::Wait,
        Owner::Revoked(_) => Verdict::Crashed,
    }
}

/// The attempt in which the guest is to be revoked from a predecessor that holds it, sealed, for
/// longer than any budget: it hangs, for a deadline of its own would have ended that. Only where
/// the successor lives to take it; a predecessor whose successor is dead had better wake up.
pub fn revoke(
    before: Epoch,
    word: Owner,
    predecessor_alive: bool,
    successor_alive: bool,
) -> Option<Epoch> {
    match word {
        // Revoked too: a daemon that died between this and the kill.
        Owner::Sealed(epoch) | Owner::GivenUp(epoch) | Owner::Revoked(epoch) => {
            (epoch > before && predecessor_alive && successor_alive).then_some(epoch)
        }
        Owner::Held(_) | Owner::Taken(_) => None,
    }
}

fn alive_or_crashed(alive: bool, verdict: Verdict) -> Verdict {
    if alive { verdict } else { Verdict::Crashed }
}

#[cfg(test)]
mod tests;
