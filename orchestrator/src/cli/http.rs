//! A client of the daemon's API, over its Unix socket or by TLS: one connection per request.

use std::path::{Path, PathBuf};

use http_body_util::{BodyExt, Full};
use hyper::body::{Bytes, Incoming};
use hyper::header::{CONTENT_TYPE, HOST};
use hyper::{Method, Request, Response};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::net::UnixStream;

use super::remote::Remote;
use crate::model::{Code, Event, Problem};

/// The API at a socket of this host, or of another machine.
#[derive(Clone, Debug)]
pub(super) enum Api {
    Socket(PathBuf),
    Machine(Remote),
}

fn broken(error: impl std::fmt::Display) -> Problem {
    let message = format!("the daemon broke off: {error}; see its log");
    Problem::new(Code::NoDaemon, message)
}

impl Api {
    /// The machine, if it is another.
    pub(super) fn remote(&self) -> Option<&Remote> {
        match self {
            Self::Socket(_) => None,
            Self::Machine(remote) => Some(remote),
        }
    }

    pub(super) async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, Problem> {
        self.ask(Method::GET, path, None::<&()>).await
    }

    pub(super) async fn send<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: &impl Serialize,
    ) -> Result<T, Problem> {
        self.ask(method, path, Some(body)).await
    }

    /// A request with an answer that says nothing.
    pub(super) async fn delete(&self, path: &str) -> Result<(), Problem> {
        let response = self.request(Method::DELETE, path, None::<&()>).await?;
        checked(response).await.map(drop)
    }

    /// A request without a body, with an answer.
    pub(super) async fn take_away<T: DeserializeOwned>(&self, path: &str) -> Result<T, Problem> {
        self.ask(Method::DELETE, path, None::<&()>).await
    }

    async fn ask<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Option<&impl Serialize>,
    ) -> Result<T, Problem> {
        let response = self.request(method, path, body).await?;
        let bytes = checked(response).await?;
        serde_json::from_slice(&bytes).map_err(|e| {
            let message = format!(
                "the daemon's answer can't be read ({e}); are command and daemon of one version?"
            );
            Problem::new(Code::Failed, message)
        })
    }

    async fn request(
        &self,
        method: Method,
        path: &str,
        body: Option<&impl Serialize>,
    ) -> Result<Response<Incoming>, Problem> {
        let mut sender = match self {
            Self::Machine(remote) => remote.connect().await?,
            Self::Socket(socket) => {
                let stream = UnixStream::connect(socket).await;
                let stream = stream.map_err(|e| unreachable(socket, &e))?;
                let made = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await;
                let (sender, connection) = made.map_err(broken)?;
                tokio::spawn(connection);
                sender
            }
        };
        let bytes = body.map(serde_json::to_vec).transpose();
        let bytes = bytes.map_err(|e| Problem::new(Code::BadRequest, e.to_string()))?;
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header(HOST, self.remote().map_or("stillpointd", Remote::name))
            .header(CONTENT_TYPE, "application/json")
            .body(Full::new(Bytes::from(bytes.unwrap_or_default())))
            .map_err(|e| Problem::new(Code::BadRequest, e.to_string()))?;
        let sent = sender.send_request(request).await;
        sent.map_err(|error| match self {
            Self::Socket(_) => broken(error),
            // A daemon refuses a certificate after its own part of the handshake.
            Self::Machine(remote) => remote.explain(&error),
        })
    }

    /// Everything that happens from now on.
    pub(super) async fn events(&self) -> Result<Events, Problem> {
        let response = self.request(Method::GET, "/v1/events", None::<&()>).await?;
        Ok(Events {
            body: response.into_body(),
            text: String::new(),
        })
    }
}

fn unreachable(socket: &Path, error: &std::io::Error) -> Problem {
    let at = socket.display();
    let message = match error.kind() {
        std::io::ErrorKind::PermissionDenied => format!(
            "this user may not use the daemon's socket {at}: the daemon's user and root may, and members of the groups \
             of `stillpointd --operate-group` and `--read-group`"
        ),
        _ => format!(
            "no daemon answers at {at} ({error}); start it (`stillpointd &`, or `systemctl start stillpointd`), or say \
             where it is with --socket, or --remote for one of another machine"
        ),
    };
    Problem::new(Code::NoDaemon, message)
}

/// The body of an answer, or the problem it tells of.
async fn checked(response: Response<Incoming>) -> Result<Bytes, Problem> {
    let status = response.status();
    let bytes = response
        .into_body()
        .collect()
        .await
        .map_err(broken)?
        .to_bytes();
    if status.is_success() {
        return Ok(bytes);
    }
    Err(serde_json::from_slice(&bytes).unwrap_or_else(|_| {
        let text = String::from_utf8_lossy(&bytes);
        Problem::new(
            Code::Failed,
            format!("the daemon answered {status}: {text}"),
        )
    }))
}

/// A stream of events.
#[derive(Debug)]
pub(super) struct Events {
    body: Incoming,
    text: String,
}

impl Events {
    /// The next; `None` when the daemon ended.
    pub(super) async fn next(&mut self) -> Option<Event> {
        loop {
            while let Some(end) = self.text.find('\n') {
                let line: String = self.text.drain(..=end).collect();
                let event = line.strip_prefix("data:").map(str::trim);
                // A later daemon may tell of things that this command doesn't know.
                if let Some(Ok(event)) = event.map(serde_json::from_str) {
                    return Some(event);
                }
            }
            let frame = self.body.frame().await?.ok()?;
            if let Ok(bytes) = frame.into_data() {
                self.text.push_str(&String::from_utf8_lossy(&bytes));
            }
        }
    }
}
