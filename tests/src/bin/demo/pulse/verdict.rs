//! What pulse's story comes to.

use std::time::Duration;

use stillpoint_tests::guest::Snapshot;

use crate::table::{Line, Moved, ms, of_swaps};

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
}

impl Verdict {
    /// As lines of the table.
    pub(crate) fn lines(&self) -> Vec<Line> {
        let to = |version| self.moved.iter().filter(|m| m.to == version).count();
        let (newer, older) = (to("0.2.0"), to("0.1.0"));
        let count = format!("{}: {newer} to 0.2.0, {older} to 0.1.0", self.moved.len());
        let mut lines = of_swaps(&self.moved, count);
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
            lines.push(Line::new(&what, text, *kept && *in_time));
        }
        lines
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
        let line = Line::new;
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
}
