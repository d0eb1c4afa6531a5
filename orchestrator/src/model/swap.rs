//! Swaps: one component of one VM, from one release to another.

use serde::{Deserialize, Serialize};
use stillpoint_control::clock::Policy;
use stillpoint_control::message::ProcessId;
use stillpoint_control::report::{Outcome, ReleaseName, SwapReport};
use utoipa::ToSchema;

use super::fleet::RolloutId;
use super::safeguards::Safeguards;
use super::vm::VmName;

/// The component that is anything of a host but a guest's own: guests stand still in their places.
pub const HOST: &str = "host";
/// The component that is KVM's modules: guests stand still without a machine.
pub const KVM: &str = "kvm";

/// A swap's id.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, ToSchema)]
#[serde(transparent)]
#[schema(value_type = String)]
pub struct SwapId(pub String);

impl std::fmt::Display for SwapId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(&self.0)
    }
}

/// How far a swap is.
///
/// ```text
///  wanted ──▶ in_progress ──▶ moved | kept | resumed | crashed
///    │             │  ▲
///    └──▶ kept     ▼  │ settled later
///               in_doubt
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum SwapState {
    /// Recorded, not begun.
    Wanted,
    /// A successor may exist.
    InProgress,
    /// The successor runs the guest.
    Moved,
    /// The predecessor runs the guest, as before.
    Kept,
    /// The guest stood still in its place while its host was changed, and runs on.
    Resumed,
    /// Both processes live and none of them says who runs the guest. Looked at again and again.
    InDoubt,
    /// The process that ran the guest died.
    Crashed,
}

impl SwapState {
    /// Whether nothing more will happen.
    pub fn is_over(self) -> bool {
        matches!(
            self,
            Self::Moved | Self::Kept | Self::Resumed | Self::Crashed
        )
    }
}

impl From<Outcome> for SwapState {
    fn from(outcome: Outcome) -> Self {
        match outcome {
            Outcome::Moved => Self::Moved,
            Outcome::Kept => Self::Kept,
            Outcome::Resumed => Self::Resumed,
            Outcome::InDoubt => Self::InDoubt,
            Outcome::Crashed => Self::Crashed,
        }
    }
}

impl std::fmt::Display for SwapState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(match self {
            Self::Wanted => "wanted",
            Self::InProgress => "in progress",
            Self::Moved => "moved",
            Self::Kept => "kept",
            Self::Resumed => "resumed",
            Self::InDoubt => "in doubt",
            Self::Crashed => "crashed",
        })
    }
}

/// A swap, as it is recorded.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct SwapRecord {
    /// Id.
    pub id: SwapId,
    /// The swap of the host that this is a guest's part of.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub part_of: Option<SwapId>,
    /// The rollout that ordered it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rollout: Option<RolloutId>,
    /// The machine.
    pub vm: VmName,
    /// Component: `vmm`, or `host` for anything of the host itself.
    pub component: String,
    /// The release before.
    pub from: ReleaseName,
    /// The release after.
    pub to: ReleaseName,
    /// How far it is.
    pub state: SwapState,
    /// The step it is at, or was at when it ended.
    pub step: String,
    /// Why it ended so, when it did not move.
    pub reason: Option<String>,
    /// The longest blackout allowed, ns; the VM's own budget when absent.
    pub budget_ns: Option<u64>,
    /// What the guest's clocks make of the pause; the VM's own policy when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub clock: Option<Policy>,
    /// How long before the pause the guest hears of it, ns; the VM's own notice when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub notice_ns: Option<u64>,
    /// Why the guest gets no notice, if an operator chose so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub no_notice: Option<String>,
    /// What guards it: the rehearsal before it, the watch after it, the way back.
    #[serde(default)]
    pub safeguards: Safeguards,
    /// The successor's process, once there is one.
    pub successor: Option<ProcessId>,
    /// Epoch of the ownership word before the handover was asked for.
    pub epoch_before: Option<u64>,
    /// When it was asked for, nanoseconds since the Unix epoch.
    pub asked_at_unix_ns: u64,
    /// When it ended.
    pub ended_at_unix_ns: Option<u64>,
    /// Every phase, blackout and clock; absent while it goes on, and in lists.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub report: Option<SwapReport>,
}
