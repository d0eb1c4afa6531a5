//! Whose time a swap of the host's kernel is: empty kexecs and swaps under guests in turn, as
//! `scenario kexecs` measured them, as figures and as a picture.

use std::fmt::Write;
use std::time::Duration;

use anyhow::{Context, ensure};
use serde_json::Value;

/// A part of a swap, and its colour: those who don't see all colours tell them apart.
const PARTS: [(&str, &str); 8] = [
    ("store the guests", "#0072b2"),
    ("write the disks", "#56b4e9"),
    ("kernel: shutdown, boot, modules", "#c9cdd2"),
    ("the host's init: disks, carve-out", "#f0e442"),
    ("start the daemon", "#e69f00"),
    ("open the store", "#cc79a7"),
    ("wall clock", "#009e73"),
    ("revive the guests", "#d55e00"),
];
/// Which of them is the kernels'.
const KERNEL: usize = 2;

/// One swap, and an empty kexec to compare it with.
#[derive(Clone, Debug, PartialEq)]
pub struct Pair {
    /// The empty kexecs before and after it, to the moment at which `/dev/kvm` could be opened: their mean.
    pub empty: Duration,
    /// The swap: the longest that a guest stood still.
    pub total: Duration,
    /// Its parts, in the order in which they come; they add up to the whole but for what lies between them.
    pub parts: [Duration; PARTS.len()],
}

impl Pair {
    /// What is neither the kernel's shutdown nor its boot, as a part of the whole.
    pub fn share(&self) -> f64 {
        (self.total.as_secs_f64() - self.empty.as_secs_f64()) / self.total.as_secs_f64()
    }

    fn of(swap: &Value, around: [&Value; 2]) -> anyhow::Result<Self> {
        let time = |value: &Value, what: &str| {
            let ns = value.as_u64();
            ns.map(Duration::from_nanos)
                .with_context(|| format!("{what} is missing in {swap:#}"))
        };
        let phase = |name: &str| {
            let phases = swap["phases"].as_array().into_iter().flatten();
            let mut found =
                phases.filter(|phase| phase["name"] == name && phase["in_blackout"] == true);
            time(&found.next().unwrap_or(&Value::Null)["duration_ns"], name)
        };
        let (kvm, command) = (
            time(&swap["kvm_up_ns"], "when KVM was there")?,
            time(&swap["command_up_ns"], "when the command was started")?,
        );
        let start = phase("start")?;
        ensure!(
            kvm <= command && command <= start + Duration::from_millis(500),
            "KVM, the host's command and the daemon did not come in that order: {kvm:?}, {command:?}, {start:?}"
        );
        Ok(Self {
            empty: (time(&around[0]["total_ns"], "the empty kexec before it")?
                + time(&around[1]["total_ns"], "the empty kexec after it")?)
                / 2,
            total: time(&swap["total_ns"], "the swap")?,
            parts: [
                phase("store")?,
                phase("sync")?,
                phase("kernel")? + kvm,
                command - kvm,
                start.saturating_sub(command),
                phase("open")?,
                phase("clock")?,
                phase("adopt")?,
            ],
        })
    }
}

/// All pairs of a run.
#[derive(Clone, Debug)]
pub struct Shares {
    kernel: String,
    ground: String,
    guests: usize,
    pairs: Vec<Pair>,
}

impl Shares {
    /// From the scenario's report.
    pub fn of(report: &Value) -> anyhow::Result<Self> {
        let list = |name: &str| report[name].as_array().cloned().unwrap_or_default();
        let (swaps, empty) = (list("swaps"), list("empty"));
        ensure!(
            empty.len() == swaps.len() + 1,
            "{} empty kexecs are not around each of {} swaps",
            empty.len(),
            swaps.len()
        );
        let around = empty.iter().zip(empty.iter().skip(1));
        let pairs = swaps
            .iter()
            .zip(around)
            .map(|(swap, (before, after))| Pair::of(swap, [before, after]))
            .collect::<anyhow::Result<Vec<_>>>()?;
        ensure!(!pairs.is_empty(), "there are no swaps");
        let text = |name: &str| report[name].as_str().unwrap_or("?").to_owned();
        Ok(Self {
            kernel: text("kernel"),
            ground: text("ground"),
            guests: report["guests"].as_array().map_or(0, Vec::len),
            pairs,
        })
    }

