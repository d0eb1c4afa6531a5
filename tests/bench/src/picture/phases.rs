//! Where our time goes: a bar of medians for each machine.

use super::svg::{Anchor, Svg};
use crate::scene::SMALL;
use crate::verdict::{Phases, Report};

const WIDTH: f64 = 980.0;
const LEFT: f64 = 150.0;
const RIGHT: f64 = 930.0;
const TOP: f64 = 126.0;
const ROW: f64 = 62.0;
const BAR: f64 = 34.0;
/// What each phase is, in order: name, class, whether its label is white, in words.
const KNOWN: [(&str, &str, bool, &str); 7] = [
    ("park", "p0", true, "stop every vCPU, finish pending I/O"),
    ("quiesce", "p1", true, "stop the devices"),
    ("save", "p2", false, "read all state from KVM and devices"),
    (
        "seal",
        "p3",
        false,
        "write the state file, seal it, send word",
    ),
    ("load", "s0", true, "decode the state and set it"),
    ("await", "s1", false, "give-up and take: who owns the guest"),
    (
        "enter",
        "s2",
        false,
        "clock, then the first entry of every vCPU",
    ),
];
const BETWEEN: (&str, &str, bool, &str) = (
    "between",
    "rest",
    false,
    "wake-ups of one process by the other",
);

/// The bars.
pub(crate) fn phases(report: &Report) -> String {
    let bars: Vec<&Phases> = report
        .phases
        .iter()
        .filter(|p| p.scene.id != SMALL.id)
        .collect();
    let longest = bars.iter().map(|p| p.host.max(total(p)).max(p.guest));
    let longest = longest.fold(0.1, f64::max) * 1.04;
    let x = |ms: f64| LEFT + ms / longest * (RIGHT - LEFT);
    let mut svg = Svg::new(WIDTH);
    svg.text(
        28.0,
        38.0,
        "title",
        Anchor::Start,
        "Where the blackout goes",
    );
    let about = "Median of each phase while the guest stands still; blue: the old process, orange: the new one.";
    svg.text(28.0, 60.0, "soft", Anchor::Start, about);
    svg.line("mark", (31.0, 76.0), (31.0, 92.0));
    let tick = "guest-visible blackout, median (the worst vCPU)";
    svg.text(44.0, 88.5, "small", Anchor::Start, tick);
    let bottom = TOP + ROW * bars.len() as f64;
    let step = nice(longest / 7.0);
    for n in 0..=(longest / step) as usize {
        let at = x(n as f64 * step);
        svg.line("grid", (at, TOP - 14.0), (at, bottom));
        let label = format!("{:.2}", n as f64 * step);
        let label = label.trim_end_matches('0').trim_end_matches('.');
        let label = if label.is_empty() { "0" } else { label };
        svg.text(at, bottom + 18.0, "small soft", Anchor::Middle, label);
    }
    let middle = f64::midpoint(LEFT, RIGHT);
    svg.text(middle, bottom + 40.0, "", Anchor::Middle, "milliseconds");
    for (n, phases) in bars.iter().enumerate() {
        bar(&mut svg, phases, TOP + ROW * n as f64, x);
    }
    let end = legend(&mut svg, bottom + 62.0);
    svg.finish(end + 14.0, "Where the blackout of a swap goes, by phase")
}

fn total(phases: &Phases) -> f64 {
    phases.medians.iter().map(|m| m.1).sum::<f64>() + phases.between
}

/// 1, 2 or 5 times a power of ten.
fn nice(step: f64) -> f64 {
    let decade = 10f64.powf(step.log10().floor());
    let times = [1.0, 2.0, 5.0, 10.0]
        .into_iter()
        .find(|t| t * decade >= step);
    times.unwrap_or(10.0) * decade
}

fn bar(svg: &mut Svg, phases: &Phases, y: f64, x: impl Fn(f64) -> f64) {
    svg.text(LEFT - 14.0, y + 21.0, "", Anchor::End, phases.scene.title);
    let between = (BETWEEN.0.to_owned(), phases.between);
    let mut at = 0.0;
    for (name, ms) in phases.medians.iter().chain([&between]) {
        let known = KNOWN.iter().find(|k| k.0 == name).unwrap_or(&BETWEEN);
        let (left, right) = (x(at), x(at + ms));
        at += ms;
        // A line of the page's colour between neighbours.
        let width = (right - left - 1.5).max(0.5);
        svg.rect(
            known.1,
            (left, y),
            (width, BAR),
            &format!("{name}: {ms:.3} ms"),
        );
        let class = if known.2 { "on" } else { "ondark" };
        let middle = f64::midpoint(left, right);
        if width > 54.0 {
            svg.text(middle, y + 15.0, class, Anchor::Middle, name);
            svg.text(middle, y + 29.0, class, Anchor::Middle, &format!("{ms:.2}"));
        } else if width > 30.0 {
            svg.text(middle, y + 21.0, class, Anchor::Middle, &format!("{ms:.2}"));
        }
    }
    let guest = x(phases.guest);
    svg.line("mark", (guest, y - 5.0), (guest, y + BAR + 5.0));
    let label = format!("{:.2}", phases.guest);
    svg.text(guest, y + BAR + 18.0, "small bold", Anchor::Middle, &label);
}

/// Two columns; gives where it ends.
fn legend(svg: &mut Svg, top: f64) -> f64 {
    let rows = (KNOWN.len() + 1).div_ceil(2);
    for (n, (name, class, _, words)) in KNOWN.iter().chain([&BETWEEN]).enumerate() {
        let (x, y) = (
            28.0 + 470.0 * (n / rows) as f64,
            top + 24.0 * (n % rows) as f64,
        );
        svg.rect(class, (x, y), (14.0, 14.0), words);
        svg.text(x + 24.0, y + 11.5, "small bold", Anchor::Start, name);
        svg.text(x + 86.0, y + 11.5, "small soft", Anchor::Start, words);
    }
    top + 24.0 * rows as f64
}
