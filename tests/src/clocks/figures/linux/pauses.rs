//! Long pauses of a stock guest: its watchdogs, its clocksource, its wall clock, and its account of
//! stolen time.

use std::time::Duration;

use stillpoint_control::clock::Policy;

use super::{DEAF, LONG, Plan, SLOW, Stage, WALL_NS, change_of};
use crate::clocks::figures::{Figure, receipt_of, worst};
use crate::linux::images::Kernel;
use crate::patience::wait_for;

/// So that the guest's watchdogs look at least once after a pause (Linux: every 4 s).
const WATCHDOG_LOOK: Duration = Duration::from_secs(6);
/// And so that one that was not told has complained.
const COMPLAINT: Duration = Duration::from_secs(30);
/// What a watchdog says that was not told.
const COMPLAINTS: &[&str] = &[
    "soft lockup",
    "hard LOCKUP",
    "rcu: INFO",
    "self-detected stall",
    "hung_task",
    "blocked for more than",
    "clocksource",
    "TSC unstable",
    "workqueue lockup",
];
/// What a stock guest of two vCPUs says on a host that is busy, pauses or not: one of them was not
/// quick enough to be asked.
const LOAD: &str = "read timed out";
/// What vCPUs may wait for their cores during a short pause and what is about it, on a busy machine.
const BUSY: Duration = Duration::from_secs(3);
/// `/proc/stat` counts in hundredths of a second.
const TICK_MS: u64 = 10;

impl Stage<'_> {
    /// Long pauses, and not a word of a watchdog's.
    pub(super) fn long_pauses(&self, plan: Plan) -> anyhow::Result<Vec<Figure>> {
        let clocksource =
            || -> anyhow::Result<String> { Ok(self.guest.health()?.clocksource.current) };
        let (before, mut pauses) = (clocksource()?, Vec::new());
        let earlier = self.guest.dmesg()?.last().map_or(0, |line| line.seq);
        let mut changes = Vec::new();
        let count = plan.pauses;
        for _ in 0..count {
            let report = self.swap(LONG, Policy::Advance)?;
            let receipt = receipt_of(&report)?;
            pauses.push(receipt.pause);
            changes.extend(change_of(&report)?);
            std::thread::sleep(WATCHDOG_LOOK);
        }
        let complaints = self.complaints(earlier)?;
        let after = clocksource()?;
        let told = changes.len();
        let change = worst(changes.into_iter());
        let first = complaints.first().cloned().unwrap_or_default();
        let shortest = pauses.iter().min().copied().unwrap_or_default();
        let longest = pauses.iter().max().copied().unwrap_or_default();
        Ok(vec![
            Figure::new(
                &self.name(&format!(
                    "{count} pauses of {shortest:.1?} to {longest:.1?}"
                )),
                "no complaint, the same clocksource",
                format!(
                    "{} complaints {first}; {before}, {after}; {} called off for their budget",
                    complaints.len(),
                    self.called_off.get()
                ),
                complaints.is_empty() && before == after && shortest >= plan.pause.least,
            ),
            Figure::new(
                &self.name("wall clock over each of them"),
                format!("changes by at most {} µs", WALL_NS / 1000),
                format!("{change} ns against the host ({told} told)"),
                change.abs() <= WALL_NS && told * 2 >= count,
            ),
        ])
    }

    /// What the guest's kernel has logged about lost time since.
    fn complaints(&self, since: u64) -> anyhow::Result<Vec<String>> {
        let lines = self.guest.dmesg()?.into_iter();
        let bad =
            |text: &str| COMPLAINTS.iter().any(|word| text.contains(word)) && !text.contains(LOAD);
        let new = lines.filter(|line| line.seq > since && bad(&line.text));
        Ok(new.map(|line| line.text).collect())
    }

    /// A long pause of which the guest is not told: it must complain, or nothing above is worth a
    /// word.
    pub(super) fn untold(&self) -> anyhow::Result<Figure> {
        let earlier = self.guest.dmesg()?.last().map_or(0, |line| line.seq);
        let report = self.swap(DEAF, Policy::Advance)?;
        let pause = receipt_of(&report)?.pause;
        let complaint = wait_for("a complaint", COMPLAINT, || {
            Ok(self.complaints(earlier)?.into_iter().next())
        });
        let name = self.name(&format!(
            "control: a pause of {pause:.1?} without KVMCLOCK_CTRL"
        ));
        Ok(match complaint {
            Ok(text) => Figure::new(&name, "caught", text, true),
            Err(_) if self.kernel == Kernel::Bookworm.name() => {
                Figure::new(&name, "caught", "no complaint", false)
            }
            // Seen of 7.3: its silence after the pauses above is worth nothing, and that is said.
            Err(_) => Figure::skipped(
                &name,
                "caught",
                "this kernel complains of no such pause, told of it or not; that it is told, pulse's page shows",
            ),
        })
    }

    /// Whether a pause counts as stolen from each vCPU: if the machine's spec says so.
    pub(super) fn stolen(&self, counts: bool) -> anyhow::Result<Figure> {
        let before = self.steal()?;
        let report = self.swap(SLOW.name, Policy::Advance)?;
        let pause = receipt_of(&report)?.pause;
        let after = self.steal()?;
        let more = before
            .iter()
            .zip(&after)
            .map(|(before, after)| after.saturating_sub(*before));
        let more: Vec<_> = more.collect();
        let least = match counts {
            true => pause.saturating_sub(Duration::from_millis(2 * TICK_MS)),
            false => Duration::ZERO,
        };
        let most = match counts {
            true => pause + BUSY,
            false => pause,
        };
        let word = if counts { "on" } else { "off" };
        Ok(Figure::new(
            &self.name(&format!(
                "stolen time over a pause of {pause:.1?}, account {word}"
            )),
            format!("{least:.2?} to {most:.2?} on each vCPU"),
            format!("{more:.2?}"),
            !more.is_empty() && more.iter().all(|more| (least..=most).contains(more)),
        ))
    }

    /// What was stolen from each vCPU, by the guest's account (proc(5), `/proc/stat`, eighth number).
    fn steal(&self) -> anyhow::Result<Vec<Duration>> {
        let stat = self.guest.must_run("cat", &["/proc/stat"])?;
        let each = stat.lines().filter_map(|line| {
            let mut words = line.split_ascii_whitespace();
            let name = words.next()?.strip_prefix("cpu")?;
            let ticks: u64 = words.nth(7)?.parse().ok()?;
            (!name.is_empty()).then(|| Duration::from_millis(ticks * TICK_MS))
        });
        Ok(each.collect())
    }
}
