//! KVM's modules, exchanged under guests that have let go of them.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::host_swap::{HostSwap, HostSwapState};

/// A module of the kernel, as it is loaded or to be loaded.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Module {
    /// Its name, such as `kvm_amd`.
    pub name: String,
    /// Its file.
    pub file: String,
    /// Its parameters that are told, `name=value`.
    pub parameters: Vec<String>,
}

/// What is exchanged of KVM, and what was there before.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct KvmSwap {
    /// What is loaded, in this order. Empty: the operator's command does all of it.
    pub to: Vec<Module>,
    /// What was there: the way back, in the order in which it is loaded.
    pub before: Vec<Module>,
    /// The release of KVM that it brings, if a rollout named one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub release: Option<String>,
    /// The release that was there before, as far as the daemon knew.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from: Option<String>,
    /// On which of the two the guests came back, once that is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub came_back_on: Option<CameBackOn>,
    /// The start of the kernel in which it was done: another one loads what is on the disk.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub boot_id: String,
}

/// On which modules guests came back.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum CameBackOn {
    /// What was to be loaded.
    New,
    /// What was there before.
    Old,
}

/// What is said of a host's KVM of which no exchange is known since its kernel started.
pub const AS_BOOTED: &str = "as booted";
/// The same after an exchange by hand, which names no release.
const BY_HAND: &str = "by hand";
/// The same after one of whose end nobody knows.
const NOT_KNOWN: &str = "not known";

/// The release of KVM that a host runs after these swaps of it, in this start of its kernel. What is no
/// release's name has a space in it.
pub fn kvm_release(swaps: &[HostSwap], boot_id: &str) -> String {
    let of_kvm = swaps
        .iter()
        .filter_map(|swap| Some((swap, swap.kvm.as_ref()?)));
    let counts = |(swap, kvm): &(&HostSwap, &KvmSwap)| {
        let happened = swap.state.is_over() && swap.state != HostSwapState::Refused;
        happened && kvm.boot_id == boot_id && kvm.came_back_on != Some(CameBackOn::Old)
    };
    let last = of_kvm
        .filter(counts)
        .max_by_key(|(swap, _)| swap.asked_at_unix_ns);
    match last.map(|(_, kvm)| (kvm.came_back_on, &kvm.release)) {
        None => AS_BOOTED.into(),
        Some((None, _)) => NOT_KNOWN.into(),
        Some((Some(_), release)) => release.clone().unwrap_or_else(|| BY_HAND.into()),
    }
}

/// Whether KVM's modules could be exchanged now.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct KvmCheck {
    /// What would be loaded in place of what; absent where that can't be told.
    pub swap: Option<KvmSwap>,
    /// The guests that would stand still.
    pub vms: Vec<String>,
    /// What stands in the way; nothing if it would work.
    pub problems: Vec<String>,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::SwapId;

    fn done(at: u64, release: Option<&str>, on: Option<CameBackOn>) -> HostSwap {
        let kvm = KvmSwap {
            release: release.map(str::to_owned),
            came_back_on: on,
            boot_id: "now".into(),
            ..KvmSwap::default()
        };
        HostSwap {
            kvm: Some(kvm),
            state: HostSwapState::Failed,
            ..HostSwap::wanted(SwapId(format!("x{}", 9 - at)), Vec::new(), 1, at)
        }
    }

    #[test]
    fn what_runs_is_what_guests_came_back_on_last_since_the_kernel_started() {
        let (new, old) = (Some(CameBackOn::New), Some(CameBackOn::Old));
        assert_eq!(kvm_release(&[], "now"), AS_BOOTED);
        let mut all = vec![done(1, Some("a"), new), done(2, Some("b"), old)];
        assert_eq!(kvm_release(&all, "now"), "a");
        assert_eq!(kvm_release(&all, "later"), AS_BOOTED);
        all.push(done(3, None, new));
        assert_eq!(kvm_release(&all, "now"), BY_HAND);
        all.push(done(4, Some("c"), None));
        assert_eq!(kvm_release(&all, "now"), NOT_KNOWN);
        all.last_mut().expect("it").state = HostSwapState::Refused;
        assert_eq!(kvm_release(&all, "now"), BY_HAND);
    }
}
