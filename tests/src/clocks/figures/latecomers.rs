//! vCPUs that run for the first time long after a swap.

use std::time::Duration;

use anyhow::ensure;
use stillpoint_control::report::Outcome;

use super::{Figure, worst};
use crate::clocks::Watched;
use crate::clocks::page::Page;
use crate::console::Console;
use crate::releases::Release;
use crate::swap::Terms;
use crate::vm::{Recipe, Vm};

/// Rounding of one page against another of one clock, ns.
const ROUNDING_NS: u64 = 2;

/// A vCPU that idles and one that is not started, woken `wait` after a swap to `to`: the step that
/// makes in vCPU 0's clock, ns, and how far theirs are from it then.
fn wake_late(to: Release, wait: Duration) -> anyhow::Result<(i64, i64)> {
    let mut guest = Watched {
        vm: Vm::boot(&Recipe::pulse(3, "online=2 mode1=idle ram=4M"))?,
    };
    guest.vm.pulse.wait_online(2)?;
    let swapped = guest.swap(to, &Terms::default())?;
    let report = &swapped.report;
    ensure!(report.outcome == Outcome::Moved, "{:?}", report.reason);
    let before = guest.page(0)?;
    std::thread::sleep(wait);
    let mut console = Console::open(&guest.vm)?;
    console.ask("mode 1 spin", "mode 1 spin")?;
    console.ask("start 2", "started 2")?;
    guest.vm.pulse.wait_progress(&[0, 1, 2], 20)?;
    let now: Vec<Page> = (0..3)
        .map(|v| guest.page(v))
        .collect::<anyhow::Result<_>>()?;
    let step = now[0].error_to(&before);
    let apart = worst(now.iter().map(|page| page.error_to(&now[0])));
    guest.vm.power_off()?;
    Ok((step, apart))
}

/// Latecomers step no clock, and without our measure they do.
pub fn latecomers(wait: Duration) -> anyhow::Result<Vec<Figure>> {
    let (step, apart) = wake_late(Release::Current, wait)?;
    let (control, _) = wake_late(Release::Faulty("spoil=latecomers"), wait)?;
    let within = |ns: i64| ns.unsigned_abs() <= ROUNDING_NS;
    Ok(vec![
        Figure::new(
            &format!("vCPUs halted and offline for {wait:?} after a swap"),
            format!("step the clock by at most {ROUNDING_NS} ns"),
            format!("{step} ns; apart {apart} ns"),
            within(step) && within(apart),
        ),
        Figure::new(
            "control: the same without the early masterclock",
            "caught",
            format!("{control} ns"),
            !within(control),
        ),
    ])
}
