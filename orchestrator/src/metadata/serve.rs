//! HTTP for one guest: what it asks on its own wire is answered here, within limits.
//!
//! A guest may send anything, as fast as it can. What that costs the host is bounded: so many
//! connections, so many bytes of a request, so long for each, and so many new connections a second.
//! Whatever it does beyond is its own loss; other guests have connections and a rate of their own.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::http::request::Parts;
use axum::http::{HeaderValue, Method, Request, Response, StatusCode, header};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::{Bytes, Incoming};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::{Mutex, Semaphore};

use super::answer::{self, Answer};
use super::asked::{self, Asked};
use super::document::Version;
use super::instance::Facts;
use super::notices::Notices;
use super::rate::Rate;
use crate::model::{Approver, EventId};

/// Connections of one VM.
pub const CONNECTIONS: usize = 16;
/// The longest head of a request, with its headers.
const HEAD: usize = 16 << 10;
/// The longest body.
const BODY: usize = 16 << 10;
/// How long a request may take to arrive; an idle connection is closed after it.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long a connection may be, a long poll within it.
const LIFETIME: Duration = Duration::from_secs(600);
/// Between two connections of a VM that opens many.
const PACE: Duration = Duration::from_millis(20);

/// The service of one VM.
#[derive(Debug)]
pub struct Service {
    facts: Facts,
    notices: Notices,
    rate: Mutex<Rate>,
    connections: Arc<Semaphore>,
}

impl Service {
    /// For this VM.
    pub fn new(facts: Facts, notices: Notices) -> Arc<Self> {
        Arc::new(Self {
            facts,
            notices,
            rate: Mutex::default(),
            connections: Arc::new(Semaphore::new(CONNECTIONS)),
        })
    }

    /// Serves whoever connects to `listener`: by the wire, that is the VM.
    pub async fn listen_tcp(self: Arc<Self>, listener: TcpListener) {
        loop {
            match listener.accept().await {
                Ok((stream, _)) => self.take(stream).await,
                Err(error) => self.stumble(&error).await,
            }
        }
    }

    /// As [`Service::listen_tcp`], for a VM's vsock.
    pub async fn listen_unix(self: Arc<Self>, listener: UnixListener) {
        loop {
            match listener.accept().await {
                Ok((stream, _)) => self.take(stream).await,
                Err(error) => self.stumble(&error).await,
            }
        }
    }

    async fn stumble(&self, error: &std::io::Error) {
        // Of the connection, or of a host short of files: neither is for ever.
        tracing::debug!(vm = %self.facts.name, "accepting: {error}");
        tokio::time::sleep(PACE).await;
    }

