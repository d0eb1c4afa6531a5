//! A VM's record as the carve-out keeps it, for a daemon whose store did not come along.

use serde::{Deserialize, Serialize};
use stillpoint_control::secret::{Secret, hex, unhex};
use stillpoint_control::spec::MachineSpec;

use crate::execute::unix_ns;
use crate::model::{Profile, VmName, VmRecord, VmState, Wanted};

/// A VM's record as the carve-out keeps it.
#[derive(Debug, Serialize, Deserialize)]
struct KeptVm {
    spec: MachineSpec,
    profile: Profile,
    release: String,
    secret: String,
    swaps: u64,
    created_at_unix_ns: u64,
}

/// What a daemon with an empty store needs to know of a VM.
pub(in crate::execute) fn kept(vm: &VmRecord) -> String {
    let kept = KeptVm {
        spec: vm.spec.clone(),
        profile: vm.profile.clone(),
        release: vm.release.clone(),
        secret: hex(vm.secret.as_bytes()),
        swaps: vm.swaps,
        created_at_unix_ns: vm.created_at_unix_ns,
    };
    serde_json::to_string(&kept).unwrap_or_default()
}

pub(super) fn restored(text: &str) -> Result<VmRecord, String> {
    let kept: KeptVm = serde_json::from_str(text).map_err(|e| e.to_string())?;
    let secret = unhex(&kept.secret).and_then(|bytes| Secret::from_bytes(&bytes));
    let name = VmName::try_from(kept.spec.name.clone()).map_err(|e| e.to_string())?;
    Ok(VmRecord {
        name,
        spec: kept.spec,
        profile: kept.profile,
        release: kept.release,
        wanted: Wanted::Running,
        state: VmState::Starting,
        reason: None,
        process: None,
        secret: secret.ok_or("its secret is no secret")?,
        swaps: kept.swaps,
        created_at_unix_ns: kept.created_at_unix_ns,
        changed_at_unix_ns: unix_ns(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_vm_is_known_again_from_what_the_carve_out_keeps() {
        let text = r#"{"name":"a","kernel":{"path":"/k"}}"#;
        let vm = VmRecord {
            name: VmName::try_from("a".to_owned()).expect("a name"),
            spec: MachineSpec::from_json(text).expect("a spec"),
            profile: Profile::default(),
            release: "0.2.0".into(),
            wanted: Wanted::Running,
            state: VmState::Starting,
            reason: None,
            process: None,
            secret: Secret::random().expect("random"),
            swaps: 3,
            created_at_unix_ns: 7,
            changed_at_unix_ns: 0,
        };
        let mut again = restored(&kept(&vm)).expect("readable");
        again.changed_at_unix_ns = 0;
        assert_eq!(again, vm);
        restored("{}").expect_err("nothing in it");
    }
}
