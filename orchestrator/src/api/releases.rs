//! `/v1/releases` and `/v1/pins`.

use std::path::{Path as FilePath, PathBuf};

use axum::Json;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::Desk;
use super::refusal::{Body, Refusal};
use crate::agent::binaries::Addition;
use crate::agent::trust::Papers;
use crate::execute::{Host, unix_ns};
use crate::model::{Code, Pin, Problem, Release, Signer, VMM, validate_minimum};

/// A release to be added.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NewRelease {
    /// The binary; it is copied.
    #[schema(value_type = String)]
    pub path: PathBuf,
    /// Version to add it under; what it says itself when absent. Not other than what is signed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub version: Option<String>,
    /// Arguments appended to its command line. Not other than what is signed.
    #[serde(default)]
    pub args: Vec<String>,
    /// Its signed manifest; `PATH.json` when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub manifest: Option<PathBuf>,
    /// The manifest's signature; `MANIFEST.minisig` when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub signature: Option<PathBuf>,
    /// Add it without a signature. It is shown as such ever after.
    #[serde(default)]
    pub unsigned: bool,
}

/// What verifying a release showed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Verification {
    /// Its version.
    pub version: String,
    /// Who signed it; absent for one that was added unsigned.
    pub signed_by: Option<Signer>,
    /// Whether it may be run: its signature counts, and its binary is the one that was added.
    pub good: bool,
    /// Why not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub problem: Option<Problem>,
}

/// The least version that may be run.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NewPin {
    /// That version.
    pub minimum: String,
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
    let given = [
        Some(&new.path),
        new.manifest.as_ref(),
        new.signature.as_ref(),
    ];
    let names = ["path", "manifest", "signature"];
    for (name, path) in names.iter().zip(given) {
        if path.is_some_and(|path| !path.is_absolute()) {
            let message = format!("field `{name}`: is not an absolute path");
            return Err(Problem::new(Code::BadRequest, message).into());
        }
    }
    if new.unsigned && (new.manifest.is_some() || new.signature.is_some()) {
        let message = "field `unsigned`: a manifest or a signature was given as well; leave out one \
                       or the other";
        return Err(Problem::new(Code::BadRequest, message).into());
    }
    let added = add(&desk.host, new).await?;
    // Whoever starts a rollout anywhere in the fleet after this counts on it.
    desk.publisher.catch_up().await;
    Ok((StatusCode::CREATED, Json(added)))
}

/// Removes a release that runs no guest.
#[utoipa::path(
    delete, path = "/v1/releases/{version}", params(("version" = String, Path,)),
    responses((status = 204), (status = "4XX", body = Problem))
)]
pub(super) async fn remove(
    State(desk): State<Desk>,
    Path(version): Path<String>,
) -> Result<StatusCode, Refusal> {
    desk.release(&version).await?;
    let users = desk.host.store.remove_release(&version).await?;
    if !users.is_empty() {
        let message = format!(
            "release {version} was not removed: it runs, or is about to run, {}; swap or stop \
             what needs it first",
            users.join(", ")
        );
        return Err(Problem::new(Code::ReleaseInUse, message).into());
    }
    // Not recorded any more: what is left on a disk that fails here is replaced at the next addition.
    desk.host.binaries.remove(&version)?;
    Ok(StatusCode::NO_CONTENT)
}

/// Verifies signature and digest of a release, as before each start.
#[utoipa::path(
    get, path = "/v1/releases/{version}/verification", params(("version" = String, Path,)),
    responses((status = 200, body = Verification), (status = "4XX", body = Problem))
)]
pub(super) async fn verify(
    State(desk): State<Desk>,
    Path(version): Path<String>,
) -> Result<Json<Verification>, Refusal> {
    let release = desk.release(&version).await?;
    let problem = desk.verified(&release).await.err().map(|refusal| refusal.0);
    Ok(Json(Verification {
        version,
        signed_by: release.signed_by,
        good: problem.is_none(),
        problem,
    }))
}

/// The least versions that may be run.
#[utoipa::path(get, path = "/v1/pins", responses((status = 200, body = [Pin])))]
pub(super) async fn pins(State(desk): State<Desk>) -> Result<Json<Vec<Pin>>, Refusal> {
    Ok(Json(desk.host.store.pins().await?))
}

