//! Rollouts as tables.

use std::time::Duration;

use crate::cli::format;
use crate::fleet::explain::{RolloutView, UnitWhy};
use crate::fleet::record::{GuestRecord, HistoryStep, RolloutRecord, UnitRecord};
use crate::model::Opening;

fn stage(record: &RolloutRecord, unit: &UnitRecord) -> String {
    match unit.stage + 1 < record.stages {
        true => format!("canary {}", unit.stage),
        false => "rest".into(),
    }
}

fn place(unit: &UnitRecord) -> [String; 2] {
    let domains = unit.domains();
    let domains: Vec<_> = domains
        .iter()
        .filter_map(|&(set, domain)| Some((set?, domain)))
        .collect();
    if domains.is_empty() {
        return ["-".into(), "-".into()];
    }
    let sets: Vec<_> = domains.iter().map(|(set, _)| *set).collect();
    let numbers: Vec<_> = domains
        .iter()
        .map(|(_, domain)| domain.to_string())
        .collect();
    [sets.join(" "), numbers.join(" ")]
}

/// What will be done, before it is.
pub(super) fn of_plan(view: &RolloutView) -> String {
    let record = &view.rollout;
    let table = match record.rung().takes_whole_host() {
        true => hosts(view),
        false => guests(record),
    };
    format!(
        "to release {}: {}, in this order\n{table}{}",
        record.to,
        record.what(),
        terms(record)
    )
}

fn guests(record: &RolloutRecord) -> String {
    let row = |unit: &UnitRecord| {
        let [set, domain] = place(unit);
        vec![
            stage(record, unit),
            set,
            domain,
            unit.swapped(),
            unit.host.to_string(),
            unit.from.clone(),
        ]
    };
    let rows: Vec<_> = record.units.iter().map(row).collect();
    let head = ["STAGE", "SET", "DOMAIN", "VM", "HOST", "FROM"];
    format::table(&head, &[], &rows)
}

/// Hosts that are swapped with all their guests, and what keeps one from being swapped until a hand helps.
fn hosts(view: &RolloutView) -> String {
    let record = &view.rollout;
    let row = |(unit, why): (&UnitRecord, &UnitWhy)| {
        let guest = |guest: &GuestRecord| match &guest.set {
            Some(set) => format!("{} ({set} {})", guest.vm, guest.domain),
            None => guest.vm.to_string(),
        };
        let guests: Vec<_> = unit.guests.iter().map(guest).collect();
        vec![
            stage(record, unit),
            unit.host.to_string(),
            guests.join(", "),
            unit.from.clone(),
            match why.waits_for.as_str() {
                "hand" => why.why.clone(),
                _ => String::new(),
            },
        ]
    };
    let rows: Vec<_> = record.units.iter().zip(&view.whys).map(row).collect();
    let head = ["STAGE", "HOST", "GUESTS", "FROM", "NOTE"];
    format::table(&head, &[], &rows)
}

/// How it goes about it.
fn terms(record: &RolloutRecord) -> String {
    let policy = &record.policy;
    let mut lines = vec![format!(
        "at once: {}, {} a host; one update domain of a set at a time, and {} of its members away at most",
        policy.at_once.total, policy.at_once.per_host, policy.set_budget
    )];
    for (number, stage) in policy.stages.iter().enumerate() {
        lines.push(format!(
            "canary {number}: {}, watched for {}",
            stage.size,
            format::time(stage.bake)
        ));
    }
    if let Some(budget) = record.budget_ns {
        let back = match record.rung().has_way_back() {
            true => "the way back is another swap, to what was there before",
            false => "there is no way back",
        };
        lines.push(format!(
            "all guests of a host stand still together, for {} at the longest; {back}",
            format::time(Duration::from_nanos(budget))
        ));
    }
    let then = match policy.roll_back {
        true => "all that was touched is put back",
        false => "it stops, and leaves all where it is",
    };
    lines.push(format!("more than {} failed: {then}", policy.failures));
    for window in &policy.windows {
        lines.push(format!("begins only in {window}"));
    }
    if let Opening::ClosedUntil(opens) = crate::model::opening(&policy.windows, now()) {
        lines.push(format!(
            "no window is open: the first opens {}",
            format::until(opens.0 / 1_000_000_000)
        ));
    }
    lines.join("\n") + "\n"
}

fn now() -> crate::model::Moment {
    crate::model::Moment(crate::execute::unix_ns())
}

/// One line that says how it is.
pub(super) fn headline(view: &RolloutView) -> String {
    let record = &view.rollout;
    let reason = record.reason.as_deref();
    let reason = reason.map_or(String::new(), |reason| format!(" ({reason})"));
    let driver = match (&view.driver, record.state.is_over()) {
        (_, true) => String::new(),
        (Some(driver), false) => format!(", driven by {driver}"),
        (None, false) => ", and nobody drives it just now".into(),
    };
    format!(
        "rollout {} to {} is {}{reason}{driver}",
        record.id, record.to, record.state
    )
}

/// A rollout, and each unit's reason.
pub(super) fn of_view(view: &RolloutView) -> String {
    let record = &view.rollout;
    let row = |(unit, why): (&UnitRecord, &UnitWhy)| {
        let [set, domain] = place(unit);
        let blackout = unit.blackout_ns.map(Duration::from_nanos);
        let note = unit.note.as_deref();
        let note = note.map_or(String::new(), |note| format!(" ({note})"));
        vec![
            stage(record, unit),
            set,
            domain,
            unit.swapped(),
            unit.host.to_string(),
            unit.phase.words().to_owned(),
            blackout.map_or_else(|| "-".into(), format::time),
            format!("{}{note}", why.why),
        ]
    };
    let rows: Vec<_> = record.units.iter().zip(&view.whys).map(row).collect();
    let head = [
        "STAGE", "SET", "DOMAIN", "VM", "HOST", "IS", "BLACKOUT", "WHY",
    ];
    format!("{}\n{}", headline(view), format::table(&head, &[6], &rows))
}

/// What was done, step by step.
pub(super) fn of_history(steps: &[HistoryStep]) -> String {
    let mut text = String::new();
    for step in steps {
        let at = format::ago(step.at.0);
        for line in &step.lines {
            text.push_str(&format!("{at:<12} {:<24} {line}\n", step.by));
        }
    }
    text
}
