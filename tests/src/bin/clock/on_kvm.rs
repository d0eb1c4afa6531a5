//! Figures of guests on this host's KVM.

use std::time::{Duration, Instant};

use stillpoint_tests::clocks::figures::{self, Figure, Plan};
use stillpoint_tests::linux::images::Kernel;

use crate::{Args, or_broken};

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
/// A pause of nearly the longest budget that there is, and a short one for a quick run.
const LONG: (&str, Duration) = ("loaded=slow:29000", Duration::from_secs(29));
/// The same where loading takes its time, and what follows must fit into the budget too.
const LONG_IN_RIG: (&str, Duration) = ("loaded=slow:26500", Duration::from_millis(26_500));
const SHORT: (&str, Duration) = ("loaded=slow:2000", Duration::from_secs(2));

/// Of the bare-metal guest. One part after the other; one that fails is a broken row.
/// What a swap costs on an emulated host is of no interest.
pub(crate) fn pulse(quick: bool, emulated: bool, wanted: Option<&str>) -> Vec<Figure> {
    let scale = |full: usize| if quick { full.div_ceil(50) } else { full };
    let late = if quick { LATE / 4 } else { LATE };
    let (fault, least) = if quick { SHORT } else { LONG };
    let mut all = Vec::new();
    let mut take = |name: &str, part: &dyn Fn() -> anyhow::Result<Vec<Figure>>| {
        if wanted.is_some_and(|wanted| !name.contains(wanted)) {
            return;
        }
        let began = Instant::now();
        eprintln!("{name} ...");
        all.extend(or_broken(name, part()));
        eprintln!("{name}: {:.0?}", began.elapsed());
    };
    take("swaps", &|| swaps(scale(SWAPS), emulated));
    take("periodic timer", &|| periodic(scale(PERIODIC), emulated));
    take("latecomers", &|| figures::latecomers(late));
    take("a long pause", &|| figures::long_pause(fault, least));
    take("differing TSCs", &figures::apart);
    take("hold", &figures::hold);
    take("negative controls", &figures::controls);
    all
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

/// Reading and loading a local APIC takes longer on an emulated host than the phase is judged by.
fn periodic(count: usize, emulated: bool) -> anyhow::Result<Vec<Figure>> {
    if emulated {
        let why = "an emulated host takes longer to load a timer than that";
        return Ok(vec![Figure::skipped("periodic timer's phase", "", why)]);
    }
    figures::periodic(count, tell)
}

/// Of Linux guests with both kernels, or those that are wanted.
pub(crate) fn linux(args: &Args) -> Vec<Figure> {
    let (quick, in_rig) = (args.quick, args.in_rig);
    let (fault, least) = match (quick, in_rig) {
        (true, _) => SHORT,
        (false, Some(_)) => LONG_IN_RIG,
        (false, None) => LONG,
    };
    let mut all = Vec::new();
    for kernel in Kernel::ALL
        .into_iter()
        .filter(|&kernel| args.wants_guest(kernel))
    {
        let is_another = in_rig.is_some_and(|host| host != kernel);
        let plan = Plan {
            part: args.of_guest,
            swaps: if quick || is_another {
                FEW
            } else {
                LINUX_SWAPS
            },
            pauses: if quick { 1 } else { PAUSES },
            fault,
            least,
            with_control: !quick,
            // Of one of them, so that it is seen on and off.
            steal: kernel == Kernel::Backports,
            may_set_clock: in_rig.is_some(),
        };
        let name = format!("a guest with {}", kernel.name());
        eprintln!("{name} ...");
        all.extend(or_broken(&name, figures::linux(kernel, plan)));
    }
    all
}
