//! HTTP over a Unix socket, with its OpenAPI.
//!
//! Every change is recorded before it is answered; what is not recorded is not done. Errors are
//! `{"code": ..., "message": ...}` with the status that [`crate::model::Code`] names.

mod admission;
mod events;
mod host;
mod journal;
mod kernel;
mod metrics;
mod pauses;
mod refusal;
mod releases;
mod rollouts;
mod serve;
mod swaps;
mod vms;

use axum::Router;
use utoipa::OpenApi;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::execute::Host;
use crate::fleet::Fleet;
use crate::fleet::publish::Publisher;
use crate::model::Event;
use crate::reconcile::Waker;

pub use host::{NewHostSwap, NewKvm};
pub use kernel::{CarveOutView, CarvedGuest, NewKernelSwap};
pub use metrics::metrics_router;
pub use pauses::Cancel;
pub use refusal::Refusal;
pub use releases::{NewPin, NewRelease, Verification, add as add_release};
pub use rollouts::{Explained, NewAct, NewCordon};
pub use serve::serve;
pub use swaps::{NewCheck, NewSwap};
pub use vms::{NewVm, VmView};

/// What the handlers work with.
#[derive(Clone, Debug)]
pub struct Desk {
    /// This host.
    pub host: Host,
    /// Wakes the task of a VM.
    pub waker: Waker,
    /// This host's place in its fleet.
    pub fleet: Fleet,
    /// Tells the fleet of this host.
    pub publisher: Publisher,
}

#[derive(OpenApi)]
#[openapi(
    info(
        title = "stillpointd",
        description = "Guests of one host: started, watched, and swapped under their feet. \
                       Over a Unix socket; callers are the daemon's own uid, or root."
    ),
    // Events come as a stream, which OpenAPI can't say; their schema is here all the same.
    components(schemas(Event))
)]
struct Document;

fn routes() -> OpenApiRouter<Desk> {
    OpenApiRouter::with_openapi(Document::openapi())
        .routes(routes!(vms::list))
        .routes(routes!(vms::put, vms::show, vms::remove))
        .routes(routes!(vms::stop))
        .routes(routes!(swaps::of_vm, swaps::ask))
        .routes(routes!(swaps::check))
        .routes(routes!(swaps::list))
        .routes(routes!(swaps::show))
        .routes(routes!(host::list, host::ask))
        .routes(routes!(host::show))
        .routes(routes!(host::release))
        .routes(routes!(host::check_kvm))
        .routes(routes!(kernel::ask))
        .routes(routes!(kernel::check))
        .routes(routes!(kernel::show, kernel::forget_all))
        .routes(routes!(kernel::forget))
        .routes(routes!(kernel::retry))
        .routes(routes!(pauses::list))
        .routes(routes!(pauses::approve))
        .routes(routes!(pauses::cancel))
        .routes(routes!(releases::list, releases::post))
        .routes(routes!(releases::remove))
        .routes(routes!(releases::verify))
        .routes(routes!(releases::pins))
        .routes(routes!(releases::pin, releases::unpin))
        .routes(routes!(rollouts::list, rollouts::start))
        .routes(routes!(rollouts::show))
        .routes(routes!(rollouts::act))
        .routes(routes!(rollouts::history))
        .routes(routes!(rollouts::explain))
        .routes(routes!(rollouts::hosts))
        .routes(routes!(rollouts::forget))
        .routes(routes!(rollouts::cordon, rollouts::uncordon))
        .routes(routes!(metrics::metrics))
        .routes(routes!(journal::list))
        .routes(routes!(events::stream))
        .routes(routes!(doctor))
}

/// The OpenAPI document, as it is committed.
pub fn openapi_json() -> Result<String, serde_json::Error> {
    let (_, document) = routes().split_for_parts();
    let mut text = serde_json::to_string_pretty(&document)?;
    text.push('\n');
    Ok(text)
}

/// All routes.
pub fn router(desk: Desk) -> Router {
    let (router, document) = routes().split_for_parts();
    let document = axum::Json(document);
    router
        .route("/openapi.json", axum::routing::get(async move || document))
        .fallback(refusal::no_such_path)
        .method_not_allowed_fallback(refusal::no_such_method)
        .with_state(desk)
}

/// What this host can and can't do.
#[utoipa::path(get, path = "/v1/doctor", responses((status = 200, body = [crate::doctor::Check])))]
async fn doctor(
    axum::extract::State(desk): axum::extract::State<Desk>,
) -> axum::Json<Vec<crate::doctor::Check>> {
    axum::Json(checks(&desk).await)
}

/// What this host can and can't do, as its daemon sees it.
pub(crate) async fn checks(desk: &Desk) -> Vec<crate::doctor::Check> {
    let host = &desk.host;
    let newest = host
        .store
        .releases()
        .await
        .ok()
        .and_then(|mut all| all.pop());
    let binary = newest.map(|release| host.binaries.path(&release.manifest.version));
    let store = host
        .store
        .releases()
        .await
        .map(drop)
        .map_err(|e| e.to_string());
    crate::doctor::of_daemon(binary, store).await
}
