//! One swap of the VMM.
//!
//! ```text
//!  record ▶ spawn successor ▶ record it ▶ let go ▶ its Ready ▶ HandOver ─┬▶ Moved ▶ check ▶ record
//!                 │                            │        │                ├▶ Kept ▶ kill ▶ record
//!                 └────────────┬───────────────┴────────┘                └▶ no word ▶ settle
//!                              ▼
//!                     kept; the guest never heard of it
//! ```
//!
//! Before the request goes out the guest can't be harmed; afterwards the two processes settle it
//! between themselves, and everything here only finds out how. The successor is killed only when
//! the predecessor said that it keeps the guest; the predecessor only when the ownership word
//! says that the successor took it.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use stillpoint_control::client::ClientError;
use stillpoint_control::health::Signs;
use stillpoint_control::message::{Handover, Request};
use stillpoint_control::ownership::{Epoch, Owner, Ownership};
use stillpoint_control::report::{Blackout, Outcome, Phase, Side, SwapReport};
use stillpoint_control::spec::MAX_BUDGET;
use tokio::sync::mpsc;

use super::start::{release_args, verified};
use super::{Host, health, rehearsal, relieve, settle, unix_ns};
use crate::agent::find::Held;
use crate::agent::pair::{self, Asked, Channel};
use crate::agent::process::Process;
use crate::agent::spawn::{self, GIVEN_FD, Job, READY_FD};
use crate::model::{Event, Release, SwapRecord, SwapState, VmRecord, VmState};
use crate::store::StoreError;

/// How long a successor may take to come up.
const READY_PATIENCE: Duration = Duration::from_secs(30);
/// How long the preparation may take while the guest runs.
const BROWNOUT: Duration = Duration::from_secs(60);
/// How long a successor may take to answer at the control socket after it took the guest.
const ANSWER_PATIENCE: Duration = Duration::from_secs(10);
/// How long it may take to measure.
const REPORT_PATIENCE: Duration = Duration::from_secs(4);
/// How long a predecessor may take to end after it gave its guest away.
const RETIRE_PATIENCE: Duration = Duration::from_secs(10);

/// A successor that is ready, and what goes to the predecessor.
struct Prepared {
    successor: Process,
    channel: OwnedFd,
    started: Duration,
}

/// Carries it out. Gives back the process that runs the guest, if it is known and lives. On
/// `Err` the swap could not be recorded, and nothing was done.
#[tracing::instrument(
    name = "swap", skip_all,
    fields(
        swap = %swap.id, vm = %vm.name, rollout = swap.rollout.as_ref().map(tracing::field::display),
        from = swap.from.version, to = swap.to.version
    )
)]
pub async fn swap(
    host: &Host,
    vm: &VmRecord,
    mut swap: SwapRecord,
    held: Held,
) -> Result<Option<Held>, (StoreError, Held)> {
    swap.state = SwapState::InProgress;
    swap.step = "start".into();
    swap.epoch_before = held.ownership.read().ok().map(|owner| owner.epoch().0);
    if let Err(error) = host.record(&swap).await {
        return Err((error, held));
    }
    let process = Some(held.process.id().clone());
    host.observe_surely(&vm.name, VmState::Swapping, None, process)
        .await;
    let first = watched(host, vm, &swap).await;
    if let Err(reason) = rehearse(host, vm, &mut swap).await {
        return Ok(keep(host, vm, swap, held, reason).await);
    }
    let prepared = match prepare(host, vm, &mut swap).await {
        Ok(prepared) => prepared,
        Err(reason) => return Ok(keep(host, vm, swap, held, reason).await),
    };
    // The second look, a while after the first: what goes on by itself has moved.
    swap.safeguards.before = health::before(first, watched(host, vm, &swap).await);
    // A daemon that starts anew in the middle watches by it; without it, by less.
    if let Err(error) = host.record(&swap).await {
        tracing::warn!(vm = %vm.name, swap = %swap.id, "not recorded: {error}");
    }
    Ok(hand_over(host, vm, swap, held, prepared).await)
}

/// Signs of life before the swap, if it will be asked after them.
async fn watched(host: &Host, vm: &VmRecord, swap: &SwapRecord) -> Option<Signs> {
    match swap.safeguards.watch_ns {
        0 => None,
        _ => health::signs(host, vm).await,
    }
}

