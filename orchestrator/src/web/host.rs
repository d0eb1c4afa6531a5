//! The host: what it can do, which releases it has, and what was done to it.

use axum::extract::State;
use axum::response::Response;
use maud::{Markup, html};

use super::shell::{Is, state};
use super::{Site, Trouble, page};
use crate::api;
use crate::cli::format::{ago, time};
use crate::doctor::{Check, Status};
use crate::model::{HostSwap, HostSwapState, Release};

/// How many changes are shown.
const LAST: usize = 20;

pub(super) async fn show(State(site): State<Site>) -> Result<Response, Trouble> {
    let store = &site.desk.host.store;
    let (releases, swaps) = (store.releases().await?, store.host_swaps().await?);
    let checks = api::checks(&site.desk).await;
    let main = html! {
        h1 { "This host" }
        h2 { "What it can do" }
        (abilities(&checks))
        h2 { "Releases" }
        (listed(&releases))
        h2 { "What was done to it while its guests stood still" }
        @if swaps.is_empty() { p.faint { "Nothing." } } @else { (done(&swaps)) }
    };
    Ok(page("Host", "/host", main))
}

fn abilities(checks: &[Check]) -> Markup {
    let is = |status| match status {
        Status::Ok => Is::Well,
        Status::Warn => Is::Busy,
        Status::Fail => Is::Ill,
    };
    html! { div.wide { table {
        thead { tr { th { "Looked at" } th { "How it is" } th { "Found" } th { "What to do" } } }
        tbody { @for check in checks { tr {
            td { (check.check) } td { (state(check.status, is(check.status))) } td { (check.found) } td.why { (check.remedy) }
        } } }
    } } }
}

fn listed(releases: &[Release]) -> Markup {
    html! { div.wide { table {
        thead { tr { th { "Version" } th { "Reads" } th { "Writes" } th { "Signed by" } } }
        tbody { @for release in releases { tr {
            td { (release.manifest.version) }
            td { (words(&release.manifest.reads)) }
            td { (words(&release.manifest.writes)) }
            td { @match &release.signed_by { Some(signer) => { (signer.key_id) } None => { span.faint { "nobody" } } } }
        } } }
    } } }
}

fn words(formats: &[u32]) -> String {
    let words: Vec<_> = formats.iter().map(ToString::to_string).collect();
    words.join(", ")
}

fn done(swaps: &[HostSwap]) -> Markup {
    let is = |swap: &HostSwap| match swap.state {
        HostSwapState::Done => Is::Well,
        HostSwapState::Wanted | HostSwapState::InProgress => Is::Busy,
        HostSwapState::Refused => Is::Quiet,
        HostSwapState::Failed => Is::Ill,
    };
    let pause = |swap: &HostSwap| swap.pause_ns.map(std::time::Duration::from_nanos);
    html! { div.wide { table {
        thead { tr { th { "When" } th { "What" } th { "Outcome" } th.n { "Longest pause" } th { "Guests" } th { "To read" } } }
        tbody { @for swap in swaps.iter().rev().take(LAST) { tr {
            td { (ago(swap.asked_at_unix_ns)) }
            td { (swap.component()) " " span.faint { (swap.command.join(" ")) } }
            td { (state(swap.state, is(swap))) }
            td.n { (pause(swap).map_or_else(|| "–".into(), time)) }
            td { (swap.guests()) }
            td.why { (swap.reason.as_deref().unwrap_or_default()) }
        } } }
    } } }
}
