//! Serves the API: on a Unix socket, whose callers the kernel names, and to other machines, whose callers name
//! themselves by certificates.

use std::future::Future;

use axum::Router;
use axum::extract::connect_info::Connected;
use axum::extract::{ConnectInfo, Request, State};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::serve::IncomingStream;
use tokio::net::UnixListener;

use super::Refusal;
use crate::auth::peer::{self, Peer, Rules};
use crate::auth::tls::{By, Door};
use crate::model::{Code, Problem};

/// The process that calls; `None` if the kernel does not say.
#[derive(Clone, Debug)]
struct Local(Option<Peer>);

impl Connected<IncomingStream<'_, UnixListener>> for Local {
    fn connect_info(stream: IncomingStream<'_, UnixListener>) -> Self {
        Self(peer::of(stream.io()).ok())
    }
}

/// Serves on the Unix socket until `end`.
pub async fn serve(
    listener: UnixListener,
    router: Router,
    rules: Rules,
    end: impl Future<Output = ()> + Send + 'static,
) -> std::io::Result<()> {
    let router = router.layer(middleware::from_fn_with_state(rules, name_peer));
    let service = router.into_make_service_with_connect_info::<Local>();
    axum::serve(listener, service)
        .with_graceful_shutdown(end)
        .await
}

async fn name_peer(
    State(rules): State<Rules>,
    ConnectInfo(Local(peer)): ConnectInfo<Local>,
    mut request: Request,
    next: Next,
) -> Response {
    let Some(peer) = peer else {
        let message = "the kernel does not say who calls";
        return Refusal(Problem::new(Code::Forbidden, message)).into_response();
    };
    let own = rustix::process::geteuid().as_raw();
    request.extensions_mut().insert(rules.caller(&peer, own));
    next.run(request).await
}

/// Serves to other machines, until the daemon ends.
pub async fn serve_machines(door: Door, router: Router) -> std::io::Result<()> {
    let router = router.layer(middleware::from_fn(name_certificate));
    let service = router.into_make_service_with_connect_info::<By>();
    axum::serve(door, service).await
}

async fn name_certificate(
    ConnectInfo(By(caller)): ConnectInfo<By>,
    mut request: Request,
    next: Next,
) -> Response {
    request.extensions_mut().insert(caller);
    next.run(request).await
}