/// Sets the least version of a component that may be run.
#[utoipa::path(
    put, path = "/v1/pins/{component}", params(("component" = String, Path,)),
    request_body = NewPin,
    responses((status = 200, body = Pin), (status = "4XX", body = Problem))
)]
pub(super) async fn pin(
    State(desk): State<Desk>,
    Path(component): Path<String>,
    Body(new): Body<NewPin>,
) -> Result<Json<Pin>, Refusal> {
    must_be_known(&component)?;
    validate_minimum(&new.minimum)?;
    let pin = Pin {
        component,
        minimum: new.minimum,
        pinned_at_unix_ns: unix_ns(),
    };
    desk.host.store.set_pin(&pin).await?;
    Ok(Json(pin))
}

/// Takes the pin of a component away.
#[utoipa::path(
    delete, path = "/v1/pins/{component}", params(("component" = String, Path,)),
    responses((status = 204), (status = "4XX", body = Problem))
)]
pub(super) async fn unpin(
    State(desk): State<Desk>,
    Path(component): Path<String>,
) -> Result<StatusCode, Refusal> {
    must_be_known(&component)?;
    desk.host.store.remove_pin(&component).await?;
    Ok(StatusCode::NO_CONTENT)
}

fn must_be_known(component: &str) -> Result<(), Problem> {
    if component == VMM {
        return Ok(());
    }
    let message = format!("there is no component `{component}`, only `{VMM}`");
    Err(Problem::new(Code::NotFound, message))
}

impl Desk {
    /// The release of that version.
    pub(super) async fn release(&self, version: &str) -> Result<Release, Refusal> {
        let found = self.host.store.release(version).await?;
        found.ok_or_else(|| {
            let message = format!(
                "there is no release `{version}` of the VMM in the store; `stillpoint release \
                 ls` shows those there are, `stillpoint release add PATH` adds one"
            );
            Problem::new(Code::NotFound, message).into()
        })
    }

    /// That release may be run: it is what was added, and signed by somebody who counts.
    pub(super) async fn verified(&self, release: &Release) -> Result<(), Refusal> {
        let (binaries, release) = (self.host.binaries.clone(), release.clone());
        let verified = tokio::task::spawn_blocking(move || binaries.verified(&release)).await;
        let verified = verified.map_err(|e| Problem::new(Code::Failed, e.to_string()))?;
        Ok(verified.map(drop)?)
    }

    /// Whether the pin lets a version be run.
    pub(super) async fn pin_allows(&self, version: &str) -> Result<(), Refusal> {
        let pins = self.host.store.pins().await?;
        let pin = pins.iter().find(|pin| pin.component == VMM);
        Ok(pin.map_or(Ok(()), |pin| pin.allows(version))?)
    }
}

/// Copies a binary into the store and records it.
pub async fn add(host: &Host, new: NewRelease) -> Result<Release, Problem> {
    let papers = (!new.unsigned).then(|| papers_of(&new));
    let addition = Addition {
        path: new.path,
        version: new.version,
        args: new.args,
        papers,
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

/// Where the papers lie.
fn papers_of(new: &NewRelease) -> Papers {
    let manifest = new.manifest.clone();
    let manifest = manifest.unwrap_or_else(|| beside(&new.path, ".json"));
    let signature = new.signature.clone();
    Papers {
        signature: signature.unwrap_or_else(|| beside(&manifest, ".minisig")),
        manifest,
    }
}

fn beside(path: &FilePath, ending: &str) -> PathBuf {
    let mut path = path.to_owned().into_os_string();
    path.push(ending);
    path.into()
}

async fn keep(host: &Host, imported: &Release) -> Result<Release, Problem> {
    let (new, version) = (&imported.manifest, &imported.manifest.version);
    if let Some(there) = host.store.release(version).await? {
        let same = there.manifest.sha256 == new.sha256 && there.manifest.args == new.args;
        let message = if !same {
            format!(
                "release {version} is there already, with sha256 {} and arguments {:?}; this one \
                 has {} and {:?}. A release never changes: give this one another version (`--as`)",
                there.manifest.sha256, there.manifest.args, new.sha256, new.args
            )
        } else if there.signed_by.is_none() && imported.signed_by.is_some() {
            format!(
                "release {version} is there already, unsigned; remove it first (`stillpoint release \
                 rm {version}`), then add it with its signature"
            )
        } else {
            return Ok(there);
        };
        return Err(Problem::new(Code::ReleaseExists, message));
    }
    host.binaries.keep(imported)?;
    host.store.add_release(imported).await?;
    Ok(imported.clone())
}
