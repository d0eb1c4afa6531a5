//! What is written in the shared store. Only grows: a field that is new has a default that means "as
//! before", so daemons of two versions share a store.

mod order;
#[cfg(test)]
pub(crate) mod samples;

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::clocks::Skew;
pub use crate::model::RolloutId;
use crate::model::{GateSaid, HostName, Labels, Moment, Policy, Rung, SwapId, VmName, VmState};
use crate::plan::rollout::State;
use crate::plan::rollout::seen::{Health, Phase, Progress};
pub use order::{Answer, Far, Order};

/// What a host says of itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostCard {
    /// Its zone.
    pub zone: String,
    /// Its fault domain.
    pub fault_domain: String,
    /// Its labels.
    #[serde(default, skip_serializing_if = "Labels::is_empty")]
    pub labels: Labels,
    /// Versions of the VMM that it has.
    pub releases: Vec<String>,
    /// Its KVM.
    #[serde(default)]
    pub kvm: ComponentCard,
    /// Its kernel.
    #[serde(default)]
    pub kernel: ComponentCard,
    /// Version of its daemon.
    pub daemon: String,
}

impl HostCard {
    /// Whether the host has that release of what is swapped.
    pub fn has(&self, rung: Rung, version: &str) -> bool {
        let releases = match rung {
            Rung::Vmm => &self.releases,
            Rung::Backend => return false,
            Rung::Kvm | Rung::Kernel => &self.whole(rung).releases,
        };
        releases.iter().any(|release| release == version)
    }

    /// What it says of a component that is swapped with all guests.
    pub fn whole(&self, rung: Rung) -> &ComponentCard {
        match rung {
            Rung::Kernel => &self.kernel,
            _ => &self.kvm,
        }
    }
}

/// What a host says of a component that is swapped with all its guests.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ComponentCard {
    /// The release that it runs, or in words what else; empty of a daemon that doesn't say.
    #[serde(default)]
    pub runs: String,
    /// Versions that it has.
    #[serde(default)]
    pub releases: Vec<String>,
}

/// That a host's daemon is heard.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Alive {
    /// Since when.
    pub since: Moment,
    /// What time it was by its clock when this was written.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub clock: Option<Moment>,
}

/// Whose a name is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Claim {
    /// Which daemon: the same for those that follow each other on one store of one machine that wasn't started anew.
    pub daemon: String,
    /// What its machine is called.
    pub machine: String,
    /// Where its store is.
    pub state_dir: String,
    /// Since when.
    pub since: Moment,
}

/// Hosts whose clocks disagree with the driver's.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClocksRecord {
    /// Whose clock they were held against.
    pub driver: HostName,
    /// By how much, at least.
    pub off: std::collections::BTreeMap<HostName, Skew>,
}

/// That a host is to be left alone.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cordon {
    /// Why.
    pub reason: String,
    /// Since when.
    pub since: Moment,
}

/// What a host says of a guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmCard {
    /// Its availability set.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub set: Option<String>,
    /// Its update domain in it.
    #[serde(default)]
    pub domain: u16,
    /// What it is.
    pub state: VmState,
    /// What runs it.
    pub release: String,
    /// How its guest is.
    pub health: Health,
    /// What is the matter, where something is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ailment: Option<String>,
    /// Since when.
    pub since: Moment,
    /// A swap of it that isn't over.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub swap: Option<SwapId>,
    /// Something else is being done to it.
    #[serde(default)]
    pub busy: bool,
}

/// An availability set: who sits where.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SetRecord {
    /// How many update domains it has.
    pub domains: u8,
    /// How many ever joined: the next one's domain.
    pub joined: u64,
    /// Members, as `HOST/VM`, and their domains.
    pub members: std::collections::BTreeMap<String, u8>,
}

/// Who drives.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DriverCard {
    /// Its host.
    pub host: HostName,
    /// Since when.
    pub since: Moment,
}

/// A guest of a host that is swapped with all of them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct GuestRecord {
    /// The VM.
    pub vm: VmName,
    /// Its availability set.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub set: Option<String>,
    /// Its update domain in it.
    #[serde(default)]
    pub domain: u16,
}

/// A unit of a rollout, and how far it is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct UnitRecord {
    /// Its host.
    pub host: HostName,
    /// The VM; absent where the host is swapped with all its guests.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vm: Option<VmName>,
    /// The guests of a host that is swapped with them, as they were when the rollout was laid out.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub guests: Vec<GuestRecord>,
    /// What is swapped.
    pub rung: Rung,
    /// Number of its stage; 0 for the canaries.
    pub stage: u8,
    /// Its availability set.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub set: Option<String>,
    /// Its update domain in it.
    #[serde(default)]
    pub domain: u16,
    /// What it ran on before.
    pub from: String,
    /// How far it is.
    pub phase: Phase,
    /// How often it was begun, on the way it is going.
    pub tries: u8,
    /// Since when it is so far.
    #[serde(rename = "since_unix_ns")]
    pub since: Moment,
    /// The order under way, or the last one: the id of its swap.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub order: Option<SwapId>,
    /// What was seen last, in words.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub note: Option<String>,
    /// The blackout of its swap, ns.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub blackout_ns: Option<u64>,
    /// The error of the guest's clock after it, ns.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub clock_error_ns: Option<i64>,
    /// The brownout of its swap, ns.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub brownout_ns: Option<u64>,
}

