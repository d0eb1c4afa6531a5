//! How the command tells of what guards a swap: the rehearsal, the guest's health afterwards, the way
//! back; and of a look beforehand.

use std::time::Duration;

use stillpoint_control::rehearsal::{Rehearsal, Verdict};

use super::format;
use crate::doctor::{Check, Status};
use crate::model::{HealthState, Preflight, Rehearsed, SwapRecord};

/// Lines of a swap's summary.
pub(super) fn of_swap(swap: &SwapRecord) -> String {
    let guards = &swap.safeguards;
    let mut text = String::new();
    if let Some(first) = &guards.way_back_of {
        text.push_str(&format!("  this is     the way back of swap {first}\n"));
    }
    match &guards.rehearsal {
        Some(Rehearsed::Told(told)) => {
            text.push_str(&format!("  rehearsal  {}\n", rehearsal(told)))
        }
        Some(Rehearsed::Unknown { why }) => text.push_str(&format!("  rehearsal  none: {why}\n")),
        None => {}
    }
    let Some(health) = &guards.health else {
        return text;
    };
    let watched = format::time(Duration::from_nanos(guards.watch_ns));
    let line = match health.state {
        HealthState::Watching | HealthState::WellSoFar => {
            format!("{}; it is watched for {watched}", health.state)
        }
        HealthState::Well => format!("well, all of {watched}"),
        state => format!("{state}: {}", health.problems.join("; ")),
    };
    text.push_str(&format!("  health     {line}\n"));
    if let Some(remedy) = &health.remedy {
        text.push_str(&format!("             {remedy}\n"));
    }
    text
}

/// Whether its rehearsal made the guest stand still.
pub(super) fn has_peeked(swap: &SwapRecord) -> bool {
    match &swap.safeguards.rehearsal {
        Some(Rehearsed::Told(told)) => !told.peek.is_zero(),
        _ => false,
    }
}

fn rehearsal(told: &Rehearsal) -> String {
    let peek = format::time(told.peek);
    match told.verdict {
        Verdict::Passed => format!(
            "{} bytes loaded in {} and saved again the same; the guest stood still for {peek}",
            told.state_bytes,
            format::time(told.load)
        ),
        Verdict::Failed | Verdict::CalledOff => {
            let why = told.reason.as_deref().unwrap_or("it did not say why");
            format!("{why}; the guest stood still for {peek}")
        }
    }
}

/// A look beforehand.
pub(super) fn of_preflight(look: &Preflight) -> String {
    let (vm, from, to) = (&look.vm, &look.from.version, &look.to.version);
    let mut text = match look.would_work {
        true => format!("{vm} could be swapped from {from} to {to}\n"),
        false => format!("{vm} can not be swapped from {from} to {to}\n"),
    };
    let peek = match look.peek_ns {
        0 => "the guest did not stand still for this".to_owned(),
        ns => format!(
            "the guest stood still for {}",
            format::time(Duration::from_nanos(ns))
        ),
    };
    text.push_str(&format!("  peek       {peek}\n\n"));
    text.push_str(&table(&look.checks));
    text
}

/// Findings as a table, each remedy below.
fn table(checks: &[Check]) -> String {
    let row = |check: &Check| {
        vec![
            check.check.clone(),
            check.status.to_string(),
            check.found.replace('\n', " "),
        ]
    };
    let rows: Vec<_> = checks.iter().map(row).collect();
    let mut text = format::table(&["CHECK", "VERDICT", "FOUND"], &[], &rows);
    text.push_str(&of_findings(checks));
    text
}

/// What is not as it should be, with what to do.
fn of_findings(checks: &[Check]) -> String {
    let bad = checks.iter().filter(|check| check.status != Status::Ok);
    bad.map(|check| format!("  {}: {}\n", check.check, check.remedy))
        .collect()
}

/// What limits or prevents swaps of a guest; nothing if nothing does.
pub(super) fn of_updatable(checks: &[Check]) -> Vec<String> {
    let bad = checks.iter().filter(|check| check.status != Status::Ok);
    let line = |check: &Check| {
        let how = match check.status {
            Status::Fail => "it can't be swapped",
            Status::Ok | Status::Warn => "its swaps are limited",
        };
        format!("{how}: {}: {}; {}", check.check, check.found, check.remedy)
    };
    bad.map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::SwapId;
    use stillpoint_control::report::ReleaseName;

    fn look(status: Status, peek_ns: u64) -> Preflight {
        let name = |version: &str| ReleaseName {
            version: version.into(),
            sha256: String::new(),
        };
        let checks = vec![
            Check::ok("memory", "20 MiB, 900 MiB are free on this host"),
            Check::new(
                "likeness",
                status,
                "virtio-blk/disk0: size",
                "don't swap to it",
            ),
        ];
        Preflight {
            id: SwapId("a-1".into()),
            vm: "web-1".to_owned().try_into().expect("name"),
            from: name("0.2.0"),
            to: name("0.2.1"),
            would_work: Preflight::judge(&checks),
            peek_ns,
            checks,
            rehearsal: None,
        }
    }

    #[test]
    fn a_look_says_what_why_and_what_to_do() {
        let text = of_preflight(&look(Status::Fail, 1_500_000));
        assert!(
            text.starts_with("web-1 can not be swapped from 0.2.0 to 0.2.1\n"),
            "{text}"
        );
        assert!(text.contains("stood still for 1.5"), "{text}");
        assert!(
            text.contains("FAIL") && text.contains("virtio-blk/disk0: size"),
            "{text}"
        );
        assert!(text.contains("likeness: don't swap to it"), "{text}");
        let text = of_preflight(&look(Status::Warn, 0));
        assert!(text.contains("could be swapped") && text.contains("did not stand still"));
    }

    #[test]
    fn a_warning_is_no_refusal_and_a_failure_is() {
        let lines = of_updatable(&look(Status::Warn, 0).checks);
        assert!(lines.len() == 1 && lines[0].starts_with("its swaps are limited"));
        let lines = of_updatable(&look(Status::Fail, 0).checks);
        assert!(lines[0].starts_with("it can't be swapped"));
    }
}
