//! Every machine that was crossed, as a field of figures.

use super::svg::{Anchor, Svg};
use crate::full::cell::{BUSY, Cell, DUTIES, MEMORY, Outcome, PAGES, Taken, VCPUS, worst_unqueued};

const WIDTH: f64 = 980.0;
const LEFT: f64 = 250.0;
const TOP: f64 = 138.0;
const COLUMN: f64 = 84.0;
const ROW: f64 = 26.0;
/// Between what is busy and what rests, and between kinds of pages.
const GAP: f64 = 16.0;
/// Up to so many ms: a class, and that of the text on it. The last takes all that is longer.
const SHADES: [(f64, &str, &str); 6] = [
    (0.5, "h0", "onlight"),
    (0.75, "h1", "onlight"),
    (1.0, "h2", "onlight"),
    (1.5, "h3", "on"),
    (2.5, "h4", "on"),
    (f64::INFINITY, "h5", "on"),
];

/// The field.
pub(crate) fn crossing(taken: &[Taken]) -> String {
    let mut svg = Svg::new(WIDTH);
    svg.heading(
        "How long a vCPU is out of its guest, on every machine",
        "Median of a machine's swaps, ms, by the host: its worst vCPU, less what that one waited for a core",
    );
    heads(&mut svg);
    let mut y = TOP;
    for pages in PAGES {
        for memory_mib in MEMORY {
            for touched in [false, true] {
                let row = Cell {
                    vcpus: 1,
                    memory_mib,
                    touched,
                    pages,
                    duty: BUSY,
                };
                let words = if touched { "touched" } else { "untouched" };
                let label = format!("{}, {} MiB {words}", row.pages_word(), row.memory_mib);
                svg.text(LEFT - 14.0, y + 17.0, "small", Anchor::End, &label);
                columns(|x, vcpus, duty| {
                    let cell = Cell { vcpus, duty, ..row };
                    let of = taken.iter().find(|taken| taken.cell == cell);
                    field(&mut svg, (x, y), &cell, of);
                });
                y += ROW;
            }
        }
        y += GAP;
    }
    legend(&mut svg, y + 8.0);
    svg.finish(
        y + 56.0,
        "Median time out of the guest for each machine of the crossing",
    )
}

/// Calls back with where each column begins, and what it is of.
fn columns(mut each: impl FnMut(f64, u8, u8)) {
    let mut x = LEFT;
    for duty in DUTIES {
        for vcpus in VCPUS {
            each(x, vcpus, duty);
            x += COLUMN;
        }
        x += GAP;
    }
}

fn heads(svg: &mut Svg) {
    columns(|x, vcpus, duty| {
        let middle = x + COLUMN / 2.0;
        let s = if vcpus == 1 { "" } else { "s" };
        let head = format!("{vcpus} vCPU{s}");
        svg.text(middle, TOP - 12.0, "small bold", Anchor::Middle, &head);
        if vcpus == VCPUS[0] {
            let word = if duty == BUSY { "busy" } else { "resting" };
            svg.text(x, TOP - 32.0, "small soft", Anchor::Start, word);
        }
    });
}

fn out(of: &Outcome) -> Option<f64> {
    match of {
        Outcome::Measured { swaps, .. } => worst_unqueued(swaps),
        Outcome::LeftOut(_) => None,
    }
}

fn field(svg: &mut Svg, at: (f64, f64), cell: &Cell, of: Option<&Taken>) {
    let (x, y) = at;
    let size = (COLUMN - 3.0, ROW - 3.0);
    let middle = (x + size.0 / 2.0, y + 16.0);
    let title = cell.title();
    match of.map(|taken| (out(&taken.outcome), &taken.outcome)) {
        Some((Some(ms), _)) => {
            let shade = SHADES.iter().find(|(most, ..)| ms <= *most);
            let (_, class, text) = shade.unwrap_or(&SHADES[SHADES.len() - 1]);
            svg.rect(class, at, size, &format!("{title}: {ms:.2} ms"));
            svg.text(
                middle.0,
                middle.1,
                text,
                Anchor::Middle,
                &format!("{ms:.2}"),
            );
        }
        Some((None, Outcome::LeftOut(why))) => {
            svg.rect("left", at, size, &format!("{title}: {why}"))
        }
        _ => svg.rect("left", at, size, &format!("{title}: not measured")),
    }
}

fn legend(svg: &mut Svg, y: f64) {
    let mut x = LEFT;
    let mut from = 0.0;
    for (most, class, _) in SHADES {
        svg.rect(class, (x, y), (18.0, 14.0), "");
        let words = match most.is_finite() {
            true => format!("{from} to {most} ms"),
            false => format!("over {from} ms"),
        };
        svg.text(x + 24.0, y + 12.0, "small", Anchor::Start, &words);
        (x, from) = (x + 112.0, most);
    }
}
