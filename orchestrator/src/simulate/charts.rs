//! What simulations came to, as pictures: SVG, light, without scripts or fonts of their own.

use kuva::prelude::*;

use super::cost::Cost;
use super::{Outcome, Sample};

/// Colours that those who don't see all colours tell apart too.
const COLOURS: [&str; 6] = [
    "#0072b2", "#e69f00", "#d55e00", "#cc79a7", "#009e73", "#56606b",
];
/// More points than this are more than a picture has columns.
const POINTS: usize = 400;

/// The share of VMs on the new release, over time; one line an outcome.
pub fn patched(outcomes: &[Outcome]) -> String {
    let lines = outcomes.iter().zip(COLOURS).map(|(outcome, colour)| {
        let share = |s: &Sample| f64::from(s.on_new) * 100.0 / f64::from(outcome.vms.max(1));
        line(points(&outcome.samples, share), colour).with_legend(outcome.name.clone())
    });
    let plots: Vec<Plot> = lines.map(Plot::Line).collect();
    let layout = titled(
        &plots,
        "VMs on the new release",
        "hours since the start",
        "% of all VMs",
    );
    draw(plots, layout.with_y_axis_min(0.0).with_y_axis_max(100.0))
}

/// How many VMs are held by the rollout, and how many are ill for other reasons.
pub fn held(outcome: &Outcome) -> String {
    let samples = &outcome.samples;
    let held = points(samples, |sample| f64::from(sample.held));
    let ill = points(samples, |sample| f64::from(sample.ill));
    let plots = vec![
        Plot::Line(line(held, COLOURS[0]).with_legend("swapped and watched")),
        Plot::Line(line(ill, COLOURS[2]).with_legend("ill for other reasons")),
    ];
    let title = format!("VMs that count as away: {}", outcome.name);
    let layout = titled(&plots, &title, "hours since the start", "VMs");
    draw(plots, layout.with_y_axis_min(0.0))
}

/// How many guests a release breaks before it is stopped, on average, by the share of guests that it breaks.
pub fn blast(staged: &[(f64, f64)], unstaged: &[(f64, f64)], vms: u32) -> String {
    let series = |points: &[(f64, f64)], colour: &str, name: &str| {
        // On such axes nothing is nowhere.
        let points = points
            .iter()
            .map(|&(share, broken)| (share * 100.0, broken.max(0.1)));
        Plot::Line(line(points.collect(), colour).with_legend(name))
    };
    let plots = vec![
        series(unstaged, COLOURS[2], "all at once, up to the limits"),
        series(staged, COLOURS[0], "canaries, 1 %, then all"),
    ];
    let title = format!("Guests broken before it was stopped, of {}", grouped(vms));
    let layout = titled(
        &plots,
        &title,
        "% of guests that the release breaks",
        "guests",
    );
    draw(plots, layout.with_log_scale())
}

/// What one plan costs, by the number of VMs.
pub fn cost(costs: &[Cost]) -> String {
    let series = |of: fn(&Cost) -> f64, colour: &str, name: &str| {
        let points = costs.iter().map(|cost| (f64::from(cost.vms), of(cost)));
        Plot::Line(line(points.collect(), colour).with_legend(name))
    };
    let linear = costs.last().map(|last| {
        let ends = costs.iter().take(1).chain(costs.last());
        let scale = last.worst_ms / f64::from(last.vms);
        let points = ends.map(|cost| (f64::from(cost.vms), f64::from(cost.vms) * scale));
        Plot::Line(
            line(points.collect(), "#8a929a")
                .with_dashed()
                .with_legend("linear"),
        )
    });
    let mut plots: Vec<Plot> = linear.into_iter().collect();
    plots.push(series(
        |cost| cost.worst_ms,
        COLOURS[2],
        "every VM looked into",
    ));
    plots.push(series(|cost| cost.usual_ms, COLOURS[0], "1 % at once"));
    let layout = titled(&plots, "What one plan costs", "VMs", "ms of processor time");
    draw(plots, layout.with_log_scale())
}

fn line(points: Vec<(f64, f64)>, colour: &str) -> LinePlot {
    LinePlot::new()
        .with_data(points)
        .with_color(colour)
        .with_stroke_width(2.0)
}

fn titled(plots: &[Plot], title: &str, x: &str, y: &str) -> Layout {
    Layout::auto_from_plots(plots)
        .with_title(title)
        .with_x_label(x)
        .with_y_label(y)
        .with_width(860.0)
        .with_height(420.0)
}

fn draw(plots: Vec<Plot>, layout: Layout) -> String {
    render_to_svg(plots, layout)
}

fn points(samples: &[Sample], of: impl Fn(&Sample) -> f64) -> Vec<(f64, f64)> {
    let step = samples.len().div_ceil(POINTS).max(1);
    let last = samples.len().saturating_sub(1);
    let kept = samples
        .iter()
        .enumerate()
        .filter(|(at, _)| at % step == 0 || *at == last);
    kept.map(|(_, sample)| (sample.hours, of(sample))).collect()
}

/// A number with its thousands apart.
pub fn grouped(number: u32) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            text.push(' ');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn thousands_are_apart() {
        let shown = [0, 999, 1_000, 1_234_567].map(grouped);
        assert_eq!(shown, ["0", "999", "1 000", "1 234 567"]);
    }

    #[test]
    fn a_picture_is_svg_and_says_what_it_shows() {
        let svg = blast(
            &[(0.001, 0.0), (1.0, 30.0)],
            &[(0.001, 90.0), (1.0, 900.0)],
            10_000,
        );
        assert!(
            svg.starts_with("<svg") && svg.contains("of 10 000"),
            "{svg}"
        );
    }
}
