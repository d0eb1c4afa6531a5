//! `/v1/host/kernel-swaps` and `/v1/host/carve-out`: the host's kernel swapped under its guests.

use std::path::PathBuf;

use axum::Json;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use serde::{Deserialize, Serialize};
use stillpoint_control::secret::{Secret, hex};
use utoipa::ToSchema;

use super::Desk;
use super::host::names;
use super::refusal::{Body, Refusal};
use super::swaps::{check_budget, check_notice, new_id};
use crate::agent::kexec;
use crate::doctor::{Check, Status};
use crate::execute::{self, LookAtJump, unix_ns};
use crate::model::{
    Code, HostSwap, KernelJump, Problem, RolloutId, SwapId, VmName, VmState, to_be_used_again,
};

/// A swap of the host's kernel to be done.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NewKernelSwap {
    /// The image of the kernel to jump into, on this host.
    #[schema(value_type = String)]
    pub kernel: PathBuf,
    /// Its initial RAM disk.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub initrd: Option<PathBuf>,
    /// Its command line; the running kernel's when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub command_line: Option<String>,
    /// The longest the guests stand still, ns. Until the jump it is kept; after it, a breach is reported.
    pub budget_ns: u64,
    /// How long before the pause the guests hear of it, ns; each one's own notice when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub notice_ns: Option<u64>,
    /// Why the guests get no notice. Recorded.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub no_notice: Option<String>,
    /// Whether each guest's revival is rehearsed before it stands still, and nothing begun if one fails; true when
    /// absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rehearse: Option<bool>,
}

/// A look at a swap of the host's kernel beforehand.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NewKernelCheck {
    /// The swap that is thought of.
    pub swap: NewKernelSwap,
    /// Whether guests' records are made for a rehearsal, for which each stands still a moment; true when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub peek: Option<bool>,
}

/// What outlives the kernel: what lies in the carve-out, or what live update kept and keeps.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct CarveOutView {
    /// Its device; `/dev/liveupdate` where each guest has a memfd of its own.
    pub path: String,
    /// Bytes of it that can be given to guests; 0 where each has a memfd of its own.
    pub size: u64,
    /// Bytes that nobody has.
    pub free: u64,
    /// Why nothing in it can be used, if so.
    pub problem: Option<String>,
    /// Guests with memory in it.
    pub guests: Vec<CarvedGuest>,
}

/// How a guest is tried again.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CarveOutRetry {
    /// The release to run it; the one that ran it when absent, or the newest that reads its state.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub release: Option<String>,
}

/// A guest with memory in the carve-out.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct CarvedGuest {
    /// Its name.
    pub vm: String,
    /// What it is, if the daemon knows it.
    pub state: Option<VmState>,
    /// Where its RAM begins, bytes from the carve-out's beginning, or its memfd's.
    pub ram: u64,
    /// Bytes of it.
    pub ram_len: u64,
    /// What the mark of its record says: empty, stored, withdrawn, consumed or unknown.
    pub record: String,
    /// Why it is what it is.
    pub reason: Option<String>,
}

impl Desk {
    fn jump_of(&self, new: &NewKernelSwap) -> Result<KernelJump, Problem> {
        check_budget(Some(new.budget_ns))?;
        check_notice(new.notice_ns, new.no_notice.as_deref())?;
        let paths = [
            ("kernel", Some(&new.kernel)),
            ("initrd", new.initrd.as_ref()),
        ];
        for (field, path) in paths {
            if path.is_some_and(|path| !path.is_absolute()) {
                let message = format!(
                    "field `{field}`: is not an absolute path; the daemon has another working directory"
                );
                return Err(Problem::new(Code::BadRequest, message));
            }
        }
        let random = Secret::random().map_err(|e| Problem::new(Code::Failed, e.to_string()))?;
        let running = || to_be_used_again(&kexec::command_line());
        Ok(KernelJump {
            image: new.kernel.clone(),
            initrd: new.initrd.clone(),
            command_line: new
                .command_line
                .as_deref()
                .map_or_else(running, to_be_used_again),
            nonce: hex(&random.as_bytes()[..16]),
            rehearse: new.rehearse.unwrap_or(true),
            from: kexec::running(),
            to: None,
            phases: Vec::new(),
            clock: None,
        })
    }