    /// Serves a connection, unless there are too many.
    async fn take<S: AsyncRead + AsyncWrite + Unpin + Send + 'static>(self: &Arc<Self>, stream: S) {
        let Ok(place) = self.connections.clone().try_acquire_owned() else {
            drop(stream);
            tokio::time::sleep(PACE).await;
            return;
        };
        let crowded = self.connections.available_permits() < CONNECTIONS / 2;
        let service = self.clone();
        tokio::spawn(async move {
            service.connection(stream).await;
            drop(place);
        });
        if crowded {
            tokio::time::sleep(PACE).await;
        }
    }

    async fn connection<S: AsyncRead + AsyncWrite + Unpin + Send>(self: Arc<Self>, stream: S) {
        let answer = service_fn(|request| self.clone().answer(request));
        let connection = http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(PATIENCE)
            .max_buf_size(HEAD)
            .max_headers(64)
            .serve_connection(TokioIo::new(stream), answer);
        // An error is the guest's: it hung up, or spoke no HTTP.
        if let Ok(Err(error)) = tokio::time::timeout(LIFETIME, connection).await {
            tracing::debug!(vm = %self.facts.name, "a connection: {error}");
        }
    }

    async fn answer(
        self: Arc<Self>,
        request: Request<Incoming>,
    ) -> Result<Response<Full<Bytes>>, Infallible> {
        if !self.rate.lock().await.allows(Instant::now()) {
            return Ok(response(answer::too_many(), true));
        }
        let (parts, body) = request.into_parts();
        let Some(body) = read(&parts, body).await else {
            let answer = Answer::error(400, "Bad request. The body is too long, or too slow");
            return Ok(response(answer, true));
        };
        match asked::judge(&parts, &body) {
            Err(why) => Ok(response(answer::refused(&why), false)),
            Ok(_) if !self.rate.lock().await.answers(Instant::now()) => {
                Ok(response(answer::too_many(), true))
            }
            Ok(asked) => Ok(response(self.reply(asked).await, false)),
        }
    }

    /// The answer to what is asked for.
    async fn reply(&self, asked: Asked) -> Answer {
        let facts = &self.facts;
        match asked {
            Asked::Versions => answer::versions(),
            Asked::Instance {
                path,
                version,
                format,
            } => answer::instance(facts, &path, version, format),
            Asked::Pauses => {
                self.notices
                    .read(|board| answer::pauses(board, facts))
                    .await
            }
            Asked::Events {
                version,
                if_none_match,
                wait,
            } => {
                self.notices.listen(facts).await;
                if let Some((last, longest)) = wait {
                    self.wait_for_other(last, longest).await;
                }
                self.events(version, &if_none_match).await
            }
            Asked::Approve(events) => {
                self.notices.listen(facts).await;
                self.approve(events).await
            }
        }
    }

    async fn events(&self, version: Version, has: &[String]) -> Answer {
        let facts = &self.facts;
        let answer = self
            .notices
            .read(|board| answer::events(board, facts, version, has))
            .await;
        self.notices.answered(&facts.name);
        answer
    }

    async fn approve(&self, events: Vec<EventId>) -> Answer {
        let facts = &self.facts;
        let by = Approver::Vm(facts.name.clone());
        let approve = self
            .notices
            .change(|board, now| board.approve(&events, &facts.group, &by, now));
        match approve.await {
            Ok(result) => answer::approved(result),
            Err(error) => {
                tracing::error!(vm = %facts.name, "an approval was not recorded: {error}");
                Answer::error(500, "The approval could not be recorded; ask again")
            }
        }
    }

    /// Waits until the VM's incarnation is another than `last`.
    async fn wait_for_other(&self, last: u64, longest: Duration) {
        let facts = &self.facts;
        let mut changes = self.notices.changes();
        let other = async {
            while self
                .notices
                .read(|board| board.incarnation(&facts.name, &facts.group))
                .await
                == last
            {
                if changes.changed().await.is_err() {
                    return;
                }
            }
        };
        let _waits = self.notices.waits(&facts.name);
        // Nothing else came: the answer says so.
        let _ = tokio::time::timeout(longest, other).await;
    }
}

/// The body of a request that may have one; `None` if it is too long or too slow.
async fn read(parts: &Parts, body: Incoming) -> Option<Bytes> {
    if parts.method != Method::POST {
        return Some(Bytes::new());
    }
    let body = Limited::new(body, BODY).collect();
    let read = tokio::time::timeout(PATIENCE, body).await;
    Some(read.ok()?.ok()?.to_bytes())
}

fn response(answer: Answer, close: bool) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from(answer.body)));
    *response.status_mut() = StatusCode::from_u16(answer.status).unwrap_or_default();
    let headers = response.headers_mut();
    // There are clients that take no answer for one of this service unless it says IMDS.
    let server = HeaderValue::from_static(concat!("IMDS/stillpoint-", env!("CARGO_PKG_VERSION")));
    headers.insert(header::SERVER, server);
    let kind = match answer.text {
        true => "text/plain; charset=utf-8",
        false => "application/json; charset=utf-8",
    };
    if answer.status != 304 {
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(kind));
    }
    let etag = answer
        .etag
        .map(|etag| HeaderValue::from_str(&format!("\"{etag}\"")));
    if let Some(Ok(etag)) = etag {
        headers.insert(header::ETAG, etag);
    }
    if let Some(allow) = answer.allow {
        headers.insert(header::ALLOW, HeaderValue::from_static(allow));
    }
    if answer.status == 429 {
        headers.insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
    }
    if close {
        headers.insert(header::CONNECTION, HeaderValue::from_static("close"));
    }
    response
}

#[cfg(test)]
mod tests;
