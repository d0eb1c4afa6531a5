//! Every swap as a dot on a log axis, over it a box of the middle half with the median.

use super::svg::{Anchor, Svg};
use crate::run::Measured;
use crate::sample::{Series, Who};
use crate::scene::{BASE, LARGE, MANY, PAIR, SMALL, Scene, VARIED};
use crate::stats::{Ratio, Summary, summary};
use crate::verdict::Report;

const WIDTH: f64 = 980.0;
const LEFT: f64 = 208.0;
const RIGHT: f64 = 762.0;
const TOP: f64 = 128.0;
const GROUP: f64 = 32.0;
const ROW: f64 = 40.0;
const BAND: f64 = 24.0;
/// The guest logs no shorter gap, ms.
const LEAST: f64 = 0.1;
/// Steps of the axis within a decade.
const STEPS: [f64; 3] = [1.0, 2.0, 5.0];
const GROUPS: [(&str, &[Scene]); 5] = [
    ("1 vCPU, 256 MiB", &[BASE]),
    ("2 vCPUs, 256 MiB", &[PAIR]),
    ("1 vCPU, one thing changed, in turns", &VARIED),
    ("Resting vCPUs, in turns", &MANY),
    ("1 vCPU, 256 MiB and 8 GiB, in turns", &[SMALL, LARGE]),
];

/// Milliseconds to places.
struct Axis {
    most: f64,
}

impl Axis {
    fn new(largest: f64) -> Self {
        let most = steps().find(|step| *step >= largest).unwrap_or(largest);
        Self {
            most: most.max(1.0),
        }
    }

    fn x(&self, ms: f64) -> f64 {
        let at = (ms.max(LEAST) / LEAST).ln() / (self.most / LEAST).ln();
        LEFT + at * (RIGHT - LEFT)
    }
}

/// 0.1, 0.2, 0.5, 1, ... ms.
fn steps() -> impl Iterator<Item = f64> {
    (-1..5).flat_map(|decade| STEPS.map(|step| step * 10f64.powi(decade)))
}

/// The distributions of all that was measured.
pub(crate) fn blackout(report: &Report, measured: &Measured) -> String {
    let largest = report.series.iter().map(|row| row.guest.max);
    let axis = Axis::new(largest.fold(0.0, f64::max));
    let mut svg = Svg::new(WIDTH);
    heading(&mut svg, report);
    let mut rows = Svg::new(WIDTH);
    let bottom = groups(&mut rows, &axis, measured);
    grid(&mut svg, &axis, bottom);
    svg.append(rows);
    let facts = &report.environment;
    let foot = format!(
        "{} cores, {}, kernel {}; nothing pinned by the bench; load {:.1} before, {:.1} after",
        facts.cores, facts.cpu, facts.kernel, facts.load_before, facts.load_after
    );
    svg.text(28.0, bottom + 76.0, "small soft", Anchor::Start, &foot);
    svg.finish(
        bottom + 96.0,
        "Guest-visible blackout of a VMM swap beside the floor",
    )
}

fn heading(svg: &mut Svg, report: &Report) {
    let title = "How long a swap of the VMM stops its guest";
    let about = "Longest gap between two TSC readings, as the guest's worst vCPU saw it";
    let about = match report.intervals.first() {
        Some(first) => {
            let Ratio { value, low, high } = first.ratio;
            format!("{about}. 1 vCPU: {value:.2} times the floor (95 %: {low:.2} to {high:.2})")
        }
        None => about.to_owned(),
    };
    svg.heading(title, &about);
    let mut x = 28.0;
    for (class, text, width) in [
        ("ours", "Stillpoint", 92.0),
        ("whole", "not rehearsed", 112.0),
        ("floor", "floor: bare KVM calls", 164.0),
        ("qemu", "QEMU", 64.0),
        ("none", "no swap: as long a window", 188.0),
    ] {
        svg.dot(class, (x + 5.0, 84.0), 5.0, text);
        svg.text(x + 16.0, 88.5, "small", Anchor::Start, text);
        x += width;
    }
    svg.rect("box", (x, 77.0), (26.0, 14.0), "the middle half");
    svg.line("mark", (x + 11.0, 76.0), (x + 11.0, 92.0));
    svg.text(
        x + 34.0,
        88.5,
        "small",
        Anchor::Start,
        "middle half, median; whisker to p90",
    );
}

