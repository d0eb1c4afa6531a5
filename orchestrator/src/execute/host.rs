//! A swap of the host itself: its guests stand still in their places while an operator's command
//! changes something, or while the operator does it by hand.
//!
//! ```text
//!  announce ▶ wait: approved, or not_before ▶ record ▶ freeze all ─┬▶ command ▶ resume all ─┬▶ done
//!      └▶ cancelled: refused                                       │        (or by hand)    └▶ undo ▶ failed
//!                                                                  └▶ one would not: resume all ▶ refused
//! ```
//!
//! Each VMM holds the ceiling by itself, so nothing in here is needed for a guest to run on: a daemon
//! that dies leaves guests that resume in time, and the next one finds out what became of it
//! ([`settle`]). What the command did then nobody knows, so it counts as failed, and is undone.

mod guests;
mod kvm;

use std::time::Duration;

use stillpoint_control::report::SwapReport;
use tokio::time::Instant;

use super::announce::{self, Clearance, Concerned};
use super::command::{self, Running};
use super::{Host, unix_ns};
use crate::agent::find::Expected;
use crate::model::{
    CommandEnd, Event, HostSwap, HostSwapState, Measured, Rehearsed, SwapRecord, SwapState,
    VmRecord, VmState,
};
use crate::store::StoreError;
use guests::freeze_all;
pub(super) use guests::{await_jump_all, resume_all, store_all};

/// How long the resumption of every guest is thought to take: the command's time ends so much before
/// the guests' own ceilings.
const RESERVE: Duration = Duration::from_millis(50);
/// And no less than this part of the budget.
const RESERVE_PART: u32 = 20;
/// The longest an undo may take: guests run meanwhile.
const UNDO_PATIENCE: Duration = Duration::from_secs(600);
/// Between two tries to record what has happened.
const RETRY: Duration = Duration::from_secs(2);

/// A guest that takes part.
#[derive(Clone, Debug)]
pub(super) struct Part {
    vm: VmRecord,
    swap: SwapRecord,
    expected: Expected,
}

/// How the guests' standing still ended.
pub(super) struct Stood {
    pub(super) ended: Option<CommandEnd>,
    /// Why it did not go as it should.
    pub(super) reason: Option<String>,
    pub(super) output: String,
}

/// Carries it out, from its announcement to its end.
#[tracing::instrument(name = "host_swap", skip_all, fields(swap = %swap.id))]
pub async fn host_swap(host: Host, mut swap: HostSwap) {
    let done = match swap.kernel {
        None => carry_out(&host, &mut swap).await,
        Some(_) => super::kernel::carry_out(&host, &mut swap).await,
    };
    if let Err(error) = done {
        // The next daemon settles it; no guest waits for that.
        tracing::error!(swap = %swap.id, "left unfinished: {error}");
    }
}

async fn carry_out(host: &Host, swap: &mut HostSwap) -> Result<(), StoreError> {
    if swap.state == HostSwapState::InProgress {
        return settle(host, swap).await;
    }
    if let Some(why) = await_clearance(host, swap).await? {
        return refuse(host, swap, Vec::new(), why).await;
    }
    let mut parts = parts(host, swap).await?;
    // A host that runs none is exchanged all the same, if that was asked for.
    if parts.is_empty() && !swap.vms.is_empty() {
        return refuse(host, swap, parts, "none of its guests runs any more".into()).await;
    }
    swap.state = HostSwapState::InProgress;
    swap.step = "freeze".into();
    let records: Vec<_> = parts.iter_mut().map(Part::begin).collect();
    host.store.update_host_swap(swap, &records).await?;
    host.tell_host_swap(swap);
    let frozen = match swap.kvm {
        Some(_) => guests::detach_all(swap, &parts).await,
        None => freeze_all(swap, &parts).await,
    };
    if let Err(why) = frozen {
        let reports = resume_all(swap, &parts).await;
        swap.pause_ns = longest(&reports);
        let parts = ended(parts, reports, unix_ns());
        return refuse(host, swap, parts, why).await;
    }
    let stood = match swap.kvm.clone() {
        Some(modules) => kvm::stand_apart(host, swap, &modules, &parts).await,
        None => stand(host, swap).await,
    };
    let reports = resume_all(swap, &parts).await;
    swap.pause_ns = longest(&reports);
    let parts = ended(parts, reports, unix_ns());
    conclude(host, swap, parts, stood).await
}

