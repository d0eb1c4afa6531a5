//! `/v1/swaps` and `/v1/vms/{name}/swaps`; the swap of all guests at once is in [`super::swap_all`].

use axum::Json;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use serde::{Deserialize, Serialize};
use stillpoint_control::clock::Policy;
use stillpoint_control::spec::{MAX_BUDGET, MachineSpec};
use utoipa::ToSchema;

use super::Desk;
use super::refusal::{Body, Refusal};
use crate::execute::{self, unix_ns};
use crate::model::{
    Code, DEFAULT_WATCH_NS, MAX_NOTICE_NS, MAX_WATCH_NS, Preflight, Problem, Release, RolloutId,
    Safeguards, SwapId, SwapRecord, SwapState, VMM, VmRecord, VmState, Wanted,
};

/// The longest reason for a swap without notice.
const MAX_REASON: usize = 500;

/// A swap to be done.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NewSwap {
    /// Component: `vmm`.
    pub component: String,
    /// Version to swap to.
    pub to: String,
    /// The longest blackout allowed, ns; the VM's own budget when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub budget_ns: Option<u64>,
    /// What the guest's clocks make of the pause; the VM's own policy when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub clock: Option<Policy>,
    /// How long before the pause the guest hears of it, ns; the VM's own notice when absent. It is
    /// given also where nobody listens.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub notice_ns: Option<u64>,
    /// Why the guest gets no notice: what was announced a moment before starts at once. Recorded.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub no_notice: Option<String>,
    /// Swap to a release below the pinned minimum.
    #[serde(default)]
    pub allow_downgrade: bool,
    /// Whether it is rehearsed before its freeze, and not begun if that fails; true when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rehearse: Option<bool>,
    /// For how long the guest is watched afterwards, ns; the VM's own time when absent, 0 for not at
    /// all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub watch_ns: Option<u64>,
    /// Whether a guest that isn't well meanwhile is swapped back; true when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub way_back: Option<bool>,
}

/// Asks for a swap. It is recorded, then done; `GET /v1/swaps/{id}` and `/v1/events` say how far
/// it is.
#[utoipa::path(
    post, path = "/v1/vms/{name}/swaps", params(("name" = String, Path,)), request_body = NewSwap,
    responses(
        (status = 202, body = SwapRecord), (status = "4XX", body = Problem),
        (status = 507, description = "no room to record it; nothing was begun", body = Problem)
    )
)]
pub(super) async fn ask(
    State(desk): State<Desk>,
    Path(name): Path<String>,
    Body(new): Body<NewSwap>,
) -> Result<(StatusCode, Json<SwapRecord>), Refusal> {
    let swap = desk.ask_swap(&name, new, new_id()?, None).await?;
    Ok((StatusCode::ACCEPTED, Json(swap)))
}

/// A look at a swap beforehand.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NewCheck {
    /// The swap that is thought of.
    pub swap: NewSwap,
    /// Whether the guest's state is saved for a rehearsal, for which it stands still a moment; true
    /// when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub peek: Option<bool>,
}

/// Says whether a swap would work. Nothing is changed; the guest stands still for the peek alone.
#[utoipa::path(
    post, path = "/v1/vms/{name}/checks", params(("name" = String, Path,)), request_body = NewCheck,
    responses((status = 200, body = Preflight), (status = "4XX", body = Problem))
)]
pub(super) async fn check(
    State(desk): State<Desk>,
    Path(name): Path<String>,
    Body(new): Body<NewCheck>,
) -> Result<Json<Preflight>, Refusal> {
    let asked = desk.check_swap(&name, new.swap).await?;
    let vm = desk.vm(&name).await?;
    let to = desk.release(&asked.to.version).await?;
    let peek = new.peek.unwrap_or(true);
    Ok(Json(
        execute::preflight(&desk.host, &vm, &to, asked, peek).await?,
    ))
}

impl Desk {
    /// Asks for a swap by that id, for that rollout if it is one's.
    pub(crate) async fn ask_swap(
        &self,
        name: &str,
        new: NewSwap,
        id: SwapId,
        rollout: Option<RolloutId>,
    ) -> Result<SwapRecord, Problem> {
        let mut swap = self
            .check_swap(name, new)
            .await
            .map_err(|refusal| refusal.0)?;
        (swap.id, swap.rollout) = (id, rollout);
        self.add_swap(swap).await
    }

