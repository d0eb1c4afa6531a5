//! vCPUs whose TSCs differ.

use anyhow::ensure;
use stillpoint_control::report::Outcome;

use super::{Figure, receipt_of};
use crate::clocks::Watched;
use crate::releases::Release;
use crate::swap::Terms;

/// What a single setting of kvmclock may miss, ns; it takes microseconds where KVM is emulated.
const ONCE_NS: u64 = 100_000;

/// A guest that has moved one vCPU's TSC: KVM has no masterclock for it then. Each vCPU has its own
/// offset afterwards, and the report says that the clock was set by the lesser way.
pub fn apart() -> anyhow::Result<Vec<Figure>> {
    let (name, bound) = (
        "vCPUs whose TSCs differ",
        "each TSC exact, kvmclock set once, and said so",
    );
    let mut guest = Watched::up(2, "tsc1=1000000 ram=4M")?;
    let seen = guest.swap(Release::Current, &Terms::default())?;
    ensure!(
        seen.report.outcome == Outcome::Moved,
        "{:?}",
        seen.report.reason
    );
    let vcpus = guest.vm.vcpus();
    guest.vm.pulse.wait_progress(&vcpus, 20)?;
    guest.vm.power_off()?;
    let receipt = receipt_of(&seen.report)?;
    if receipt.masterclock_before {
        let why = "this KVM ignores what a guest does to its TSC";
        return Ok(vec![Figure::skipped(name, bound, why)]);
    }
    let error = receipt.kvmclock_error_ns;
    let measured = format!(
        "{:?} cycles off, kvmclock {error:?} ns, {} tries; {:?}",
        receipt.tsc_offset_delta, receipt.tries, receipt.fallback
    );
    let good = receipt.tsc_offset_delta == [0, 0]
        && error.is_some_and(|ns| ns.unsigned_abs() <= ONCE_NS)
        && receipt.tries == 1
        && receipt.fallback.is_some();
    Ok(vec![Figure::new(name, bound, measured, good)])
}