impl RolloutRecord {
    /// What is swapped.
    pub fn rung(&self) -> Rung {
        // Nothing else was ever laid out but by its word.
        self.component.parse().unwrap_or(Rung::Vmm)
    }

    /// How much it swaps, in words.
    pub fn what(&self) -> String {
        let units = self.units.len();
        match self.rung().takes_whole_host() {
            true => {
                let guests: usize = self.units.iter().map(|unit| unit.guests.len()).sum();
                whole_hosts(&self.component, units, guests)
            }
            false => counted(units, "VM"),
        }
    }
}

fn whole_hosts(component: &str, hosts: usize, guests: usize) -> String {
    let (hosts, guests) = (counted(hosts, "host"), counted(guests, "guest"));
    format!("{component} of {hosts}, with {guests}")
}

/// So many of them, in words.
fn counted(number: usize, one: &str) -> String {
    match number {
        1 => format!("1 {one}"),
        _ => format!("{number} {one}s"),
    }
}

impl UnitRecord {
    /// What an order of it is of.
    pub fn subject(&self) -> (HostName, Option<VmName>) {
        (self.host.clone(), self.vm.clone())
    }

    /// As the planner has it.
    pub fn progress(&self) -> Progress {
        Progress {
            phase: self.phase,
            tries: self.tries,
            since: self.since,
        }
    }

    /// What it is called: `VM on HOST`, or `host HOST`.
    pub fn name(&self) -> String {
        match &self.vm {
            Some(vm) => format!("{vm} on {}", self.host),
            None => format!("host {}", self.host),
        }
    }

    /// What it is called where nothing tells more: the VM, or the host.
    pub fn short(&self) -> &str {
        self.vm
            .as_ref()
            .map_or(self.host.as_str(), |vm| vm.as_str())
    }

    /// What is swapped of it, where its host is told beside it: the VM, or how many guests go together.
    pub fn swapped(&self) -> String {
        match &self.vm {
            Some(vm) => vm.to_string(),
            None => match self.guests.len() {
                1 => "1 guest".into(),
                many => format!("{many} guests"),
            },
        }
    }

    /// The update domains in which it has guests, each once; no set's where a guest is in none.
    pub fn domains(&self) -> BTreeSet<(Option<&str>, u16)> {
        let domain = |set: &'_ Option<String>, domain| match set {
            Some(_) => domain,
            None => 0,
        };
        if self.vm.is_some() {
            return BTreeSet::from([(self.set.as_deref(), domain(&self.set, self.domain))]);
        }
        let guests = self.guests.iter();
        guests
            .map(|guest| (guest.set.as_deref(), domain(&guest.set, guest.domain)))
            .collect()
    }

    /// Whether it takes away a VM of that host, or of the host as a whole.
    pub fn takes(&self, host: &HostName, vm: Option<&VmName>) -> bool {
        let is_it = match (&self.vm, vm) {
            (Some(mine), Some(vm)) => mine == vm,
            _ => true,
        };
        self.host == *host && is_it
    }
}

/// A rollout.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct RolloutRecord {
    /// Its id.
    pub id: RolloutId,
    /// What is swapped: `vmm`, `kvm` or `kernel`.
    pub component: String,
    /// The longest that guests of a host stand still that is swapped with all of them, ns.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub budget_ns: Option<u64>,
    /// Version of the release that is rolled out.
    pub to: String,
    /// Whether it may be below the pinned minimum.
    #[serde(default)]
    pub allow_downgrade: bool,
    /// How it goes about it.
    pub policy: Policy,
    /// How many stages there are, the last one counted.
    pub stages: u8,
    /// What it is as a whole.
    pub state: State,
    /// Why, in words.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// What its gates said last.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub gates: Vec<GateSaid>,
    /// How many failures were forgiven by resuming it.
    #[serde(default)]
    pub forgiven: u32,
    /// Its units, in the order in which they are looked at.
    pub units: Vec<UnitRecord>,
    /// How many steps its history has.
    #[serde(default)]
    pub steps: u64,
    /// When it was asked for, nanoseconds since the Unix epoch.
    #[serde(rename = "asked_at_unix_ns")]
    pub asked_at: Moment,
    /// When it ended.
    #[serde(
        rename = "ended_at_unix_ns",
        default,
        skip_serializing_if = "Option::is_none"
    )]
    pub ended_at: Option<Moment>,
}

/// What was done in one step of a rollout.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct HistoryStep {
    /// When.
    #[serde(rename = "at_unix_ns")]
    pub at: Moment,
    /// Who: the driver on a host, or a person and the host whose daemon they asked.
    pub by: String,
    /// What, and why.
    pub lines: Vec<String>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_is_one_and_not_many() {
        assert_eq!(
            whole_hosts("kernel", 1, 1),
            "kernel of 1 host, with 1 guest"
        );
        assert_eq!(whole_hosts("kvm", 2, 0), "kvm of 2 hosts, with 0 guests");
        assert_eq!(counted(1, "VM"), "1 VM");
        assert_eq!(counted(12, "VM"), "12 VMs");
    }
}
