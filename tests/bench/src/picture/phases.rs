//! Where our time goes: a bar of medians for each machine.

use super::svg::{Anchor, Svg};
use crate::sample::Who;
use crate::scene::SMALL;
use crate::verdict::{Phases, Report};

const WIDTH: f64 = 980.0;
const LEFT: f64 = 150.0;
const RIGHT: f64 = 930.0;
const TOP: f64 = 92.0;
const ROW: f64 = 56.0;
const BAR: f64 = 36.0;

/// A phase as it is shown.
struct Shown {
    name: &'static str,
    class: &'static str,
    words: &'static str,
}

const fn shown(name: &'static str, class: &'static str, words: &'static str) -> Shown {
    Shown { name, class, words }
}

const KNOWN: [Shown; 7] = [
    shown("park", "p0", "old: stop every vCPU, finish pending I/O"),
    shown("quiesce", "p1", "old: stop the devices"),
    shown("save", "p2", "old: read all state from KVM and devices"),
    shown(
        "seal",
        "p3",
        "old: write the state file, seal it, send word",
    ),
    shown("load", "s0", "new: decode the state and set it"),
    shown("await", "s1", "new: hear of the give-up, take the guest"),
    shown(
        "enter",
        "s2",
        "new: let every vCPU in (as far as it does not overlap)",
    ),
];
const BETWEEN: Shown = shown("between", "rest", "wake-ups of one process by the other");
const AFTER: Shown = shown(
    "resume",
    "guest",
    "guest: from its entry to its first reading",
);
/// Labels on these are white.
const DEEP: [&str; 3] = ["p0", "p1", "s0"];

/// The bars.
pub(crate) fn phases(report: &Report) -> String {
    let bars: Vec<&Phases> = report
        .phases
        .iter()
        .filter(|p| p.scene.id != SMALL.id)
        .collect();
    let longest = bars.iter().map(|p| total(p) + p.after).fold(0.1, f64::max) * 1.02;
    let x = |ms: f64| LEFT + ms / longest * (RIGHT - LEFT);
    let mut svg = Svg::new(WIDTH);
    svg.heading(
        "Where the blackout goes",
        "Median of each phase while the guest stands still. Blue: the old process; orange: the new one; dashed: the guest itself",
    );
    let bottom = TOP + ROW * bars.len() as f64;
    grid(&mut svg, longest, bottom, x);
    for (n, phases) in bars.iter().enumerate() {
        bar(&mut svg, phases, TOP + ROW * n as f64, x);
    }
    let end = legend(&mut svg, bottom + 70.0);
    svg.finish(end + 20.0, "Where the blackout of a swap goes, by phase")
}

fn total(phases: &Phases) -> f64 {
    phases.medians.iter().map(|m| m.1).sum::<f64>() + phases.between
}

/// 1, 2 or 5 times a power of ten.
fn nice(step: f64) -> f64 {
    let decade = 10f64.powf(step.log10().floor());
    let times = [1.0, 2.0, 5.0, 10.0].into_iter();
    times
        .map(|t| t * decade)
        .find(|t| *t >= step)
        .unwrap_or(step)
}

fn grid(svg: &mut Svg, longest: f64, bottom: f64, x: impl Fn(f64) -> f64) {
    let step = nice(longest / 7.0);
    for n in 0..=(longest / step) as usize {
        let at = x(n as f64 * step);
        svg.line("grid", (at, TOP - 10.0), (at, bottom));
        let label = match n {
            0 => "0".to_owned(),
            _ if step < 0.1 => format!("{:.2}", n as f64 * step),
            _ => format!("{:.1}", n as f64 * step),
        };
        svg.text(at, bottom + 18.0, "small soft", Anchor::Middle, &label);
    }
    let middle = f64::midpoint(LEFT, RIGHT);
    svg.text(middle, bottom + 40.0, "", Anchor::Middle, "milliseconds");
}

fn bar(svg: &mut Svg, phases: &Phases, y: f64, x: impl Fn(f64) -> f64) {
    let title = match phases.who {
        // Below the same machine's.
        Who::Whole => "not rehearsed",
        _ => phases.scene.title,
    };
    svg.text(LEFT - 14.0, y + 22.0, "", Anchor::End, title);
    let ends = [(BETWEEN.name, phases.between), (AFTER.name, phases.after)];
    let all = phases.medians.iter().map(|(name, ms)| (name.as_str(), *ms));
    let mut at = 0.0;
    for (name, ms) in all.chain(ends) {
        let known = KNOWN.iter().chain([&AFTER]).find(|k| k.name == name);
        let class = known.unwrap_or(&BETWEEN).class;
        let (left, right) = (x(at), x(at + ms));
        at += ms;
        // A line of the page's colour between neighbours; nothing for what can't be seen.
        let width = right - left - 1.5;
        if width < 0.4 {
            continue;
        }
        svg.rect(
            class,
            (left, y),
            (width, BAR),
            &format!("{name}: {ms:.3} ms"),
        );
        let label = match class {
            _ if DEEP.contains(&class) => "on",
            "guest" => "small bold",
            _ => "ondark",
        };
        let middle = left + width / 2.0;
        if width > 50.0 {
            svg.text(middle, y + 16.0, label, Anchor::Middle, name);
            svg.text(middle, y + 30.0, label, Anchor::Middle, &format!("{ms:.2}"));
        } else if width > 31.0 {
            svg.text(middle, y + 22.0, label, Anchor::Middle, &format!("{ms:.2}"));
        }
    }
}

/// The legend; gives where it ends. Every figure is in the report, and beside its bar's part.
fn legend(svg: &mut Svg, top: f64) -> f64 {
    let mut y = top;
    for row in KNOWN.iter().chain([&BETWEEN, &AFTER]) {
        svg.rect(row.class, (28.0, y), (14.0, 14.0), row.words);
        svg.text(52.0, y + 11.5, "small bold", Anchor::Start, row.name);
        svg.text(124.0, y + 11.5, "small soft", Anchor::Start, row.words);
        y += 23.0;
    }
    y
}
