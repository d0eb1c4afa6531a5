//! Pages for people, served by the daemon: what runs here, how its pauses went, what is to come; the fleet and its
//! rollouts. By TCP, where the daemon was told to (`--web`), with figures for Prometheus beside them.
//!
//! | module | what it holds |
//! |---|---|
//! | [`door`] | who is let in |
//! | `shell` | what every page has: head, ways to the others, style |
//! | `guests`, `guest`, `events`, `host` | a page each, of this host |
//! | `fleet` | the fleet by update domain, and rollouts as they move |
//! | `acts` | what a person does to a rollout on its page |
//! | `picture` | distributions and timelines, as inline SVG |
//! | `live` | a page that changes while it is looked at |
//!
//! Every page is whole without scripts: forms are forms, and pictures have their figures in a table beside
//! them. With scripts it is fetched anew when something happens (`live.js`, the only one).

pub mod door;

mod acts;
mod events;
mod fleet;
mod guest;
mod guests;
mod host;
mod live;
mod picture;
mod shell;

use std::future::Future;
use std::net::SocketAddr;

use axum::Router;
use axum::http::{StatusCode, header};
use axum::middleware;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use maud::{Markup, html};
use tokio::net::TcpListener;

use crate::api::{self, Desk, gate};
use crate::auth::Role;
use crate::model::Problem;
use crate::store::StoreError;
use door::Key;

/// What a page is made of.
#[derive(Clone, Debug)]
pub(crate) struct Site {
    desk: Desk,
    /// What its forms hold.
    key: Key,
}

/// A page that can't be made: the reason, on a page.
struct Trouble(StatusCode, String);

impl From<StoreError> for Trouble {
    fn from(error: StoreError) -> Self {
        Self(StatusCode::SERVICE_UNAVAILABLE, error.to_string())
    }
}

impl From<Problem> for Trouble {
    fn from(problem: Problem) -> Self {
        let status = StatusCode::from_u16(problem.code.http_status());
        let status = status.unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        Self(status, problem.message)
    }
}

impl IntoResponse for Trouble {
    fn into_response(self) -> Response {
        let Self(status, message) = self;
        let main = html! {
            h1 { "This can't be shown" }
            p { (message) }
            p { a href="/" { "Guests" } }
        };
        (status, page("Trouble", "", main)).into_response()
    }
}

/// A whole page.
fn page(title: &str, here: &str, main: Markup) -> Response {
    let text = shell::page(title, here, &main).into_string();
    let headers = [
        (header::CONTENT_TYPE, "text/html; charset=utf-8"),
        (header::CACHE_CONTROL, "no-store"),
        (
            header::CONTENT_SECURITY_POLICY,
            "default-src 'none'; style-src 'self'; script-src 'self'; connect-src 'self'; \
             form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
        ),
        (header::REFERRER_POLICY, "no-referrer"),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
    ];
    (headers, text).into_response()
}

/// All pages, but for figures. Whoever serves them says who looks.
pub fn pages(desk: Desk, key: Key) -> Router {
    let site = Site { desk, key };
    Router::new()
        .route("/", get(guests::show))
        .route("/guests/{name}", get(guest::show))
        .route("/fleet", get(fleet::show))
        .route("/rollouts/{id}", get(fleet::show_rollout))
        .route("/rollouts/{id}/pause", post(acts::pause))
        .route("/rollouts/{id}/resume", post(acts::resume))
        .route("/events", get(events::show))
        .route("/events/{event}/approve", post(events::approve))
        .route("/events/{event}/cancel", post(events::cancel))
        .route("/host", get(host::show))
        .route("/live", get(live::stream))
        .with_state(site)
        .route("/style.css", get(shell::style))
        .route("/live.js", get(live::script))
}

/// Serves until `end`. Whoever doesn't know the key sees a page that says so; who knows it has that role.
pub async fn serve(
    listener: TcpListener,
    desk: Desk,
    key: Key,
    role: Role,
    end: impl Future<Output = ()> + Send + 'static,
) -> std::io::Result<()> {
    // Figures tell nothing of what guests are, and those who read them have no cookies.
    let figures = api::metrics_router(desk.clone());
    let store = desk.host.store.clone();
    let porter = door::Porter {
        key: key.clone(),
        role,
    };
    let router = pages(desk, key)
        .fallback(no_such_page)
        .layer(middleware::from_fn_with_state(store, gate::pass))
        .layer(middleware::from_fn_with_state(porter, door::check))
        .merge(figures);
    let service = router.into_make_service_with_connect_info::<SocketAddr>();
    axum::serve(listener, service)
        .with_graceful_shutdown(end)
        .await
}

async fn no_such_page() -> Trouble {
    Trouble(StatusCode::NOT_FOUND, "There is no such page.".into())
}
