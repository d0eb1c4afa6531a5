//! What a report says of how soon the guest got as much done again as before.

use std::time::Duration;

use stillpoint_control::recovery::Recovery;
use stillpoint_control::report::SwapReport;

use crate::cli::format;

/// A line for each thing that was counted.
pub(super) fn lines(report: &SwapReport) -> String {
    let mut text = String::new();
    for (number, recovery) in report.recovery.iter().enumerate() {
        let head = if number == 0 { "recovery" } else { "" };
        text.push_str(&format!("  {head:<10} {}\n", line(recovery)));
    }
    text
}

fn line(recovery: &Recovery) -> String {
    let Recovery { of, lost, .. } = recovery;
    if !recovery.is_known() {
        return format!("{of}: still watched; `stillpoint report` says more in a few seconds");
    }
    let lost = match lost.is_zero() {
        true => "no work lost".to_owned(),
        false => format!("work of {} lost", format::time(*lost)),
    };
    match recovery.until_ns.map(Duration::from_nanos) {
        Some(Duration::ZERO) => format!("{of}: at 95 % of its speed from the first moment, {lost}"),
        Some(until) => {
            let until = format::time(until);
            format!("{of}: at 95 % of its speed again after {until}, {lost}")
        }
        None => {
            let watched = format::time(recovery.watched);
            format!("{of}: not at 95 % of its speed again within {watched}, {lost}")
        }
    }
}