/// What an earlier daemon left: guests are resumed, and what it was about is undone.
async fn settle(host: &Host, swap: &mut HostSwap) -> Result<(), StoreError> {
    let parts = parts(host, swap).await?;
    if let Some(modules) = &swap.kvm {
        // Guests without a machine wait for KVM, and for nothing else.
        kvm::see_that_it_is_there(modules).await;
    }
    let reports = resume_all(swap, &parts).await;
    swap.pause_ns = longest(&reports);
    let parts = ended(parts, reports, unix_ns());
    if let Some(process) = &swap.process {
        command::end_left_over(process).await;
    }
    let stood = Stood {
        ended: (!swap.is_by_hand()).then_some(CommandEnd::Unknown),
        reason: Some("the daemon ended in the middle of it; the guests run on".into()),
        output: String::new(),
    };
    conclude(host, swap, parts, stood).await
}

/// Waits until the guests have had their notice; gives why it is not to begin, if so.
pub(super) async fn await_clearance(
    host: &Host,
    swap: &mut HostSwap,
) -> Result<Option<String>, StoreError> {
    if swap.vms.is_empty() {
        return Ok(None);
    }
    loop {
        // Before the look at the board: what changes after it is not missed.
        let mut changes = host.notices.changes();
        let mut vms = Vec::new();
        for name in &swap.vms {
            vms.extend(host.store.vm(name).await?);
        }
        let concerned = Concerned {
            swap: &swap.id,
            vms: vms.iter().collect(),
            notice_ns: swap.notice_ns,
            no_notice: swap.no_notice.as_ref(),
            expected_ns: Some(swap.budget_ns),
            budget_ns: Some(swap.budget_ns),
            description: "Virtual machine is being paused while its host is maintained.",
        };
        let (is_new, clearance) = announce::clear(host, &concerned).await?;
        // All at once: there is nothing else to wait for.
        let clearance = match clearance {
            Clearance::Go => announce::begin(host, &swap.id).await?,
            other => other,
        };
        match clearance {
            Clearance::Go => return Ok(None),
            Clearance::Withdrawn(why) => return Ok(Some(why)),
            Clearance::Wait(longest) => {
                if is_new {
                    swap.step = "wait for its time, or approvals".into();
                    host.store.update_host_swap(swap, &[]).await?;
                    host.tell_host_swap(swap);
                }
                tokio::select! {
                    _ = changes.changed() => {}
                    () = tokio::time::sleep(longest) => {}
                }
            }
        }
    }
}

/// The guests whose part is still to come. A guest that ended meanwhile has none.
pub(super) async fn parts(host: &Host, swap: &HostSwap) -> Result<Vec<Part>, StoreError> {
    let mut parts = Vec::new();
    for mut record in host.store.open_parts(&swap.id).await? {
        let vm = host.store.vm(&record.vm).await?;
        match vm.filter(|vm| vm.state.is_active()) {
            Some(vm) => parts.push(Part {
                expected: host.expected(&vm),
                vm,
                swap: record,
            }),
            None => {
                end_part(
                    &mut record,
                    None,
                    Some("the guest ended before it began".into()),
                );
                host.store.update_swap(&record).await?;
            }
        }
    }
    Ok(parts)
}

impl Part {
    /// The guest.
    pub(super) fn vm(&self) -> &VmRecord {
        &self.vm
    }

