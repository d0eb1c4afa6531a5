//! `POST /v1/swaps`: every guest of this host.

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::Desk;
use super::refusal::{Body, Refusal};
use super::swaps::{NewSwap, check_request};
use crate::model::{Problem, Release, SwapRecord, VmName, VmRecord};

/// What became of the wish to swap every guest of a host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct AskedAll {
    /// The swaps that were recorded; as many at once are done as the host has cores for.
    pub asked: Vec<SwapRecord>,
    /// Guests that the release runs already.
    pub already: Vec<VmName>,
    /// Guests that can't be swapped as they are now.
    pub left_out: Vec<LeftOut>,
}

/// A guest that is left where it is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct LeftOut {
    /// Its name.
    pub vm: VmName,
    /// Why it is left out.
    pub problem: Problem,
}

/// Asks for a swap of every guest that has a process. A release that may not be run here refuses them all; what
/// is wrong with one guest leaves that one out. They go one after another, as many at once as the host has
/// cores for.
#[utoipa::path(
    post, path = "/v1/swaps", request_body = NewSwap,
    responses(
        (status = 202, body = AskedAll), (status = "4XX", body = Problem),
        (status = 507, description = "no room to record all of them", body = Problem)
    )
)]
pub(super) async fn ask(
    State(desk): State<Desk>,
    Body(new): Body<NewSwap>,
) -> Result<(StatusCode, Json<AskedAll>), Refusal> {
    check_request(&new)?;
    let to = desk.may_be_run(&new).await?;
    let mut all = AskedAll {
        asked: Vec::new(),
        already: Vec::new(),
        left_out: Vec::new(),
    };
    let vms = desk.host.store.vms().await?;
    for vm in vms.into_iter().filter(|vm| vm.state.is_active()) {
        let name = vm.name.clone();
        if vm.release == new.to {
            all.already.push(name);
            continue;
        }
        match one(&desk, vm, &to, new.clone()).await {
            Ok(swap) => all.asked.push(swap),
            Err(Refusal(problem)) => all.left_out.push(LeftOut { vm: name, problem }),
        }
    }
    Ok((StatusCode::ACCEPTED, Json(all)))
}

async fn one(desk: &Desk, vm: VmRecord, to: &Release, new: NewSwap) -> Result<SwapRecord, Refusal> {
    desk.may_be_swapped(&vm, &new).await?;
    let swap = desk.swap_of(vm, to, new).await?;
    Ok(desk.add_swap(swap).await?)
}
