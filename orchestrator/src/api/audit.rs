//! `/v1/audit`: who asked for what, and what came of it. `/v1/whoami`: who the daemon takes a caller for.

use axum::extract::{Query, State};
use axum::{Extension, Json};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::Desk;
use super::refusal::Refusal;
use crate::auth::{Caller, Role};
use crate::model::{AuditEntry, Code, Problem};

/// Lines of an answer, where nobody says how many.
const LAST: u32 = 1000;

/// Which lines.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Which {
    /// Of this caller only.
    who: Option<String>,
    /// So many at most, the newest.
    last: Option<u32>,
}

/// The audit log, oldest line first. A line is on disk before what it tells of is begun; the last 10,000 are kept, and
/// of requests that were denied the last 1,000.
#[utoipa::path(
    get, path = "/v1/audit",
    params(
        ("who" = Option<String>, Query, description = "only lines of this caller"),
        ("last" = Option<u32>, Query, description = "so many lines at most, the newest; 1000 when absent")
    ),
    responses((status = 200, body = [AuditEntry]), (status = "4XX", body = Problem))
)]
pub(super) async fn list(
    State(desk): State<Desk>,
    Query(which): Query<Which>,
) -> Result<Json<Vec<AuditEntry>>, Refusal> {
    let last = which.last.unwrap_or(LAST);
    if last == 0 {
        let message = "field `last`: 0 lines are none; ask for 1 or more";
        return Err(Problem::new(Code::BadRequest, message).into());
    }
    Ok(Json(desk.host.store.audit(which.who, last).await?))
}

/// Who a caller is taken for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Known {
    /// Who: `uid N`, or the name of a certificate.
    pub who: String,
    /// From where.
    pub from: String,
    /// What they may do.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub role: Option<Role>,
}

/// Who the daemon takes the caller for.
#[utoipa::path(get, path = "/v1/whoami", responses((status = 200, body = Known)))]
pub(super) async fn whoami(Extension(caller): Extension<Caller>) -> Json<Known> {
    Json(Known {
        who: caller.who,
        from: caller.from,
        role: caller.role,
    })
}