    /// Its part's record.
    pub(super) fn record(&self) -> SwapRecord {
        self.swap.clone()
    }

    /// What its rehearsal showed.
    pub(super) fn rehearsed(&mut self, rehearsed: Option<Rehearsed>) {
        self.swap.safeguards.rehearsal = rehearsed;
    }

    pub(super) fn begin(&mut self) -> SwapRecord {
        self.swap.state = SwapState::InProgress;
        self.swap.step = "stand still".into();
        self.swap.clone()
    }
}

pub(super) fn longest(reports: &[Result<SwapReport, String>]) -> Option<u64> {
    let pauses = reports.iter().flatten().map(|report| report.blackout.host);
    whole_ns(pauses.max()?)
}

/// A pause as it is recorded, if it was one.
pub(super) fn whole_ns(pause: Duration) -> Option<u64> {
    let ns = u64::try_from(pause.as_nanos()).unwrap_or(u64::MAX);
    (ns > 0).then_some(ns)
}

pub(super) fn ended(
    parts: Vec<Part>,
    reports: Vec<Result<SwapReport, String>>,
    at: u64,
) -> Vec<Part> {
    let end = |(mut part, report): (Part, Result<SwapReport, String>)| {
        let (report, problem) = match report {
            Ok(report) => (Some(report), None),
            Err(problem) => (None, Some(problem)),
        };
        end_part(&mut part.swap, report, problem);
        part.swap.ended_at_unix_ns = Some(at);
        part
    };
    parts.into_iter().zip(reports).map(end).collect()
}

pub(super) fn end_part(swap: &mut SwapRecord, report: Option<SwapReport>, problem: Option<String>) {
    swap.state = match &report {
        Some(_) => SwapState::Resumed,
        // It was never frozen, or has no more to say; its own keeper finds out what it is.
        None => SwapState::Kept,
    };
    swap.step = "done".into();
    let reason = report.as_ref().and_then(|report| report.reason.clone());
    swap.reason = problem.or(reason);
    swap.ended_at_unix_ns = Some(unix_ns());
    swap.report = report;
}

/// By when what is done to the host must be done, for the guests to run in time.
fn command_deadline(swap: &HostSwap) -> Instant {
    let budget = Duration::from_nanos(swap.budget_ns);
    let reserve = (budget / RESERVE_PART).max(RESERVE).min(budget / 2);
    Instant::now() + (budget - reserve)
}

/// While the guests stand still: the command runs, or the operator does what is to be done.
async fn stand(host: &Host, swap: &mut HostSwap) -> Stood {
    let budget = Duration::from_nanos(swap.budget_ns);
    let deadline = command_deadline(swap);
    if swap.is_by_hand() {
        swap.step = "by hand".into();
        host.tell_host_swap(swap);
        let released = host.holds.wait(&swap.id, deadline).await;
        return Stood {
            ended: None,
            reason: (!released).then(|| format!("nobody released it within {budget:?}")),
            output: String::new(),
        };
    }
    run_command(host, swap, deadline).await
}

/// Runs the operator's command, until then at the longest.
async fn run_command(host: &Host, swap: &mut HostSwap, deadline: Instant) -> Stood {
    swap.step = "command".into();
    host.tell_host_swap(swap);
    let log = host.host_swap_log(&swap.id);
    let running = match Running::start(&swap.command, &log) {
        Ok(running) => running,
        Err(why) => {
            return Stood {
                reason: Some(format!("the command was not started: {why}")),
                ended: Some(CommandEnd::NotStarted(why)),
                output: String::new(),
            };
        }
    };
    swap.process = running.id();
    // Beside the command: nobody waits for the disk.
    let recorded = host.store.update_host_swap(swap, &[]);
    let (ended, recorded) = tokio::join!(running.end_by(deadline), recorded);
    if let Err(error) = recorded {
        tracing::warn!(swap = %swap.id, "the command's process was not recorded: {error}");
    }
    let reason = (!ended.is_success()).then(|| format!("the command: {ended}"));
    Stood {
        ended: Some(ended),
        reason,
        output: command::tail(&log),
    }
}

