//! `/v1/rollouts`, `/v1/hosts`: the fleet, as any of its daemons tells it.

use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::{Extension, Json};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::Desk;
use super::gate::By;
use super::refusal::{Body, Refusal};
use super::swaps::new_id;
use crate::auth::{Caller, Role};
use crate::execute::unix_ns;
use crate::fleet::ask::{Act, NewRollout, the_vm};
use crate::fleet::explain::{self, HostView, RolloutSummary, RolloutView};
use crate::fleet::record::{HistoryStep, RolloutId};
use crate::model::{Code, Moment, Problem, Rung, VMM};

/// The longest reason for a cordon.
const MAX_REASON: usize = 500;

fn now() -> Moment {
    Moment(unix_ns())
}

/// Something that a hand does to a rollout.
#[derive(Clone, Copy, Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NewAct {
    /// What.
    pub act: Act,
}

/// Why a host is to be left alone.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NewCordon {
    /// The reason, which is recorded.
    pub reason: String,
}

/// Why a VM isn't being updated now.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct Explained {
    /// The sentence.
    pub why: String,
}

impl Desk {
    async fn viewed(&self, id: &RolloutId) -> Result<RolloutView, Problem> {
        let look = self.fleet.look().await?;
        let rollout = self.fleet.rollout(id).await?;
        let mut view = explain::view(&look, &rollout.record, now());
        view.driver = self.fleet.driver().await?.map(|card| card.host);
        Ok(view)
    }
}

/// All rollouts, oldest first, without their units.
#[utoipa::path(get, path = "/v1/rollouts", responses((status = 200, body = [RolloutSummary])))]
pub(super) async fn list(State(desk): State<Desk>) -> Result<Json<Vec<RolloutSummary>>, Refusal> {
    let look = desk.fleet.look().await?;
    let all = look.rollouts.iter();
    Ok(Json(
        all.map(|rollout| explain::summary(&rollout.record))
            .collect(),
    ))
}

/// Starts a rollout, or with `dry_run` says what one would do. Whatever daemon is elected drives it. One that swaps
/// whole hosts needs the role `admin`.
#[utoipa::path(
    post, path = "/v1/rollouts", request_body = NewRollout,
    responses(
        (status = 202, body = RolloutView), (status = "4XX", body = Problem),
        (status = 507, description = "no room to record it; nothing was begun", body = Problem)
    )
)]
pub(super) async fn start(
    State(desk): State<Desk>,
    Extension(By(by)): Extension<By>,
    Extension(caller): Extension<Caller>,
    Body(new): Body<NewRollout>,
) -> Result<(StatusCode, Json<RolloutView>), Refusal> {
    may_change(&caller, &new)?;
    if !new.allow_downgrade && new.component == VMM {
        desk.pin_allows(&new.to).await?;
    }
    // What was done on this host a moment ago, such as a release that was added, counts.
    desk.publisher.catch_up().await;
    let id = RolloutId(new_id()?.0);
    let record = desk.fleet.start(&new, id, &by, now()).await?;
    let look = desk.fleet.look().await?;
    let view = explain::view(&look, &record, now());
    let status = match new.dry_run {
        true => StatusCode::OK,
        false => StatusCode::ACCEPTED,
    };
    Ok((status, Json(view)))
}

/// What changes hosts themselves is for admins, by a rollout as by hand.
fn may_change(caller: &Caller, new: &NewRollout) -> Result<(), Problem> {
    let of_hosts = new.component.parse().is_ok_and(Rung::takes_whole_host);
    if !of_hosts || new.dry_run || caller.role >= Some(Role::Admin) {
        return Ok(());
    }
    let (component, who) = (&new.component, &caller.who);
    let role = caller.role.map_or("none", Role::word);
    let message = format!(
        "a rollout of {component} changes the hosts themselves and needs the role `admin`, and {who} has `{role}`: {}",
        caller.remedy
    );
    Err(Problem::new(Code::Forbidden, message))
}

/// One rollout, and why each of its units isn't begun now.
#[utoipa::path(
    get, path = "/v1/rollouts/{id}", params(("id" = String, Path,)),
    responses((status = 200, body = RolloutView), (status = "4XX", body = Problem))
)]
pub(super) async fn show(
    State(desk): State<Desk>,
    Path(id): Path<String>,
) -> Result<Json<RolloutView>, Refusal> {
    Ok(Json(desk.viewed(&RolloutId(id)).await?))
}

