//! What a report says of the guest's clock.

use stillpoint_control::clock::Correction;
use stillpoint_control::report::{ClockReceipt, Step, SwapReport};

use crate::cli::format;
use crate::model::HOST;

/// The lines of a report that tell of the clock; none for a guest that never moved.
pub(super) fn lines(report: &SwapReport) -> String {
    let Some(clock) = &report.clock else {
        return String::new();
    };
    let error = clock.kvmclock_error_ns.map_or_else(
        || "kvmclock not measured (not in use, or its vCPUs stayed halted)".to_owned(),
        |ns| format!("kvmclock {}", format::signed_time(ns)),
    );
    let off: Vec<String> = clock
        .tsc_offset_delta
        .iter()
        .filter(|&&delta| delta != 0)
        .map(|delta| delta.to_string())
        .collect();
    let tsc = if report.component == HOST {
        "TSC left alone".to_owned()
    } else if clock.tsc_offset_delta.is_empty() {
        "TSC offset not known".to_owned()
    } else if off.is_empty() {
        "TSC exact".to_owned()
    } else {
        format!("TSC off by {} cycles", off.join(", "))
    };
    let mut text = format!("  clock      {}: {error}, {tsc}\n", clock.policy);
    let mut more = |line: String| text.push_str(&format!("             {line}\n"));
    more(pause_of(clock));
    if let Some(line) = wall_clock_of(clock) {
        more(line);
    }
    for step in &clock.steps {
        more(step_of(step));
    }
    if let Some(fallback) = &clock.fallback {
        more(fallback.clone());
    }
    text
}

/// The pause as the guest's clocks have it, and what it cost to set them.
fn pause_of(clock: &ClockReceipt) -> String {
    let included = format::time(clock.pause.saturating_sub(clock.held));
    let mut line = match clock.held.is_zero() {
        true => format!("a pause of {included}, included"),
        false => {
            let held = format::time(clock.held);
            format!("a pause of {held} left out, and {included} after it included")
        }
    };
    let loop_cpu = format::time(clock.loop_cpu);
    match clock.tries {
        // It went on by itself.
        0 => {}
        tries => line.push_str(&format!("; set in {tries} tries, {loop_cpu} of CPU")),
    }
    match (clock.masterclock_before, clock.masterclock_after) {
        (true, true) => {}
        (before, after) => {
            let word = |on| if on { "on" } else { "off" };
            let (before, after) = (word(before), word(after));
            line.push_str(&format!("; masterclock {before} before, {after} after"));
        }
    }
    line
}

fn wall_clock_of(clock: &ClockReceipt) -> Option<String> {
    let wall = &clock.wall_clock;
    let of = match wall.of.as_str() {
        "agent" => "the guest's wall clock",
        "kvmclock" => "the wall clock of its kvmclock",
        _ => return None,
    };
    let error = |ns: Option<i64>| ns.map_or_else(|| "not known".into(), format::signed_time);
    let (before, after) = (error(wall.error_before_ns), error(wall.error_after_ns));
    Some(format!(
        "{of} against the host's: {before} before, {after} after"
    ))
}

fn step_of(step: &Step) -> String {
    let by = format::signed_time(step.by_ns);
    match (step.how, &step.problem) {
        (_, Some(_)) => format!("wall clock not corrected by {by}; see the warning"),
        (Correction::Slew, None) => format!("wall clock slewed by {by}, at 500 ppm"),
        (_, None) => format!("wall clock stepped by {by}"),
    }
}
