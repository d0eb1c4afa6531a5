//! All guests, and how their pauses were.

use std::collections::HashMap;
use std::time::Duration;

use axum::extract::State;
use axum::response::Response;
use maud::{Markup, html};

use super::picture::distribution;
use super::shell::{Is, state};
use super::{Site, Trouble, page};
use crate::cli::format::{ago, signed_time, time, until};
use crate::metadata::board::Board;
use crate::model::{Pause, SwapRecord, SwapState, VmRecord, VmState};

/// How many swaps the distribution is of.
const LAST: usize = 500;

pub(super) async fn show(State(site): State<Site>) -> Result<Response, Trouble> {
    let host = &site.desk.host;
    let (vms, swaps) = (host.store.vms().await?, host.store.swaps(None).await?);
    let open = |board: &Board| -> Vec<Pause> {
        let all = board.all().into_iter();
        all.filter(|pause| pause.state.is_open()).cloned().collect()
    };
    let pauses = host.notices.read(open).await;
    let mut last: HashMap<&str, &SwapRecord> = HashMap::new();
    for swap in &swaps {
        last.insert(swap.vm.as_str(), swap);
    }
    let main = html! {
        h1 { "Guests of this host" }
        @if vms.is_empty() {
            p { "No guest was ever run here. " code { "stillpoint run" } " starts one." }
        } @else {
            (table(&vms, &last, &pauses))
            (spread(&swaps))
        }
    };
    Ok(page("Guests", "/", main))
}

/// A guest's state with its colour.
pub(super) fn of_vm(vm: &VmRecord) -> Markup {
    let is = match vm.state {
        VmState::Running => Is::Well,
        VmState::Starting | VmState::Swapping => Is::Busy,
        VmState::Stopped => Is::Quiet,
        VmState::Crashed | VmState::Failed | VmState::Lost => Is::Ill,
    };
    state(vm.state, is)
}

/// A swap's, likewise.
pub(super) fn of_swap(swap: &SwapRecord) -> Markup {
    let is = match swap.state {
        SwapState::Moved | SwapState::Resumed => Is::Well,
        SwapState::Wanted | SwapState::InProgress => Is::Busy,
        SwapState::Kept => Is::Quiet,
        SwapState::InDoubt | SwapState::Crashed => Is::Ill,
    };
    state(swap.state, is)
}

fn table(vms: &[VmRecord], last: &HashMap<&str, &SwapRecord>, pauses: &[Pause]) -> Markup {
    html! {
        div.wide { table {
            caption { (vms.len()) " guests; the last pause of each" }
            thead { tr {
                th { "Guest" } th { "State" } th { "Release" } th { "Set, domain" } th { "Last pause" }
                th.n { "Stood still" } th.n { "A vCPU saw" } th.n { "Clock error" } th { "To come" }
            } }
            tbody { @for vm in vms { (row(vm, last.get(vm.name.as_str()).copied(), pauses)) } }
        } }
    }
}

fn row(vm: &VmRecord, last: Option<&SwapRecord>, pauses: &[Pause]) -> Markup {
    let report = last.and_then(|swap| swap.report.as_ref());
    let clock = report.and_then(|report| report.clock.as_ref()?.kvmclock_error_ns);
    let next = pauses
        .iter()
        .find(|pause| pause.vms().any(|name| *name == vm.name));
    let set = vm.profile.availability_set.as_deref().unwrap_or("–");
    html! { tr {
        td { a href=(format!("/guests/{}", vm.name)) { (vm.name) } }
        td { (of_vm(vm)) @if let Some(reason) = &vm.reason { div.faint { (reason) } } }
        td { (vm.release) }
        td { (set) ", " (vm.profile.update_domain) }
        td { @match last { Some(swap) => { (of_swap(swap)) " " span.faint { (swap.component) ", " (ago(swap.asked_at_unix_ns)) } } None => { span.faint { "none" } } } }
        td.n { (report.map_or_else(|| "–".into(), |report| time(report.blackout.host))) }
        td.n { (report.and_then(|report| report.blackout.guest_worst()).map_or_else(|| "–".into(), time)) }
        td.n { (clock.map_or_else(|| "–".into(), signed_time)) }
        td { @match next { Some(pause) => { a href="/events" { (pause.state) ", " (until(pause.not_before_unix_s)) } } None => { span.faint { "nothing" } } } }
    } }
}

fn spread(swaps: &[SwapRecord]) -> Markup {
    let ended = swaps.iter().rev().filter_map(|swap| swap.report.as_ref());
    let ended: Vec<_> = ended.take(LAST).collect();
    let stood = ended.iter().map(|report| report.blackout.host);
    let mut pauses: Vec<Duration> = stood.filter(|pause| !pause.is_zero()).collect();
    let budget = ended.iter().map(|report| report.budget).min();
    let over = ended
        .iter()
        .filter(|report| report.blackout.host > report.budget)
        .count();
    pauses.sort();
    let at = |share: f64| {
        let index = ((pauses.len() as f64 * share).ceil() as usize).clamp(1, pauses.len()) - 1;
        time(pauses[index])
    };
    html! {
        h2 { "How long guests stood still" }
        @if pauses.is_empty() {
            p.faint { "No guest has stood still yet." }
        } @else {
            ul.facts {
                li { "swaps " b { (pauses.len()) } }
                li { "median " b { (at(0.5)) } }
                li { "99 of 100 within " b { (at(0.99)) } }
                li { "longest " b { (at(1.0)) } }
                li { "over budget " b { (over) } }
            }
            figure {
                (distribution(&pauses, budget))
                figcaption { "The last " (pauses.len()) ", as the host measured them; the line is the smallest budget among them." }
            }
        }
    }
}