/// Rehearses the swap, if that was not left out. On `Err` it must not begin.
async fn rehearse(host: &Host, vm: &VmRecord, swap: &mut SwapRecord) -> Result<(), String> {
    if !swap.safeguards.rehearse {
        return Ok(());
    }
    swap.step = "rehearse".into();
    host.tell_swap(swap);
    let release = release_of(host, swap).await?;
    let terms = rehearsal::Terms {
        peek: true,
        budget_ns: swap.budget_ns,
        clock: swap.clock,
        of: rehearsal::Of::Handover,
    };
    let rehearsed = rehearsal::rehearse(host, vm, &release, terms).await?;
    let refusal = rehearsal::refusal(&rehearsed);
    swap.safeguards.rehearsal = Some(rehearsed);
    refusal.map_or(Ok(()), Err)
}

async fn release_of(host: &Host, swap: &SwapRecord) -> Result<Release, String> {
    let version = &swap.to.version;
    let release = host.store.release(version).await;
    let release = release.map_err(|e| e.to_string())?;
    release.ok_or_else(|| format!("release {version} is not in the store"))
}

/// Ends a swap that can't begin.
pub async fn refuse(host: &Host, mut swap: SwapRecord, why: String) {
    swap.state = SwapState::Kept;
    swap.reason = Some(why);
    swap.ended_at_unix_ns = Some(unix_ns());
    host.end_swap(&swap, None).await;
}

/// Starts the successor and waits until it is ready. The guest hears nothing of this.
async fn prepare(host: &Host, vm: &VmRecord, swap: &mut SwapRecord) -> Result<Prepared, String> {
    let begun = tokio::time::Instant::now();
    let release = release_of(host, swap).await?;
    let binary = verified(host, &release).await?;
    let Channel {
        predecessor,
        successor,
    } = pair::channel().map_err(|e| format!("cannot make the handover's socketpair: {e}"))?;
    let mut args = vec![
        "adopt".to_owned(),
        format!("--handover-fd={GIVEN_FD}"),
        format!("--ready-fd={READY_FD}"),
    ];
    args.extend(release_args(&release));
    let job = Job {
        binary,
        args,
        given: successor,
        memory: None,
        log: &host.dir(&vm.name).log(),
    };
    let gated = spawn::spawn(job).map_err(|e| e.to_string())?;
    // Recorded before it runs anything: a daemon that starts anew knows both processes.
    swap.successor = Some(gated.process().id().clone());
    swap.step = "adopt".into();
    host.record(swap).await.map_err(|e| e.to_string())?;
    let pid = gated.process().id().pid;
    host.scopes.enclose(&vm.name, pid, true).await;
    let started = gated.let_go().map_err(|e| e.to_string())?;
    let successor = started
        .ready(READY_PATIENCE)
        .await
        .map_err(|e| format!("the successor did not come up: {e}"))?;
    Ok(Prepared {
        successor,
        channel: predecessor,
        started: begun.elapsed(),
    })
}

