//! Pictures: inline SVG in the page's own colours, without scripts. What they show stands in a table
//! beside them.

use std::time::Duration;

use maud::{Markup, html};
use stillpoint_control::report::{Phase, SwapReport};

use crate::cli::format::time;

const WIDTH: f64 = 720.0;
const HEIGHT: f64 = 150.0;
/// Left of the axis, and below it.
const MARGIN: f64 = 24.0;
/// Steps of a distribution for each factor of ten.
const STEPS: i32 = 6;
/// Phases that have colours of their own; others share the last.
const PHASES: [&str; 6] = ["park", "save", "load", "await", "enter", "stand"];
const ROW: f64 = 22.0;

/// How pauses are spread, on a logarithmic axis, with the smallest budget among them as a line.
pub(super) fn distribution(pauses: &[Duration], budget: Option<Duration>) -> Markup {
    let step = |pause: &Duration| {
        let micros = pause.as_secs_f64().max(1e-6) * 1e6;
        (micros.log10() * f64::from(STEPS)).floor() as i32
    };
    let steps: Vec<i32> = pauses.iter().map(step).collect();
    let (Some(&first), Some(&last)) = (steps.iter().min(), steps.iter().max()) else {
        return html! {};
    };
    // Whole tens, and the budget, are always on the axis.
    let end = budget
        .as_ref()
        .map_or(last, |budget| last.max(step(budget)));
    let first = budget
        .as_ref()
        .map_or(first, |budget| first.min(step(budget)));
    let first = first.div_euclid(STEPS) * STEPS;
    let end = (end.div_euclid(STEPS) + 1) * STEPS;
    let slot = (WIDTH - 2.0 * MARGIN) / f64::from(end - first);
    let x = |step: f64| MARGIN + (step - f64::from(first)) * slot;
    let count = |step: i32| steps.iter().filter(|&&s| s == step).count();
    let most = (first..end).map(count).max().unwrap_or(1).max(1);
    let ground = HEIGHT - MARGIN;
    let tall = |n: usize| (ground - 14.0) * n as f64 / most as f64;
    let said = format!("Distribution of {} pauses", pauses.len());
    html! {
        svg viewBox=(format!("0 0 {WIDTH} {HEIGHT}")) width=(WIDTH) role="img" aria-label=(said) {
            @for s in first..end {
                @let n = count(s);
                @if n > 0 {
                    rect.bar x=(x(f64::from(s)) + 1.0) y=(ground - tall(n)) width=(slot - 2.0) height=(tall(n)) {
                        title { (n) " of " (pauses.len()) ", " (edge(s)) " to " (edge(s + 1)) }
                    }
                }
            }
            line.axis x1=(MARGIN) y1=(ground) x2=(WIDTH - MARGIN) y2=(ground) {}
            @for s in (first..=end).step_by(STEPS as usize) {
                line.axis x1=(x(f64::from(s))) y1=(ground) x2=(x(f64::from(s))) y2=(ground + 4.0) {}
                text x=(x(f64::from(s))) y=(ground + 17.0) text-anchor="middle" { (edge(s)) }
            }
            @if let Some(budget) = budget {
                @let at = x((budget.as_secs_f64() * 1e6).log10() * f64::from(STEPS));
                line.limit x1=(at) y1="4" x2=(at) y2=(ground) {}
                @let (near, side) = if at < WIDTH / 2.0 { (at + 4.0, "start") } else { (at - 4.0, "end") };
                text x=(near) y="13" text-anchor=(side) { "budget " (time(budget)) }
            }
        }
    }
}

fn edge(step: i32) -> String {
    time(Duration::from_secs_f64(
        10f64.powf(f64::from(step) / f64::from(STEPS)) * 1e-6,
    ))
}

fn colour(name: &str) -> usize {
    PHASES
        .iter()
        .position(|phase| *phase == name)
        .unwrap_or(PHASES.len())
}

/// Pauses one below the other, each with its phases, all on one scale.
pub(super) fn timeline(pauses: &[(String, &SwapReport)]) -> Markup {
    let total = |report: &SwapReport| dark(report).map(|phase| phase.duration).sum::<Duration>();
    let longest = pauses.iter().map(|(_, report)| total(report)).max();
    let Some(longest) = longest.filter(|longest| !longest.is_zero()) else {
        return html! {};
    };
    let left = 110.0;
    let scale = (WIDTH - left - 70.0) / longest.as_secs_f64();
    let height = ROW * pauses.len() as f64 + 6.0;
    html! {
        svg viewBox=(format!("0 0 {WIDTH} {height}")) width=(WIDTH) role="img" aria-label="Each pause by its phases" {
            @for (row, (name, report)) in pauses.iter().enumerate() {
                @let y = ROW * row as f64 + 4.0;
                text x=(left - 8.0) y=(y + 12.0) text-anchor="end" { (name) }
                (bars(report, left, y, scale))
                text x=(left + total(report).as_secs_f64() * scale + 6.0) y=(y + 12.0) { (time(total(report))) }
            }
        }
        ul.key {
            @for (number, name) in PHASES.iter().chain(&["other"]).enumerate() {
                li { i class=(format!("p{number}")) {} (name) }
            }
        }
    }
}

fn dark(report: &SwapReport) -> impl Iterator<Item = &Phase> {
    report.phases.iter().filter(|phase| phase.in_blackout)
}

fn bars(report: &SwapReport, left: f64, y: f64, scale: f64) -> Markup {
    let mut at = left;
    html! {
        @for phase in dark(report) {
            @let wide = phase.duration.as_secs_f64() * scale;
            rect class=(format!("p{}", colour(&phase.name))) x=(at) y=(y) width=(wide.max(0.3)) height=(ROW - 8.0) {
                title { (phase.name) ", " (time(phase.duration)) }
            }
            ({ at += wide; "" })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_distribution_holds_every_pause_and_the_budget() {
        let ms = Duration::from_millis;
        let pauses = [ms(1), ms(1), ms(3), ms(900)];
        let picture = distribution(&pauses, Some(ms(1000))).into_string();
        let told = picture.matches(" of 4, ").count();
        assert_eq!(told, 3, "{picture}");
        assert!(picture.contains("2 of 4, 1.00 ms to 1.47 ms"), "{picture}");
        assert!(picture.contains("budget 1.00 s"), "{picture}");
        assert_eq!(distribution(&[], None).into_string(), "");
    }
}
