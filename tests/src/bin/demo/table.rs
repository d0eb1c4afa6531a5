//! The table at the end: what was promised, what was seen, and whether it is true.

use std::fmt;
use std::time::Duration;

use serde_json::Value;
use stillpoint_tests::guest::Snapshot;

/// The clock's hard bound.
const CLOCK_BOUND_NS: u64 = 50;

/// A swap that moved.
#[derive(Debug)]
pub(crate) struct Moved {
    to: &'static str,
    state: String,
    host: Duration,
    guest: Option<Duration>,
    clock_ns: Option<i64>,
}

/// A swap that had to be kept.
#[derive(Debug)]
pub(crate) struct Kept {
    /// What the release does wrong.
    pub(crate) what: &'static str,
    /// The guest runs on in the old process, and the command said so.
    pub(crate) kept: bool,
    /// It stood still no longer than the budget allows.
    pub(crate) in_time: bool,
    /// How long it stood still in vain.
    pub(crate) frozen: Duration,
}

/// The whole story.
#[derive(Debug)]
pub(crate) struct Verdict {
    pub(crate) moved: Vec<Moved>,
    pub(crate) kept: Vec<Kept>,
    pub(crate) end: Snapshot,
    pub(crate) took: Duration,
}

impl Moved {
    /// From what `stillpoint swap --json` printed.
    pub(crate) fn read(to: &'static str, answer: &Value) -> Option<Self> {
        let report = &answer["report"];
        let guest = report["blackout"]["guest_ns"].as_array()?;
        Some(Self {
            to,
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

fn ms(time: Duration) -> String {
    format!("{:.2} ms", time.as_secs_f64() * 1e3)
}

/// Least, middle, most.
fn spread<T: Copy + Ord>(values: impl Iterator<Item = T>) -> Option<[T; 3]> {
    let mut all: Vec<T> = values.collect();
    all.sort_unstable();
    Some([*all.first()?, all[all.len() / 2], *all.last()?])
}

/// One line: what, what was seen, whether it is as promised.
struct Line {
    what: String,
    seen: String,
    good: bool,
}

impl Verdict {
    fn lines(&self) -> Vec<Line> {
        let line = |what: &str, seen: String, good| Line {
            what: what.into(),
            seen,
            good,
        };
        let moves = self.moved.iter().filter(|m| m.state == "moved").count();
        let to = |version| self.moved.iter().filter(|m| m.to == version).count();
        let count = format!(
            "{moves} of 10: {} to 0.2.0, {} to 0.1.0",
            to("0.2.0"),
            to("0.1.0")
        );
        let mut lines = vec![line("swaps that moved the guest", count, moves == 10)];
        for (whose, seen) in [
            ("host", spread(self.moved.iter().map(|m| m.host))),
            ("guest", spread(self.moved.iter().filter_map(|m| m.guest))),
        ] {
            let text = seen
                .map(|all| all.map(ms).join("  "))
                .unwrap_or("not measured".into());
            let what = format!("blackout seen by the {whose}, min median max");
            lines.push(line(&what, text, seen.is_some()));
        }
        lines.push(self.clock());
        lines.extend(self.guest_lines());
        for Kept {
            what,
            kept,
            in_time,
            frozen,
        } in &self.kept
        {
            let what = format!("a release that {what}");
            let text = format!(
                "guest stayed with the old one, frozen {} in vain",
                ms(*frozen)
            );
            lines.push(Line {
                what,
                seen: text,
                good: *kept && *in_time,
            });
        }
        lines
    }

    fn clock(&self) -> Line {
        let errors: Vec<i64> = self.moved.iter().filter_map(|m| m.clock_ns).collect();
        let worst = errors.iter().map(|e| e.unsigned_abs()).max();
        Line {
            what: "clock error, worst".into(),
            seen: worst.map_or("not measured".into(), |ns| format!("{ns} ns")),
            good: errors.len() == self.moved.len() && worst.is_some_and(|ns| ns <= CLOCK_BOUND_NS),
        }
    }

    fn guest_lines(&self) -> Vec<Line> {
        let vcpus = &self.end.vcpus;
        let sum = |f: fn(&stillpoint_guest_abi::pulse::Report) -> u64| vcpus.iter().map(f).sum();
        let fired: u64 = sum(|v| v.oneshot.fired + v.deadline.fired);
        let lost: u64 = sum(|v| {
            let open = |t: stillpoint_guest_abi::pulse::Timers| t.armed.saturating_sub(t.fired + 1);
            open(v.oneshot) + open(v.deadline)
        });
        let doubled: u64 = sum(|v| v.oneshot.doubled + v.deadline.doubled);
        let passes: u64 = sum(|v| v.ram_passes);
        let equal = vcpus
            .iter()
            .all(|v| v.ram_errors == 0 && v.ram_checksum == v.ram_expected);
        let back: u64 = sum(|v| v.clock_backwards + v.tsc_backwards) + self.end.globals.warps;
        let reads: u64 = sum(|v| v.clock_reads);
        let others = self.end.faults();
        let line = |what: &str, seen, good| Line {
            what: what.into(),
            seen,
            good,
        };
        vec![
            line(
                "timers lost",
                format!("{lost} of {fired}"),
                lost == 0 && fired > 0,
            ),
            line("timers fired twice", doubled.to_string(), doubled == 0),
            line(
                "clock readings backwards",
                format!("{back} of {reads}"),
                back == 0 && reads > 0,
            ),
            line(
                "RAM checksum",
                format!(
                    "{}, after {passes} passes",
                    if equal { "equal" } else { "NOT equal" }
                ),
                equal && passes > 0,
            ),
            line(
                "anything else the guest minds",
                if others.is_empty() {
                    "nothing".into()
                } else {
                    others.join("; ")
                },
                others.is_empty(),
            ),
        ]
    }

    /// Whether all of it is true.
    pub(crate) fn is_good(&self) -> bool {
        self.lines().iter().all(|line| line.good)
    }
}

/// Prints it.
pub(crate) fn print(verdict: &Verdict) {
    let lines = verdict.lines();
    let width = lines.iter().map(|line| line.what.len()).max().unwrap_or(0);
    let rule = "─".repeat(width + 52);
    println!("\n{rule}");
    for Line { what, seen, good } in &lines {
        println!(" {} {what:<width$}  {seen}", if *good { "✓" } else { "✗" });
    }
    println!("{rule}");
    let end = if verdict.is_good() {
        "All of it true"
    } else {
        "NOT all of it true"
    };
    println!(
        "{end}, in {:.0} s. More: `stillpoint --help`, README.md",
        verdict.took.as_secs_f64()
    );
}
