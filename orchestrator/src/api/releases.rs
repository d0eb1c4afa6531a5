//! `/v1/releases`.

use std::path::PathBuf;

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::Desk;
use super::refusal::{Body, Refusal};
use crate::agent::binaries::Addition;
use crate::execute::{Host, unix_ns};
use crate::model::{Code, Problem, Release};

/// A release to be added.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NewRelease {
    /// The binary; it is copied.
    #[schema(value_type = String)]
    pub path: PathBuf,
    /// Version to add it under; what it says itself when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub version: Option<String>,
    /// Arguments appended to its command line.
    #[serde(default)]
    pub args: Vec<String>,
}

/// All releases, oldest first.
#[utoipa::path(get, path = "/v1/releases", responses((status = 200, body = [Release])))]
pub(super) async fn list(State(desk): State<Desk>) -> Result<Json<Vec<Release>>, Refusal> {
    Ok(Json(desk.host.store.releases().await?))
}

/// Adds a release. Adding the same binary with the same arguments again changes nothing.
#[utoipa::path(
    post, path = "/v1/releases", request_body = NewRelease,
    responses((status = 201, body = Release), (status = "4XX", body = Problem))
)]
pub(super) async fn post(
    State(desk): State<Desk>,
    Body(new): Body<NewRelease>,
) -> Result<(StatusCode, Json<Release>), Refusal> {
    if !new.path.is_absolute() {
        let message = "field `path`: is not an absolute path";
        return Err(Problem::new(Code::BadRequest, message).into());
    }
    Ok((StatusCode::CREATED, Json(add(&desk.host, new).await?)))
}

/// Copies a binary into the store and records it.
pub async fn add(host: &Host, new: NewRelease) -> Result<Release, Problem> {
    let addition = Addition {
        path: new.path,
        version: new.version,
        args: new.args,
        at_unix_ns: unix_ns(),
    };
    let binaries = host.binaries.clone();
    let imported = tokio::task::spawn_blocking(move || binaries.import(&addition))
        .await
        .map_err(|e| Problem::new(Code::Failed, e.to_string()))??;
    let kept = keep(host, &imported).await;
    if !matches!(&kept, Ok(release) if *release == imported) {
        host.binaries.discard(&imported);
    }
    kept
}

async fn keep(host: &Host, imported: &Release) -> Result<Release, Problem> {
    let (new, version) = (&imported.manifest, &imported.manifest.version);
    if let Some(there) = host.store.release(version).await? {
        if there.manifest.sha256 == new.sha256 && there.manifest.args == new.args {
            return Ok(there);
        }
        let message = format!(
            "release {version} is there already, with sha256 {} and arguments {:?}; this one has \
             {} and {:?}. A release never changes: give this one another version (`--as`)",
            there.manifest.sha256, there.manifest.args, new.sha256, new.args
        );
        return Err(Problem::new(Code::ReleaseExists, message));
    }
    host.binaries.keep(imported)?;
    host.store.add_release(imported).await?;
    Ok(imported.clone())
}