    /// Records a swap that was checked, and has it done.
    pub(super) async fn add_swap(&self, swap: SwapRecord) -> Result<SwapRecord, Problem> {
        let name = &swap.vm;
        if !self.host.store.add_swap(&swap).await? {
            let message = format!(
                "another swap of `{name}` is going on; wait for its end (`stillpoint report {name}`)"
            );
            return Err(Problem::new(Code::SwapInProgress, message));
        }
        self.waker.wake(name);
        Ok(swap)
    }

    /// Checks everything that can be checked before the guest hears of it.
    async fn check_swap(&self, name: &str, new: NewSwap) -> Result<SwapRecord, Refusal> {
        let vm = self.vm(name).await?;
        check_request(&new)?;
        self.may_be_swapped(&vm, &new).await?;
        let to = self.may_be_run(&new).await?;
        self.swap_of(vm, &to, new).await
    }

    /// Whether a swap can be asked of a guest as it is now.
    pub(super) async fn may_be_swapped(&self, vm: &VmRecord, new: &NewSwap) -> Result<(), Refusal> {
        let name = &vm.name;
        check_hold(new, &vm.spec)?;
        if !vm.state.is_active() || vm.wanted == Wanted::Stopped {
            let message = format!(
                "`{name}` is {}: there is no process to swap; the next `stillpoint run` starts \
                 it with whatever release is asked for",
                vm.state
            );
            return Err(Problem::new(Code::NotRunning, message).into());
        }
        if let Some(open) = self.host.store.open_swap(&vm.name).await? {
            let message = format!(
                "another swap of `{name}` is going on ({}, to release {}); wait for its end",
                open.id, open.to.version
            );
            return Err(Problem::new(Code::SwapInProgress, message).into());
        }
        if vm.state != VmState::Running {
            let message = format!("`{name}` is {}; ask again when it is running", vm.state);
            return Err(Problem::new(Code::NotRunning, message).into());
        }
        Ok(())
    }

    /// Whether the release of a swap may be run here.
    pub(super) async fn may_be_run(&self, new: &NewSwap) -> Result<Release, Refusal> {
        let to = self.release(&new.to).await?;
        if !new.allow_downgrade {
            self.pin_allows(&new.to).await?;
        }
        self.verified(&to).await?;
        Ok(to)
    }

    /// The swap of a guest, as it is recorded.
    pub(super) async fn swap_of(
        &self,
        vm: VmRecord,
        to: &Release,
        new: NewSwap,
    ) -> Result<SwapRecord, Refusal> {
        let from = self.release(&vm.release).await?;
        to.can_follow(&from)?;
        Ok(SwapRecord {
            id: new_id()?,
            part_of: None,
            rollout: None,
            vm: vm.name,
            component: new.component,
            from: from.name(),
            to: to.name(),
            state: SwapState::Wanted,
            step: "recorded".into(),
            reason: None,
            budget_ns: new.budget_ns,
            clock: new.clock,
            notice_ns: new.notice_ns,
            no_notice: new.no_notice,
            safeguards: Safeguards {
                rehearse: new.rehearse.unwrap_or(true),
                watch_ns: new
                    .watch_ns
                    .or(vm.profile.watch_ns)
                    .unwrap_or(DEFAULT_WATCH_NS),
                way_back: new.way_back.unwrap_or(true),
                ..Safeguards::default()
            },
            successor: None,
            epoch_before: None,
            asked_at_unix_ns: unix_ns(),
            ended_at_unix_ns: None,
            report: None,
        })
    }
}

pub(super) fn check_request(new: &NewSwap) -> Result<(), Problem> {
    let bad = |message| Err(Problem::new(Code::BadRequest, message));
    if new.component != VMM {
        let given = &new.component;
        return bad(format!(
            "field `component`: `{given}` can't be swapped, only `{VMM}`"
        ));
    }
    check_notice(new.notice_ns, new.no_notice.as_deref())?;
    if let Some(ns) = new.watch_ns.filter(|&ns| ns > MAX_WATCH_NS) {
        return bad(format!(
            "field `watch_ns`: {ns} is more than {MAX_WATCH_NS}, a day"
        ));
    }
    check_budget(new.budget_ns)
}

