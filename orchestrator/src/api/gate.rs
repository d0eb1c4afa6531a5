//! What every request goes through: has its caller the role that it needs, and is it on record.
//!
//! ```text
//!   listener says who calls ─▶ role enough? ─▶ a change? ─▶ recorded, on disk ─▶ done ─▶ what came of it recorded
//!                                  │ no            │ no                │ can't be
//!                                  ▼               ▼                   ▼
//!                           403, recorded       answered           refused: nothing is done
//! ```
//!
//! Must never: begin a change that is not on record, or let anybody through of whom no listener said who they are.

use axum::body::{Body, Bytes};
use axum::extract::{MatchedPath, Request, State};
use axum::http::header::{CONTENT_TYPE, HeaderMap, ORIGIN};
use axum::http::request::Parts;
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};

use super::Refusal;
use super::roles::{is_change, needed};
use crate::auth::{Caller, Role};
use crate::execute::unix_ns;
use crate::model::{Code, Outcome, Problem};
use crate::store::{Asking, Came, Store};

/// The largest body of a request, as elsewhere in HTTP servers of this kind.
const LARGEST: usize = 2 << 20;
/// So much of a body is recorded, and of an answer's message.
const SHOWN: usize = 1000;

/// Lets a request through, or not. The store is where it is recorded.
pub(crate) async fn pass(State(store): State<Store>, request: Request, next: Next) -> Response {
    let (mut parts, body) = request.into_parts();
    let Some(caller) = parts.extensions.get::<Caller>().cloned() else {
        return refuse("nobody said who calls; this is a fault of the daemon");
    };
    let route = parts.extensions.get::<MatchedPath>().cloned();
    let role = needed(&parts.method, route.as_ref().map(MatchedPath::as_str));
    let changes = is_change(&parts.method);
    if let Some(problem) = against(&caller, role, &parts) {
        tracing::warn!(who = caller.who, from = caller.from, method = %parts.method, path = parts.uri.path(), "denied: {problem}");
        if changes {
            // Who is denied has no right to a record; where it can't be made the log has it.
            let asking = asking(&caller, &parts, None);
            if let Ok(number) = store.begin_audit(asking, Outcome::Denied).await {
                let came = Came {
                    outcome: Outcome::Denied,
                    status: Some(403),
                    reason: Some(problem.clone()),
                };
                let _ = store.end_audit(number, came).await;
            }
        }
        return refuse(problem);
    }
    if !changes {
        return next.run(Request::from_parts(parts, body)).await;
    }
    let bytes = match axum::body::to_bytes(body, LARGEST).await {
        Ok(bytes) => bytes,
        Err(error) => {
            let message =
                format!("the request's body can't be taken: {error}; {LARGEST} bytes are the most");
            return Refusal(Problem::new(Code::BadRequest, message)).into_response();
        }
    };
    let asking = asking(&caller, &parts, shown(&parts.headers, &bytes));
    let (who, path) = (asking.who.clone(), asking.path.clone());
    let number = match store.begin_audit(asking, Outcome::UnderWay).await {
        Ok(number) => number,
        Err(error) => return Refusal(error.into()).into_response(),
    };
    let line = Line::new(store, number);
    parts.extensions.insert(By(format!(
        "{who} ({role})",
        role = caller.role.map_or("-", Role::word)
    )));
    let response = next
        .run(Request::from_parts(parts, Body::from(bytes)))
        .await;
    let (response, came) = outcome(response).await;
    tracing::info!(who, role = %role, path, outcome = %came.outcome, status = came.status, "audit");
    line.end(came).await;
    response
}

/// Whose word a change is, for the records of the fleet.
#[derive(Clone, Debug)]
pub(crate) struct By(pub(crate) String);

fn refuse(message: impl Into<String>) -> Response {
    Refusal(Problem::new(Code::Forbidden, message)).into_response()
}

