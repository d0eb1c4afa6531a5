//! The fleet by update domain, and its rollouts as they move.

mod charts;
mod shown;

use std::collections::BTreeMap;
use std::time::Duration;

use axum::Extension;
use axum::extract::{Path, State};
use axum::response::Response;
use maud::{Markup, html};

use super::{Site, Trouble, acts, page};
use crate::auth::{Caller, Role};
use crate::cli::format::ago;
use crate::execute::unix_ns;
use crate::fleet::explain::{self, HostView, RolloutView};
use crate::fleet::record::{HistoryStep, RolloutId, UnitRecord};
use crate::model::Moment;
use crate::plan::rollout::seen::{Health, Phase};
use shown::{FleetShown, Seat};

fn now() -> Moment {
    Moment(unix_ns())
}

/// The fleet.
pub(super) async fn show(State(site): State<Site>) -> Result<Response, Trouble> {
    let shown = shown::fleet(&site.desk, now()).await?;
    Ok(page("Fleet", "/fleet", fleet(&shown)))
}

/// One rollout.
pub(super) async fn show_rollout(
    State(site): State<Site>,
    Extension(caller): Extension<Caller>,
    Path(id): Path<String>,
) -> Result<Response, Trouble> {
    let (fleet, id) = (&site.desk.fleet, RolloutId(id));
    let look = fleet.look().await?;
    let found = fleet.rollout(&id).await?;
    let mut view = explain::view(&look, &found.record, now());
    view.driver = fleet.driver().await?.map(|card| card.host);
    let history = fleet.history(&id).await?;
    // Forms that would be refused are not shown.
    let acts = match caller.role >= Some(Role::Operate) {
        true => acts::form(&found.record, &site),
        false => html! {},
    };
    let title = format!("Rollout to {}", found.record.to);
    Ok(page(&title, "", rollout(&view, &history, &acts)))
}

fn fleet(shown: &FleetShown) -> Markup {
    html! {
        h1 { "Fleet" }
            @for view in &shown.open {
                section {
                    h2 { a href=(format!("/rollouts/{}", view.rollout.id)) { "Rollout to " (view.rollout.to) } }
                    (state(view))
                    (domains(&view.rollout.units))
                }
            }
            section {
                h2 { "Guests by update domain" }
                @if shown.sets.is_empty() { p class="soft" { "No guest runs." } }
                table {
                    thead { tr { th { "Set" } th { "Domain" } th { "Guests" } } }
                    tbody {
                        @for ((alone, set, domain), seats) in &shown.sets {
                            tr {
                                td { @if *alone { "no set" } @else { (set) } }
                                td { @if !alone { (domain) } }
                                td { @for seat in seats { (guest(seat)) } }
                            }
                        }
                    }
                }
            }
            section { h2 { "Hosts" } (hosts(&shown.hosts)) p class="soft" { "Store: " (shown.store) } }
            section { h2 { "Rollouts" } (rollouts(shown)) }
    }
}

fn guest(seat: &Seat) -> Markup {
    let is_bad = seat.health == Health::Ill;
    let note = seat.phase.map(Phase::words);
    html! {
        div {
            strong class=[is_bad.then_some("failed")] { (seat.vm) }
            span class="soft" { " on " (seat.host) ", release " (seat.release) ", " (seat.state)
                @if is_bad { ", not well" }
                @if let Some(note) = note { "; in the rollout: " (note) }
            }
        }
    }
}

fn hosts(hosts: &[HostView]) -> Markup {
    html! {
        table {
            thead { tr { th { "Host" } th { "Is" } th { "Where" } th { "Guests" } th { "Releases" } th { "Notes" } } }
            tbody {
                @for host in hosts {
                    tr {
                        td { (host.name) }
                        td { @if host.alive { span class="done" { "heard" } } @else { span class="failed" { "not heard" } } }
                        td {
                            (host.zone) " / " (host.fault_domain)
                            @for (name, value) in &host.labels { " " span class="soft" { (name) "=" (value) } }
                        }
                        td { (host.guests) }
                        td {
                            (host.releases.join(" "))
                            @if !host.kvm.runs.is_empty() { " " span class="soft" { "KVM " (host.kvm.runs) ", kernel " (host.kernel.runs) } }
                        }
                        td {
                            @if host.drives { "drives rollouts. " }
                            @if let Some(skew) = &host.clock { "Its clock is " (skew) " of the driver's: nothing is begun there. " }
                            @if let Some(reason) = &host.cordon { "Cordoned: " (reason) }
                        }
                    }
                }
            }
        }
    }
}

fn rollouts(shown: &FleetShown) -> Markup {
    html! {
        @if shown.rollouts.is_empty() { p class="soft" { "No rollout was started yet." } }
        @else {
            table {
                thead { tr { th { "Rollout" } th { "To" } th { "Is" } th { "Done" } th { "Failed" } th { "Asked for" } } }
                tbody {
                    @for one in &shown.rollouts {
                        tr {
                            td { a href=(format!("/rollouts/{}", one.id)) { (one.id) } }
                            td { (one.to) }
                            td { (one.state) }
                            td { (one.done) " of " (one.units) }
                            td { (one.failed) }
                            td { (ago(one.asked_at_unix_ns)) }
                        }
                    }
                }
            }
        }
    }
}

