//! No pause without its event: a swap is announced to its guest, and waits until it may begin.
//!
//! ```text
//!  wanted ─▶ announce ─▶ wait: approved, or not_before ─▶ its turn ─▶ Started ─▶ swap ─▶ over
//!                           └─▶ cancelled: the swap is refused
//! ```
//!
//! Where nobody listens nothing is waited for; the event is there all the same (RFD 0008). All of
//! it is on disk before the swap begins, so a daemon that starts anew goes on where the last one
//! was.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use rustix::rand::{GetRandomFlags, getrandom};
use stillpoint_control::report::SwapReport;

use super::{Host, unix_ns};
use crate::metadata::board::{Announcement, Board, Start};
use crate::metadata::instance::guid;
use crate::model::{
    EventId, Group, Measured, PauseId, Rehearsed, SwapId, SwapRecord, VmName, VmRecord,
};
use crate::store::StoreError;

/// The notice of a VM whose owner said nothing.
const DEFAULT_NOTICE: Duration = Duration::from_secs(15 * 60);
/// How long an event stays after its pause at least, where somebody listens: those who look once a
/// second see it once more.
const LINGER: Duration = Duration::from_secs(2);
/// How long it stays for those who look less often, whose machine is slow, or whose last question a swap of the host's
/// kernel left without an answer: they wait for as long as their client does before they ask again.
const LINGER_UNSEEN: Duration = Duration::from_secs(60);
/// Between two looks at whether it was seen.
const GLANCE: Duration = Duration::from_millis(200);

/// Whether a swap may begin.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Clearance {
    /// It may.
    Go,
    /// Not before that long, unless something changes on the board.
    Wait(Duration),
    /// Never, and why.
    Withdrawn(String),
}

/// A pause to be announced: of one VM, or of all of a host at once.
#[derive(Clone, Debug)]
pub(super) struct Concerned<'a> {
    /// The swap.
    pub(super) swap: &'a SwapId,
    /// The VMs that stand still.
    pub(super) vms: Vec<&'a VmRecord>,
    /// The notice; each VM's own when absent, and the longest of them counts.
    pub(super) notice_ns: Option<u64>,
    /// Why there is none.
    pub(super) no_notice: Option<&'a String>,
    /// How long it is thought to be, ns; when absent, as long as each VM's last pauses were, and for
    /// its first what it is allowed.
    pub(super) expected_ns: Option<u64>,
    /// The longest it may be, ns; each VM's own budget when absent.
    pub(super) budget_ns: Option<u64>,
    /// What it is for, in words for the guest.
    pub(super) description: &'static str,
}

/// Announces a pause, if that was not done yet, and says whether it is new and may [`begin`].
pub(super) async fn clear(
    host: &Host,
    concerned: &Concerned<'_>,
) -> Result<(bool, Clearance), StoreError> {
    let groups = concerned.groups();
    let events = groups.iter().map(|_| EventId(fresh_guid())).collect();
    let ids = (PauseId(fresh_guid()), events);
    host.notices
        .change(|board, now| {
            let known = board.of_swap(concerned.swap).map(|pause| pause.id.clone());
            let is_new = known.is_none();
            let id = known.unwrap_or_else(|| {
                let new = announcement(board, concerned, groups, ids, now);
                board.announce(new, now)
            });
            (is_new, clearance(board, &id, now))
        })
        .await
}

/// Whether an announced pause may still [`begin`].
pub async fn may_begin(host: &Host, swap: &SwapId) -> bool {
    let may = |board: &Board| {
        let id = board.of_swap(swap).map(|pause| pause.id.clone());
        id.is_some_and(|id| clearance(board, &id, unix_ns()) == Clearance::Go)
    };
    host.notices.read(may).await
}

/// Tells that an announced pause starts, if it still may. From then on nobody can cancel it.
pub async fn begin(host: &Host, swap: &SwapId) -> Result<Clearance, StoreError> {
    host.notices
        .change(|board, now| {
            let id = board.of_swap(swap).map(|pause| pause.id.clone());
            let Some(id) = id else {
                return Clearance::Withdrawn("it was never announced".into());
            };
            let clearance = clearance(board, &id, now);
            if clearance == Clearance::Go {
                board.start(&id, now);
            }
            clearance
        })
        .await
}