    /// The share of the middle pair.
    pub fn median_share(&self) -> f64 {
        let mut shares: Vec<_> = self.pairs.iter().map(Pair::share).collect();
        shares.sort_by(f64::total_cmp);
        shares[shares.len() / 2]
    }

    /// For people.
    pub fn table(&self) -> String {
        let mut text = format!("{}, {} guests, {}\n", self.kernel, self.guests, self.ground);
        text.push_str("pair   empty    swap   ours");
        for (name, _) in PARTS {
            let _ = write!(text, "  {name}");
        }
        text.push('\n');
        for (at, pair) in self.pairs.iter().enumerate() {
            let (empty, total) = (pair.empty.as_secs_f64(), pair.total.as_secs_f64());
            let share = pair.share() * 100.0;
            let _ = write!(
                text,
                "{:>4}  {empty:>5.2} s {total:>5.2} s {share:>4.1} %",
                at + 1
            );
            for (part, (name, _)) in pair.parts.iter().zip(PARTS) {
                let wide = name.len();
                let _ = write!(text, "  {:>wide$}", format!("{:.2} s", part.as_secs_f64()));
            }
            text.push('\n');
        }
        let _ = writeln!(
            text,
            "our share, the middle one: {:.1} %",
            self.median_share() * 100.0
        );
        text
    }

