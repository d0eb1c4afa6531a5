//! A page that changes while it is looked at: its script is told that something happened, and fetches it anew.

use std::convert::Infallible;
use std::time::Duration;

use axum::extract::State;
use axum::http::header;
use axum::response::IntoResponse;
use axum::response::sse::{self, KeepAlive, Sse};
use tokio_stream::wrappers::ReceiverStream;
use tokio_stream::{Stream, StreamExt};

use super::Site;

/// Pages are told to be made anew at most this often.
const BREATH: Duration = Duration::from_millis(250);
/// And at least this often: times on them go on.
const TICK: Duration = Duration::from_secs(5);

/// That something happened, here or in the fleet; what it was is on the page.
pub(super) async fn stream(
    State(site): State<Site>,
) -> Sse<impl Stream<Item = Result<sse::Event, Infallible>>> {
    let desk = site.desk;
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
    let lines = ReceiverStream::new(told).map(|()| Ok(sse::Event::default().data("new")));
    Sse::new(lines).keep_alive(KeepAlive::new().interval(Duration::from_secs(15)))
}

/// The script.
pub(super) async fn script() -> impl IntoResponse {
    let headers = [(header::CONTENT_TYPE, "text/javascript; charset=utf-8")];
    (headers, include_str!("live.js"))
}
