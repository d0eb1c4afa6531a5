//! HTTP over a Unix socket, with its OpenAPI.
//!
//! Every change is recorded before it is answered; what is not recorded is not done. Errors are
//! `{"code": ..., "message": ...}` with the status that [`crate::model::Code`] names.

mod admission;
mod audit;
mod events;
pub(crate) mod gate;
mod host;
mod journal;
mod kernel;
mod metrics;
mod pauses;
mod refusal;
mod releases;
pub mod roles;
mod rollouts;
mod serve;
mod swap_all;
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
use crate::traces::Traces;

pub use audit::Known;
pub(crate) use host::{Exchange, check as check_host_swap, names};
pub use host::{NewHostSwap, NewKvm};
pub use kernel::{CarveOutRetry, CarveOutView, CarvedGuest, NewKernelCheck, NewKernelSwap};
pub use metrics::metrics_router;
pub use pauses::Cancel;
pub use refusal::Refusal;
pub use releases::{NewPin, NewRelease, Verification, add as add_release};
pub use rollouts::{Explained, NewAct, NewCordon};
pub use serve::{serve, serve_machines};
pub use swap_all::{AskedAll, LeftOut};
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
    /// Where spans are told.
    pub traces: Traces,
}

#[derive(OpenApi)]
#[openapi(
    info(
        title = "stillpointd",
        description = "Guests of one host: started, watched, and swapped under their feet. \
                       Over a Unix socket, whose callers the kernel names, and by TLS with certificates on \
                       both sides. `x-role` of an operation is the role that its callers need."
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
        .routes(routes!(swaps::list, swap_all::ask))
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
        .routes(routes!(audit::list))
        .routes(routes!(audit::whoami))
        .routes(routes!(events::stream))
        .routes(routes!(doctor))
}

/// The OpenAPI document, as it is committed.
pub fn openapi_json() -> Result<String, serde_json::Error> {
    let (_, document) = described();
    let mut text = serde_json::to_string_pretty(&document)?;
    text.push('\n');
    Ok(text)
}

/// The routes, and the document with the role that each needs.
fn described() -> (Router<Desk>, utoipa::openapi::OpenApi) {
    let (router, mut document) = routes().split_for_parts();
    for (path, item) in &mut document.paths.paths {
        let operations = [
            ("GET", &mut item.get),
            ("PUT", &mut item.put),
            ("POST", &mut item.post),
            ("DELETE", &mut item.delete),
        ];
        for (method, operation) in operations {
            let found = roles::ROLES
                .iter()
                .find(|(m, p, _)| (*m, *p) == (method, path.as_str()));
            if let (Some(operation), Some((_, _, role))) = (operation, found) {
                let extension = utoipa::openapi::extensions::Extensions::builder();
                let extension = extension.add("x-role", role.word()).build();
                operation.extensions = Some(extension);
            }
        }
    }
    (router, document)
}

/// All routes, each for those who have its role. Whoever serves them says who calls.
pub fn router(desk: Desk) -> Router {
    router_and(desk, Router::new())
}

/// The same, with further ones beside them.
pub fn router_and(desk: Desk, more: Router) -> Router {
    let (router, document) = described();
    let document = axum::Json(document);
    let store = desk.host.store.clone();
    router
        .route("/openapi.json", axum::routing::get(async move || document))
        .fallback(refusal::no_such_path)
        .method_not_allowed_fallback(refusal::no_such_method)
        .with_state(desk)
        .merge(more)
        .layer(axum::middleware::from_fn_with_state(store, gate::pass))
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