    /// Two bars for each pair, one above the other; SVG, without scripts or fonts of its own.
    pub fn picture(&self) -> String {
        const WIDE: f64 = 900.0;
        const LEFT: f64 = 92.0;
        const BAR: f64 = 17.0;
        let pair_high = BAR * 2.0 + 16.0;
        let top = 78.0;
        let bottom = top + pair_high * self.pairs.len() as f64;
        let high = bottom + 112.0;
        // A guest that was stopped last did not stand still for all of its storing.
        let bars = |pair: &Pair| pair.parts.iter().sum::<Duration>().max(pair.empty);
        let longest = self.pairs.iter().map(bars);
        let longest = longest.max().unwrap_or_default().as_secs_f64().max(0.1);
        let step = [0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 60.0];
        let step = step
            .into_iter()
            .find(|step| longest / step <= 10.0)
            .unwrap_or(60.0);
        let scale = (WIDE - LEFT - 150.0) / longest;
        let x = |seconds: f64| LEFT + seconds * scale;
        let mut svg = format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDE}\" height=\"{high}\" viewBox=\"0 0 {WIDE} {high}\" \
             font-family=\"sans-serif\" font-size=\"12\" fill=\"#24292f\">\n\
             <rect width=\"{WIDE}\" height=\"{high}\" fill=\"#ffffff\"/>\n\
             <text x=\"{LEFT}\" y=\"26\" font-size=\"16\" font-weight=\"bold\">The host's kernel swapped under {} guests, beside empty kexecs</text>\n\
             <text x=\"{LEFT}\" y=\"46\" fill=\"#57606a\">{} to itself, on an emulated host; our share is what a swap takes longer: {:.1} % in the middle of them</text>\n",
            self.guests,
            escaped(&self.kernel),
            self.median_share() * 100.0
        );
        let mut tick = 0.0;
        while tick <= longest {
            let at = x(tick);
            let _ = writeln!(
                svg,
                "<line x1=\"{at:.1}\" y1=\"{:.1}\" x2=\"{at:.1}\" y2=\"{bottom:.1}\" stroke=\"#e1e4e8\"/>\
                 <text x=\"{at:.1}\" y=\"{:.1}\" text-anchor=\"middle\" fill=\"#57606a\">{tick} s</text>",
                top - 8.0,
                bottom + 16.0
            );
            tick += step;
        }
        for (at, pair) in self.pairs.iter().enumerate() {
            let y = top + pair_high * at as f64;
            let mut bar = |row: f64, name: &str, parts: &[(Duration, &str)], note: &str| {
                let y = y + row * (BAR + 2.0);
                let _ = writeln!(
                    svg,
                    "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{name}</text>",
                    LEFT - 8.0,
                    y + BAR - 4.0
                );
                let mut from = 0.0;
                for (part, colour) in parts {
                    let wide = part.as_secs_f64();
                    let _ = writeln!(
                        svg,
                        "<rect x=\"{:.2}\" y=\"{y:.1}\" width=\"{:.2}\" height=\"{BAR}\" fill=\"{colour}\"/>",
                        x(from),
                        wide * scale
                    );
                    from += wide;
                }
                let _ = writeln!(
                    svg,
                    "<text x=\"{:.1}\" y=\"{:.1}\">{note}</text>",
                    x(from) + 6.0,
                    y + BAR - 4.0
                );
            };
            let empty = format!("{:.2} s", pair.empty.as_secs_f64());
            bar(
                0.0,
                &format!("{} empty", at + 1),
                &[(pair.empty, PARTS[KERNEL].1)],
                &empty,
            );
            let parts: Vec<_> = pair
                .parts
                .iter()
                .copied()
                .zip(PARTS.map(|part| part.1))
                .collect();
            let total = format!(
                "{:.2} s, ours {:.1} %",
                pair.total.as_secs_f64(),
                pair.share() * 100.0
            );
            bar(1.0, "swap", &parts, &total);
        }
        for (at, (name, colour)) in PARTS.iter().enumerate() {
            let (column, row) = ((at % 3) as f64, (at / 3) as f64);
            let (x, y) = (LEFT + column * 250.0, bottom + 36.0 + row * 22.0);
            let _ = writeln!(
                svg,
                "<rect x=\"{x}\" y=\"{:.1}\" width=\"12\" height=\"12\" fill=\"{colour}\"/><text x=\"{:.1}\" y=\"{:.1}\">{name}</text>",
                y,
                x + 18.0,
                y + 10.5
            );
        }
        svg.push_str("</svg>\n");
        svg
    }
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;")
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn report() -> Value {
        let phase = |name: &str, ms: u64, in_blackout: bool| json!({"name": name, "in_blackout": in_blackout, "duration_ns": ms * 1_000_000});
        let swap = json!({
            "total_ns": 10_000_000_000u64,
            "kvm_up_ns": 4_000_000_000u64,
            "command_up_ns": 4_100_000_000u64,
            "phases": [
                phase("load", 3000, false), phase("store", 200, true), phase("sync", 50, true),
                phase("kernel", 5000, true), phase("start", 4300, true), phase("open", 30, true),
                phase("clock", 10, true), phase("adopt", 310, true),
            ],
        });
        let empty = [8000, 8200, 9800, 9600].map(|ms: u64| json!({"total_ns": ms * 1_000_000}));
        json!({"kernel": "6.1 <x>", "ground": "here", "guests": [1, 2], "empty": empty, "swaps": [swap, swap, swap]})
    }

    #[test]
    fn a_share_is_what_a_swap_takes_longer() {
        let shares = Shares::of(&report()).expect("a report");
        assert!((shares.median_share() - 0.1).abs() < 1e-9);
        let parts = shares.pairs[0].parts.map(|part| part.as_millis());
        assert_eq!(parts, [200, 50, 9000, 100, 200, 30, 10, 310]);
        assert!(shares.table().contains("10.0 %"), "{}", shares.table());
    }

    #[test]
    fn the_picture_has_every_part_of_every_pair() {
        let svg = Shares::of(&report()).expect("a report").picture();
        assert_eq!(svg.matches("<rect").count(), 1 + 3 * 9 + PARTS.len());
        assert!(
            svg.contains("6.1 &lt;x>") && svg.ends_with("</svg>\n"),
            "{svg}"
        );
    }

    #[test]
    fn what_is_missing_is_named() {
        let mut report = report();
        report["swaps"][1]["phases"] = json!([]);
        let error = Shares::of(&report).expect_err("no phases").to_string();
        assert!(error.contains("start is missing"), "{error}");
        Shares::of(&json!({"swaps": []})).expect_err("no swaps");
    }
}