/// Every guest runs: undoes what failed, and records the end.
pub(super) async fn conclude(
    host: &Host,
    swap: &mut HostSwap,
    parts: Vec<Part>,
    stood: Stood,
) -> Result<(), StoreError> {
    record_parts(host, swap, &parts).await;
    swap.ended = stood.ended;
    swap.output = stood.output;
    let over = |part: &&Part| part.swap.reason.is_some();
    let broken = parts.iter().find(over).map(|part| {
        let why = part.swap.reason.clone().unwrap_or_default();
        format!("{}: {why}", part.vm.name)
    });
    swap.reason = stood.reason.or(broken);
    swap.state = match swap.reason {
        None => HostSwapState::Done,
        Some(_) => HostSwapState::Failed,
    };
    // Of KVM, what failed was undone before the guests ran.
    if swap.state == HostSwapState::Failed && swap.kvm.is_none() {
        undo(host, swap).await;
    }
    end(host, swap).await;
    Ok(())
}

/// Runs what the operator gave for the case that it fails.
async fn undo(host: &Host, swap: &mut HostSwap) {
    let Some(undo) = swap.undo.clone() else {
        return;
    };
    swap.step = "undo".into();
    host.tell_host_swap(swap);
    let log = host.host_swap_log(&swap.id);
    let shell = ["/bin/sh".to_owned(), "-c".to_owned(), undo];
    swap.undone = Some(match Running::start(&shell, &log) {
        Ok(running) => running.end_by(Instant::now() + UNDO_PATIENCE).await,
        Err(why) => CommandEnd::NotStarted(why),
    });
    swap.output = command::tail(&log);
}

/// Ends one that did not begin. No command was run.
pub(super) async fn refuse(
    host: &Host,
    swap: &mut HostSwap,
    parts: Vec<Part>,
    why: String,
) -> Result<(), StoreError> {
    record_parts(host, swap, &parts).await;
    for mut record in host.store.open_parts(&swap.id).await? {
        end_part(&mut record, None, Some(why.clone()));
        host.store.update_swap(&record).await?;
        host.tell_swap(&record);
    }
    swap.state = HostSwapState::Refused;
    swap.reason = Some(why);
    end(host, swap).await;
    Ok(())
}

async fn record_parts(host: &Host, swap: &HostSwap, parts: &[Part]) {
    let records: Vec<_> = parts.iter().map(|part| part.swap.clone()).collect();
    surely(host, swap, &records).await;
    for part in parts {
        host.tell_swap(&part.swap);
        let vm = part.vm.name.clone();
        let (state, reason) = (VmState::Running, None);
        if part.swap.state == SwapState::Resumed {
            host.tell(Event::Vm { vm, state, reason });
        }
    }
}

pub(super) async fn end(host: &Host, swap: &mut HostSwap) {
    swap.ended_at_unix_ns = Some(unix_ns());
    surely(host, swap, &[]).await;
    host.tell_host_swap(swap);
    let measured = Measured {
        outcome: Some(match swap.state {
            HostSwapState::Refused => SwapState::Kept,
            _ => SwapState::Resumed,
        }),
        reason: swap.reason.clone(),
        pause_ns: swap.pause_ns,
        clock_step_ns: None,
    };
    announce::end_pause_of(host, &swap.id, measured).await;
}

/// Recorded, tried until it succeeds: it has happened, whatever the disk says.
pub(super) async fn surely(host: &Host, swap: &HostSwap, parts: &[SwapRecord]) {
    while let Err(error) = host.store.update_host_swap(swap, parts).await {
        if matches!(error, StoreError::Closed) {
            return;
        }
        tracing::error!(swap = %swap.id, "not recorded, will be tried again: {error}");
        tokio::time::sleep(RETRY).await;
    }
}
