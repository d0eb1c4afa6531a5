//! What a rollout asks of this host with all its guests: its KVM exchanged, or put back; its kernel swapped.
//!
//! ```text
//!   forward ─▶ runs it already? ─▶ exchange, as `stillpoint swap kvm` does, by the release of that name
//!   back    ─▶ the swap of this rollout that went before:
//!                 none, or guests came back on the old modules ─▶ there
//!                 not over ─▶ wait                   otherwise ─▶ exchange, to what was there before it
//!   kernel  ─▶ runs it already? ─▶ jump, as `stillpoint swap kernel` does; after it the adoption has said what came of it
//! ```
//!
//! The order's id is the swap's here too. Must never: exchange anything under some guests of the host only; take
//! from an order more than a release's name.

use std::path::Path;

use super::{asked_for, say};
use crate::agent::kernel_releases::{self, KernelRelease};
use crate::agent::kexec;
use crate::agent::kvm_releases::{self, KvmRelease};
use crate::agent::process::boot_id;
use crate::api::{Desk, Exchange, NewHostSwap, NewKernelSwap, NewKvm, check_host_swap, names};
use crate::execute::unix_ns;
use crate::fleet::record::{Answer, Far, Order};
use crate::model::{
    CameBackOn, Code, HostSwap, HostSwapState, KvmSwap, Problem, Rung, kvm_release,
};
use crate::plan::rollout::Way;
use crate::plan::rollout::evidence::Worst;

/// How it is to be done.
struct How {
    exchange: Exchange,
    command: Vec<String>,
    undo: Option<String>,
    /// The release that is there afterwards.
    release: String,
}

/// Begins it, if there is anything to do.
pub(super) async fn begin(desk: &Desk, order: &Order) -> Result<Answer, Problem> {
    match order.rung {
        Rung::Kvm => begin_kvm(desk, order).await,
        Rung::Kernel => Ok(begin_kernel(desk, order).await),
        Rung::Backend | Rung::Vmm => {
            let reason = format!("no {} is swapped with all guests of a host", order.rung);
            Ok(say(order, Far::Refused, Some(reason)))
        }
    }
}

async fn begin_kvm(desk: &Desk, order: &Order) -> Result<Answer, Problem> {
    let swaps = desk.host.store.host_swaps().await?;
    let runs = kvm_release(&swaps, &boot_id());
    let how = match order.way {
        Way::Forward if runs == order.to => return Ok(say(order, Far::Settled, None)),
        Way::Forward => forward(&desk.host.kvm_dir, &order.to),
        Way::Back => match went_before(&swaps, order) {
            None => return Ok(say(order, Far::Settled, None)),
            Some(swap) if !swap.state.is_over() => {
                let reason = format!("swap {} of this host has to end first", swap.id);
                return Ok(say(order, Far::UnderWay, Some(reason)));
            }
            Some(swap) => match &swap.kvm {
                Some(kvm) if kvm.came_back_on != Some(CameBackOn::Old) => Ok(back(swap, kvm)),
                _ => return Ok(say(order, Far::Settled, None)),
            },
        },
    };
    let asked = match how {
        Ok(how) => ask(desk, order, how, runs).await,
        Err(problem) => Err(problem),
    };
    Ok(asked_for(order, asked))
}

/// Jumps. It is on disk under the order's id before anything happens, and what comes of it says the adoption after
/// the jump, before this is looked at again: no order is a second jump. A host that runs the kernel needs none.
async fn begin_kernel(desk: &Desk, order: &Order) -> Answer {
    if order.way == Way::Back {
        let reason = "a jump into another kernel has no way back".to_owned();
        return say(order, Far::Refused, Some(reason));
    }
    if kexec::running() == order.to {
        return say(order, Far::Settled, None);
    }
    let asked = match kernel_releases::find(&desk.host.boot_dir, &order.to) {
        Err(error) => Err(Problem::new(Code::NotFound, error.to_string())),
        Ok(KernelRelease { image, initrd }) => {
            let new = NewKernelSwap {
                kernel: image,
                initrd,
                command_line: None,
                budget_ns: order.budget_ns.unwrap_or(0),
                notice_ns: order.notice_ns,
                no_notice: order.no_notice.clone(),
                rehearse: None,
            };
            let rollout = Some(order.rollout.clone());
            let asked = desk.ask_kernel_swap(new, order.id.clone(), rollout);
            asked.await.map(drop).map_err(|refusal| refusal.0)
        }
    };
    asked_for(order, asked)
}