    /// Checks all that can be checked, and begins the swap under that id.
    pub(crate) async fn ask_kernel_swap(
        &self,
        new: NewKernelSwap,
        id: SwapId,
        rollout: Option<RolloutId>,
    ) -> Result<HostSwap, Refusal> {
        let jump = self.jump_of(&new)?;
        let checks = execute::kernel_checks(&self.host, &jump, new.budget_ns).await?;
        let failed: Vec<_> = checks
            .iter()
            .filter(|check| check.status == Status::Fail)
            .map(|check| format!("{}: {} ({})", check.check, check.found, check.remedy))
            .collect();
        if !failed.is_empty() {
            let message = format!(
                "the host's kernel can't be swapped, and nothing was begun:\n  {}",
                failed.join("\n  ")
            );
            return Err(Problem::new(Code::BadRequest, message).into());
        }
        let mut vms = self.host.store.vms().await?;
        vms.retain(|vm| vm.state.is_active());
        if vms.is_empty() {
            let message = "no guest runs on this host: boot the other kernel as ever".to_owned();
            return Err(Problem::new(Code::NotRunning, message).into());
        }
        let swap = HostSwap {
            rollout,
            kernel: Some(jump),
            notice_ns: new.notice_ns,
            no_notice: new.no_notice,
            ..HostSwap::wanted(id, names(&vms), new.budget_ns, unix_ns())
        };
        self.begin(swap, &vms).await
    }
}

/// Looks whether it would work. Loads the kernel, and forgets it again; guests stand still for the rehearsal's peek
/// alone.
#[utoipa::path(
    post, path = "/v1/host/kernel-swaps/check", request_body = NewKernelCheck,
    responses((status = 200, body = [Check]), (status = "4XX", body = Problem))
)]
pub(super) async fn check(
    State(desk): State<Desk>,
    Body(NewKernelCheck { swap: new, peek }): Body<NewKernelCheck>,
) -> Result<Json<Vec<Check>>, Refusal> {
    let jump = desk.jump_of(&new)?;
    let mut checks = execute::kernel_checks(&desk.host, &jump, new.budget_ns).await?;
    if jump.rehearse {
        let look = LookAtJump {
            id: new_id()?,
            peek: peek.unwrap_or(true),
            budget_ns: new.budget_ns,
            no_notice: new.no_notice,
        };
        checks.extend(execute::rehearsals(&desk.host, &look).await?);
    }
    Ok(Json(checks))
}

/// Swaps the host's kernel. It is recorded, then done; after the jump `GET /v1/host/swaps/{id}` of the next
/// daemon says what became of it.
#[utoipa::path(
    post, path = "/v1/host/kernel-swaps", request_body = NewKernelSwap,
    responses(
        (status = 202, body = HostSwap), (status = "4XX", body = Problem),
        (status = 507, description = "no room to record it; nothing was begun", body = Problem)
    )
)]
pub(super) async fn ask(
    State(desk): State<Desk>,
    Body(new): Body<NewKernelSwap>,
) -> Result<(StatusCode, Json<HostSwap>), Refusal> {
    let swap = desk.ask_kernel_swap(new, new_id()?, None).await?;
    Ok((StatusCode::ACCEPTED, Json(swap)))
}

