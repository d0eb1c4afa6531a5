//! Cards for tests: of a host that is one to swap something on, and of a guest that is well.

use super::{ComponentCard, HostCard, VmCard};
use crate::model::{Labels, Moment, VmState};
use crate::plan::rollout::seen::Health;

/// A host that has releases `good` and `next` of the VMM, and `next` of all else.
pub(crate) fn host() -> HostCard {
    let runs = |runs: &str| ComponentCard {
        runs: runs.into(),
        releases: vec!["next".into()],
    };
    HostCard {
        zone: "z".into(),
        fault_domain: "r".into(),
        labels: Labels::new(),
        releases: vec!["good".into(), "next".into()],
        kernel: runs("6.1.0"),
        kvm: runs("as booted"),
        daemon: "0".into(),
    }
}

/// A guest that runs by `good`, in this set if in any.
pub(crate) fn guest(set: Option<&str>, domain: u16) -> VmCard {
    VmCard {
        set: set.map(str::to_owned),
        domain,
        state: VmState::Running,
        release: "good".into(),
        health: Health::Well,
        ailment: None,
        since: Moment(1),
        swap: None,
        busy: false,
    }
}
