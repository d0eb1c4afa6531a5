//! What is written in the shared store. Only grows: a field that is new has a default that means "as
//! before", so daemons of two versions share a store.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::clocks::Skew;
pub use crate::model::RolloutId;
use crate::model::{
    Domain, GateSaid, HostName, Labels, Moment, Policy, Rung, SwapId, SwapRecord, VmName, VmState,
};
use crate::plan::rollout::seen::{Health, Phase, Progress};
use crate::plan::rollout::{State, Way};

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
    /// Version of its daemon.
    pub daemon: String,
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

/// A unit of a rollout, and how far it is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct UnitRecord {
    /// Its host.
    pub host: HostName,
    /// The VM.
    pub vm: VmName,
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

impl UnitRecord {
    /// As the planner has it.
    pub fn progress(&self) -> Progress {
        Progress {
            phase: self.phase,
            tries: self.tries,
            since: self.since,
        }
    }

    /// Its update domain, if it is in a set and the domain is one that sets have.
    pub fn seat(&self) -> Option<(&str, Domain)> {
        let domain = Domain::new(u8::try_from(self.domain).ok()?).ok()?;
        self.set.as_deref().map(|set| (set, domain))
    }
}

/// A rollout.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct RolloutRecord {
    /// Its id.
    pub id: RolloutId,
    /// What is swapped: `vmm`.
    pub component: String,
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

/// A swap to be done.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Order {
    /// Its id, and that of the swap.
    pub id: SwapId,
    /// The rollout.
    pub rollout: RolloutId,
    /// The driver's epoch.
    pub epoch: u64,
    /// The version that is to run the VM.
    pub to: String,
    /// In which direction that is.
    pub way: Way,
    /// How long before its pause the guest hears of it, ns; its own notice when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub notice_ns: Option<u64>,
    /// Why it gets no notice.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub no_notice: Option<String>,
    /// Whether a guest that isn't well is put back at once, by its own host.
    pub way_back: bool,
    /// Whether the release may be below the pinned minimum.
    pub allow_downgrade: bool,
}

/// How far an order is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Far {
    /// Something else has to end first, or it goes on.
    UnderWay,
    /// It could not be begun. The guest runs on as before.
    Refused,
    /// The VM runs on what was ordered; more may come to be known.
    There,
    /// The same, and all is known.
    Settled,
    /// It was not done, and the guest runs on as before.
    Kept,
    /// The guest was lost.
    Lost,
}

/// What became of an order.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Answer {
    /// The order.
    pub order: SwapId,
    /// How far it is.
    pub far: Far,
    /// Why, in words.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// The swap as it is recorded, once it is over.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub swap: Option<SwapRecord>,
}
