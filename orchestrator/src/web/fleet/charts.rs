//! Charts as SVG within the page: each says in words what it shows, for those who don't see it.

use std::time::Duration;

use maud::{Markup, html};

use crate::fleet::record::UnitRecord;
use crate::plan::rollout::seen::Phase;

/// The colour of a unit.
pub(super) fn fill(phase: Phase) -> &'static str {
    match phase {
        Phase::Done => "f-done",
        Phase::Waiting => "f-waiting",
        Phase::Begun | Phase::Watched | Phase::BackBegun | Phase::BackWatched => "f-moving",
        Phase::Failed | Phase::Spoilt | Phase::BackWaiting | Phase::Back | Phase::Stuck => {
            "f-failed"
        }
    }
}

/// A bar of so many cells, one a unit, in the order of the layout.
pub(super) fn bar(units: &[&UnitRecord]) -> Markup {
    let done = units
        .iter()
        .filter(|unit| unit.phase == Phase::Done)
        .count();
    let cell = (480 / units.len().max(1)).clamp(2, 24);
    let width = cell * units.len();
    html! {
        svg role="img" width=(width) height="16" viewBox=(format!("0 0 {width} 16"))
            aria-label=(format!("{done} of {} done", units.len())) {
            @for (at, unit) in units.iter().enumerate() {
                rect x=(at * cell) y="1" width=(cell - 1) height="14" rx="2" class=(fill(unit.phase)) {
                    title { (unit.name()) ": " (unit.phase.words()) }
                }
            }
        }
    }
}

/// Bounds of the blackouts' columns, µs, by twos from 62 µs up.
const COLUMNS: u32 = 16;

fn bound(column: u32) -> Duration {
    Duration::from_nanos(62_500) * 2_u32.pow(column)
}

/// How long blackouts were so far, and the limit.
pub(super) fn blackouts(seen: &[Duration], limit: Option<Duration>) -> Markup {
    let column = |time: Duration| (0..COLUMNS - 1).find(|&at| time <= bound(at));
    let mut counts = vec![0_u32; COLUMNS as usize];
    for &time in seen {
        counts[column(time).unwrap_or(COLUMNS - 1) as usize] += 1;
    }
    let most = counts.iter().copied().max().unwrap_or(0).max(1);
    let longest = seen.iter().max().copied().unwrap_or_default();
    let said = format!("{} blackouts, the longest {}", seen.len(), time(longest));
    let limit = limit.map(|limit| column(limit).unwrap_or(COLUMNS - 1) * 40 + 40);
    html! {
        svg role="img" width="660" height="150" viewBox="0 0 660 150" aria-label=(said) {
            line x1="0" y1="120" x2="640" y2="120" class="f-axis" {}
            @for (at, &count) in (0..COLUMNS).zip(&counts) {
                @let height = count * 100 / most;
                @if count > 0 {
                    rect x=(at * 40 + 4) y=(120 - height) width="32" height=(height) rx="2" class="f-moving" {
                        title { (count) " of up to " (time(bound(at))) }
                    }
                    text x=(at * 40 + 20) y=(114 - height) text-anchor="middle" { (count) }
                }
                @if at % 2 == 0 {
                    text x=(at * 40 + 36) y="138" text-anchor="middle" { (time(bound(at))) }
                }
            }
            @if let Some(x) = limit {
                line x1=(x) y1="8" x2=(x) y2="120" class="f-limit" { title { "the limit" } }
            }
        }
    }
}

/// A time with a fitting unit.
pub(super) fn time(time: Duration) -> String {
    let us = time.as_micros();
    match us {
        0..1_000 => format!("{us} µs"),
        1_000..1_000_000 => format!("{} ms", us / 1_000),
        _ => format!("{} s", us / 1_000_000),
    }
}
