//! `/v1/host/swaps`: guests stand still in their places while something of their host is changed.

use std::collections::BTreeSet;

use axum::Json;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use serde::{Deserialize, Serialize};
use stillpoint_control::clock::Policy;
use utoipa::ToSchema;

use super::Desk;
use super::refusal::{Body, Refusal};
use super::swaps::{check_budget, check_notice, new_id};
use crate::agent::modules::{self, ModulesError};
use crate::agent::process::boot_id;
use crate::execute::{self, unix_ns};
use crate::model::{
    Code, HostSwap, HostSwapState, KvmCheck, KvmSwap, Module, Problem, Safeguards, SwapId,
    SwapRecord, SwapState, VmName, VmRecord, VmState, Wanted,
};
use crate::store::Busy;

/// The longest command, bytes of all its words.
const MAX_COMMAND: usize = 100_000;

/// A swap of the host to be done.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NewHostSwap {
    /// KVM's modules are exchanged: the guests let go of KVM meanwhile.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kvm: Option<NewKvm>,
    /// The program and its arguments that are run, as the daemon's user, while the guests stand still.
    /// Empty: the operator does it by hand, and lets the guests go; or, of KVM, the daemon exchanges the
    /// modules.
    #[serde(default)]
    pub command: Vec<String>,
    /// What `/bin/sh -c` runs when that failed, once the guests run again.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub undo: Option<String>,
    /// The guests that stand still; all that run when empty.
    #[serde(default)]
    pub vms: Vec<String>,
    /// The longest a guest stands still, ns.
    pub budget_ns: u64,
    /// How long before the pause the guests hear of it, ns; each one's own notice when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub notice_ns: Option<u64>,
    /// Why the guests get no notice. Recorded.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub no_notice: Option<String>,
}

/// What is to become of KVM's modules.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NewKvm {
    /// The folder with the modules to load; the same files again when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub to: Option<String>,
    /// Parameters that are to be other than they are, `MODULE.NAME=VALUE`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub parameters: Vec<String>,
}

/// Asks for a swap of the host. It is recorded, then done; `GET /v1/host/swaps/{id}` says how far it is.
#[utoipa::path(
    post, path = "/v1/host/swaps", request_body = NewHostSwap,
    responses(
        (status = 202, body = HostSwap), (status = "4XX", body = Problem),
        (status = 507, description = "no room to record it; nothing was begun", body = Problem)
    )
)]
pub(super) async fn ask(
    State(desk): State<Desk>,
    Body(new): Body<NewHostSwap>,
) -> Result<(StatusCode, Json<HostSwap>), Refusal> {
    check(&new)?;
    let vms = desk.guests(&new.vms).await?;
    let kvm = match &new.kvm {
        Some(kvm) => {
            let exchange = match new.command.is_empty() {
                true => Exchange::Folder(kvm.clone()),
                false => Exchange::Command,
            };
            Some(desk.kvm(exchange, &vms).await?)
        }
        None => None,
    };
    let swap = HostSwap {
        kvm,
        command: new.command,
        undo: new.undo,
        notice_ns: new.notice_ns,
        no_notice: new.no_notice,
        ..HostSwap::wanted(new_id()?, names(&vms), new.budget_ns, unix_ns())
    };
    Ok((StatusCode::ACCEPTED, Json(desk.begin(swap, &vms).await?)))
}

/// How KVM is to be exchanged.
#[derive(Clone, Debug)]
pub(crate) enum Exchange {
    /// By modules of a folder.
    Folder(NewKvm),
    /// By modules that were there before.
    PutBack(Vec<Module>),
    /// By a command: what it does, the operator knows.
    Command,
}

/// What these guests are called.
pub(crate) fn names(vms: &[VmRecord]) -> Vec<VmName> {
    vms.iter().map(|vm| vm.name.clone()).collect()
}

pub(crate) fn check(new: &NewHostSwap) -> Result<(), Problem> {
    let bad = |message: String| Err(Problem::new(Code::BadRequest, message));
    if new.kvm.is_some() && !new.vms.is_empty() {
        return bad(
            "field `vms`: KVM's modules are exchanged under all guests of the host or under none"
                .into(),
        );
    }
    check_budget(Some(new.budget_ns))?;
    check_notice(new.notice_ns, new.no_notice.as_deref())?;
    let words = new.command.iter().chain(&new.undo);
    if words.clone().any(|word| word.contains('\0')) {
        return bad("fields `command` and `undo`: a word holds a zero byte".into());
    }
    if words.map(String::len).sum::<usize>() > MAX_COMMAND {
        return bad(format!(
            "fields `command` and `undo`: more than {MAX_COMMAND} bytes"
        ));
    }
    if let Some(program) = new.command.first()
        && !is_program(program)
    {
        return bad(format!(
            "field `command`: {program:?} is no program that the daemon finds; give its path"
        ));
    }
    Ok(())
}

