//! `/metrics`: figures for Prometheus; on the API's socket, and by TCP where the daemon was told to.

use axum::Router;
use axum::extract::State;
use axum::http::header::CONTENT_TYPE;
use axum::response::IntoResponse;
use axum::routing::get;

use super::Desk;
use super::refusal::Refusal;
use crate::metrics::{Figures, text};
use crate::model::{HealthState, SwapState};

/// What Prometheus calls its text format.
const TEXT: &str = "text/plain; version=0.0.4";

/// Figures of this host and its fleet, in Prometheus' text format.
#[utoipa::path(
    get, path = "/metrics",
    responses((status = 200, description = "figures", content_type = "text/plain"))
)]
pub(super) async fn metrics(State(desk): State<Desk>) -> Result<impl IntoResponse, Refusal> {
    let store = &desk.host.store;
    let is_unwell = |swap: &crate::model::SwapRecord| {
        let health = swap.safeguards.health.as_ref();
        swap.state == SwapState::Moved
            && health.is_some_and(|health| health.state == HealthState::Unwell)
    };
    let vms = store.vms().await?;
    let last = store.last_swaps().await?;
    let mut figures = Figures {
        swaps: store.swap_figures().await?,
        guests: vms.iter().map(|vm| vm.state).collect(),
        unwell: last.iter().filter(|swap| is_unwell(swap)).count(),
        spans: desk.traces.counts(),
        ..Figures::default()
    };
    // A fleet that is away is itself a figure.
    if let Ok(look) = desk.fleet.look().await {
        let last = look
            .rollouts
            .last()
            .map(|rollout| rollout.record.id.clone());
        let told = look.rollouts.into_iter().map(|rollout| rollout.record);
        let told =
            told.filter(|record| !record.state.is_over() || Some(&record.id) == last.as_ref());
        figures.rollouts = told.collect();
        figures.hosts = desk.fleet.hosts().await.ok();
    }
    Ok(([(CONTENT_TYPE, TEXT)], text(&figures)))
}

/// What is served of this by TCP: figures, and nothing else.
pub fn metrics_router(desk: Desk) -> Router {
    Router::new()
        .route("/metrics", get(metrics))
        .with_state(desk)
}