/// Announces the pause of a VM's swap, if that was not done yet, and says whether the swap may
/// [`begin`].
pub async fn clear_swap(
    host: &Host,
    vm: &VmRecord,
    swap: &mut SwapRecord,
) -> Result<Clearance, StoreError> {
    let concerned = Concerned {
        swap: &swap.id,
        vms: vec![vm],
        notice_ns: swap.notice_ns,
        no_notice: swap.no_notice.as_ref(),
        expected_ns: None,
        budget_ns: swap.budget_ns,
        description: "Virtual machine is being paused while the software that runs it is updated.",
    };
    let (is_new, clearance) = clear(host, &concerned).await?;
    if is_new && matches!(clearance, Clearance::Wait(_)) {
        swap.step = "wait for its time, or an approval".into();
        host.record(swap).await?;
    }
    Ok(clearance)
}

fn clearance(board: &Board, id: &PauseId, now: u64) -> Clearance {
    match board.start_of(id, now) {
        Start::Now => Clearance::Go,
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

impl Concerned<'_> {
    /// The groups that hear of it, each with its VMs that stand still.
    fn groups(&self) -> Vec<(Group, Vec<VmName>)> {
        let mut groups = BTreeMap::<_, Vec<_>>::new();
        for vm in &self.vms {
            let group = Group::of(&vm.name, &vm.profile);
            groups.entry(group).or_default().push(vm.name.clone());
        }
        groups.into_iter().collect()
    }

    fn notice_ns(&self, board: &Board, now: u64) -> u64 {
        let default = u64::try_from(DEFAULT_NOTICE.as_nanos()).unwrap_or(u64::MAX);
        let of_vm = |vm: &&VmRecord| {
            // Where nobody listens, nobody is there to be warned.
            let heard = board.is_heard(&Group::of(&vm.name, &vm.profile), now);
            heard.then(|| vm.profile.notice_ns.unwrap_or(default))
        };
        match (self.no_notice, self.notice_ns) {
            (Some(_), _) => 0,
            (None, Some(notice)) => notice,
            (None, None) => self.vms.iter().filter_map(of_vm).max().unwrap_or(0),
        }
    }

    fn expected_ns(&self, board: &Board) -> u64 {
        let of_vm = |vm: &&VmRecord| {
            let past = board.of_vm(&vm.name).into_iter().rev();
            let measured = past.filter_map(|pause| pause.measured.as_ref()?.pause_ns);
            let budget = u64::try_from(vm.spec.blackout_budget.as_nanos()).unwrap_or(u64::MAX);
            let budget = || self.budget_ns.unwrap_or(budget);
            measured.take(10).max().unwrap_or_else(budget)
        };
        let of_vms = || self.vms.iter().map(of_vm).max().unwrap_or(0);
        self.expected_ns.unwrap_or_else(of_vms)
    }
}

/// Whether a guest may be made to stand still for a look at a swap.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Peek {
    /// It may: its event says that it started.
    Announced,
    /// It may not, and why.
    LeftOut(String),
}

/// A look at a swap beforehand.
#[derive(Clone, Copy, Debug)]
pub(super) struct Look<'a> {
    /// Its id.
    pub(super) id: &'a SwapId,
    /// The longest its pause may be, ns; the VM's own budget when absent.
    pub(super) budget_ns: Option<u64>,
    /// Why the guest hears of that only when it starts.
    pub(super) no_notice: Option<&'a String>,
}

