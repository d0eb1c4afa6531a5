//! Watches a guest after its swap, and has it swapped back when it is not well.
//!
//! ```text
//!  moved ─▶ watching ─▶ well so far ─▶ well
//!               └──────────┴─▶ unwell ─▶ the way back: a swap like any other, recorded with this
//! ```
//!
//! The way back starts from state that is saved anew, never from an old one. It is tried once; its
//! pause is urgent, so its event says that it started at once, with the reason that is recorded
//! (RFD 0024). All of it is on disk before it begins: a daemon that starts anew goes on with it.

use std::time::Duration;

use stillpoint_control::client::ClientError;
use stillpoint_control::health::Signs;
use stillpoint_control::recovery::Recovery;
use stillpoint_control::report::SwapReport;
use tokio::time::Instant;

use super::{Host, unix_ns};
use crate::model::{
    Before, Health, HealthState, Safeguards, SwapId, SwapRecord, SwapState, VmRecord,
};
use crate::plan::health::{self, Verdict, Watch};
use crate::store::StoreError;

/// Between two looks until all was seen to be well.
const SOON: Duration = Duration::from_millis(100);
/// Between two looks after that.
const LATER: Duration = Duration::from_secs(1);

/// A watch that goes on, over several looks.
#[derive(Debug)]
pub struct Watching {
    swap: SwapId,
    began: Instant,
    watch: Watch,
}

/// What is next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// Another look after that long.
    Look(Duration),
    /// Nothing: it is written down how the guest is.
    Over,
}

/// A look at a guest; `None` from a VMM that tells no signs of life.
pub(super) async fn signs(host: &Host, vm: &VmRecord) -> Option<Signs> {
    host.expected(vm).signs().await.ok()
}

/// What gave signs of life before a swap, from two looks.
pub(super) fn before(first: Option<Signs>, second: Option<Signs>) -> Option<Before> {
    Some(health::before(&first?, &second?))
}

/// The guest has moved: from now on it is watched.
pub(super) fn begin(swap: &mut SwapRecord) {
    let guards = &mut swap.safeguards;
    if guards.watch_ns > 0 {
        guards.health = Some(Health::new(HealthState::Watching, Vec::new(), unix_ns()));
    }
}

/// One look at a guest that was swapped, and what follows from it.
pub async fn watch(
    host: &Host,
    vm: &VmRecord,
    mut swap: SwapRecord,
    watching: &mut Option<Watching>,
) -> Result<Next, StoreError> {
    if watching.as_ref().is_none_or(|known| known.swap != swap.id) {
        let before = swap.safeguards.before.clone().unwrap_or_default();
        *watching = Some(Watching {
            swap: swap.id.clone(),
            began: Instant::now(),
            watch: Watch::begin(before, Duration::ZERO),
        });
    }
    let Some(known) = watching.as_mut() else {
        return Ok(Next::Over);
    };
    let told = host.expected(vm).signs().await;
    if let Ok(signs) = &told {
        note_recovery(host, &mut swap, signs).await?;
    }
    let now = known.began.elapsed();
    let verdict = match told {
        Ok(signs) => known.watch.look(signs, now),
        Err(ClientError::Refused { code, .. }) if code == "bad_request" => {
            let why = format!("release {} tells no signs of life", swap.to.version);
            return end(host, swap, HealthState::Ended, vec![why]).await;
        }
        Err(error) => known.watch.mute(&error.to_string(), now),
    };
    let clock = swap.report.as_ref().and_then(health::of_clock);
    let is_over = unix_ns() >= ends_at(&swap);
    match (verdict, clock) {
        (Verdict::Unwell(mut problems), clock) => {
            problems.extend(clock);
            put_back(host, vm, swap, problems).await
        }
        (_, Some(problem)) => put_back(host, vm, swap, vec![problem]).await,
        (Verdict::Well, None) if is_over => end(host, swap, HealthState::Well, Vec::new()).await,
        (Verdict::Well, None) => {
            let state = swap.safeguards.health.as_ref().map(|health| health.state);
            if state != Some(HealthState::WellSoFar) {
                let health = Health::new(HealthState::WellSoFar, Vec::new(), unix_ns());
                swap.safeguards.health = Some(health);
                host.record(&swap).await?;
            }
            Ok(Next::Look(LATER))
        }
        // What is late has its patience, also when the time is over.
        (Verdict::Wait(_), None) => Ok(Next::Look(SOON)),
    }
}

/// How soon the guest was as fast again is known some time after the rest of the report.
async fn note_recovery(
    host: &Host,
    swap: &mut SwapRecord,
    signs: &Signs,
) -> Result<(), StoreError> {
    let is_awaited = |report: &&mut SwapReport| !report.recovery.iter().all(Recovery::is_known);
    if signs.recovery.is_empty() {
        return Ok(());
    }
    if let Some(report) = swap.report.as_mut().filter(is_awaited) {
        report.recovery.clone_from(&signs.recovery);
        host.record(swap).await?;
    }
    Ok(())
}

