//! What guests have been told of, and an operator's word on it.

use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::response::{Redirect, Response};
use axum::{Extension, Form};
use maud::{Markup, html};
use serde::Deserialize;

use super::shell::{Is, state};
use super::{Site, Trouble, page};
use crate::api::Refusal;
use crate::auth::{Caller, Role};
use crate::cli::format::{ago, time, until};
use crate::metadata::board::Board;
use crate::model::{Approver, EventId, Notice, Pause, PauseState};

/// How many of those that are over are shown.
const LAST: usize = 20;

/// A form's fields.
#[derive(Debug, Deserialize)]
pub(super) struct Said {
    key: String,
    #[serde(default)]
    reason: String,
}

pub(super) async fn show(
    State(site): State<Site>,
    Extension(caller): Extension<Caller>,
) -> Result<Response, Trouble> {
    // Forms that would be refused are not shown.
    let acting = (caller.role >= Some(Role::Operate)).then_some(&site);
    let all = |board: &Board| -> Vec<Pause> { board.all().into_iter().cloned().collect() };
    let pauses = site.desk.host.notices.read(all).await;
    let (open, over): (Vec<_>, Vec<_>) = pauses.iter().partition(|pause| pause.state.is_open());
    let main = html! {
        h1 { "Events" }
        @if open.is_empty() {
            p { "No pause is to come." }
        } @else {
            (table(&open, true, acting))
        }
        @if !over.is_empty() {
            h2 { "Over" }
            (table(&over.into_iter().rev().take(LAST).collect::<Vec<_>>(), false, None))
        }
    };
    Ok(page("Events", "/events", main))
}

fn table(pauses: &[&Pause], is_open: bool, site: Option<&Site>) -> Markup {
    html! { div.wide { table {
        thead { tr {
            th { "Guests" } th { "State" } th { @if is_open { "Starts" } @else { "Started" } }
            th { "Approved" } th { "What for" }
            th { @if site.is_some() { "Your word" } @else if is_open {} @else { "What it was" } }
        } }
        tbody {
            @for pause in pauses { @for notice in &pause.notices { (row(pause, notice, is_open, site)) } }
        }
    } } }
}

fn row(pause: &Pause, notice: &Notice, is_open: bool, site: Option<&Site>) -> Markup {
    let names: Vec<_> = notice.vms.iter().map(ToString::to_string).collect();
    let is = match pause.state {
        PauseState::Scheduled => Is::Busy,
        PauseState::Started => Is::Well,
        PauseState::Over | PauseState::Cancelled => Is::Quiet,
    };
    let approved = notice.approval.as_ref().map(|approval| match &approval.by {
        Approver::Vm(name) => format!("by {name}"),
        Approver::Operator => "by an operator".into(),
    });
    html! { tr {
        td { (names.join(", ")) }
        td { (state(pause.state, is)) }
        td { @match (pause.state, pause.started_at_unix_ns) {
            (PauseState::Scheduled, _) => { (until(pause.not_before_unix_s)) }
            (_, Some(at)) => { (ago(at)) }
            (_, None) => { "–" }
        } }
        td { (approved.as_deref().unwrap_or(if is_open { "not yet" } else { "nobody" })) }
        td { (pause.description) @if let Some(reason) = &pause.no_notice { div.faint { "without notice: " (reason) } } }
        td { @match site {
            Some(site) if pause.state == PauseState::Scheduled => { (word(notice, site)) }
            _ => { (came(pause)) }
        } }
    } }
}

/// The two forms.
fn word(notice: &Notice, site: &Site) -> Markup {
    let event = &notice.event;
    html! {
        @if notice.approval.is_none() {
            form method="post" action=(format!("/events/{event}/approve")) {
                (site.key.field())
                button.go #(format!("approve-{event}")) { "Approve" }
            }
            " "
        }
        form method="post" action=(format!("/events/{event}/cancel")) {
            (site.key.field())
            label { span.faint { "reason " } input type="text" name="reason" size="14"; }
            " " button #(format!("cancel-{event}")) { "Cancel" }
        }
    }
}

fn came(pause: &Pause) -> Markup {
    let Some(measured) = &pause.measured else {
        return html! {};
    };
    let still = measured.pause_ns.map(std::time::Duration::from_nanos);
    html! {
        @if let Some(still) = still { (time(still)) }
        @if let Some(reason) = &measured.reason { div.faint { (reason) } }
    }
}

impl From<Refusal> for Trouble {
    fn from(Refusal(problem): Refusal) -> Self {
        Self(StatusCode::CONFLICT, problem.message)
    }
}

impl Site {
    pub(super) fn knows(&self, said: &Said) -> Result<(), Trouble> {
        let stranger = || {
            Trouble(
                StatusCode::FORBIDDEN,
                "This form is from another page than ours.".into(),
            )
        };
        self.key.is(&said.key).then_some(()).ok_or_else(stranger)
    }
}

pub(super) async fn approve(
    State(site): State<Site>,
    Path(event): Path<String>,
    Form(said): Form<Said>,
) -> Result<Redirect, Trouble> {
    site.knows(&said)?;
    site.desk.approve(&EventId(event)).await?;
    Ok(Redirect::to("/events"))
}

pub(super) async fn cancel(
    State(site): State<Site>,
    Path(event): Path<String>,
    Form(said): Form<Said>,
) -> Result<Redirect, Trouble> {
    site.knows(&said)?;
    let reason = Some(said.reason.trim().to_owned()).filter(|reason| !reason.is_empty());
    site.desk.cancel(&EventId(event), reason).await?;
    Ok(Redirect::to("/events"))
}
