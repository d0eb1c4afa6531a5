//! No pause without its event: a swap is announced to its guest, and waits until it may begin.
//!
//! ```text
//!  wanted ─▶ announce ─▶ wait: approved, or not_before ─▶ Started ─▶ swap ─▶ over
//!                           └─▶ cancelled: the swap is refused
//! ```
//!
//! Where nobody listens nothing is waited for; the event is there all the same (RFD 0008). All of
//! it is on disk before the swap begins, so a daemon that starts anew goes on where the last one
//! was.

use std::time::{Duration, Instant};

use rustix::rand::{GetRandomFlags, getrandom};
use stillpoint_control::report::SwapReport;

use super::{Host, unix_ns};
use crate::metadata::board::{Announcement, Board, Start};
use crate::metadata::instance::guid;
use crate::model::{EventId, Group, Measured, PauseId, SwapRecord, VmName, VmRecord};
use crate::store::StoreError;

/// The notice of a VM whose owner said nothing.
const DEFAULT_NOTICE: Duration = Duration::from_secs(15 * 60);
/// How long an event stays after its pause at least, where somebody listens: those who look once a
/// second see it once more.
const LINGER: Duration = Duration::from_secs(2);
/// How long it stays for those who look less often, or whose machine is slow.
const LINGER_UNSEEN: Duration = Duration::from_secs(30);
/// Between two looks at whether it was seen.
const GLANCE: Duration = Duration::from_millis(200);

/// Whether a swap may begin.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Clearance {
    /// It may; its event says that it started.
    Go,
    /// Not before that long, unless something changes on the board.
    Wait(Duration),
    /// Never, and why.
    Withdrawn(String),
}

/// Announces the pause of a swap, if that was not done yet, and says whether the swap may begin.
pub async fn clear(
    host: &Host,
    vm: &VmRecord,
    swap: &mut SwapRecord,
) -> Result<Clearance, StoreError> {
    let group = Group::of(&vm.name, &vm.profile);
    let ids = (PauseId(fresh_guid()), EventId(fresh_guid()));
    let (is_new, clearance) = host
        .notices
        .change(|board, now| {
            let known = board.of_swap(&swap.id).map(|pause| pause.id.clone());
            let is_new = known.is_none();
            let id = known.unwrap_or_else(|| {
                let new = announcement(board, vm, swap, group, ids, now);
                board.announce(new, now)
            });
            (is_new, clearance(board, &id, now))
        })
        .await?;
    if is_new && matches!(clearance, Clearance::Wait(_)) {
        swap.step = "wait for its time, or an approval".into();
        host.record(swap).await?;
    }
    Ok(clearance)
}

fn clearance(board: &mut Board, id: &PauseId, now: u64) -> Clearance {
    match board.start_of(id, now) {
        Start::Now => {
            board.start(id, now);
            Clearance::Go
        }
        Start::At(unix_s) => {
            let at = Duration::from_secs(unix_s);
            Clearance::Wait(at.saturating_sub(Duration::from_nanos(now)))
        }
        Start::Never => {
            let pause = board.all().into_iter().find(|pause| pause.id == *id);
            let measured = pause.and_then(|pause| pause.measured.clone());
            let why = measured.and_then(|measured| measured.reason);
            Clearance::Withdrawn(why.unwrap_or_else(|| "its event was cancelled".into()))
        }
    }
}

fn announcement(
    board: &Board,
    vm: &VmRecord,
    swap: &SwapRecord,
    group: Group,
    (id, event): (PauseId, EventId),
    now: u64,
) -> Announcement {
    let default = u64::try_from(DEFAULT_NOTICE.as_nanos()).unwrap_or(u64::MAX);
    let notice_ns = match (&swap.no_notice, swap.notice_ns) {
        (Some(_), _) => 0,
        (None, Some(notice)) => notice,
        // Nobody is there to be warned.
        (None, None) if !board.is_heard(&group, now) => 0,
        (None, None) => vm.profile.notice_ns.unwrap_or(default),
    };
    Announcement {
        id,
        swap: swap.id.clone(),
        description: "Virtual machine is being paused while the software that runs it is updated."
            .into(),
        notices: vec![(event, group, vec![vm.name.clone()])],
        notice_ns,
        expected_ns: expected_ns(board, vm, swap),
        no_notice: swap.no_notice.clone(),
    }
}

