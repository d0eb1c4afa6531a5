//! Connections to members: kept while they are good, and made anew at whichever member answers.

use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use http_body_util::{BodyExt, Full};
use hyper::body::{Bytes, Incoming};
use hyper::client::conn::http1::SendRequest;
use hyper::header::{AUTHORIZATION, CONTENT_TYPE, HOST};
use hyper::http::request::Builder;
use hyper::{Method, Request, Response};
use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use serde_json::{Value, json};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

use super::endpoint::Endpoint;
use super::tls::{self, TlsError};
use super::wire::Answered;
use super::{EtcdConfig, EtcdError};
use crate::auth::certificate::Certificate;
use crate::auth::whole;
use crate::execute::unix_ns;
use crate::http::handshake;

/// How long a member has to answer. An election of etcd's own takes about a second.
const PATIENCE: Duration = Duration::from_secs(3);
/// How long one has to take a connection.
const CONNECT: Duration = Duration::from_secs(2);
/// Connections that are kept for later.
const KEPT: usize = 4;
/// Of a stream, that a member which has lost its peers is to end it: it would stay open, and nothing come by it.
const WITH_LEADER: (&str, &str) = ("Grpc-Metadata-hasleader", "true");

type Sender = SendRequest<Full<Bytes>>;

/// A connection that is free, and which member's it is.
#[derive(Debug)]
struct Free {
    member: usize,
    sender: Sender,
}

/// Ways to all members.
#[derive(Debug)]
pub(super) struct Connections {
    endpoints: Vec<Endpoint>,
    prefix: String,
    tls: Option<Arc<ClientConfig>>,
    /// Our own certificate, where we have one.
    certificate: Option<PathBuf>,
    user: Option<(String, PathBuf)>,
    free: Mutex<Vec<Free>>,
    token: Mutex<Option<String>>,
    /// The member that answered last: asked first.
    good: AtomicUsize,
}

/// Why a member did not answer.
enum Failure {
    /// It never heard the request.
    Unheard(String),
    /// It may have carried it out.
    BrokeOff(String),
}

impl Connections {
    pub(super) fn new(config: EtcdConfig) -> Result<Self, EtcdError> {
        Ok(Self {
            tls: tls::client(&config)?,
            certificate: config.identity.map(|(certificate, _)| certificate),
            endpoints: config.endpoints,
            prefix: config.prefix,
            user: config.user,
            free: Mutex::default(),
            token: Mutex::default(),
            good: AtomicUsize::new(0),
        })
    }

    pub(super) fn prefix(&self) -> &str {
        &self.prefix
    }

    pub(super) fn said(&self) -> String {
        let all: Vec<String> = self.endpoints.iter().map(ToString::to_string).collect();
        all.join(", ")
    }

    /// A request that may be carried out twice.
    pub(super) async fn read(&self, path: &str, request: &Value) -> Result<Answered, EtcdError> {
        self.ask(path, request, true).await
    }

    /// A request that must not be.
    pub(super) async fn write(&self, path: &str, request: &Value) -> Result<Answered, EtcdError> {
        self.ask(path, request, false).await
    }

    async fn ask(&self, path: &str, request: &Value, again: bool) -> Result<Answered, EtcdError> {
        match self.ask_once(path, request, again).await {
            // A token that is over was refused before anything was done.
            Err(EtcdError::Refused(why)) if self.user.is_some() && is_about_token(&why) => {
                *lock(&self.token) = None;
                self.ask_once(path, request, again).await
            }
            answer => answer,
        }
    }

    async fn ask_once(
        &self,
        path: &str,
        request: &Value,
        again: bool,
    ) -> Result<Answered, EtcdError> {
        let token = self.token().await?;
        self.try_all(path, request, token.as_deref(), again).await
    }

