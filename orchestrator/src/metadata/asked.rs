//! What a guest asks for: its request, judged. Nothing of it is trusted; what can't be answered is
//! a [`Refused`] with the status and words that clients know.

use std::time::Duration;

use axum::http::request::Parts;
use axum::http::{HeaderMap, Method, header};
use serde::Deserialize;

use super::document::{self, Version};
use super::instance;
use crate::model::EventId;

/// The most events approved by one request.
const MOST_APPROVED: usize = 256;
/// How long a request waits for a change when it does not say.
const DEFAULT_WAIT: Duration = Duration::from_secs(60);
/// The longest it waits.
const MAX_WAIT: Duration = Duration::from_secs(300);

/// How an answer of `/metadata/instance` is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// JSON.
    Json,
    /// Text: a value, or the names below.
    Text,
}

/// What is asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Asked {
    /// The api-versions.
    Versions,
    /// Something of the VM itself.
    Instance {
        /// Where below `/metadata/instance`.
        path: Vec<String>,
        /// The api-version.
        version: &'static str,
        /// How to write it.
        format: Format,
    },
    /// The events.
    Events {
        /// The api-version.
        version: Version,
        /// What the guest has already.
        if_none_match: Vec<String>,
        /// Wait for something else than this incarnation, so long.
        wait: Option<(u64, Duration)>,
    },
    /// That these events may start.
    Approve(Vec<EventId>),
    /// Pauses, past and to come.
    Pauses,
}

