//! `/v1/vms`.

use std::time::Duration;

use axum::Json;
use axum::extract::{Path, Query, State};
use axum::http::StatusCode;
use serde::{Deserialize, Serialize};
use stillpoint_control::message::ProcessId;
use stillpoint_control::secret::Secret;
use stillpoint_control::spec::{MachineSpec, SpecError, Survive};
use tokio::sync::broadcast;
use utoipa::ToSchema;

use super::Desk;
use super::refusal::{Body, Refusal};
use crate::doctor::Check;
use crate::execute::{self, unix_ns};
use crate::fleet::seats::Wish;
use crate::model::{Code, Event, Problem, Profile, VmName, VmRecord, VmState, Wanted};
use crate::reconcile;

/// A VM to be started.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NewVm {
    /// The machine.
    pub spec: MachineSpec,
    /// Version of the release to start it with; the newest when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub release: Option<String>,
    /// What its guest hears of itself, and how its pauses are announced.
    #[serde(default)]
    pub profile: Profile,
    /// Its update domain is the one whose turn it is in its availability set, in place of the profile's.
    #[serde(default)]
    pub in_turn: bool,
    /// How many update domains its availability set has, where it is the set's first member; 5 when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub update_domains: Option<u8>,
    /// Start it with a release below the pinned minimum.
    #[serde(default)]
    pub allow_downgrade: bool,
}

/// A VM, as it is shown.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct VmView {
    /// Name.
    pub name: VmName,
    /// What it is.
    pub state: VmState,
    /// What its owner wants.
    pub wanted: Wanted,
    /// Why, when it isn't what its owner wants.
    pub reason: Option<String>,
    /// Version of the release that runs it.
    pub release: String,
    /// Its process, while there is one.
    pub process: Option<ProcessId>,
    /// Swaps it has lived through.
    pub swaps: u64,
    /// The machine.
    pub spec: MachineSpec,
    /// What its guest hears of itself, and how its pauses are announced.
    #[serde(default)]
    pub profile: Profile,
    /// What limits or prevents swaps of it, and what does not; in lists left out.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub updatable: Vec<Check>,
    /// What can be swapped under it, and why not the rest; in lists left out.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub rungs: Vec<Check>,
    /// Its serial console: raw bytes both ways.
    pub console_socket: String,
    /// Where host programs connect to the guest's sockets, if it has a vsock device.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vsock_socket: Option<String>,
    /// What its serial console said.
    pub console_log: String,
    /// What its VMMs logged.
    pub vmm_log: String,
    /// When it was asked for, nanoseconds since the Unix epoch.
    pub created_at_unix_ns: u64,
    /// When its state changed last.
    pub changed_at_unix_ns: u64,
}

impl Desk {
    fn view(&self, vm: VmRecord) -> VmView {
        let dir = self.host.dir(&vm.name);
        VmView {
            console_socket: dir.console().display().to_string(),
            vsock_socket: vm.spec.vsock.map(|_| dir.vsock().display().to_string()),
            console_log: dir.console_log().display().to_string(),
            vmm_log: dir.log().display().to_string(),
            name: vm.name,
            state: vm.state,
            wanted: vm.wanted,
            reason: vm.reason,
            release: vm.release,
            process: vm.process,
            swaps: vm.swaps,
            spec: vm.spec,
            profile: vm.profile,
            updatable: Vec::new(),
            rungs: Vec::new(),
            created_at_unix_ns: vm.created_at_unix_ns,
            changed_at_unix_ns: vm.changed_at_unix_ns,
        }
    }

    /// As [`Desk::view`], with what limits its swaps.
    async fn judged(&self, vm: VmRecord) -> VmView {
        let updatable = execute::updatable(&self.host, &vm).await;
        let rungs = execute::rungs(&self.host, &vm);
        VmView {
            updatable,
            rungs,
            ..self.view(vm)
        }
    }

    /// The VM of that name.
    pub(super) async fn vm(&self, name: &str) -> Result<VmRecord, Refusal> {
        let unknown = || Refusal(Problem::unknown_vm(name));
        let name = VmName::try_from(name.to_owned()).map_err(|_| unknown())?;
        self.host.store.vm(&name).await?.ok_or_else(unknown)
    }

    /// Waits until `over` says that the VM is what was asked for, or is no more.
    async fn when(
        &self,
        name: &VmName,
        mut events: broadcast::Receiver<Event>,
        over: impl Fn(&VmRecord) -> bool,
    ) -> Result<VmRecord, Refusal> {
        loop {
            let vm = self.vm(name.as_str()).await?;
            if over(&vm) {
                return Ok(vm);
            }
            loop {
                match events.recv().await {
                    Ok(event) if event.vm() != Some(name) => {}
                    // Missed some: look anyway.
                    Ok(_) | Err(broadcast::error::RecvError::Lagged(_)) => break,
                    Err(broadcast::error::RecvError::Closed) => {
                        let message = "the daemon is ending; ask again when it is back";
                        return Err(Problem::new(Code::Failed, message).into());
                    }
                }
            }
        }
    }
}

