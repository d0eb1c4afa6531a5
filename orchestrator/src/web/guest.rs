//! One guest: its pauses, one below the other.

use std::time::Duration;

use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::response::Response;
use maud::{Markup, html};
use stillpoint_control::report::SwapReport;

use super::guests::{of_swap, of_vm};
use super::picture::timeline;
use super::{Site, Trouble, page};
use crate::cli::format::{ago, signed_time, size, time};
use crate::model::{SwapRecord, VmName, VmRecord};

/// How many of its pauses are shown.
const LAST: usize = 30;

pub(super) async fn show(
    State(site): State<Site>,
    Path(name): Path<String>,
) -> Result<Response, Trouble> {
    let missing = || {
        Trouble(
            StatusCode::NOT_FOUND,
            format!("There is no guest `{name}`."),
        )
    };
    let vm = VmName::try_from(name.clone()).map_err(|_| missing())?;
    let host = &site.desk.host;
    let record = host.store.vm(&vm).await?.ok_or_else(missing)?;
    let swaps = host.store.swaps(Some(&vm)).await?;
    let last: Vec<&SwapRecord> = swaps.iter().rev().take(LAST).collect();
    let main = html! {
        h1 { (record.name) " " (of_vm(&record)) }
        (facts(&record))
        h2 { "Its pauses" }
        @if last.is_empty() {
            p.faint { "It has never been paused." }
        } @else {
            (picture(&last))
            (table(&last))
            @if swaps.len() > LAST { p.faint { "The last " (LAST) " of " (swaps.len()) ". " code { "stillpoint report" } " lists all." } }
        }
    };
    Ok(page(record.name.as_str(), "", main))
}

fn facts(vm: &VmRecord) -> Markup {
    let process = vm.process.as_ref().map(|process| process.pid);
    html! {
        @if let Some(reason) = &vm.reason { p { (reason) } }
        ul.facts {
            li { "release " b { (vm.release) } }
            li { "vCPUs " b { (vm.spec.cpus) } }
            li { "memory " b { (size(vm.spec.memory.size)) } }
            li { "budget " b { (time(vm.spec.blackout_budget)) } }
            li { "swaps lived through " b { (vm.swaps) } }
            @if let Some(pid) = process { li { "process " b { (pid) } } }
            @if let Some(set) = &vm.profile.availability_set { li { "set " b { (set) } ", domain " b { (vm.profile.update_domain) } } }
        }
    }
}

fn picture(last: &[&SwapRecord]) -> Markup {
    let stood = |report: &&SwapReport| !report.blackout.host.is_zero();
    let named = last.iter().filter_map(|swap| {
        let report = swap.report.as_ref().filter(stood)?;
        Some((ago(swap.asked_at_unix_ns), report))
    });
    let pauses: Vec<_> = named.collect();
    html! { figure {
        (timeline(&pauses))
        figcaption { "What each pause was made of, newest first." }
    } }
}

fn table(last: &[&SwapRecord]) -> Markup {
    html! { div.wide { table {
        thead { tr {
            th { "When" } th { "What" } th { "Outcome" } th.n { "Stood still" } th.n { "A vCPU saw" }
            th.n { "Budget" } th.n { "Clock error" } th { "Phases" } th { "To read" }
        } }
        tbody { @for swap in last { (row(swap)) } }
    } } }
}

fn row(swap: &SwapRecord) -> Markup {
    let report = swap.report.as_ref();
    let clock = report.and_then(|report| report.clock.as_ref()?.kvmclock_error_ns);
    let what = match swap.from.version == swap.to.version {
        true => swap.component.clone(),
        false => format!(
            "{} {} → {}",
            swap.component, swap.from.version, swap.to.version
        ),
    };
    let dash = || "–".to_owned();
    html! { tr {
        td { (ago(swap.asked_at_unix_ns)) }
        td { (what) }
        td { (of_swap(swap)) }
        td.n { (report.map_or_else(dash, |report| time(report.blackout.host))) }
        td.n { (report.and_then(|report| report.blackout.guest_worst()).map_or_else(dash, time)) }
        td.n { (report.map_or_else(dash, |report| time(report.budget))) }
        td.n { (clock.map_or_else(dash, signed_time)) }
        td { @if let Some(report) = report { (phases(report)) } }
        td.why {
            @if let Some(reason) = &swap.reason { div { (reason) } }
            @for warning in report.iter().flat_map(|report| &report.warnings) { div.ill { (warning) } }
        }
    } }
}

fn phases(report: &SwapReport) -> Markup {
    let dark = report.phases.iter().filter(|phase| phase.in_blackout);
    html! { details {
        summary { (dark.clone().count()) " phases" }
        @for phase in dark { div.faint { (phase.name) " " (time(phase.duration)) } }
        @for recovery in &report.recovery {
            @if let Some(until) = recovery.until_ns.filter(|_| recovery.is_known()) {
                div.faint { (recovery.of) " at 95 % of its speed after " (time(Duration::from_nanos(until))) }
            }
        }
    } }
}