/// Pauses a rollout, resumes, ends or rolls it back.
#[utoipa::path(
    post, path = "/v1/rollouts/{id}/acts", params(("id" = String, Path,)), request_body = NewAct,
    responses((status = 200, body = RolloutView), (status = "4XX", body = Problem))
)]
pub(super) async fn act(
    State(desk): State<Desk>,
    Path(id): Path<String>,
    Extension(By(by)): Extension<By>,
    Body(new): Body<NewAct>,
) -> Result<Json<RolloutView>, Refusal> {
    let id = RolloutId(id);
    desk.fleet.act(&id, new.act, &by, now()).await?;
    Ok(Json(desk.viewed(&id).await?))
}

/// What was done in a rollout, step by step, and why.
#[utoipa::path(
    get, path = "/v1/rollouts/{id}/history", params(("id" = String, Path,)),
    responses((status = 200, body = [HistoryStep]), (status = "4XX", body = Problem))
)]
pub(super) async fn history(
    State(desk): State<Desk>,
    Path(id): Path<String>,
) -> Result<Json<Vec<HistoryStep>>, Refusal> {
    Ok(Json(desk.fleet.history(&RolloutId(id)).await?))
}

/// A VM of the fleet.
#[derive(Clone, Debug, Deserialize)]
pub(super) struct Asked {
    vm: String,
}

/// In one sentence, why a VM isn't being updated now.
#[utoipa::path(
    get, path = "/v1/explain", params(("vm" = String, Query, description = "NAME, or HOST/NAME")),
    responses((status = 200, body = Explained), (status = "4XX", body = Problem))
)]
pub(super) async fn explain(
    State(desk): State<Desk>,
    axum::extract::Query(Asked { vm }): axum::extract::Query<Asked>,
) -> Result<Json<Explained>, Refusal> {
    desk.publisher.catch_up().await;
    let look = desk.fleet.look().await?;
    let place = the_vm(&look, &vm)?;
    let why = explain::explain(&look, place, now());
    Ok(Json(Explained { why }))
}

/// The hosts of the fleet.
#[utoipa::path(get, path = "/v1/hosts", responses((status = 200, body = [HostView])))]
pub(super) async fn hosts(State(desk): State<Desk>) -> Result<Json<Vec<HostView>>, Refusal> {
    desk.publisher.catch_up().await;
    Ok(Json(desk.fleet.hosts().await?))
}

impl Desk {
    async fn host_view(&self, name: &str) -> Result<HostView, Problem> {
        let mut hosts = self.fleet.hosts().await?.into_iter();
        let found = hosts.find(|host| host.name.as_str() == name);
        found.ok_or_else(|| Problem::new(Code::NotFound, format!("no host `{name}`")))
    }
}

/// Forgets a host that is no more.
#[utoipa::path(
    delete, path = "/v1/hosts/{name}", params(("name" = String, Path,)),
    responses((status = 204), (status = "4XX", body = Problem))
)]
pub(super) async fn forget(
    State(desk): State<Desk>,
    Path(name): Path<String>,
) -> Result<StatusCode, Refusal> {
    desk.fleet.forget(&name).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Has a host left alone: no rollout begins anything there, and no guest is started there.
#[utoipa::path(
    put, path = "/v1/hosts/{name}/cordon", params(("name" = String, Path,)), request_body = NewCordon,
    responses((status = 200, body = HostView), (status = "4XX", body = Problem))
)]
pub(super) async fn cordon(
    State(desk): State<Desk>,
    Path(name): Path<String>,
    Body(new): Body<NewCordon>,
) -> Result<Json<HostView>, Refusal> {
    if new.reason.trim().is_empty() || new.reason.len() > MAX_REASON {
        let message = format!("field `reason`: say in 1 to {MAX_REASON} bytes why");
        return Err(Problem::new(Code::BadRequest, message).into());
    }
    desk.fleet.cordon(&name, Some(new.reason)).await?;
    Ok(Json(desk.host_view(&name).await?))
}

/// Ends a cordon.
#[utoipa::path(
    delete, path = "/v1/hosts/{name}/cordon", params(("name" = String, Path,)),
    responses((status = 200, body = HostView), (status = "4XX", body = Problem))
)]
pub(super) async fn uncordon(
    State(desk): State<Desk>,
    Path(name): Path<String>,
) -> Result<Json<HostView>, Refusal> {
    desk.fleet.cordon(&name, None).await?;
    Ok(Json(desk.host_view(&name).await?))
}