/// The longest of the VM's last pauses; what it is allowed, for the first.
fn expected_ns(board: &Board, vm: &VmRecord, swap: &SwapRecord) -> u64 {
    let past = board.of_vm(&vm.name).into_iter().rev();
    let measured = past.filter_map(|pause| pause.measured.as_ref()?.pause_ns);
    let budget = vm.spec.blackout_budget.as_nanos();
    let budget = || {
        swap.budget_ns
            .unwrap_or(u64::try_from(budget).unwrap_or(u64::MAX))
    };
    measured.take(10).max().unwrap_or_else(budget)
}

/// Ends the pause of a swap that is over. Where somebody listens, its event stays until it was seen
/// after the pause.
pub(super) async fn end_pause(host: &Host, swap: &SwapRecord) {
    let since = Instant::now();
    let measured = measured(swap);
    let paused = measured.pause_ns.is_some();
    let heard: Vec<Vec<VmName>> = host
        .notices
        .read(|board| {
            let notices = board.of_swap(&swap.id).map(|pause| &pause.notices);
            let groups = notices.into_iter().flatten().map(|notice| &notice.group);
            let heard = groups.map(|group| board.heard_by(group, unix_ns()));
            heard.filter(|vms| !vms.is_empty()).collect()
        })
        .await;
    if heard.is_empty() || !paused {
        end(host.clone(), swap.clone(), measured).await;
        return;
    }
    let (host, swap) = (host.clone(), swap.clone());
    tokio::spawn(async move {
        tokio::time::sleep(LINGER).await;
        while since.elapsed() < LINGER_UNSEEN && !is_seen(&host, &heard, since) {
            tokio::time::sleep(GLANCE).await;
        }
        end(host, swap, measured).await;
    });
}

/// Whether every group has a VM that has seen its event since then.
fn is_seen(host: &Host, groups: &[Vec<VmName>], since: Instant) -> bool {
    let mut groups = groups.iter();
    groups.all(|vms| host.notices.was_seen(vms, since))
}

async fn end(host: Host, swap: SwapRecord, measured: Measured) {
    let ended = host
        .notices
        .change(|board, now| {
            if let Some(id) = board.of_swap(&swap.id).map(|pause| pause.id.clone()) {
                board.end(&id, measured, now);
            }
        })
        .await;
    if let Err(error) = ended {
        // The next daemon ends it; see `settle_pauses`.
        tracing::error!(vm = %swap.vm, swap = %swap.id, "the end of its pause was not recorded: {error}");
    }
}

fn measured(swap: &SwapRecord) -> Measured {
    let report: Option<&SwapReport> = swap.report.as_ref();
    let pause = report.map(|report| report.blackout.host);
    let pause = pause.filter(|pause| !pause.is_zero());
    let clock = report.and_then(|report| report.clock.as_ref());
    Measured {
        outcome: Some(swap.state),
        reason: swap.reason.clone(),
        pause_ns: pause.map(|pause| u64::try_from(pause.as_nanos()).unwrap_or(u64::MAX)),
        clock_step_ns: clock.and_then(|clock| clock.kvmclock_error_ns),
    }
}

/// Ends the pauses whose swap ended when no daemon could note it. To be called once, before
/// anything else happens.
pub async fn settle_pauses(host: &Host) -> Result<(), StoreError> {
    let open: Vec<_> = host
        .notices
        .read(|board| {
            let open = board
                .all()
                .into_iter()
                .filter(|pause| pause.state.is_open());
            open.map(|pause| (pause.id.clone(), pause.swap.clone()))
                .collect()
        })
        .await;
    for (id, swap) in open {
        let measured = match host.store.swap(&swap).await? {
            Some(swap) if !swap.state.is_over() => continue,
            Some(swap) => measured(&swap),
            None => Measured::default(),
        };
        host.notices
            .change(|board, now| board.end(&id, measured, now))
            .await?;
    }
    Ok(())
}

/// Forgets that a VM listened, which is no more.
pub async fn forget(host: &Host, vm: &VmName) -> Result<(), StoreError> {
    host.notices.forget(vm).await
}

fn fresh_guid() -> String {
    let mut bytes = [0; 16];
    let mut at = 0;
    // Never fails for so few bytes, but may be interrupted before the kernel's pool is ready.
    while at < bytes.len() {
        at += getrandom(&mut bytes[at..], GetRandomFlags::empty()).unwrap_or(0);
    }
    guid(bytes)
}
