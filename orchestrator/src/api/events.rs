//! `/v1/events`: a stream of server-sent events.

use std::convert::Infallible;
use std::time::Duration;

use axum::extract::State;
use axum::response::sse::{self, KeepAlive, Sse};
use tokio_stream::wrappers::BroadcastStream;
use tokio_stream::{Stream, StreamExt};

use super::Desk;

/// Everything that happens from now on, as server-sent events; the data of each is an `Event`.
#[utoipa::path(
    get, path = "/v1/events",
    responses((status = 200, description = "a stream", content_type = "text/event-stream"))
)]
pub(super) async fn stream(
    State(desk): State<Desk>,
) -> Sse<impl Stream<Item = Result<sse::Event, Infallible>>> {
    let events = BroadcastStream::new(desk.host.events.subscribe());
    // A listener that is too slow misses events; what counts is in the store.
    let lines = events.filter_map(|event| {
        let line = sse::Event::default().json_data(event.ok()?).ok()?;
        Some(Ok(line))
    });
    Sse::new(lines).keep_alive(KeepAlive::new().interval(Duration::from_secs(15)))
}