pub(super) fn check_notice(notice_ns: Option<u64>, no_notice: Option<&str>) -> Result<(), Problem> {
    let bad = |message| Err(Problem::new(Code::BadRequest, message));
    match (no_notice, notice_ns) {
        (Some(_), Some(_)) => bad("fields `notice_ns` and `no_notice` exclude each other".into()),
        (Some(reason), None) if reason.trim().is_empty() || reason.len() > MAX_REASON => {
            bad(format!(
                "field `no_notice`: say in 1 to {MAX_REASON} bytes why the guest gets no notice"
            ))
        }
        (None, Some(ns)) if ns == 0 || ns > MAX_NOTICE_NS => bad(format!(
            "field `notice_ns`: {ns} is not more than 0 and at most {MAX_NOTICE_NS}; for a swap \
             without notice give its reason in `no_notice`"
        )),
        _ => Ok(()),
    }
}

pub(super) fn check_budget(budget_ns: Option<u64>) -> Result<(), Problem> {
    let ceiling = u64::try_from(MAX_BUDGET.as_nanos()).unwrap_or(u64::MAX);
    match budget_ns {
        Some(ns) if ns == 0 || ns > ceiling => {
            let message =
                format!("field `budget_ns`: {ns} is not more than 0 and at most {ceiling}");
            Err(Problem::new(Code::BadRequest, message))
        }
        _ => Ok(()),
    }
}

/// A clock that is held is late afterwards: without anything to correct it that is refused.
fn check_hold(new: &NewSwap, spec: &MachineSpec) -> Result<(), Problem> {
    if new.clock != Some(Policy::Hold) || spec.correction().is_some() {
        return Ok(());
    }
    let name = &spec.name;
    let message = format!(
        "field `clock`: hold leaves the wall clock of `{name}` late by the pause, and nothing would \
         correct it: the machine has no vsock for its agent, and its spec does not say that the \
         guest sees to it by ptp; use advance"
    );
    Err(Problem::new(Code::BadRequest, message))
}

/// Ids sort by time, and are short enough to type.
pub(super) fn new_id() -> Result<SwapId, Problem> {
    let mut random = [0; 2];
    rustix::rand::getrandom(&mut random, rustix::rand::GetRandomFlags::empty())
        .map_err(|e| Problem::new(Code::Failed, format!("no random bytes: {e}")))?;
    let ms = unix_ns() / 1_000_000;
    let tail = stillpoint_control::secret::hex(&random);
    Ok(SwapId(format!("{ms:011x}-{tail}")))
}

fn without_reports(mut swaps: Vec<SwapRecord>) -> Vec<SwapRecord> {
    for swap in &mut swaps {
        swap.report = None;
    }
    swaps
}

/// All swaps, oldest first, without their reports.
#[utoipa::path(get, path = "/v1/swaps", responses((status = 200, body = [SwapRecord])))]
pub(super) async fn list(State(desk): State<Desk>) -> Result<Json<Vec<SwapRecord>>, Refusal> {
    Ok(Json(without_reports(desk.host.store.swaps(None).await?)))
}

/// All swaps of a VM, oldest first, without their reports.
#[utoipa::path(
    get, path = "/v1/vms/{name}/swaps", params(("name" = String, Path,)),
    responses((status = 200, body = [SwapRecord]), (status = "4XX", body = Problem))
)]
pub(super) async fn of_vm(
    State(desk): State<Desk>,
    Path(name): Path<String>,
) -> Result<Json<Vec<SwapRecord>>, Refusal> {
    let vm = desk.vm(&name).await?;
    let swaps = desk.host.store.swaps(Some(&vm.name)).await?;
    Ok(Json(without_reports(swaps)))
}

/// One swap, with its report when it is over.
#[utoipa::path(
    get, path = "/v1/swaps/{id}", params(("id" = String, Path,)),
    responses((status = 200, body = SwapRecord), (status = "4XX", body = Problem))
)]
pub(super) async fn show(
    State(desk): State<Desk>,
    Path(id): Path<String>,
) -> Result<Json<SwapRecord>, Refusal> {
    let swap = desk.host.store.swap(&SwapId(id.clone())).await?;
    swap.map(Json).ok_or_else(|| {
        let message = format!("there is no swap `{id}`; `GET /v1/swaps` lists all");
        Problem::new(Code::NotFound, message).into()
    })
}