/// All VMs.
#[utoipa::path(get, path = "/v1/vms", responses((status = 200, body = [VmView])))]
pub(super) async fn list(State(desk): State<Desk>) -> Result<Json<Vec<VmView>>, Refusal> {
    let vms = desk.host.store.vms().await?;
    Ok(Json(vms.into_iter().map(|vm| desk.view(vm)).collect()))
}

/// One VM.
#[utoipa::path(
    get, path = "/v1/vms/{name}", params(("name" = String, Path,)),
    responses((status = 200, body = VmView), (status = "4XX", body = Problem))
)]
pub(super) async fn show(
    State(desk): State<Desk>,
    Path(name): Path<String>,
) -> Result<Json<VmView>, Refusal> {
    let vm = desk.vm(&name).await?;
    Ok(Json(desk.judged(vm).await))
}

/// Starts a VM. Answered when its guest runs, or did not start. A VM that is over is started
/// anew with what is given.
#[utoipa::path(
    put, path = "/v1/vms/{name}", params(("name" = String, Path,)), request_body = NewVm,
    responses(
        (status = 201, body = VmView), (status = "4XX", body = Problem),
        (status = 507, description = "no room to record it; nothing was started", body = Problem)
    )
)]
pub(super) async fn put(
    State(desk): State<Desk>,
    Path(name): Path<String>,
    Body(new): Body<NewVm>,
) -> Result<(StatusCode, Json<VmView>), Refusal> {
    let wish = Wish {
        domain: (!new.in_turn).then_some(new.profile.update_domain),
        of: new.update_domains,
    };
    let mut vm = desk.check(&name, new).await?;
    let taken = || {
        let message = format!(
            "a guest called `{name}` is there already and was left alone; stop it first, or \
             take another name"
        );
        Refusal(Problem::new(Code::NameTaken, message))
    };
    let known = desk.host.store.vm(&vm.name).await?;
    if known.as_ref().is_some_and(|known| known.state.is_active()) {
        return Err(taken());
    }
    desk.place(&mut vm)?;
    desk.seat(&mut vm, known.as_ref(), wish).await?;
    let events = desk.host.events.subscribe();
    if !desk.host.store.put_vm(&vm).await? {
        return Err(taken());
    }
    desk.waker.wake(&vm.name);
    let vm = desk
        .when(&vm.name, events, |vm| vm.state != VmState::Starting)
        .await?;
    if matches!(vm.state, VmState::Failed | VmState::Crashed) {
        let reason = vm.reason.unwrap_or_default();
        let message = format!("`{name}` did not start: {reason}");
        return Err(Problem::new(Code::StartFailed, message).into());
    }
    Ok((StatusCode::CREATED, Json(desk.judged(vm).await)))
}

impl Desk {
    /// Finds the place of a VM's memory in the carve-out, if it is to outlive the kernel.
    fn place(&self, vm: &mut VmRecord) -> Result<(), Refusal> {
        if vm.spec.memory.survive == Survive::Vmm {
            return Ok(());
        }
        let placed = self.host.carve_out.place(&vm.spec);
        let why = |why: String| Problem::new(Code::StartFailed, why);
        vm.spec.memory.carve_out = Some(placed.map_err(why)?);
        Ok(())
    }

    /// Checks everything that can be checked before it is recorded.
    async fn check(&self, name: &str, mut new: NewVm) -> Result<VmRecord, Refusal> {
        new.spec.validate()?;
        new.profile.validate()?;
        self.not_cordoned().await?;
        if new.spec.name != name {
            let problem = format!("{:?} is not the {name:?} of the path", new.spec.name);
            return Err(field("name", problem));
        }
        if new.spec.memory.carve_out.is_some() {
            let problem = "is found by the daemon; leave it out";
            return Err(field("memory.carve_out", problem.into()));
        }
        if !new.spec.kernel.path.is_absolute() {
            let problem = "is not an absolute path; the daemon has another working directory";
            return Err(field("kernel.path", problem.into()));
        }
        if new
            .spec
            .kernel
            .initrd
            .as_ref()
            .is_some_and(|path| !path.is_absolute())
        {
            return Err(field("kernel.initrd", "is not an absolute path".into()));
        }
        let vm_name = VmName::try_from(name.to_owned())?;
        let fits = self.host.dir(&vm_name).check_length();
        fits.map_err(|e| field("name", e.to_string()))?;
        // Written down: a VM without it is one of before there were fences.
        new.profile.reach.get_or_insert_default();
        let release = self.release_for(new.release, new.allow_downgrade).await?;
        let secret = Secret::random().map_err(|e| Problem::new(Code::Failed, e.to_string()))?;
        let now = unix_ns();
        Ok(VmRecord {
            name: vm_name,
            spec: new.spec,
            release,
            profile: new.profile,
            wanted: Wanted::Running,
            state: VmState::Starting,
            reason: None,
            process: None,
            secret,
            swaps: 0,
            created_at_unix_ns: now,
            changed_at_unix_ns: now,
        })
    }

