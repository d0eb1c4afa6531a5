//! Whether a pause can be held: what the predecessor knows of it, before it offers the guest.
//!
//! The rest the successor finds out, which moves the TSC of a vCPU that never ran and reads it back
//! (`machine::build`), and refuses the offer if it stays where it was.

use crate::clock;
use crate::machine::Machine;

/// Why not, if the successor does not say that it will.
pub(super) const NOT_KNOWN: &str =
    "the release to swap to does not know it, so the guest's clocks would jump";

/// Why not.
pub(super) fn check(machine: &Machine) -> Result<(), &'static str> {
    if machine.spec().correction().is_none() {
        return Err(
            "nothing would correct the guest's wall clock after it (the machine has no vsock for \
             its agent, and `clock.correction` does not say that the guest sees to it by ptp)",
        );
    }
    match machine.clock() {
        Ok(now) if clock::is_master(now.flags) => Ok(()),
        _ => Err(
            "KVM's masterclock is off (the host's clocksource is not the TSC, or the guest's \
             vCPUs have TSCs of their own)",
        ),
    }
}
