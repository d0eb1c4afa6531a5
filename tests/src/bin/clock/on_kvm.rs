//! Figures of guests on this host's KVM.

use std::time::Duration;

use stillpoint_tests::clocks::figures::{self, Figure, Part, Pause, Plan};
use stillpoint_tests::linux::images::Kernel;

use crate::Args;
use crate::parts::Parts;

/// Swaps whose every clock is judged.
const SWAPS: usize = 1000;
/// Swaps of a guest with a periodic timer; every tenth swallows ticks.
const PERIODIC: usize = 1000;
/// How late the latecomers come.
const LATE: Duration = Duration::from_secs(20);
/// Swaps of a Linux guest.
const LINUX_SWAPS: usize = 20;
/// In a quick run, or on an emulated host with another kernel than the guest's.
const FEW: usize = 3;
/// Its long pauses.
const PAUSES: usize = 20;

/// Of the bare-metal guest. What a swap costs on an emulated host is of no interest.
pub(crate) fn pulse(parts: &mut Parts, args: &Args) {
    let emulated = args.in_rig.is_some();
    let quick = args.quick || emulated;
    let scale = |full: usize| if quick { full.div_ceil(50) } else { full };
    let late = if quick { LATE / 4 } else { LATE };
    let mut take = |name: &str, part: &dyn Fn() -> anyhow::Result<Vec<Figure>>| {
        if args.part.as_ref().is_none_or(|part| name.contains(part)) {
            parts.take(name, part);
        }
    };
    take("swaps", &|| swaps(scale(SWAPS), emulated));
    take("periodic timer", &|| {
        figures::periodic(scale(PERIODIC), emulated, tell)
    });
    take("latecomers", &|| figures::latecomers(late));
    take("a long pause", &|| figures::long_pause(pause(quick)));
    take("differing TSCs", &figures::apart);
    take("hold", &figures::hold);
    take("negative controls", &figures::controls);
}

fn pause(quick: bool) -> Pause {
    if quick { Pause::SHORT } else { Pause::LONG }
}

fn tell(swap: usize) {
    if swap.is_multiple_of(100) {
        eprintln!("  {swap} swaps");
    }
}

fn swaps(count: usize, emulated: bool) -> anyhow::Result<Vec<Figure>> {
    let mut swaps = figures::swaps(count, tell)?;
    if !emulated {
        swaps.figures.extend(swaps.costs);
    }
    Ok(swaps.figures)
}

/// Of Linux guests with both kernels, or those that are wanted.
pub(crate) fn linux(parts: &mut Parts, args: &Args) {
    let (quick, in_rig) = (args.quick, args.in_rig);
    let wanted = |kernel: &Kernel| args.wants_guest(*kernel);
    for kernel in Kernel::ALL.into_iter().filter(wanted) {
        let is_another = in_rig.is_some_and(|host| host != kernel);
        let few = quick || is_another;
        let plan = Plan {
            part: args.of_guest,
            swaps: if few { FEW } else { LINUX_SWAPS },
            pauses: if quick { 1 } else { PAUSES },
            pause: pause(quick),
            with_control: !quick,
            // Of one of them, so that it is seen on and off.
            steal: kernel == Kernel::Backports,
            may_set_clock: in_rig.is_some(),
        };
        let wants = |part| args.of_guest.is_none_or(|wanted| wanted == part);
        let name = format!("a guest with {}", kernel.name());
        if wants(Part::Swaps) || wants(Part::Pauses) {
            parts.take(&name, || figures::linux(kernel, plan));
        }
        if wants(Part::Ptp) {
            let name = format!("{name} and phc2sys");
            parts.take(&name, || figures::ptp(kernel));
        }
    }
}