/// Why a request is not answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Refused {
    /// 400.
    Bad(String),
    /// 400, for a version that is not there; with the three newest.
    Version([&'static str; 3]),
    /// 404.
    NotFound,
    /// 405, with what is allowed.
    Method(&'static str),
}

fn bad(text: &str) -> Refused {
    Refused::Bad(format!("Bad request. {text}"))
}

/// Judges a request. `body` is read for POST only.
pub fn judge(parts: &Parts, body: &[u8]) -> Result<Asked, Refused> {
    let headers = &parts.headers;
    if headers.contains_key("x-forwarded-for") {
        return Err(bad("Requests must not contain the header X-Forwarded-For"));
    }
    if !has_metadata_header(headers) {
        return Err(bad("Required metadata header not specified"));
    }
    let path = parts.uri.path().trim_matches('/');
    let path: Vec<&str> = path.split('/').collect();
    let query = Query::parse(parts.uri.query().unwrap_or_default())?;
    let is = |words: &[&str]| {
        path.len() == words.len()
            && path
                .iter()
                .zip(words)
                .all(|(a, b)| a.eq_ignore_ascii_case(b))
    };
    if is(&["metadata", "scheduledevents"]) {
        return events(parts, &query, body);
    }
    if is(&["metadata", "versions"]) {
        return only_get(parts).map(|()| Asked::Versions);
    }
    if is(&["stillpoint", "v1", "pauses"]) {
        return only_get(parts).map(|()| Asked::Pauses);
    }
    if path.len() >= 2 && is_instance(&path) {
        only_get(parts)?;
        let known = instance::VERSIONS
            .iter()
            .find(|v| query.api_version == Some(**v));
        let newest = [
            instance::VERSIONS[33],
            instance::VERSIONS[32],
            instance::VERSIONS[31],
        ];
        return Ok(Asked::Instance {
            path: path[2..].iter().map(|&part| part.to_owned()).collect(),
            version: known.ok_or(Refused::Version(newest))?,
            format: query.format()?,
        });
    }
    Err(Refused::NotFound)
}

fn is_instance(path: &[&str]) -> bool {
    path[0].eq_ignore_ascii_case("metadata") && path[1].eq_ignore_ascii_case("instance")
}

fn has_metadata_header(headers: &HeaderMap) -> bool {
    let value = headers
        .get("metadata")
        .and_then(|value| value.to_str().ok());
    value.is_some_and(|value| value.trim().eq_ignore_ascii_case("true"))
}

fn only_get(parts: &Parts) -> Result<(), Refused> {
    match parts.method {
        Method::GET => Ok(()),
        _ => Err(Refused::Method("GET")),
    }
}

fn events(parts: &Parts, query: &Query<'_>, body: &[u8]) -> Result<Asked, Refused> {
    let reads = match parts.method {
        Method::GET => true,
        Method::POST => false,
        _ => return Err(Refused::Method("GET, POST")),
    };
    let version = query.api_version.and_then(Version::of);
    let [.., (c, _), (b, _), (a, _)] = document::VERSIONS;
    let version = version.ok_or(Refused::Version([a, b, c]))?;
    if !reads {
        return start_requests(body).map(Asked::Approve);
    }
    Ok(Asked::Events {
        version,
        if_none_match: if_none_match(&parts.headers),
        wait: query.wait()?,
    })
}

/// The tags of `If-None-Match`, without quotes: `"7"`, `W/"7"`, and a bare `7`, as clients send it.
fn if_none_match(headers: &HeaderMap) -> Vec<String> {
    let values = headers.get_all(header::IF_NONE_MATCH).iter();
    let values = values.filter_map(|value| value.to_str().ok());
    let tags = values.flat_map(|value| value.split(','));
    let bare = |tag: &str| {
        let tag = tag.trim();
        let tag = tag.strip_prefix("W/").unwrap_or(tag);
        tag.trim_matches('"').to_owned()
    };
    tags.map(bare).collect()
}

#[derive(Deserialize)]
struct Start {
    #[serde(rename = "StartRequests")]
    requests: Vec<StartRequest>,
}

#[derive(Deserialize)]
struct StartRequest {
    #[serde(rename = "EventId")]
    event: EventId,
}

/// `{"StartRequests":[{"EventId":"..."}]}`, whatever content type it claims, and whatever else is in
/// it: clients in use send more.
fn start_requests(body: &[u8]) -> Result<Vec<EventId>, Refused> {
    let start: Start = serde_json::from_slice(body).map_err(|error| {
        bad(&format!(
            "The body is not {{\"StartRequests\":[{{\"EventId\":\"...\"}}]}}: {error}"
        ))
    })?;
    match start.requests.len() {
        0 => Err(bad("StartRequests is empty")),
        1..=MOST_APPROVED => Ok(start.requests.into_iter().map(|r| r.event).collect()),
        _ => Err(bad("StartRequests has too many entries")),
    }
}

/// The parameters that mean something. Others are passed over, unless one is there twice.
#[derive(Debug, Default)]
struct Query<'a> {
    api_version: Option<&'a str>,
    format: Option<&'a str>,
    wait_for_change: Option<&'a str>,
    last_etag: Option<&'a str>,
    timeout_sec: Option<&'a str>,
}

impl<'a> Query<'a> {
    fn parse(text: &'a str) -> Result<Self, Refused> {
        let mut query = Self::default();
        let mut names: Vec<String> = Vec::new();
        for part in text.split('&').filter(|part| !part.is_empty()) {
            let (name, value) = part.split_once('=').unwrap_or((part, ""));
            let name = name.to_ascii_lowercase();
            match name.as_str() {
                "api-version" => query.api_version = Some(value),
                "format" => query.format = Some(value),
                "wait_for_change" => query.wait_for_change = Some(value),
                "last_etag" => query.last_etag = Some(value),
                "timeout_sec" => query.timeout_sec = Some(value),
                _ => {}
            }
            if names.contains(&name) {
                return Err(bad("A query parameter is there twice"));
            }
            names.push(name);
        }
        Ok(query)
    }

    fn format(&self) -> Result<Format, Refused> {
        match self.format.unwrap_or("json") {
            word if word.eq_ignore_ascii_case("json") => Ok(Format::Json),
            word if word.eq_ignore_ascii_case("text") => Ok(Format::Text),
            _ => Err(bad("format is neither json nor text")),
        }
    }

    fn wait(&self) -> Result<Option<(u64, Duration)>, Refused> {
        if !self
            .wait_for_change
            .is_some_and(|word| word.eq_ignore_ascii_case("true"))
        {
            return Ok(None);
        }
        let last = self.last_etag.unwrap_or("0").replace("%22", "");
        let last = last.trim_matches('"').parse();
        let last = last.map_err(|_| bad("last_etag is no DocumentIncarnation"))?;
        let seconds = self.timeout_sec.map(str::parse).transpose();
        let seconds = seconds.map_err(|_| bad("timeout_sec is no number of seconds"))?;
        let wait = seconds.map_or(DEFAULT_WAIT, Duration::from_secs);
        Ok(Some((last, wait.min(MAX_WAIT))))
    }
}