/// Asks the predecessor, and acts on its answer.
async fn hand_over(
    host: &Host,
    vm: &VmRecord,
    mut swap: SwapRecord,
    held: Held,
    prepared: Prepared,
) -> Option<Held> {
    let Prepared {
        successor, channel, ..
    } = prepared;
    // Kept until this function ends: with it a successor can be started again.
    let files = pair::state_file().and_then(|file| Ok((file.try_clone()?, file)));
    let (state, _kept) = match files {
        Ok(files) => files,
        Err(error) => {
            successor.kill().await;
            let reason = format!("cannot make the file for the saved state: {error}");
            return keep(host, vm, swap, held, reason).await;
        }
    };
    swap.step = "hand over".into();
    host.tell_swap(&swap);
    let (progress, phases) = mpsc::unbounded_channel();
    let start = Phase {
        name: "start".into(),
        side: Side::Agent,
        in_blackout: false,
        duration: prepared.started,
    };
    let _ = progress.send(start.clone());
    tokio::spawn(tell_phases(host.clone(), swap.clone(), phases));
    let budget = swap
        .budget_ns
        .map_or(vm.spec.blackout_budget, Duration::from_nanos);
    let asked = Asked {
        control: host.dir(&vm.name).control(),
        request: Request::HandOver {
            swap: swap.id.0.clone(),
            to: swap.to.clone(),
            budget_ns: swap.budget_ns,
            brownout: BROWNOUT,
            clock: swap.clock,
        },
        longest: BROWNOUT + budget.min(MAX_BUDGET),
        channel,
        state,
        progress,
    };
    match answer(asked, vm, &swap, &held, &successor).await {
        Ok(Handover::Moved) if !taken(&held, &swap) => settle(host, vm, swap, Some(held)).await,
        Ok(Handover::Moved) => {
            let retiring = Some((held.process, held.ownership));
            moved(host, vm, swap, retiring, successor, Some(start)).await
        }
        Ok(Handover::Kept { mut report }) => {
            if !successor.is_alive() {
                // Its own end says more than the connection that closed.
                let exit = successor.exit();
                report.warnings.push(format!("the successor {exit}"));
            }
            successor.kill().await;
            report.phases.insert(0, start);
            swap.report = Some(*report);
            keep(host, vm, swap, held, String::new()).await
        }
        Err(ClientError::Refused { message, .. }) => {
            successor.kill().await;
            let reason = format!("the predecessor refused: {message}");
            keep(host, vm, swap, held, reason).await
        }
        Err(error) => {
            tracing::warn!(vm = %vm.name, swap = %swap.id, "no answer to the handover: {error}");
            drop(successor);
            settle(host, vm, swap, Some(held)).await
        }
    }
}

/// Whether the word says so too: a predecessor that was relieved of its guest knows only that it has
/// it no more.
fn taken(held: &Held, swap: &SwapRecord) -> bool {
    let before = Epoch(swap.epoch_before.unwrap_or(u64::MAX));
    matches!(held.ownership.read(), Ok(Owner::Taken(epoch)) if epoch > before)
}

/// The predecessor's answer. One that hangs gives none: it is relieved of the guest, and its
/// connection breaks.
async fn answer(
    asked: Asked,
    vm: &VmRecord,
    swap: &SwapRecord,
    held: &Held,
    successor: &Process,
) -> Result<Handover, ClientError> {
    let answer = pair::hand_over(asked);
    tokio::pin!(answer);
    let Some(before) = swap.epoch_before.map(Epoch) else {
        return answer.await;
    };
    let patience = relieve::patience(vm, swap);
    loop {
        tokio::select! {
            answer = &mut answer => return answer,
            hangs = relieve::hangs(before, &held.ownership, patience) => match hangs {
                relieve::Hangs::Sealed => {
                    relieve::relieve(before, &held.ownership, &held.process, successor).await;
                }
                // The word says what the predecessor would have said.
                relieve::Hangs::Retiring => return Ok(Handover::Moved),
            }
        }
    }
}

async fn tell_phases(host: Host, swap: SwapRecord, mut phases: mpsc::UnboundedReceiver<Phase>) {
    while let Some(phase) = phases.recv().await {
        tracing::info!(
            swap = %swap.id, vm = %swap.vm, rollout = swap.rollout.as_ref().map(tracing::field::display),
            phase = phase.name, took = ?phase.duration, "a phase is over"
        );
        host.tell(Event::Phase {
            swap: swap.id.clone(),
            vm: swap.vm.clone(),
            phase,
        });
    }
}

/// The successor has the guest: checks it, records it, sees the predecessor off. One that owns it
/// and does not answer may hang: then the record says "in doubt", and it is looked at again.
pub(super) async fn moved(
    host: &Host,
    vm: &VmRecord,
    mut swap: SwapRecord,
    predecessor: Option<(Process, Arc<Ownership>)>,
    successor: Process,
    start: Option<Phase>,
) -> Option<Held> {
    let found = find_successor(host, vm, &successor).await;
    let before = Epoch(swap.epoch_before.unwrap_or(u64::MAX));
    let expected = host.expected(vm);
    swap.report = match &found {
        Some(_) => expected.last_report(&swap.id.0, REPORT_PATIENCE).await,
        None => None,
    };
    if let (Some(report), Some(start)) = (&mut swap.report, start) {
        report.phases.insert(0, start);
    }
    swap.state = SwapState::Moved;
    swap.step = "done".into();
    swap.reason = swap
        .report
        .as_ref()
        .and_then(|report| report.reason.clone());
    if found.is_none() && successor.is_alive() {
        swap.report = None;
        doubt(
            host,
            swap,
            "the successor owns the guest, and does not answer at its socket",
        )
        .await;
        if let Some((process, ownership)) = predecessor {
            tokio::spawn(retire(process, ownership, before));
        }
        return None;
    }
    if found.is_none() {
        swap.state = SwapState::Crashed;
        swap.reason = Some("the successor took the guest and died".into());
    } else if swap.report.is_none() {
        swap.reason = Some("the successor runs the guest, but gave no report in time".into());
    }
    swap.ended_at_unix_ns = Some(unix_ns());
    if swap.state == SwapState::Moved {
        health::begin(&mut swap);
    }
    let state = match &found {
        Some(_) => VmState::Running,
        None => VmState::Crashed,
    };
    host.end_swap(&swap, Some((state, successor.id().clone())))
        .await;
    if let Some((process, ownership)) = predecessor {
        tokio::spawn(retire(process, ownership, before));
    }
    found
}