/// Announces the peek of a look beforehand. Where nobody listens its event starts at once; where
/// somebody does, an operator's reason has it so, and without one the guest is left alone: a look
/// is not worth a wait of a quarter of an hour, and none is taken without a word.
pub(super) async fn peek(host: &Host, vm: &VmRecord, look: Look<'_>) -> Result<Peek, StoreError> {
    let group = Group::of(&vm.name, &vm.profile);
    let (id, event) = (PauseId(fresh_guid()), EventId(fresh_guid()));
    host.notices
        .change(|board, now| {
            if look.no_notice.is_none() && board.is_heard(&group, now) {
                let why = "the guest listens for events, and a peek is a pause that it was not told of: \
                           --no-notice REASON peeks all the same, and --no-peek leaves it out";
                return Peek::LeftOut(why.into());
            }
            let budget = vm.spec.blackout_budget.as_nanos();
            let new = Announcement {
                id,
                swap: look.id.clone(),
                description: "Virtual machine is being paused for a moment to see whether the software \
                              that runs it can be updated."
                    .into(),
                notices: vec![(event, group, vec![vm.name.clone()])],
                notice_ns: 0,
                expected_ns: look
                    .budget_ns
                    .unwrap_or(u64::try_from(budget).unwrap_or(u64::MAX)),
                no_notice: look.no_notice.cloned(),
            };
            let id = board.announce(new, now);
            board.start(&id, now);
            Peek::Announced
        })
        .await
}

/// The peek is over; it took this long.
pub(super) async fn end_peek(host: &Host, look: &SwapId, took: Duration) -> Result<(), StoreError> {
    let measured = Measured {
        pause_ns: Some(u64::try_from(took.as_nanos()).unwrap_or(u64::MAX)).filter(|&ns| ns > 0),
        ..Measured::default()
    };
    host.notices
        .change(|board, now| {
            if let Some(id) = board.of_swap(look).map(|pause| pause.id.clone()) {
                board.end(&id, measured, now);
            }
        })
        .await
}

fn announcement(
    board: &Board,
    concerned: &Concerned<'_>,
    groups: Vec<(Group, Vec<VmName>)>,
    (id, events): (PauseId, Vec<EventId>),
    now: u64,
) -> Announcement {
    let notices = events.into_iter().zip(groups);
    Announcement {
        id,
        swap: concerned.swap.clone(),
        description: concerned.description.into(),
        notices: notices
            .map(|(event, (group, vms))| (event, group, vms))
            .collect(),
        notice_ns: concerned.notice_ns(board, now),
        expected_ns: concerned.expected_ns(board),
        no_notice: concerned.no_notice.cloned(),
    }
}

/// Ends the pause of a VM's swap that is over.
pub(super) async fn end_pause(host: &Host, swap: &SwapRecord) {
    end_pause_of(host, &swap.id, measured(swap)).await;
}

/// Ends the pause of a swap that is over. Where somebody listens, its event stays until it was seen
/// after the pause.
pub(super) async fn end_pause_of(host: &Host, swap: &SwapId, measured: Measured) {
    let since = Instant::now();
    let paused = measured.pause_ns.is_some();
    let heard: Vec<Vec<VmName>> = host
        .notices
        .read(|board| {
            let notices = board.of_swap(swap).map(|pause| &pause.notices);
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

async fn end(host: Host, swap: SwapId, measured: Measured) {
    let ended = host
        .notices
        .change(|board, now| {
            if let Some(id) = board.of_swap(&swap).map(|pause| pause.id.clone()) {
                board.end(&id, measured, now);
            }
        })
        .await;
    if let Err(error) = ended {
        // The next daemon ends it; see `settle_pauses`.
        tracing::error!(%swap, "the end of its pause was not recorded: {error}");
    }
}

fn measured(swap: &SwapRecord) -> Measured {
    let report: Option<&SwapReport> = swap.report.as_ref();
    let pause = report.map(|report| report.blackout.host);
    // A swap that its rehearsal ended made no pause but the peek.
    let peek = match &swap.safeguards.rehearsal {
        Some(Rehearsed::Told(told)) => Some(told.peek),
        _ => None,
    };
    let pause = pause.filter(|pause| !pause.is_zero()).or(peek);
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
        if host
            .store
            .host_swap(&swap)
            .await?
            .is_some_and(|swap| !swap.state.is_over())
        {
            continue;
        }
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