fn state(view: &RolloutView) -> Markup {
    let record = &view.rollout;
    html! {
        p {
            "It is " strong { (record.state) }
            @if let Some(reason) = &record.reason { " (" (reason) ")" }
            @if !record.state.is_over() {
                @match &view.driver {
                    Some(driver) => { ", driven by " (driver) }
                    None => { ", and nobody drives it just now" }
                }
                ". Waiting: " (view.waits.rollout) " for others of it, " (view.waits.time) " for a time, "
                (view.waits.outside) " for something outside, " (view.waits.hand) " for a hand"
            }
            "."
        }
    }
}

/// A bar for each update domain.
fn domains(units: &[UnitRecord]) -> Markup {
    let mut domains: BTreeMap<(Option<&str>, u16), Vec<&UnitRecord>> = BTreeMap::new();
    for unit in units {
        for domain in unit.domains() {
            domains.entry(domain).or_default().push(unit);
        }
    }
    html! {
        table class="bars" { tbody {
            @for ((set, domain), units) in &domains {
                @let done = units.iter().filter(|unit| unit.phase == Phase::Done).count();
                tr { td { (set.unwrap_or("no set")) @if set.is_some() { " " (domain) } } td { (charts::bar(units)) } td { (done) " of " (units.len()) } }
            }
        } }
        p class="key" {
            @for (phase, said) in [
                (Phase::Waiting, "waiting"), (Phase::Begun, "under way"), (Phase::Done, "done"),
                (Phase::Spoilt, "failed, or put back"),
            ] {
                span {
                    svg width="12" height="12" aria-hidden="true" {
                        rect width="12" height="12" rx="2" class=(charts::fill(phase)) {}
                    }
                    " " (said)
                }
            }
        }
    }
}

fn rollout(view: &RolloutView, history: &[HistoryStep], acts: &Markup) -> Markup {
    let record = &view.rollout;
    let blackouts = record.units.iter().filter_map(|unit| unit.blackout_ns);
    let blackouts: Vec<Duration> = blackouts.map(Duration::from_nanos).collect();
    html! {
        h1 { "Rollout " @if record.rung().takes_whole_host() { "of " (record.component) " " } "to " (record.to) }
            section { h2 { (record.id) } (state(view)) (acts) (domains(&record.units)) }
            section {
                h2 { "Blackouts so far" }
                @if blackouts.is_empty() { p class="soft" { "None yet." } }
                @else {
                    (charts::blackouts(&blackouts, record.policy.limits.blackout))
                    @if let Some(limit) = record.policy.limits.blackout {
                        p class="soft" { "The dashed line is the limit: " (charts::time(limit)) "." }
                    }
                }
            }
            @let whole = record.rung().takes_whole_host();
            section {
                h2 { @if whole { "Hosts, each with all its guests" } @else { "Guests" } }
                (units(view))
            }
            section {
                h2 { "What was done" }
                table { tbody {
                    @for step in history.iter().rev() { @for line in &step.lines {
                        tr { td class="soft" { (ago(step.at.0)) } td class="soft" { (step.by) } td { (line) } }
                    } }
                } }
            }
    }
}

fn units(view: &RolloutView) -> Markup {
    let record = &view.rollout;
    let whole = record.rung().takes_whole_host();
    html! {
        table {
            thead { tr { th { "Stage" } th { "Set" } th { @if whole { "Host" } @else { "Guest" } } th { "Is" } th { "Blackout" } th { "Why" } } }
            tbody {
                @for (unit, why) in record.units.iter().zip(&view.whys) {
                    tr {
                        td { @if unit.stage + 1 < record.stages { "canary " (unit.stage) } @else { "rest" } }
                        td {
                            @for (set, domain) in unit.domains() { @if let Some(set) = set { (set) " " (domain) " " } }
                        }
                        td {
                            @match &unit.vm {
                                Some(vm) => { (vm) span class="soft" { " on " (unit.host) } }
                                None => {
                                    (unit.host) " "
                                    @for guest in &unit.guests { span class="soft" { (guest.vm) " " } }
                                }
                            }
                        }
                        td class=[unit.phase.is_failure().then_some("failed")] { (unit.phase.words()) }
                        td { @if let Some(ns) = unit.blackout_ns { (charts::time(Duration::from_nanos(ns))) } }
                        td {
                            (why.why)
                            @if let Some(note) = &unit.note { span class="soft" { " (" (note) ")" } }
                        }
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::VmState;

    #[test]
    fn what_others_wrote_is_text_and_no_markup() {
        let seat = Seat {
            vm: "<script>alert(1)</script> & more".into(),
            host: String::new(),
            release: String::new(),
            state: VmState::Running,
            health: Health::Well,
            phase: None,
        };
        let shown = guest(&seat).into_string();
        let text = "&lt;script&gt;alert(1)&lt;/script&gt; &amp; more";
        assert!(shown.contains(text), "{shown}");
        assert!(!shown.contains("<script"), "{shown}");
    }

    #[test]
    fn a_chart_says_in_words_what_it_shows() {
        let seen = [Duration::from_micros(400), Duration::from_millis(7)];
        let chart = charts::blackouts(&seen, Some(Duration::from_millis(5))).into_string();
        assert!(chart.contains("2 blackouts, the longest 7 ms"), "{chart}");
        assert_eq!(chart.matches("f-moving").count(), 2, "{chart}");
        assert!(chart.contains("the limit"), "{chart}");
    }
}
