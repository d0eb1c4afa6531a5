//! What a browser shows: the fleet by update domain, rollouts as they move, blackouts so far. By TCP, where
//! the daemon was told to (`--web`), together with figures for Prometheus.
//!
//! It only shows. Whoever can connect can look, and nobody can do anything: no route changes anything,
//! and there is nothing of a secret on any page. Without scripts a page is as complete, and made anew every
//! few seconds; with them it follows the daemon's events.

mod charts;
mod page;
mod shown;

use std::convert::Infallible;
use std::time::Duration;

use axum::Router;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::http::header::{CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE};
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use maud::Markup;
use tokio_stream::{Stream, StreamExt};

use crate::api::{self, Desk, Refusal};
use crate::execute::unix_ns;
use crate::fleet::explain;
use crate::fleet::record::RolloutId;
use crate::model::{Moment, Problem};

/// Pages are told to be made anew at most this often.
const BREATH: Duration = Duration::from_millis(250);
/// And at least this often: times on them go on.
const TICK: Duration = Duration::from_secs(2);
/// Nothing of anybody else's is loaded, and no page can be put into another.
const POLICY: &str = "default-src 'none'; style-src 'self'; script-src 'self'; connect-src 'self'; \
     img-src 'self' data:; frame-ancestors 'none'; base-uri 'none'; form-action 'none'";

/// All pages.
pub fn router(desk: Desk) -> Router {
    Router::new()
        .route("/", get(fleet))
        .route("/rollouts/{id}", get(rollout))
        .route("/live", get(live))
        .route("/style.css", get(style))
        .route("/live.js", get(script))
        .fallback(nothing)
        .with_state(desk.clone())
        .merge(api::metrics_router(desk))
}

fn now() -> Moment {
    Moment(unix_ns())
}

fn html(status: StatusCode, page: Markup) -> Response {
    let head = [
        (CONTENT_TYPE, "text/html; charset=utf-8"),
        (CACHE_CONTROL, "no-store"),
        (CONTENT_SECURITY_POLICY, POLICY),
    ];
    (status, head, page.into_string()).into_response()
}

/// A problem as a page.
fn sorry(problem: &Problem) -> Response {
    let status = StatusCode::from_u16(problem.code.http_status());
    let status = status.unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    html(status, page::problem(&problem.message))
}

async fn fleet(State(desk): State<Desk>) -> Response {
    match shown::fleet(&desk, now()).await {
        Ok(shown) => html(StatusCode::OK, page::fleet(&shown)),
        Err(problem) => sorry(&problem),
    }
}

async fn rollout(State(desk): State<Desk>, Path(id): Path<String>) -> Response {
    let id = RolloutId(id);
    let viewed = async {
        let look = desk.fleet.look().await?;
        let rollout = desk.fleet.rollout(&id).await?;
        let mut view = explain::view(&look, &rollout.record, now());
        view.driver = desk.fleet.driver().await?.map(|card| card.host);
        Ok((view, desk.fleet.history(&id).await?))
    };
    match viewed.await {
        Ok((view, history)) => html(StatusCode::OK, page::rollout(&view, &history, now())),
        Err(problem) => sorry(&problem),
    }
}

/// Says that there is something new to be looked at.
async fn live(
    State(desk): State<Desk>,
) -> Result<Sse<impl Stream<Item = Result<Event, Infallible>>>, Refusal> {
    let (tell, told) = tokio::sync::mpsc::channel(1);
    let mut changes = desk.fleet.shared.changes();
    let mut events = desk.host.events.subscribe();
    tokio::spawn(async move {
        loop {
            tokio::select! {
                () = tokio::time::sleep(TICK) => {}
                _ = changes.changed() => {}
                _ = events.recv() => {}
            }
            if tell.send(()).await.is_err() {
                return;
            }
            tokio::time::sleep(BREATH).await;
            events = events.resubscribe();
            changes.mark_unchanged();
        }
    });
    let told = tokio_stream::wrappers::ReceiverStream::new(told);
    let lines = told.map(|()| Ok(Event::default().data("look")));
    Ok(Sse::new(lines).keep_alive(KeepAlive::default()))
}

async fn style() -> impl IntoResponse {
    ([(CONTENT_TYPE, "text/css")], include_str!("style.css"))
}

async fn script() -> impl IntoResponse {
    let kind = [(CONTENT_TYPE, "text/javascript")];
    (kind, include_str!("live.js"))
}

async fn nothing() -> Response {
    html(
        StatusCode::NOT_FOUND,
        page::problem("There is no such page."),
    )
}