fn ends_at(swap: &SwapRecord) -> u64 {
    let moved = swap.ended_at_unix_ns.unwrap_or(0);
    moved.saturating_add(swap.safeguards.watch_ns)
}

async fn end(
    host: &Host,
    mut swap: SwapRecord,
    state: HealthState,
    problems: Vec<String>,
) -> Result<Next, StoreError> {
    swap.safeguards.health = Some(Health::new(state, problems, unix_ns()));
    host.record(&swap).await?;
    Ok(Next::Over)
}

/// Ends a watch because of something else that became of the guest.
pub async fn supersede(host: &Host, swap: SwapRecord, why: &str) -> Result<(), StoreError> {
    end(host, swap, HealthState::Ended, vec![why.to_owned()])
        .await
        .map(drop)
}

/// It is not well. Wants it back where it was, if that may be and was not tried already.
async fn put_back(
    host: &Host,
    vm: &VmRecord,
    mut swap: SwapRecord,
    problems: Vec<String>,
) -> Result<Next, StoreError> {
    let why = problems.join("; ");
    tracing::warn!(vm = %vm.name, swap = %swap.id, "not well after its swap: {why}");
    let mut health = Health::new(HealthState::Unwell, problems, unix_ns());
    if !swap.safeguards.way_back {
        health.remedy = Some(by_hand(vm, &swap));
        swap.safeguards.health = Some(health);
        host.record(&swap).await?;
        return Ok(Next::Over);
    }
    let back = way_back(&swap, &why);
    health.remedy = Some(format!(
        "it is put back to {} by swap {}",
        back.to.version, back.id
    ));
    swap.safeguards.health = Some(health);
    swap.safeguards.put_back_by = Some(back.id.clone());
    if host.store.put_back(&swap, &back).await? {
        host.tell_swap(&swap);
        host.tell_swap(&back);
        return Ok(Next::Over);
    }
    // An operator was quicker, who may know better.
    let why = "another swap of it was begun".to_owned();
    swap.safeguards.put_back_by = None;
    end(host, swap, HealthState::Ended, vec![why]).await
}

fn by_hand(vm: &VmRecord, swap: &SwapRecord) -> String {
    let (name, from) = (&vm.name, &swap.from.version);
    match &swap.safeguards.way_back_of {
        Some(first) => format!(
            "this swap was the way back of {first} already, and another is not tried by itself; look \
             at the guest's console and `stillpoint logs {name}`"
        ),
        None => format!(
            "the way back was switched off: `stillpoint swap vmm {name} --to {from}` puts it back"
        ),
    }
}

/// An ordinary swap to the release before. No rehearsal: it is urgent, and its state is saved once.
fn way_back(swap: &SwapRecord, why: &str) -> SwapRecord {
    let now = unix_ns();
    SwapRecord {
        id: SwapId(format!("{}-back", swap.id)),
        part_of: None,
        rollout: swap.rollout.clone(),
        vm: swap.vm.clone(),
        component: swap.component.clone(),
        from: swap.to.clone(),
        to: swap.from.clone(),
        state: SwapState::Wanted,
        step: "recorded".into(),
        reason: None,
        budget_ns: swap.budget_ns,
        clock: swap.clock,
        notice_ns: None,
        no_notice: Some(format!("the way back of swap {}: {why}", swap.id)),
        safeguards: Safeguards {
            watch_ns: swap.safeguards.watch_ns,
            way_back_of: Some(swap.id.clone()),
            ..Safeguards::default()
        },
        successor: None,
        epoch_before: None,
        asked_at_unix_ns: now,
        ended_at_unix_ns: None,
        report: None,
    }
}

/// A way back that came to nothing leaves the guest where it is; the record says what to do.
pub(super) async fn note_way_back(host: &Host, back: &SwapRecord) -> Result<(), StoreError> {
    let Some(first) = &back.safeguards.way_back_of else {
        return Ok(());
    };
    let Some(mut first) = host.store.swap(first).await? else {
        return Ok(());
    };
    let remedy = match back.state {
        SwapState::Moved => format!("it was put back to {} by swap {}", back.to.version, back.id),
        SwapState::Kept => format!(
            "putting it back by swap {} came to nothing ({}); it goes on in {}, where it is not well, \
             and another try is yours: `stillpoint swap vmm {} --to {}`",
            back.id,
            back.reason.as_deref().unwrap_or("for no reason given"),
            first.to.version,
            first.vm,
            back.to.version,
        ),
        SwapState::Crashed => format!("it was lost when it was put back by swap {}", back.id),
        _ => return Ok(()),
    };
    if let Some(health) = &mut first.safeguards.health {
        health.remedy = Some(remedy);
    }
    host.record(&first).await
}
