//! Answers, byte for byte. Pure: the board and what is asked for, to what is sent.

use serde::Serialize;
use serde_json::json;
use utoipa::ToSchema;

use super::asked::{Format, Refused};
use super::board::{Board, EventError};
use super::document::{self, Version, document};
use super::instance::{self, Facts};
use crate::model::{EventId, Pause, PauseState, SwapState};

/// What is sent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// The HTTP status.
    pub status: u16,
    /// Whether the body is text; it is JSON otherwise.
    pub text: bool,
    /// The incarnation that the body is of.
    pub etag: Option<u64>,
    /// What may be asked for here, with 405.
    pub allow: Option<&'static str>,
    /// The body.
    pub body: String,
}

impl Answer {
    fn json(body: String) -> Self {
        Self {
            status: 200,
            text: false,
            etag: None,
            allow: None,
            body,
        }
    }

    /// An error with that status.
    pub fn error(status: u16, text: &str) -> Self {
        let body = json!({ "error": text }).to_string();
        Self {
            status,
            ..Self::json(body)
        }
    }
}

/// The answer to what is refused.
pub fn refused(why: &Refused) -> Answer {
    match why {
        Refused::Bad(text) => Answer::error(400, text),
        Refused::Version(newest) => {
            let text = "Bad request. api-version is invalid or was not specified in the request. \
                        For more information refer to aka.ms/azureimds";
            // Written by hand for the order of the keys.
            let newest = json!(newest);
            let body = format!("{{\"error\":{},\"newest-versions\":{newest}}}", json!(text));
            Answer {
                status: 400,
                ..Answer::json(body)
            }
        }
        Refused::NotFound => Answer::error(404, "Not found"),
        Refused::Method(allow) => Answer {
            allow: Some(allow),
            ..Answer::error(405, "Method not allowed")
        },
    }
}

/// The answer to a VM that asks too often.
pub fn too_many() -> Answer {
    Answer::error(429, "Too many requests")
}

/// The events that a VM sees; 304 if it has them already.
pub fn events(board: &Board, facts: &Facts, version: Version, has: &[String]) -> Answer {
    let incarnation = board.incarnation(&facts.name, &facts.group);
    let etag = Some(incarnation);
    if has.iter().any(|tag| *tag == incarnation.to_string()) {
        return Answer {
            status: 304,
            etag,
            ..Answer::json(String::new())
        };
    }
    let seen = board.seen_by(&facts.group);
    Answer {
        etag,
        ..Answer::json(document(incarnation, &seen, version))
    }
}

/// The answer to an approval. No words: there are clients that read any body as JSON.
pub fn approved(result: Result<(), EventError>) -> Answer {
    match result {
        Ok(()) => Answer::json(String::new()),
        Err(error) => Answer::error(400, &format!("Bad request. {}", for_guest(&error))),
    }
}

fn for_guest(error: &EventError) -> String {
    match error {
        EventError::Unknown(event) => {
            let event: String = event.chars().take(64).collect();
            format!("There is no event {event}")
        }
        EventError::Late(..) => error.to_string(),
    }
}

/// Something of the VM itself.
pub fn instance(facts: &Facts, path: &[String], version: &str, format: Format) -> Answer {
    let path: Vec<&str> = path.iter().map(String::as_str).collect();
    match facts.answer(&path, version, format) {
        None => Answer::error(404, "Not found"),
        Some(Err(())) => Answer::error(
            400,
            "Bad request. A single value is given as text only; ask with format=text",
        ),
        Some(Ok(body)) => Answer {
            text: format == Format::Text,
            ..Answer::json(body)
        },
    }
}

/// The api-versions.
pub fn versions() -> Answer {
    Answer::json(json!({ "apiVersions": instance::VERSIONS.as_slice() }).to_string())
}

/// A VM's pauses, past and to come.
pub fn pauses(board: &Board, facts: &Facts) -> Answer {
    let pauses = board.of_vm(&facts.name);
    let pauses = pauses.into_iter().map(|pause| Receipt::of(pause, facts));
    let pauses = Pauses {
        pauses: pauses.collect(),
    };
    Answer::json(serde_json::to_string(&pauses).expect("strings and numbers are always JSON"))
}

/// A VM's pauses, oldest first.
#[derive(Debug, Serialize, ToSchema)]
pub struct Pauses {
    pauses: Vec<Receipt>,
}

/// What a guest may know of a pause. Nothing of other groups.
#[derive(Debug, Serialize, ToSchema)]
pub struct Receipt {
    /// The event by which it was announced.
    event_id: Option<EventId>,
    /// How far it is.
    state: PauseState,
    /// What it is for.
    description: String,
    /// Before that it does not start unless it is approved; while it is scheduled.
    not_before: Option<String>,
    /// Whether a VM of the set, or an operator, said "go".
    approved: bool,
    /// When it was announced, nanoseconds since the Unix epoch.
    announced_at_unix_ns: u64,
    /// When it started.
    started_at_unix_ns: Option<u64>,
    /// When it was over or cancelled.
    ended_at_unix_ns: Option<u64>,
    /// How long it was expected to be, ns.
    expected_ns: u64,
    /// Why nobody was given notice, when an operator chose so.
    no_notice: Option<String>,
    /// How its swap ended.
    outcome: Option<SwapState>,
    /// Why it ended so, when the guest did not move, or why it was cancelled.
    reason: Option<String>,
    /// How long the guest stood still by the host's clock, ns; null if it never did.
    pause_ns: Option<u64>,
    /// The step of the guest's clock, ns.
    clock_step_ns: Option<i64>,
}

impl Receipt {
    fn of(pause: &Pause, facts: &Facts) -> Self {
        let notice = pause.notice_to(&facts.group);
        let measured = pause.measured.clone().unwrap_or_default();
        Self {
            event_id: notice.map(|notice| notice.event.clone()),
            state: pause.state,
            description: pause.description.clone(),
            not_before: match pause.state {
                PauseState::Scheduled => Some(document::date(pause.not_before_unix_s)),
                _ => None,
            },
            approved: notice.is_some_and(|notice| notice.approval.is_some()),
            announced_at_unix_ns: pause.announced_at_unix_ns,
            started_at_unix_ns: pause.started_at_unix_ns,
            ended_at_unix_ns: pause.ended_at_unix_ns,
            expected_ns: pause.expected_ns,
            no_notice: pause.no_notice.clone(),
            outcome: measured.outcome,
            reason: measured.reason,
            pause_ns: measured.pause_ns,
            clock_step_ns: measured.clock_step_ns,
        }
    }
}