    /// The version that was asked for, or the one that was added last; not one below the pin, unless
    /// that is asked for.
    async fn release_for(
        &self,
        version: Option<String>,
        allow_downgrade: bool,
    ) -> Result<String, Refusal> {
        let newest = match version {
            Some(version) => Some(self.release(&version).await?),
            None => self.host.store.releases().await?.pop(),
        };
        let Some(release) = newest else {
            let message = "there is no release of the VMM to start it with; add one with \
                           `stillpoint release add PATH`";
            return Err(Problem::new(Code::NotFound, message).into());
        };
        let version = release.manifest.version;
        if !allow_downgrade {
            self.pin_allows(&version).await?;
        }
        Ok(version)
    }
}

impl Desk {
    /// Presses the VM's power button, and waits until it has switched itself off, or the time is
    /// over. A guest that takes no note of the button is not waited for.
    async fn ask_to_end(&self, vm: &VmRecord, grace: Duration) -> Result<(), Refusal> {
        let events = self.host.events.subscribe();
        match self.host.expected(vm).press_power_button().await {
            Ok(true) => {}
            Ok(false) => return Ok(()),
            Err(error) => {
                tracing::warn!(vm = %vm.name, "pressing its power button: {error}");
                return Ok(());
            }
        }
        let over = self.when(&vm.name, events, |vm| !vm.state.is_active());
        match tokio::time::timeout(grace, over).await {
            Ok(over) => over.map(drop),
            Err(_) => {
                tracing::warn!(vm = %vm.name, "still on {grace:?} after its power button was pressed: powered off");
                Ok(())
            }
        }
    }
}

fn field(field: &'static str, problem: String) -> Refusal {
    SpecError::Field { field, problem }.into()
}

/// Removes the record of a VM that is over.
#[utoipa::path(
    delete, path = "/v1/vms/{name}", params(("name" = String, Path,)),
    responses((status = 204), (status = "4XX", body = Problem))
)]
pub(super) async fn remove(
    State(desk): State<Desk>,
    Path(name): Path<String>,
) -> Result<StatusCode, Refusal> {
    let vm = desk.vm(&name).await?;
    if !vm.state.is_active() {
        let failed = |why: String| Problem::new(Code::StillRunning, why);
        desk.host
            .carve_out
            .give_back(&name, false)
            .map_err(failed)?;
    }
    if !desk.host.store.remove_vm(&vm.name).await? {
        let message = format!("`{name}` is {}; stop it first", vm.state);
        return Err(Problem::new(Code::StillRunning, message).into());
    }
    // Its sockets are gone already; logs go with the record.
    let _ = tokio::fs::remove_dir_all(desk.host.dir(&vm.name).path()).await;
    execute::forget(&desk.host, &vm.name).await?;
    desk.unseat(&vm).await;
    reconcile::removed(&desk.host, &vm.name);
    desk.waker.wake(&vm.name);
    Ok(StatusCode::NO_CONTENT)
}

/// How a VM is to be ended.
#[derive(Clone, Copy, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct StopVm {
    /// Its power button is pressed first, and this long, in nanoseconds, is waited for it to
    /// switch itself off. 0, as when it is absent: it is powered off at once.
    #[serde(default)]
    grace_ns: u64,
}

/// Ends a VM. Answered when its process has ended.
#[utoipa::path(
    post, path = "/v1/vms/{name}/stop", 
    params(
        ("name" = String, Path,),
        ("grace_ns" = Option<u64>, Query, description = "press its power button first, and wait so \
            long for it to switch itself off; absent or 0: it is powered off at once")
    ),
    responses((status = 200, body = VmView), (status = "4XX", body = Problem))
)]
pub(super) async fn stop(
    State(desk): State<Desk>,
    Path(name): Path<String>,
    Query(how): Query<StopVm>,
) -> Result<Json<VmView>, Refusal> {
    let vm = desk.vm(&name).await?;
    if !vm.state.is_active() {
        let message = format!("`{name}` is {} already", vm.state);
        return Err(Problem::new(Code::NotRunning, message).into());
    }
    if how.grace_ns > 0 {
        desk.ask_to_end(&vm, Duration::from_nanos(how.grace_ns))
            .await?;
    }
    let events = desk.host.events.subscribe();
    desk.host.store.want(&vm.name, Wanted::Stopped).await?;
    desk.waker.wake(&vm.name);
    let vm = desk
        .when(&vm.name, events, |vm| !vm.state.is_active())
        .await?;
    Ok(Json(desk.view(vm)))
}
