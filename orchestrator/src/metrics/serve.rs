//! Where Prometheus asks. Nothing can be changed here, and nothing but figures is told: so it may listen
//! on an address, which the API never does.

use std::future::Future;

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use tokio::net::TcpListener;

use super::scrape;
use crate::execute::Host;

/// Of OpenMetrics 1.0.
const TEXT: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Serves until `end`.
pub async fn serve(
    listener: TcpListener,
    host: Host,
    end: impl Future<Output = ()> + Send + 'static,
) -> std::io::Result<()> {
    let router = Router::new()
        .route("/metrics", get(metrics))
        .with_state(host);
    axum::serve(listener, router)
        .with_graceful_shutdown(end)
        .await
}

async fn metrics(State(host): State<Host>) -> Response {
    match scrape(&host.store, &host.notices).await {
        Ok(text) => ([(header::CONTENT_TYPE, TEXT)], text).into_response(),
        Err(error) => {
            let text = format!("the store can't be read: {error}\n");
            (StatusCode::SERVICE_UNAVAILABLE, text).into_response()
        }
    }
}