/// What is against letting a request through.
fn against(caller: &Caller, needs: Role, parts: &Parts) -> Option<String> {
    if let Some(lapsed) = caller.lapsed(unix_ns() / 1_000_000_000) {
        return Some(lapsed);
    }
    let (method, path, who) = (&parts.method, parts.uri.path(), &caller.who);
    match caller.role {
        None => {
            return Some(format!(
                "{who} has no role here, and {method} {path} needs `{needs}`: {}",
                caller.remedy
            ));
        }
        Some(has) if has < needs => {
            return Some(format!(
                "{method} {path} needs the role `{needs}`, and {who} has `{has}`: {}",
                caller.remedy
            ));
        }
        Some(_) => {}
    }
    // A browser shows its user's certificate to whatever any page of any site has it ask for. Pages have forms with a
    // key in them; the API is not for browsers.
    let by_certificate = caller.shown.is_some() && is_change(method) && path.starts_with("/v1/");
    (by_certificate && parts.headers.contains_key(ORIGIN)).then(|| {
        "a page in a browser asks for this, and the API takes changes from programs only".into()
    })
}

fn asking(caller: &Caller, parts: &Parts, body: Option<String>) -> Asking {
    let uri = &parts.uri;
    // A page's key may be in an address.
    let path = match uri.query() {
        Some(query) if uri.path().starts_with("/v1/") => format!("{}?{query}", uri.path()),
        _ => uri.path().to_owned(),
    };
    Asking {
        who: caller.who.clone(),
        from: caller.from.clone(),
        role: caller.role,
        method: parts.method.to_string(),
        path: short(&path),
        body,
    }
}

fn short(text: &str) -> String {
    if text.len() <= SHOWN {
        return text.to_owned();
    }
    let end = text.floor_char_boundary(SHOWN);
    format!("{}...", &text[..end])
}

/// What is recorded of a body: JSON as it is. A form of a page holds its key.
fn shown(headers: &HeaderMap, bytes: &Bytes) -> Option<String> {
    let kind = headers.get(CONTENT_TYPE)?.to_str().ok()?;
    let text = std::str::from_utf8(bytes).ok()?;
    (kind.starts_with("application/json") && !text.is_empty() && text != "null")
        .then(|| short(text))
}

/// What came of it, by its answer.
async fn outcome(response: Response) -> (Response, Came) {
    let status = response.status();
    let outcome = match status.as_u16() {
        100..=399 => Outcome::Done,
        400..=499 => Outcome::Refused,
        _ => Outcome::Failed,
    };
    let mut came = Came {
        outcome,
        status: Some(status.as_u16()),
        reason: None,
    };
    if outcome == Outcome::Done {
        return (response, came);
    }
    // Problems are short; a page with one is not told of here.
    let (parts, body) = response.into_parts();
    let bytes = axum::body::to_bytes(body, LARGEST)
        .await
        .unwrap_or_default();
    let problem: Option<Problem> = serde_json::from_slice(&bytes).ok();
    came.reason = problem.map(|problem| short(&problem.message));
    (Response::from_parts(parts, Body::from(bytes)), came)
}

/// A line that is under way. One that is dropped is of a caller who went away, and whose request with them.
struct Line {
    store: Store,
    number: i64,
    is_ended: bool,
}

impl Line {
    fn new(store: Store, number: i64) -> Self {
        Self {
            store,
            number,
            is_ended: false,
        }
    }

    async fn end(mut self, came: Came) {
        self.is_ended = true;
        if let Err(error) = self.store.end_audit(self.number, came).await {
            tracing::warn!(
                number = self.number,
                "what came of it is not in the audit log: {error}"
            );
        }
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        if self.is_ended {
            return;
        }
        let (store, number) = (self.store.clone(), self.number);
        let came = Came {
            outcome: Outcome::CutOff,
            status: None,
            reason: Some("the caller went away before an answer".into()),
        };
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            runtime.spawn(async move { store.end_audit(number, came).await });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bodies_are_shortened_and_forms_are_not_shown() {
        let with = |kind: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(CONTENT_TYPE, kind.parse().expect("a value"));
            headers
        };
        let form = Bytes::from_static(b"key=secret&reason=x");
        assert_eq!(
            shown(&with("application/x-www-form-urlencoded"), &form),
            None
        );
        let json = with("application/json");
        assert_eq!(shown(&json, &Bytes::from_static(b"{}")), Some("{}".into()));
        assert_eq!(shown(&json, &Bytes::from_static(b"null")), None);
        let long = shown(&json, &Bytes::from("ä".repeat(SHOWN))).expect("text");
        assert!(
            long.len() <= SHOWN + 3 && long.ends_with("..."),
            "{}",
            long.len()
        );
    }
}
