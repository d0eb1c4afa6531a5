//! Takes the guest from a predecessor that hangs with its saved state complete, so that the successor,
//! which waits with that state loaded, can have it.
//!
//! A predecessor holds the deadline of a blackout by itself. One that stands there with the word
//! `Sealed` or `GivenUp` long after it can't be slow: it hangs. It is killed, because the successor
//! takes the guest from nobody who lives; but the word is revoked before that, or a predecessor
//! that wakes up in the last moment, and runs its guest, would die with it (RFD 0010).

use std::time::Duration;

use stillpoint_control::ownership::{Epoch, Owner, Ownership};
use stillpoint_control::spec::MAX_BUDGET;
use tokio::time::Instant;

use crate::agent::process::Process;
use crate::model::{SwapRecord, VmRecord};
use crate::plan;

/// What may come on top of the budget before a predecessor counts as one that hangs.
const MARGIN: Duration = Duration::from_secs(5);
const PAUSE: Duration = Duration::from_millis(50);

/// How long a predecessor may stand there sealed in this swap.
pub(super) fn patience(vm: &VmRecord, swap: &SwapRecord) -> Duration {
    let budget = swap.budget_ns.map(Duration::from_nanos);
    budget.unwrap_or(vm.spec.blackout_budget).min(MAX_BUDGET) + MARGIN
}

/// In what a predecessor that gives no answer hangs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Hangs {
    /// With its guest sealed.
    Sealed,
    /// In its retirement: the successor has the guest.
    Retiring,
}

/// Returns when the word has spoken of a sealed guest of a later attempt for that long, or of one
/// that was taken for longer than a predecessor needs to say so.
pub(super) async fn hangs(before: Epoch, ownership: &Ownership, patience: Duration) -> Hangs {
    let (mut sealed, mut taken) = (None, None);
    loop {
        match ownership.read() {
            Ok(Owner::Sealed(epoch) | Owner::GivenUp(epoch)) if epoch > before => {
                if sealed.get_or_insert_with(Instant::now).elapsed() >= patience {
                    return Hangs::Sealed;
                }
            }
            Ok(Owner::Taken(epoch)) if epoch > before => {
                if taken.get_or_insert_with(Instant::now).elapsed() >= MARGIN {
                    return Hangs::Retiring;
                }
            }
            _ => sealed = None,
        }
        tokio::time::sleep(PAUSE).await;
    }
}

/// Revokes the guest, if the successor lives to take it, and kills the predecessor. Whether it did.
pub(super) async fn relieve(
    before: Epoch,
    ownership: &Ownership,
    predecessor: &Process,
    successor: &Process,
) -> bool {
    let Ok(word) = ownership.read() else {
        return false;
    };
    let alive = (predecessor.is_alive(), successor.is_alive());
    let Some(epoch) = plan::vm::revoke(before, word, alive.0, alive.1) else {
        return false;
    };
    if !matches!(word, Owner::Revoked(_)) && ownership.revoke(epoch).is_err() {
        // It woke up, or the successor took the guest: as well.
        return false;
    }
    tracing::warn!(
        pid = predecessor.id().pid,
        "hangs with its guest sealed: killed"
    );
    predecessor.kill().await;
    true
}