/// Nobody knows for sure where the guest is: looked at again and again.
pub(super) async fn doubt(host: &Host, mut swap: SwapRecord, why: &str) {
    swap.state = SwapState::InDoubt;
    swap.reason = Some(format!("{why}; looked at again and again"));
    // Not written is not worse than before: the record still says "in progress".
    if let Err(error) = host.record(&swap).await {
        tracing::error!(vm = %swap.vm, swap = %swap.id, "not recorded: {error}");
    }
}

/// The successor at the control socket, proved; its predecessor may answer for a moment longer.
async fn find_successor(host: &Host, vm: &VmRecord, successor: &Process) -> Option<Held> {
    let deadline = tokio::time::Instant::now() + ANSWER_PATIENCE;
    loop {
        match host.expected(vm).find().await {
            Ok(held) if held.process.id() == successor.id() => return Some(held),
            Ok(_) => {}
            Err(error) => tracing::debug!(vm = %vm.name, "successor: {error}"),
        }
        if !successor.is_alive() || tokio::time::Instant::now() >= deadline {
            return None;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// Waits for the predecessor's end; kills it only if the word says that the guest is not its own.
async fn retire(process: Process, ownership: Arc<Ownership>, before: Epoch) {
    if process.ends_within(RETIRE_PATIENCE).await {
        process.exit();
        return;
    }
    let pid = process.id().pid;
    match ownership.read() {
        Ok(Owner::Taken(epoch)) if epoch > before => {
            tracing::warn!(pid, "the predecessor did not retire: killed");
            process.kill().await;
        }
        word => tracing::error!(pid, ?word, "the predecessor does not retire"),
    }
}

/// The predecessor runs the guest, as before.
pub(super) async fn keep(
    host: &Host,
    vm: &VmRecord,
    mut swap: SwapRecord,
    held: Held,
    reason: String,
) -> Option<Held> {
    let report = swap.report.take();
    let report = report.unwrap_or_else(|| report_of_agent(vm, &swap, reason.clone()));
    swap.reason = report.reason.clone().or(Some(reason));
    swap.report = Some(report);
    swap.state = SwapState::Kept;
    swap.ended_at_unix_ns = Some(unix_ns());
    // A process that has ended since is for the next look.
    let process = held.process.id().clone();
    host.end_swap(&swap, Some((VmState::Running, process)))
        .await;
    Some(held)
}

/// A report for a swap of which the predecessor never heard.
fn report_of_agent(vm: &VmRecord, swap: &SwapRecord, reason: String) -> SwapReport {
    SwapReport {
        swap: swap.id.0.clone(),
        vm: vm.name.to_string(),
        component: swap.component.clone(),
        from: swap.from.clone(),
        to: swap.to.clone(),
        outcome: Outcome::Kept,
        reason: Some(reason),
        started_at_unix_ns: swap.asked_at_unix_ns,
        vcpus: vm.spec.cpus.into(),
        memory_bytes: vm.spec.memory.size,
        state_format: 0,
        state_bytes: 0,
        budget: swap
            .budget_ns
            .map_or(vm.spec.blackout_budget, Duration::from_nanos),
        margin: None,
        phases: Vec::new(),
        blackout: Blackout::default(),
        clock: None,
        recovery: Vec::new(),
        warnings: Vec::new(),
    }
}