/// The swap of an order's rollout that went forward here, as far as one did. What came after it is a way back.
fn went_before<'a>(swaps: &'a [HostSwap], order: &Order) -> Option<&'a HostSwap> {
    let of_it = swaps.iter().filter(|swap| {
        let is_of_it = swap.rollout.as_ref() == Some(&order.rollout);
        is_of_it && swap.state != HostSwapState::Refused
    });
    of_it.min_by_key(|swap| swap.asked_at_unix_ns)
}

fn forward(dir: &Path, version: &str) -> Result<How, Problem> {
    let found = kvm_releases::find(dir, version);
    let found = found.map_err(|error| Problem::new(Code::NotFound, error.to_string()))?;
    let release = version.to_owned();
    Ok(match found {
        KvmRelease::Modules(folder, parameters) => How {
            exchange: Exchange::Folder(NewKvm {
                to: Some(folder.display().to_string()),
                parameters,
            }),
            command: Vec::new(),
            undo: None,
            release,
        },
        KvmRelease::Programs { exchange, undo } => How {
            exchange: Exchange::Command,
            command: vec![exchange.display().to_string()],
            undo: Some(quoted(&undo.display().to_string())),
            release,
        },
    })
}

/// The way back from a swap: to the modules that were there before it, or by the undo of its release.
fn back(swap: &HostSwap, kvm: &KvmSwap) -> How {
    let release = kvm.from.clone().unwrap_or_default();
    match (swap.command.first(), &swap.undo) {
        (Some(exchange), Some(undo)) => How {
            exchange: Exchange::Command,
            command: vec!["/bin/sh".into(), "-c".into(), undo.clone()],
            undo: Some(quoted(exchange)),
            release,
        },
        _ => How {
            exchange: Exchange::PutBack(kvm.before.clone()),
            command: Vec::new(),
            undo: None,
            release,
        },
    }
}

/// A word as a shell reads it.
fn quoted(word: &str) -> String {
    format!("'{}'", word.replace('\'', "'\\''"))
}

/// Asks for the swap as `stillpoint swap kvm` would, under the order's id.
async fn ask(desk: &Desk, order: &Order, how: How, runs: String) -> Result<(), Problem> {
    let new = NewHostSwap {
        command: how.command,
        undo: how.undo,
        budget_ns: order.budget_ns.unwrap_or(0),
        notice_ns: order.notice_ns,
        no_notice: order.no_notice.clone(),
        ..NewHostSwap::default()
    };
    check_host_swap(&new)?;
    let vms = desk
        .guests_or_none(&[])
        .await
        .map_err(|refusal| refusal.0)?;
    let kvm = desk.kvm(how.exchange, &vms).await;
    let kvm = kvm.map_err(|refusal| refusal.0)?;
    let swap = HostSwap {
        rollout: Some(order.rollout.clone()),
        kvm: Some(KvmSwap {
            release: Some(how.release),
            from: Some(runs),
            ..kvm
        }),
        command: new.command,
        undo: new.undo,
        notice_ns: new.notice_ns,
        no_notice: new.no_notice,
        ..HostSwap::wanted(order.id.clone(), names(&vms), new.budget_ns, unix_ns())
    };
    desk.begin(swap, &vms)
        .await
        .map(drop)
        .map_err(|refusal| refusal.0)
}