    async fn try_all(
        &self,
        path: &str,
        request: &Value,
        token: Option<&str>,
        again: bool,
    ) -> Result<Answered, EtcdError> {
        let first = self.good.load(Ordering::Relaxed);
        let mut problems = Vec::new();
        for at in 0..self.endpoints.len() {
            let member = (first + at) % self.endpoints.len();
            let endpoint = self.endpoints[member].to_string();
            match self.ask_member(member, path, request, token).await {
                Ok((status, body)) => {
                    self.good.store(member, Ordering::Relaxed);
                    return judge(endpoint, status, &body);
                }
                Err(Failure::BrokeOff(problem)) if !again => {
                    self.good
                        .store((member + 1) % self.endpoints.len(), Ordering::Relaxed);
                    let problem = format!("{problem}{}", self.lapsed());
                    return Err(EtcdError::BrokeOff { endpoint, problem });
                }
                Err(Failure::BrokeOff(problem) | Failure::Unheard(problem)) => {
                    problems.push(format!("{endpoint}: {problem}"));
                }
            }
        }
        let problems = problems.join("; ");
        Err(EtcdError::Away(format!("{problems}{}", self.lapsed())))
    }

    async fn ask_member(
        &self,
        member: usize,
        path: &str,
        request: &Value,
        token: Option<&str>,
    ) -> Result<(u16, Bytes), Failure> {
        let mut sender = self.sender(member).await?;
        let asked = async {
            let asked = self.request(member, path, token);
            let response = send(&mut sender, asked.body(body(request))).await?;
            let status = response.status().as_u16();
            let body = response.into_body().collect().await;
            Ok((status, body.map_err(|e| whole(&e))?.to_bytes()))
        };
        match tokio::time::timeout(PATIENCE, asked).await {
            Err(_) => Err(Failure::BrokeOff(format!("no answer in {PATIENCE:?}"))),
            Ok(Err(problem)) => Err(Failure::BrokeOff(problem)),
            Ok(Ok(answer)) => {
                let mut free = lock(&self.free);
                if free.len() < KEPT {
                    free.push(Free { member, sender });
                }
                Ok(answer)
            }
        }
    }

    /// Opens a stream of answers at the member that answered last, or the next that does.
    pub(super) async fn stream(&self, path: &str, request: &Value) -> Result<Incoming, EtcdError> {
        let token = self.token().await?;
        let first = self.good.load(Ordering::Relaxed);
        let mut problems = Vec::new();
        for at in 0..self.endpoints.len() {
            let member = (first + at) % self.endpoints.len();
            let opened = async {
                let mut sender = self.connect(member).await.map_err(said)?;
                let asked = self.request(member, path, token.as_deref());
                let asked = asked.header(WITH_LEADER.0, WITH_LEADER.1);
                send(&mut sender, asked.body(body(request))).await
            };
            match tokio::time::timeout(PATIENCE, opened).await {
                Ok(Ok(response)) if response.status().is_success() => {
                    return Ok(response.into_body());
                }
                Ok(Ok(response)) => problems.push(format!("it answers {}", response.status())),
                Ok(Err(problem)) => problems.push(problem),
                Err(_) => problems.push(format!("no answer in {PATIENCE:?}")),
            }
        }
        Err(EtcdError::Away(problems.join("; ")))
    }

    fn request(&self, member: usize, path: &str, token: Option<&str>) -> Builder {
        let endpoint = &self.endpoints[member];
        let builder = Request::builder()
            .method(Method::POST)
            .uri(path)
            .header(HOST, format!("{}:{}", endpoint.host, endpoint.port))
            .header(CONTENT_TYPE, "application/json");
        match token {
            Some(token) => builder.header(AUTHORIZATION, token),
            None => builder,
        }
    }

    /// A free connection to that member, or a new one.
    async fn sender(&self, member: usize) -> Result<Sender, Failure> {
        loop {
            let kept = {
                let mut free = lock(&self.free);
                free.retain(|free| !free.sender.is_closed());
                let at = free.iter().position(|free| free.member == member);
                at.map(|at| free.swap_remove(at).sender)
            };
            let Some(mut sender) = kept else {
                return self.connect(member).await;
            };
            // One that was closed meanwhile says so before anything is sent.
            if sender.ready().await.is_ok() {
                return Ok(sender);
            }
        }
    }