/// What an exchange loads, and what is there before it.
fn swap_by(exchange: Exchange) -> Result<KvmSwap, ModulesError> {
    let (to, before) = match exchange {
        Exchange::Command => Default::default(),
        Exchange::PutBack(modules) => {
            let before = modules::present()?;
            (modules::instead(&modules, None, &[])?, before)
        }
        Exchange::Folder(new) => {
            let before = modules::present()?;
            let folder = new.to.as_deref().map(std::path::Path::new);
            (modules::instead(&before, folder, &new.parameters)?, before)
        }
    };
    Ok(KvmSwap {
        to,
        before,
        boot_id: boot_id(),
        ..KvmSwap::default()
    })
}

/// Whether the daemon finds a program of that name.
fn is_program(name: &str) -> bool {
    use modules::is_executable;
    if name.contains('/') {
        return is_executable(std::path::Path::new(name));
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    !name.is_empty() && std::env::split_paths(&path).any(|dir| is_executable(&dir.join(name)))
}

/// Whether KVM's modules could be exchanged now. Nothing is touched.
#[utoipa::path(
    post, path = "/v1/host/kvm/checks", request_body = NewKvm,
    responses((status = 200, body = KvmCheck), (status = "4XX", body = Problem))
)]
pub(super) async fn check_kvm(
    State(desk): State<Desk>,
    Body(new): Body<NewKvm>,
) -> Result<Json<KvmCheck>, Refusal> {
    let vms = desk.guests(&[]).await?;
    let names = vms.iter().map(|vm| vm.name.to_string()).collect();
    let (swap, problems) = desk.look_at_kvm(Exchange::Folder(new), &vms).await?;
    Ok(Json(KvmCheck {
        swap,
        vms: names,
        problems,
    }))
}

impl Desk {
    /// What is to be exchanged of KVM, if nothing stands in the way.
    pub(crate) async fn kvm(
        &self,
        exchange: Exchange,
        vms: &[VmRecord],
    ) -> Result<KvmSwap, Refusal> {
        match self.look_at_kvm(exchange, vms).await? {
            (Some(swap), problems) if problems.is_empty() => Ok(swap),
            (_, problems) => Err(Problem::new(Code::BadRequest, problems.join("; ")).into()),
        }
    }

    /// What would be exchanged of KVM, and what stands in the way.
    async fn look_at_kvm(
        &self,
        exchange: Exchange,
        vms: &[VmRecord],
    ) -> Result<(Option<KvmSwap>, Vec<String>), Refusal> {
        let ours: Vec<u32> = vms
            .iter()
            .filter_map(|vm| Some(vm.process.as_ref()?.pid))
            .collect();
        let looked = tokio::task::spawn_blocking(move || {
            let holders = modules::holders(&ours);
            let mut problems: Vec<_> = holders
                .iter()
                .map(|holder| format!("{holder} has KVM open: end it first, or move it away"))
                .collect();
            let swap = swap_by(exchange);
            let swap = swap.map_err(|error| problems.push(error.to_string())).ok();
            (swap, problems)
        });
        looked.await.map_err(|error| {
            Problem::new(Code::Failed, format!("looking at KVM's modules: {error}")).into()
        })
    }

    /// The guests of these names, each of which must run; all that run if there are no names.
    pub(super) async fn guests(&self, names: &[String]) -> Result<Vec<VmRecord>, Refusal> {
        let vms = self.guests_or_none(names).await?;
        if vms.is_empty() {
            let message = "no guest runs on this host: run the command yourself".to_owned();
            return Err(Problem::new(Code::NotRunning, message).into());
        }
        Ok(vms)
    }

    /// The same, where there need be none.
    pub(crate) async fn guests_or_none(&self, names: &[String]) -> Result<Vec<VmRecord>, Refusal> {
        let mut vms = Vec::new();
        if names.is_empty() {
            vms = self.host.store.vms().await?;
            vms.retain(|vm| vm.state.is_active() && vm.wanted == Wanted::Running);
        }
        // Each once, in whatever order they were named.
        for name in names.iter().collect::<BTreeSet<_>>() {
            vms.push(self.vm(name).await?);
        }
        for vm in &vms {
            let name = &vm.name;
            if vm.state != VmState::Running || vm.wanted != Wanted::Running {
                let message = format!("`{name}` is {}; ask again when it is running", vm.state);
                return Err(Problem::new(Code::NotRunning, message).into());
            }
            if vm.spec.clock.policy == Policy::Hold {
                let message = format!(
                    "`{name}` has the clock policy hold, which a pause in its place can't keep: KVM's \
                     clocks go on meanwhile; leave it out by naming the others, or swap its VMM instead"
                );
                return Err(Problem::new(Code::BadRequest, message).into());
            }
        }
        Ok(vms)
    }

