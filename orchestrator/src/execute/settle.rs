//! Finds out how a swap ended that nobody watched to its end: the predecessor's connection broke,
//! or an earlier daemon died in the middle. Never guesses: until the ownership word, the pidfds
//! and the VMM at the control socket agree, the swap is in doubt and is looked at again.

use std::time::Duration;

use stillpoint_control::message::GuestState;
use stillpoint_control::ownership::Epoch;

use super::swap::{self, keep, moved};
use super::{Host, relieve, unix_ns};
use crate::agent::custody;
use crate::agent::find::Held;
use crate::agent::process::Process;
use crate::model::{SwapRecord, SwapState, VmRecord, VmState};
use crate::plan::{self, vm::Verdict};

/// How long the two processes may take between themselves, before the record says "in doubt":
/// more than any blackout budget, and they end it themselves when it is broken.
const PATIENCE: Duration = Duration::from_secs(40);
const PAUSE: Duration = Duration::from_millis(100);

/// Settles it. Gives back the process that runs the guest, if it is known and lives. The record
/// is over afterwards, or says "in doubt".
pub async fn settle(
    host: &Host,
    vm: &VmRecord,
    mut swap: SwapRecord,
    mut held: Option<Held>,
) -> Option<Held> {
    let began = tokio::time::Instant::now();
    let deadline = began + PATIENCE;
    let hung = began + relieve::patience(vm, &swap);
    loop {
        let predecessor = vm.process.as_ref().and_then(|id| Process::open(id).ok());
        let successor = swap
            .successor
            .as_ref()
            .and_then(|id| Process::open(id).ok());
        // Asked anew each time: what it said before may be over.
        let mut running = false;
        if let Ok(found) = host.expected(vm).find().await {
            running = found.description.state == GuestState::Running
                && Some(found.process.id()) == vm.process.as_ref();
            held = Some(found);
        }
        let alive = (predecessor.is_some(), successor.is_some());
        match verdict(&swap, held.as_ref(), alive) {
            // The word alone does not say that it is over: a predecessor that still prepares may
            // yet seal. Only its own word that it runs the guest does.
            Verdict::Kept if !running => {}
            Verdict::Moved => {
                if let (Some(successor), Some(held)) = (successor, held.take()) {
                    let retiring = predecessor.map(|process| (process, held.ownership));
                    return moved(host, vm, swap, retiring, successor, None).await;
                }
            }
            Verdict::Kept => {
                if let Some(successor) = successor {
                    successor.kill().await;
                }
                let held = held.take()?;
                let expected = host.expected(vm);
                swap.report = expected.last_report(&swap.id.0, PAUSE).await;
                let reason = "the handover was cut off before the successor took the guest";
                return keep(host, vm, swap, held, reason.into()).await;
            }
            Verdict::Crashed => {
                // Nobody may run the guest any more; what is left of the two is no use.
                for process in [predecessor, successor].into_iter().flatten() {
                    process.kill().await;
                }
                crashed(host, vm, swap).await;
                return None;
            }
            Verdict::Wait if tokio::time::Instant::now() >= hung => {
                let epoch = swap.epoch_before.map(Epoch);
                if let (Some(p), Some(s), Some(held), Some(before)) =
                    (&predecessor, &successor, &held, epoch)
                {
                    relieve::relieve(before, &held.ownership, p, s).await;
                }
            }
            Verdict::Wait => {}
        }
        if tokio::time::Instant::now() >= deadline {
            doubt(host, swap, alive).await;
            return None;
        }
        tokio::time::sleep(PAUSE).await;
    }
}

fn verdict(swap: &SwapRecord, held: Option<&Held>, alive: (bool, bool)) -> Verdict {
    let (predecessor, successor) = alive;
    if !predecessor && !successor {
        return Verdict::Crashed;
    }
    let Some(held) = held else {
        return Verdict::Wait;
    };
    let (Some(before), Ok(word)) = (swap.epoch_before, held.ownership.read()) else {
        return Verdict::Wait;
    };
    plan::vm::settle(Epoch(before), word, predecessor, successor)
}

async fn crashed(host: &Host, vm: &VmRecord, mut swap: SwapRecord) {
    swap.state = SwapState::Crashed;
    swap.reason = Some("the process that ran the guest died, and the guest with it".into());
    swap.ended_at_unix_ns = Some(unix_ns());
    let process = vm.process.clone();
    host.end_swap(&swap, process.map(|process| (VmState::Crashed, process)))
        .await;
    host.dir(&vm.name).remove_stale_sockets();
    custody::release(&vm.name);
}

async fn doubt(host: &Host, swap: SwapRecord, alive: (bool, bool)) {
    let word = |alive| if alive { "lives" } else { "is dead" };
    let why = format!(
        "the predecessor {}, the successor {}, and the VMM at the control socket does not say \
         who runs the guest",
        word(alive.0),
        word(alive.1)
    );
    swap::doubt(host, swap, &why).await;
}
