//! A page that changes while it is looked at: its script is told that something happened, and fetches it anew.

use std::convert::Infallible;
use std::time::Duration;

use axum::extract::State;
use axum::http::header;
use axum::response::IntoResponse;
use axum::response::sse::{self, KeepAlive, Sse};
use tokio_stream::wrappers::BroadcastStream;
use tokio_stream::{Stream, StreamExt};

use super::Site;

/// That something happened; what it was is on the page.
pub(super) async fn stream(
    State(site): State<Site>,
) -> Sse<impl Stream<Item = Result<sse::Event, Infallible>>> {
    let events = BroadcastStream::new(site.desk.host.events.subscribe());
    // One who missed some knows no less: something happened.
    let lines = events.map(|_| Ok(sse::Event::default().data("new")));
    Sse::new(lines).keep_alive(KeepAlive::new().interval(Duration::from_secs(15)))
}

/// The script.
pub(super) async fn script() -> impl IntoResponse {
    let headers = [(header::CONTENT_TYPE, "text/javascript; charset=utf-8")];
    (headers, include_str!("live.js"))
}
