//! `make clock`: every promise about clocks, measured in full length, beside its bound.
//!
//! Prints a table, writes `target/clock/report.json`, and fails if a bound is broken. What this
//! machine can't show is a row that says why.

mod table;

use std::io::Write;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::Context;
use serde::Serialize;
use stillpoint_tests::clocks::figures::{self, Figure, Verdict};
use stillpoint_tests::ground;
use stillpoint_tests::releases::root;

/// Swaps whose every clock is judged.
const SWAPS: usize = 1000;
/// Swaps of a guest with a periodic timer.
const PERIODIC: usize = 50;
/// How late the latecomers come.
const LATE: Duration = Duration::from_secs(20);

#[derive(Serialize)]
struct Report<'a> {
    kernel: String,
    cores: usize,
    seconds: u64,
    figures: &'a [Figure],
}

fn main() -> ExitCode {
    match run() {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("clock: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> anyhow::Result<bool> {
    let quick = std::env::args().any(|arg| arg == "--quick");
    let began = Instant::now();
    let mut figures = match ground::no_kvm() {
        Some(why) => vec![Figure::skipped("everything on /dev/kvm", "", &why)],
        None => on_kvm(quick)?,
    };
    figures.extend(in_linux());
    write!(std::io::stdout(), "{}", table::of(&figures))?;
    let report = Report {
        kernel: rustix::system::uname().release().to_string_lossy().into(),
        cores: ground::cores(),
        seconds: began.elapsed().as_secs(),
        figures: &figures,
    };
    let dir = root().join("target/clock");
    std::fs::create_dir_all(&dir)?;
    let path = dir.join("report.json");
    std::fs::write(&path, serde_json::to_vec_pretty(&report)?)
        .with_context(|| path.display().to_string())?;
    println!("{} s; {}", report.seconds, path.display());
    Ok(figures.iter().all(|f| f.verdict != Verdict::Broken))
}

/// One part after the other; one that fails is a broken row, and the rest goes on.
fn on_kvm(quick: bool) -> anyhow::Result<Vec<Figure>> {
    let scale = |full: usize| if quick { full.div_ceil(20) } else { full };
    let late = if quick { LATE / 10 } else { LATE };
    let (fault, least) = match quick {
        true => ("loaded=slow:2000", Duration::from_secs(2)),
        false => ("loaded=slow:29000", Duration::from_secs(29)),
    };
    type Part<'a> = (
        &'static str,
        Box<dyn Fn() -> anyhow::Result<Vec<Figure>> + 'a>,
    );
    let parts: [Part<'_>; 6] = [
        ("swaps", Box::new(|| swaps(scale(SWAPS)))),
        (
            "periodic timer",
            Box::new(|| figures::periodic(scale(PERIODIC))),
        ),
        ("latecomers", Box::new(move || figures::latecomers(late))),
        (
            "a long pause",
            Box::new(move || figures::long_pause(fault, least)),
        ),
        ("hold", Box::new(figures::hold)),
        ("negative controls", Box::new(figures::controls)),
    ];
    let mut all = Vec::new();
    for (name, part) in parts {
        eprintln!("{name} ...");
        all.extend(part().unwrap_or_else(|error| vec![failed(name, &error)]));
    }
    Ok(all)
}

fn swaps(count: usize) -> anyhow::Result<Vec<Figure>> {
    let progress = |swap: usize| {
        if swap.is_multiple_of(100) {
            eprintln!("  {swap} swaps");
        }
    };
    let mut swaps = figures::swaps(count, progress)?;
    swaps.figures.push(swaps.pauses);
    Ok(swaps.figures)
}

fn failed(name: &str, error: &anyhow::Error) -> Figure {
    Figure {
        name: name.to_owned(),
        bound: "measured".into(),
        measured: format!("{error:#}").lines().next().unwrap_or("").into(),
        verdict: Verdict::Broken,
    }
}

/// What takes a Linux guest.
fn in_linux() -> Vec<Figure> {
    let why = "takes a Linux guest in the rig; not built yet";
    let rows = [
        (
            "wall clock of a Linux guest over a swap",
            "changes by at most 5 µs",
        ),
        ("wall clock over a pause of 30 s", "changes by at most 5 µs"),
        ("host's clock set or slewed in the pause", "moves nothing"),
        (
            "20 pauses of 30 s, kernels 6.1 and 7.3",
            "no watchdog's line",
        ),
        ("hold: wall clock corrected by the agent", "within 1 ms"),
    ];
    rows.iter()
        .map(|(name, bound)| Figure::skipped(name, bound, why))
        .collect()
}