/// What lies in the carve-out.
#[utoipa::path(
    get, path = "/v1/host/carve-out",
    responses((status = 200, body = CarveOutView), (status = "4XX", body = Problem))
)]
pub(super) async fn show(State(desk): State<Desk>) -> Result<Json<CarveOutView>, Refusal> {
    let carve_out = &desk.host.carve_out;
    let Some(path) = carve_out.path() else {
        let why = carve_out.directory().err().unwrap_or_default();
        return Err(Problem::new(Code::NotFound, why).into());
    };
    let mut view = CarveOutView {
        path: path.display().to_string(),
        size: 0,
        free: 0,
        problem: None,
        guests: Vec::new(),
    };
    let directory = match carve_out.directory() {
        Ok(directory) => directory,
        Err(problem) => {
            view.problem = Some(problem);
            return Ok(Json(view));
        }
    };
    (view.size, view.free) = (directory.size, directory.free());
    for entry in &directory.entries {
        let name = VmName::try_from(entry.vm.clone()).ok();
        let vm = match name {
            Some(name) => desk.host.store.vm(&name).await?,
            None => None,
        };
        let mark = carve_out.mark(entry);
        view.guests.push(CarvedGuest {
            vm: entry.vm.clone(),
            state: vm.as_ref().map(|vm| vm.state),
            ram: entry.ram.start,
            ram_len: entry.ram.len,
            record: mark.map_or_else(|why| why, |mark| mark.to_string()),
            reason: vm.and_then(|vm| vm.reason),
        });
    }
    Ok(Json(view))
}

/// Tries a guest again that was not revived after a jump.
#[utoipa::path(
    post, path = "/v1/host/carve-out/{vm}/retry", params(("vm" = String, Path,)), request_body = Option<CarveOutRetry>,
    responses((status = 200, body = CarveOutView), (status = "4XX", body = Problem))
)]
pub(super) async fn retry(
    State(desk): State<Desk>,
    Path(name): Path<String>,
    Body(how): Body<Option<CarveOutRetry>>,
) -> Result<Json<CarveOutView>, Refusal> {
    let name = VmName::try_from(name)?;
    let failed = |why: String| Problem::new(Code::StartFailed, why);
    let release = how.and_then(|how| how.release);
    let retried = execute::retry(&desk.host, &name, release.as_deref()).await;
    retried.map_err(failed)?;
    desk.waker.wake(&name);
    show(State(desk)).await
}

/// Gives the memory of a guest back that is not to be run from its record.
#[utoipa::path(
    delete, path = "/v1/host/carve-out/{vm}", params(("vm" = String, Path,)),
    responses((status = 200, body = CarveOutView), (status = "4XX", body = Problem))
)]
pub(super) async fn forget(
    State(desk): State<Desk>,
    Path(name): Path<String>,
) -> Result<Json<CarveOutView>, Refusal> {
    let vm_name = VmName::try_from(name.clone())?;
    let vm = desk.host.store.vm(&vm_name).await?;
    if vm.is_some_and(|vm| vm.state.is_active()) {
        let message = format!("`{name}` runs in that memory; stop it first");
        return Err(Problem::new(Code::StillRunning, message).into());
    }
    let failed = |why: String| Problem::new(Code::Failed, why);
    if !desk.host.carve_out.give_back(&name, true).map_err(failed)? {
        let message = format!("`{name}` has no memory in the carve-out");
        return Err(Problem::new(Code::NotFound, message).into());
    }
    show(State(desk)).await
}

/// Begins the carve-out anew. Whatever lies in it is given up.
#[utoipa::path(
    delete, path = "/v1/host/carve-out",
    responses((status = 200, body = CarveOutView), (status = "4XX", body = Problem))
)]
pub(super) async fn forget_all(State(desk): State<Desk>) -> Result<Json<CarveOutView>, Refusal> {
    let vms = desk.host.store.vms().await?;
    let placed =
        |vm: &&crate::model::VmRecord| vm.state.is_active() && vm.spec.memory.carve_out.is_some();
    if let Some(vm) = vms.iter().find(placed) {
        let message = format!("`{}` runs in it; stop it first", vm.name);
        return Err(Problem::new(Code::StillRunning, message).into());
    }
    let failed = |why: String| Problem::new(Code::Failed, why);
    desk.host.carve_out.forget_all().map_err(failed)?;
    show(State(desk)).await
}