    /// Records a swap of the host with each guest's part, and begins it.
    pub(crate) async fn begin(
        &self,
        swap: HostSwap,
        vms: &[VmRecord],
    ) -> Result<HostSwap, Refusal> {
        let mut parts = Vec::with_capacity(vms.len());
        for vm in vms {
            parts.push(self.part(&swap, vm).await?);
        }
        if let Err(busy) = self.host.store.add_host_swap(&swap, &parts).await? {
            let message = match busy {
                Busy::Host(id) => {
                    format!("another swap of this host is going on ({id}); wait for its end")
                }
                Busy::Vm(vm) => format!("a swap of `{vm}` is going on; wait for its end"),
            };
            return Err(Problem::new(Code::SwapInProgress, message).into());
        }
        tokio::spawn(execute::host_swap(self.host.clone(), swap.clone()));
        Ok(swap)
    }

    async fn part(&self, swap: &HostSwap, vm: &VmRecord) -> Result<SwapRecord, Refusal> {
        let release = self.release(&vm.release).await?.name();
        Ok(SwapRecord {
            id: SwapId(format!("{}.{}", swap.id, vm.name)),
            part_of: Some(swap.id.clone()),
            rollout: swap.rollout.clone(),
            vm: vm.name.clone(),
            component: swap.component().into(),
            from: release.clone(),
            to: release,
            state: SwapState::Wanted,
            step: "recorded".into(),
            reason: None,
            budget_ns: Some(swap.budget_ns),
            clock: None,
            notice_ns: swap.notice_ns,
            no_notice: swap.no_notice.clone(),
            safeguards: Safeguards {
                rehearse: swap.kernel.as_ref().is_some_and(|jump| jump.rehearse),
                ..Safeguards::default()
            },
            successor: None,
            epoch_before: None,
            asked_at_unix_ns: swap.asked_at_unix_ns,
            ended_at_unix_ns: None,
            report: None,
        })
    }

    async fn host_swap(&self, id: &str) -> Result<HostSwap, Refusal> {
        let swap = self.host.store.host_swap(&SwapId(id.to_owned())).await?;
        swap.ok_or_else(|| {
            let message = format!(
                "there is no swap `{id}` of this host; `stillpoint host changes` lists all"
            );
            Problem::new(Code::NotFound, message).into()
        })
    }
}

/// All swaps of the host, oldest first.
#[utoipa::path(get, path = "/v1/host/swaps", responses((status = 200, body = [HostSwap])))]
pub(super) async fn list(State(desk): State<Desk>) -> Result<Json<Vec<HostSwap>>, Refusal> {
    Ok(Json(desk.host.store.host_swaps().await?))
}

/// One swap of the host.
#[utoipa::path(
    get, path = "/v1/host/swaps/{id}", params(("id" = String, Path,)),
    responses((status = 200, body = HostSwap), (status = "4XX", body = Problem))
)]
pub(super) async fn show(
    State(desk): State<Desk>,
    Path(id): Path<String>,
) -> Result<Json<HostSwap>, Refusal> {
    desk.host_swap(&id).await.map(Json)
}

/// Lets the guests go that stand still while an operator does something by hand.
#[utoipa::path(
    post, path = "/v1/host/swaps/{id}/release", params(("id" = String, Path,)),
    responses((status = 202, body = HostSwap), (status = "4XX", body = Problem))
)]
pub(super) async fn release(
    State(desk): State<Desk>,
    Path(id): Path<String>,
) -> Result<(StatusCode, Json<HostSwap>), Refusal> {
    let swap = desk.host_swap(&id).await?;
    if desk.host.holds.let_go(&swap.id) {
        return Ok((StatusCode::ACCEPTED, Json(swap)));
    }
    let why = match swap.state {
        state if state.is_over() => format!("it is {state}; its guests run"),
        HostSwapState::Wanted => {
            "its guests do not stand still yet; `stillpoint events cancel` withdraws it".into()
        }
        _ => "it ends with its command".into(),
    };
    let message = format!("swap `{id}` has nothing to let go: {why}");
    Err(Problem::new(Code::TooLate, message).into())
}
