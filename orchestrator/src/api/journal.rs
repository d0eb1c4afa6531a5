//! `/v1/journal`: what was asked, and what came of it.

use axum::Json;
use axum::extract::{Query, State};
use serde::Deserialize;

use super::Desk;
use super::refusal::Refusal;
use crate::model::{Code, JournalEntry, Problem, VmName};

/// Lines of an answer, where nobody says how many.
const LAST: u32 = 1000;

/// Which lines.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Which {
    /// Of this VM only, which may be forgotten.
    vm: Option<String>,
    /// So many at most, the newest.
    last: Option<u32>,
}

/// The journal, oldest line first. It is written in one act with what it tells of.
#[utoipa::path(
    get, path = "/v1/journal",
    params(
        ("vm" = Option<String>, Query, description = "only lines of this VM, which may be forgotten"),
        ("last" = Option<u32>, Query, description = "so many lines at most, the newest; 1000 when absent")
    ),
    responses((status = 200, body = [JournalEntry]), (status = "4XX", body = Problem))
)]
pub(super) async fn list(
    State(desk): State<Desk>,
    Query(which): Query<Which>,
) -> Result<Json<Vec<JournalEntry>>, Refusal> {
    let vm = which.vm.map(VmName::try_from).transpose()?;
    let last = which.last.unwrap_or(LAST);
    if last == 0 {
        let message = "field `last`: 0 lines are none; ask for 1 or more";
        return Err(Problem::new(Code::BadRequest, message).into());
    }
    Ok(Json(desk.host.store.journal(vm.as_ref(), last).await?))
}
