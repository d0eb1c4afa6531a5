//! Serves the API on a Unix socket, to the daemon's own uid and to root.

use std::future::Future;

use axum::Router;
use axum::extract::connect_info::Connected;
use axum::extract::{ConnectInfo, Request};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::serve::IncomingStream;
use tokio::net::UnixListener;

use super::Refusal;
use crate::model::{Code, Problem};

/// Who calls; `None` if the kernel does not say.
#[derive(Clone, Copy, Debug)]
struct Caller(Option<u32>);

impl Connected<IncomingStream<'_, UnixListener>> for Caller {
    fn connect_info(stream: IncomingStream<'_, UnixListener>) -> Self {
        Self(stream.io().peer_cred().ok().map(|peer| peer.uid()))
    }
}

/// Serves until `end`. The socket's directory and mode keep others out already; the caller's uid
/// is checked all the same.
pub async fn serve(
    listener: UnixListener,
    router: Router,
    end: impl Future<Output = ()> + Send + 'static,
) -> std::io::Result<()> {
    let router = router.layer(middleware::from_fn(check_caller));
    let service = router.into_make_service_with_connect_info::<Caller>();
    axum::serve(listener, service)
        .with_graceful_shutdown(end)
        .await
}

async fn check_caller(
    ConnectInfo(Caller(uid)): ConnectInfo<Caller>,
    request: Request,
    next: Next,
) -> Response {
    let own = rustix::process::geteuid().as_raw();
    if uid.is_some_and(|uid| uid == 0 || uid == own) {
        return next.run(request).await;
    }
    let message = format!("this daemon serves uid {own} and root only");
    Refusal(Problem::new(Code::Forbidden, message)).into_response()
}