fn grid(svg: &mut Svg, axis: &Axis, bottom: f64) {
    for step in steps().filter(|step| *step <= axis.most * 1.001) {
        let x = axis.x(step);
        svg.line("grid", (x, TOP - 12.0), (x, bottom + 6.0));
        let label = match step {
            least if least <= LEAST => "≤ 0.1".to_owned(),
            _ => format!("{step:.1}").trim_end_matches(".0").to_owned(),
        };
        svg.text(x, bottom + 24.0, "small soft", Anchor::Middle, &label);
    }
    let middle = f64::midpoint(LEFT, RIGHT);
    svg.text(
        middle,
        bottom + 46.0,
        "",
        Anchor::Middle,
        "blackout, milliseconds (log scale)",
    );
    for (x, head) in [(820.0, "median"), (888.0, "p99"), (950.0, "n")] {
        svg.text(x, TOP - 8.0, "small soft", Anchor::End, head);
    }
}

/// Draws all groups; gives where the last ends.
fn groups(svg: &mut Svg, axis: &Axis, measured: &Measured) -> f64 {
    let mut y = TOP;
    for (title, scenes) in GROUPS {
        let of = |scene: &Scene| Who::ALL.map(|who| measured.get(scene, who));
        let series: Vec<&Series> = scenes.iter().flat_map(of).flatten().collect();
        if series.is_empty() {
            continue;
        }
        svg.text(28.0, y + 14.0, "bold", Anchor::Start, title);
        y += GROUP;
        for one in series {
            let label = match (scenes.len(), one.who) {
                (1, who) => who.name().to_owned(),
                (_, Who::NoSwap) => format!("no swap, {}", one.scene.short()),
                _ => one.scene.short(),
            };
            svg.text(LEFT - 14.0, y + 17.0, "", Anchor::End, &label);
            strip(svg, axis, one, y);
            y += ROW;
        }
        y += 10.0;
    }
    y - 10.0
}

fn strip(svg: &mut Svg, axis: &Axis, series: &Series, y: f64) {
    let mut values = series.guest();
    values.sort_unstable();
    let Some(Summary {
        n,
        p25,
        p50,
        p75,
        p90,
        p99,
        ..
    }) = summary(&values)
    else {
        return;
    };
    let class = match series.who {
        Who::Ours => "dot ours",
        Who::Whole => "dot whole",
        Who::Floor => "dot floor",
        Who::Qemu | Who::QemuStop => "dot qemu",
        Who::NoSwap => "dot none",
    };
    for (index, value) in values.iter().enumerate() {
        // The golden ratio spreads neighbours evenly over the band.
        let spread = (index as f64 * 0.618_034).fract();
        let ms = *value as f64 / 1e6;
        let at = (axis.x(ms), y + spread * BAND);
        svg.dot(class, at, 3.2, &shown(ms));
    }
    let middle = y + BAND / 2.0;
    if p75 > LEAST {
        svg.line("thin", (axis.x(p75), middle), (axis.x(p90), middle));
        let (left, right) = (axis.x(p25), axis.x(p75));
        let title = format!("middle half: {p25:.2} to {p75:.2} ms");
        svg.rect(
            "box",
            (left, y + 3.0),
            ((right - left).max(2.0), BAND - 6.0),
            &title,
        );
        let x = axis.x(p50);
        svg.line("mark", (x, y - 1.0), (x, y + BAND + 1.0));
    }
    svg.text(820.0, y + 17.0, "bold", Anchor::End, &shown(p50));
    svg.text(888.0, y + 17.0, "", Anchor::End, &shown(p99));
    svg.text(950.0, y + 17.0, "soft", Anchor::End, &n.to_string());
}

fn shown(ms: f64) -> String {
    match ms {
        below if below < LEAST => "< 0.1".into(),
        small if small < 10.0 => format!("{small:.2}"),
        large => format!("{large:.1}"),
    }
}
