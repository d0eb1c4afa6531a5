//! vmclock and ptp_kvm, as a stock guest has them.

use std::time::{Duration, SystemTime};

use anyhow::Context;
use stillpoint_control::clock::Policy;

use super::Stage;
use crate::clocks::figures::Figure;
use crate::linux::dmesg;
use crate::patience::{PATIENCE, wait_for};

impl Stage<'_> {
    /// Boots with a vmclock device, which the older kernel does not know.
    pub(super) fn boots(&self) -> anyhow::Result<Figure> {
        let complaints = dmesg::complaints(&self.guest.dmesg()?);
        let first = complaints.first().cloned().unwrap_or_default();
        Ok(Figure::new(
            &self.name("boots with a vmclock device"),
            "no complaint",
            format!("{} complaints {first}", complaints.len()),
            complaints.is_empty(),
        ))
    }

    /// Sequence and marker of the guest's vmclock; `None` where its kernel has no driver.
    pub(super) fn vmclock_page(&self) -> anyhow::Result<Option<(u32, u64)>> {
        let script = "test -e /dev/vmclock0 && od -An -tu4 -j12 -N4 /dev/vmclock0 && \
                      od -An -tu8 -j16 -N8 /dev/vmclock0 || true";
        let said = self.guest.must_run("sh", &["-c", script])?;
        let mut words = said.split_ascii_whitespace();
        Ok(match (words.next(), words.next()) {
            (Some(sequence), Some(marker)) => Some((sequence.parse()?, marker.parse()?)),
            _ => None,
        })
    }

    /// How often the event device, which tells of a changed page, has been heard.
    fn events(&self) -> anyhow::Result<u64> {
        let interrupts = self.guest.must_run("cat", &["/proc/interrupts"])?;
        let ged = interrupts.lines().find(|line| line.contains("ACPI:Ged"));
        let words = ged.context("no event device")?.split_ascii_whitespace();
        Ok(words.filter_map(|word| word.parse::<u64>().ok()).sum())
    }

    /// vmclock over a swap.
    pub(super) fn vmclock(&self) -> anyhow::Result<Vec<Figure>> {
        let (before, heard) = (self.vmclock_page()?, self.events()?);
        self.swap(&self.current()?, Policy::Advance)?;
        let event = wait_for("the guest to hear of a swap", PATIENCE, || {
            Ok(Some(self.events()?).filter(|&now| now > heard))
        });
        let after = self.vmclock_page()?;
        let name = self.name("vmclock over a swap");
        let bound = "sequence on by two, marker the same";
        let page = match (before, after) {
            (Some(before), Some(after)) => {
                let good = after == (before.0.wrapping_add(2), before.1);
                Figure::new(&name, bound, format!("{before:?}, {after:?}"), good)
            }
            _ => Figure::skipped(&name, bound, "this kernel has no driver for it"),
        };
        let told = event.map_or(0, |now| now - heard);
        let notified = Figure::new(
            &self.name("vmclock: the guest is notified of a swap"),
            "once",
            format!("{told} times"),
            told == 1,
        );
        Ok(vec![page, notified])
    }

    /// ptp_kvm gives the host's clock, after whatever swaps.
    pub(super) fn ptp_kvm(&self) -> anyhow::Result<Figure> {
        let now = || SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        let before = now()?;
        let clocks = self.guest.agent()?.clocks()?;
        let after = now()?;
        let told = clocks
            .ptp_kvm
            .map(|reading| Duration::from_nanos(reading.ns));
        let good = told.is_some_and(|told| (before..=after).contains(&told));
        let late = told.map(|told| told.saturating_sub(before));
        let took = after - before;
        Ok(Figure::new(
            &self.name("ptp_kvm"),
            "the host's clock while it is asked",
            format!("{late:.1?} after the question, which took {took:.1?}"),
            good,
        ))
    }
}
