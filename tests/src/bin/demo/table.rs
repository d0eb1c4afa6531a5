//! The table at the end: what was promised, what was seen, and whether it is true.

use std::fmt;
use std::time::Duration;

use serde_json::Value;

/// The clock's hard bound.
const CLOCK_BOUND_NS: u64 = 50;

/// A swap that moved.
#[derive(Debug)]
pub(crate) struct Moved {
    pub(crate) to: String,
    state: String,
    host: Duration,
    guest: Option<Duration>,
    clock_ns: Option<i64>,
}

impl Moved {
    /// From what `stillpoint swap --json` printed.
    pub(crate) fn read(to: &str, answer: &Value) -> Option<Self> {
        let report = &answer["report"];
        let guest = report["blackout"]["guest_ns"].as_array()?;
        Some(Self {
            to: to.to_owned(),
            state: answer["state"].as_str()?.to_owned(),
            host: Duration::from_nanos(report["blackout"]["host_ns"].as_u64()?),
            guest: guest
                .iter()
                .filter_map(Value::as_u64)
                .max()
                .map(Duration::from_nanos),
            clock_ns: report["clock"]["kvmclock_error_ns"].as_i64(),
        })
    }
}

impl fmt::Display for Moved {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let guest = self.guest.map_or("not seen".into(), ms);
        let clock = self.clock_ns.map_or("?".into(), |ns| format!("{ns:+} ns"));
        write!(
            f,
            "{}  host {:>9}  guest {guest:>9}  clock {clock:>6}",
            self.state,
            ms(self.host)
        )
    }
}

/// Milliseconds, for people.
pub(crate) fn ms(time: Duration) -> String {
    format!("{:.2} ms", time.as_secs_f64() * 1e3)
}

/// Least, middle, most.
fn spread<T: Copy + Ord>(values: impl Iterator<Item = T>) -> Option<[T; 3]> {
    let mut all: Vec<T> = values.collect();
    all.sort_unstable();
    Some([*all.first()?, all[all.len() / 2], *all.last()?])
}

/// One line: what, what was seen, whether it is as promised.
pub(crate) struct Line {
    what: String,
    seen: String,
    good: bool,
}

impl Line {
    pub(crate) fn new(what: &str, seen: String, good: bool) -> Self {
        Self {
            what: what.into(),
            seen,
            good,
        }
    }
}

/// What is to be said of swaps that should all have moved: how many did, how long the host, and
/// the guest where it looked, saw it stand still, and how far the clock is off.
pub(crate) fn of_swaps(moved: &[Moved], count: String) -> Vec<Line> {
    let all = moved.iter().all(|m| m.state == "moved");
    let mut lines = vec![Line::new("swaps that moved the guest", count, all)];
    let host = spread(moved.iter().map(|m| m.host));
    let guest = spread(moved.iter().filter_map(|m| m.guest));
    for (whose, seen) in [("host", host), ("guest", guest)] {
        let Some(seen) = seen else { continue };
        let what = format!("blackout seen by the {whose}, min median max");
        lines.push(Line::new(&what, seen.map(ms).join("  "), true));
    }
    let errors: Vec<i64> = moved.iter().filter_map(|m| m.clock_ns).collect();
    let worst = errors.iter().map(|e| e.unsigned_abs()).max();
    lines.push(Line::new(
        "clock error, worst",
        worst.map_or("not measured".into(), |ns| format!("{ns} ns")),
        errors.len() == moved.len() && worst.is_some_and(|ns| ns <= CLOCK_BOUND_NS),
    ));
    lines
}

/// Prints it, and tells whether all of it is true.
pub(crate) fn print(lines: &[Line], took: Duration) -> bool {
    let width = lines.iter().map(|line| line.what.len()).max().unwrap_or(0);
    let rule = "─".repeat(width + 52);
    println!("\n{rule}");
    for Line { what, seen, good } in lines {
        println!(" {} {what:<width$}  {seen}", if *good { "✓" } else { "✗" });
    }
    println!("{rule}");
    let good = lines.iter().all(|line| line.good);
    let end = if good {
        "All of it true"
    } else {
        "NOT all of it true"
    };
    let took = took.as_secs_f64();
    println!("{end}, in {took:.0} s. More: `stillpoint --help`, README.md");
    good
}
