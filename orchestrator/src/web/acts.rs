//! A person's word on a rollout: nothing more begins, or it goes on.

use axum::extract::{Path, State};
use axum::response::Redirect;
use axum::{Extension, Form};
use maud::{Markup, html};

use super::events::Said;
use super::{Site, Trouble};
use crate::api::gate::By;
use crate::execute::unix_ns;
use crate::fleet::ask::Act;
use crate::fleet::record::{RolloutId, RolloutRecord};
use crate::model::Moment;
use crate::plan::rollout::State as Is;

/// The form for what can be done to it now, if anything.
pub(super) fn form(record: &RolloutRecord, site: &Site) -> Markup {
    let (act, word) = match record.state {
        Is::Running => ("pause", "Pause"),
        Is::Paused | Is::Stopped => ("resume", "Resume"),
        _ => return html! {},
    };
    html! {
        form method="post" action=(format!("/rollouts/{}/{act}", record.id)) {
            (site.key.field())
            button.go[act == "resume"] #(act) { (word) }
            @if record.state == Is::Stopped { " " span.faint { "failures so far are forgiven" } }
            @if record.state == Is::Running { " " span.faint { "what is under way ends" } }
        }
    }
}

async fn act(site: &Site, id: String, act: Act, by: &str) -> Result<Redirect, Trouble> {
    let now = Moment(unix_ns());
    let id = RolloutId(id);
    let record = site.desk.fleet.act(&id, act, by, now).await?;
    Ok(Redirect::to(&format!("/rollouts/{}", record.id)))
}

pub(super) async fn pause(
    State(site): State<Site>,
    Path(id): Path<String>,
    Extension(By(by)): Extension<By>,
    Form(said): Form<Said>,
) -> Result<Redirect, Trouble> {
    site.knows(&said)?;
    act(&site, id, Act::Pause, &by).await
}

pub(super) async fn resume(
    State(site): State<Site>,
    Path(id): Path<String>,
    Extension(By(by)): Extension<By>,
    Form(said): Form<Said>,
) -> Result<Redirect, Trouble> {
    site.knows(&said)?;
    act(&site, id, Act::Resume, &by).await
}
