//! Sends spans to a collector, some at a time, and again if it does not take them.

use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use hyper::body::Bytes;
use hyper::{Method, StatusCode};
use opentelemetry_proto::tonic::collector::trace::v1::{
    ExportTraceServiceRequest, ExportTraceServiceResponse,
};
use opentelemetry_proto::tonic::common::v1::InstrumentationScope;
use opentelemetry_proto::tonic::common::v1::any_value::Value;
use opentelemetry_proto::tonic::resource::v1::Resource;
use opentelemetry_proto::tonic::trace::v1::{ResourceSpans, ScopeSpans, Span};
use prost::Message;
use tokio::sync::mpsc;

use super::Counts;
use super::span::attribute;
use crate::http::{self, Asked};
use crate::model::{HttpUrl, NoHttpUrl};

/// The most spans of one request.
const BATCH: usize = 512;
/// How long the first of them waits for others.
const GATHER: Duration = Duration::from_millis(200);
/// How long a collector has for its answer.
const PATIENCE: Duration = Duration::from_secs(10);
/// Between the first try and the second; twice as long each time after that.
const AGAIN: Duration = Duration::from_millis(250);
/// How often the same spans are tried.
const TRIES: u32 = 6;
/// The longest answer that is read.
const LARGEST: usize = 64 << 10;

/// Where spans go: `http://HOST:4318`, or `https://` for TLS; `/v1/traces` comes after what is given.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Collector(HttpUrl);

/// Text that names no collector.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}: where the collector takes OTLP by HTTP, such as http://127.0.0.1:4318")]
pub struct NoCollector(#[from] NoHttpUrl);

impl std::fmt::Display for Collector {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(f)
    }
}

impl FromStr for Collector {
    type Err = NoCollector;

    fn from_str(text: &str) -> Result<Self, NoCollector> {
        Ok(Self(text.parse()?))
    }
}

/// Whose spans they are.
pub(super) fn resource(host: &str) -> Resource {
    let text = |key, value: &str| attribute(key, Value::StringValue(value.to_owned()));
    Resource {
        attributes: vec![
            text("service.name", "stillpointd"),
            text("service.version", env!("CARGO_PKG_VERSION")),
            text("service.instance.id", host),
            text("host.name", host),
        ],
        ..Resource::default()
    }
}

/// Sends what comes, until nobody can tell of anything any more.
pub(super) async fn send(
    to: Collector,
    resource: Resource,
    mut from: mpsc::Receiver<Span>,
    counts: Arc<Counts>,
) {
    let mut fails = false;
    let mut spans = Vec::new();
    while from.recv_many(&mut spans, BATCH).await > 0 {
        tokio::time::sleep(GATHER).await;
        while spans.len() < BATCH
            && let Ok(span) = from.try_recv()
        {
            spans.push(span);
        }
        let many = u64::try_from(spans.len()).unwrap_or(u64::MAX);
        let body = request(&resource, std::mem::take(&mut spans));
        match deliver(&to.0, body).await {
            Ok(()) => {
                counts.sent.fetch_add(many, Ordering::Relaxed);
                if std::mem::replace(&mut fails, false) {
                    tracing::info!(collector = %to, "takes spans again");
                }
            }
            Err(why) => {
                counts.dropped.fetch_add(many, Ordering::Relaxed);
                if !std::mem::replace(&mut fails, true) {
                    tracing::warn!(collector = %to, "takes no spans: {why}; they are dropped, and swaps go on");
                }
            }
        }
    }
}

fn request(resource: &Resource, spans: Vec<Span>) -> Bytes {
    let scope = InstrumentationScope {
        name: "stillpoint".into(),
        version: env!("CARGO_PKG_VERSION").into(),
        ..InstrumentationScope::default()
    };
    let scope_spans = vec![ScopeSpans {
        scope: Some(scope),
        spans,
        ..ScopeSpans::default()
    }];
    let resource_spans = vec![ResourceSpans {
        resource: Some(resource.clone()),
        scope_spans,
        ..ResourceSpans::default()
    }];
    ExportTraceServiceRequest { resource_spans }
        .encode_to_vec()
        .into()
}

/// Why a request was not taken.
enum Failure {
    /// It may be taken if it is sent again.
    Passing(String),
    /// It won't.
    Final(String),
}

async fn deliver(to: &HttpUrl, body: Bytes) -> Result<(), String> {
    let mut wait = AGAIN;
    for _ in 1..TRIES {
        match attempt(to, body.clone()).await {
            Ok(()) => return Ok(()),
            Err(Failure::Final(why)) => return Err(why),
            Err(Failure::Passing(_)) => tokio::time::sleep(wait).await,
        }
        wait *= 2;
    }
    attempt(to, body).await.map_err(|failure| match failure {
        Failure::Passing(why) | Failure::Final(why) => why,
    })
}

async fn attempt(to: &HttpUrl, body: Bytes) -> Result<(), Failure> {
    let asked = Asked {
        method: Method::POST,
        path: "/v1/traces".into(),
        kind: Some("application/x-protobuf"),
        body,
    };
    let answer = tokio::time::timeout(PATIENCE, http::ask(to, asked, LARGEST)).await;
    let (status, body) = match answer {
        Err(_) => return Err(Failure::Passing(format!("no answer in {PATIENCE:?}"))),
        Ok(Err(why)) => return Err(Failure::Passing(why)),
        Ok(Ok(answer)) => answer,
    };
    match status {
        status if status.is_success() => {
            tell_of_refusals(&body);
            Ok(())
        }
        StatusCode::TOO_MANY_REQUESTS
        | StatusCode::BAD_GATEWAY
        | StatusCode::SERVICE_UNAVAILABLE
        | StatusCode::GATEWAY_TIMEOUT => Err(Failure::Passing(format!("it answers {status}"))),
        status => Err(Failure::Final(format!("it answers {status}"))),
    }
}

/// A collector may take a request and refuse some of its spans.
fn tell_of_refusals(body: &[u8]) {
    let answer = ExportTraceServiceResponse::decode(body).unwrap_or_default();
    let refused = answer.partial_success.unwrap_or_default();
    if refused.rejected_spans > 0 {
        let (many, why) = (refused.rejected_spans, refused.error_message);
        tracing::warn!("the collector refuses {many} spans: {why}");
    }
}