/// What is to be said of an order whose swap is recorded.
pub(super) async fn of_swap(
    desk: &Desk,
    order: &Order,
    swap: &HostSwap,
) -> Result<Answer, Problem> {
    let came_back_on = swap.kvm.as_ref().and_then(|kvm| kvm.came_back_on);
    let mut far = far(order.way, swap.state, came_back_on);
    let mut reason = swap.reason.clone();
    let came_to = swap.kernel.as_ref().and_then(|jump| jump.to.as_ref());
    if let Some(other) = came_to.filter(|kernel| **kernel != order.to) {
        far = Far::Failed;
        reason = Some(format!("the host came to kernel {other}"));
    }
    if !swap.state.is_over() {
        return Ok(say(order, far, reason));
    }
    let parts = desk.host.store.parts(&swap.id).await?;
    Ok(Answer {
        worst: Some(Worst::of(&parts)),
        ..say(order, far, reason)
    })
}

/// How far an order is, by its swap.
fn far(way: Way, state: HostSwapState, came_back_on: Option<CameBackOn>) -> Far {
    match (state, way) {
        (HostSwapState::Wanted | HostSwapState::InProgress, _) => Far::UnderWay,
        (HostSwapState::Refused, _) => Far::Kept,
        (HostSwapState::Done, _) => Far::Settled,
        // Guests were late, and that is no reason to take them away once more.
        (HostSwapState::Failed, Way::Back) if came_back_on == Some(CameBackOn::New) => Far::Settled,
        (HostSwapState::Failed, _) => Far::Failed,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fleet::record::RolloutId;
    use crate::model::SwapId;

    fn order(way: Way) -> Order {
        Order {
            id: SwapId("r-0b1".into()),
            rollout: RolloutId("r".into()),
            rung: Rung::Kvm,
            epoch: 1,
            to: "1.1".into(),
            budget_ns: Some(1),
            way,
            notice_ns: None,
            no_notice: None,
            way_back: false,
            allow_downgrade: true,
        }
    }

    fn swap(at: u64, state: HostSwapState) -> HostSwap {
        HostSwap {
            rollout: Some(RolloutId("r".into())),
            kvm: Some(KvmSwap::default()),
            state,
            ..HostSwap::wanted(SwapId(format!("r-0f{at}")), Vec::new(), 1, at)
        }
    }

    #[test]
    fn the_way_back_is_from_the_first_swap_that_was_not_refused() {
        let back = order(Way::Back);
        assert!(went_before(&[swap(1, HostSwapState::Refused)], &back).is_none());
        let all = [
            swap(1, HostSwapState::Refused),
            swap(2, HostSwapState::Done),
            swap(3, HostSwapState::Failed),
        ];
        let found = went_before(&all, &back).map(|swap| swap.id.0.as_str());
        assert_eq!(found, Some("r-0f2"));
        let mut others = all;
        for swap in &mut others {
            swap.rollout = None;
        }
        assert!(went_before(&others, &back).is_none());
    }

    #[test]
    fn a_swap_that_failed_is_evidence_forward_and_tried_again_on_the_way_back() {
        use HostSwapState::{Done, Failed, InProgress, Refused};
        let (new, old) = (Some(CameBackOn::New), Some(CameBackOn::Old));
        for (way, state, on, says) in [
            (Way::Forward, InProgress, None, Far::UnderWay),
            (Way::Forward, Refused, None, Far::Kept),
            (Way::Forward, Done, new, Far::Settled),
            (Way::Forward, Failed, old, Far::Failed),
            (Way::Forward, Failed, new, Far::Failed),
            (Way::Back, Failed, new, Far::Settled),
            (Way::Back, Failed, old, Far::Failed),
            (Way::Back, Failed, None, Far::Failed),
        ] {
            assert_eq!(far(way, state, on), says, "{way:?} {state} {on:?}");
        }
    }

    #[test]
    fn what_a_shell_runs_is_one_word_whatever_is_in_it() {
        assert_eq!(quoted("/a b/it's"), r"'/a b/it'\''s'");
    }
}
