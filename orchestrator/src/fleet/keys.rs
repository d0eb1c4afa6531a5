//! Where records are.

use crate::model::{HostName, VmName};

use super::record::RolloutId;

/// All that is looked at for each step: what is so now, not what was.
pub const LIVE: &str = "live/";
/// What hosts say of themselves.
pub const HOSTS: &str = "live/hosts/";
/// Hosts whose daemons are heard.
pub const ALIVE: &str = "live/alive/";
/// Whose a name is.
pub const CLAIMS: &str = "claims/";
/// Hosts whose clocks disagree with the driver's.
pub const CLOCKS: &str = "live/clocks";
/// Hosts that are to be left alone.
pub const CORDONS: &str = "live/cordons/";
/// What hosts say of their guests.
pub const VMS: &str = "live/vms/";
/// Availability sets.
pub const SETS: &str = "sets/";
/// Who drives.
pub const DRIVER: &str = "driver";
/// Raised by each start of a rollout.
pub const OPEN: &str = "open";
/// Rollouts.
pub const ROLLOUTS: &str = "live/rollouts/";
/// What was done, step by step.
pub const HISTORY: &str = "history/";
/// Swaps to be done.
pub const ORDERS: &str = "live/orders/";
/// How far they are.
pub const ANSWERS: &str = "live/answers/";

pub(crate) fn of_host(area: &str, host: &HostName) -> String {
    format!("{area}{host}")
}

pub(crate) fn guests(area: &str, host: &HostName) -> String {
    format!("{area}{host}/")
}

pub(crate) fn of_vm(area: &str, host: &HostName, vm: &VmName) -> String {
    format!("{area}{host}/{vm}")
}

pub(crate) fn rollout(id: &RolloutId) -> String {
    format!("{ROLLOUTS}{id}")
}

/// Steps sort as they happened.
pub(crate) fn step(id: &RolloutId, step: u64) -> String {
    format!("{HISTORY}{id}/{step:08}")
}

/// What stands for the host as a whole beside its VMs: no VM is called so.
pub(crate) const WHOLE_HOST: &str = "@host";

/// Of a VM, or of the host with all its guests.
pub(crate) fn of_unit(area: &str, host: &HostName, vm: Option<&VmName>) -> String {
    match vm {
        Some(vm) => of_vm(area, host, vm),
        None => format!("{area}{host}/{WHOLE_HOST}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_vm_is_called_as_the_host_as_a_whole() {
        VmName::try_from(WHOLE_HOST.to_owned()).expect_err("no name of a VM");
    }
}