    async fn connect(&self, member: usize) -> Result<Sender, Failure> {
        let endpoint = &self.endpoints[member];
        let connected = tokio::time::timeout(CONNECT, self.open(endpoint)).await;
        match connected {
            Err(_) => Err(Failure::Unheard(format!("no connection in {CONNECT:?}"))),
            Ok(opened) => opened.map_err(Failure::Unheard),
        }
    }

    async fn open(&self, endpoint: &Endpoint) -> Result<Sender, String> {
        let stream = TcpStream::connect((endpoint.host.as_str(), endpoint.port)).await;
        let stream = stream.map_err(|e| e.to_string())?;
        // Requests are small, and each is waited for.
        stream.set_nodelay(true).map_err(|e| e.to_string())?;
        match &self.tls {
            Some(config) if endpoint.tls => {
                let name = ServerName::try_from(endpoint.host.clone());
                let name = name.map_err(|_| TlsError::Name(endpoint.host.clone()).to_string())?;
                let connector = TlsConnector::from(config.clone());
                let stream = connector.connect(name, stream).await;
                handshake(stream.map_err(|e| tls::explain(&e))?).await
            }
            _ => handshake(stream).await,
        }
    }

    /// What to say of our own certificate, if that is why nobody listens: members don't tell.
    fn lapsed(&self) -> String {
        let Some(path) = self.certificate.as_deref().filter(|_| self.tls.is_some()) else {
            return String::new();
        };
        match Certificate::of_file(path) {
            Ok(own) if unix_ns() / 1_000_000_000 > own.until_unix_s => format!(
                "; this daemon's own certificate for etcd, {}, has expired: renew it, and start the daemon again",
                path.display()
            ),
            _ => String::new(),
        }
    }

    /// What says who we are; `None` where nobody is asked.
    async fn token(&self) -> Result<Option<String>, EtcdError> {
        let Some((name, file)) = &self.user else {
            return Ok(None);
        };
        if let Some(token) = lock(&self.token).clone() {
            return Ok(Some(token));
        }
        let password = tokio::fs::read_to_string(file).await;
        let password = password.map_err(|source| EtcdError::Password {
            path: file.clone(),
            source,
        })?;
        let request = json!({ "name": name, "password": password.trim_end_matches('\n') });
        let answer = self
            .try_all("/v3/auth/authenticate", &request, None, true)
            .await?;
        let token = answer.body["token"].as_str().map(str::to_owned);
        let token = token.ok_or_else(|| answer.unreadable("no token"))?;
        *lock(&self.token) = Some(token.clone());
        Ok(Some(token))
    }
}

fn body(request: &Value) -> Full<Bytes> {
    Full::new(Bytes::from(request.to_string()))
}

async fn send(
    sender: &mut Sender,
    request: hyper::http::Result<Request<Full<Bytes>>>,
) -> Result<Response<Incoming>, String> {
    let request = request.map_err(|e| e.to_string())?;
    sender.send_request(request).await.map_err(|e| whole(&e))
}

fn judge(endpoint: String, status: u16, body: &[u8]) -> Result<Answered, EtcdError> {
    let parsed: Result<Value, _> = serde_json::from_slice(body);
    if (200..300).contains(&status) {
        return match parsed {
            Ok(body) => Ok(Answered { endpoint, body }),
            Err(e) => Err(EtcdError::Unreadable {
                endpoint,
                problem: e.to_string(),
            }),
        };
    }
    let said = parsed.ok().and_then(|body| {
        let text = body["error"].as_str().or(body["message"].as_str());
        text.map(str::to_owned)
    });
    match said {
        Some(why) => Err(EtcdError::Refused(why)),
        None => Err(EtcdError::Unreadable {
            endpoint,
            problem: format!("status {status}"),
        }),
    }
}

fn is_about_token(why: &str) -> bool {
    why.contains("invalid auth token") || why.contains("auth: token")
}

fn said(failure: Failure) -> String {
    match failure {
        Failure::Unheard(problem) | Failure::BrokeOff(problem) => problem,
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
