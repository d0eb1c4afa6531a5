//! VMs: what is wanted of them, and what they are.

use serde::{Deserialize, Serialize};
use stillpoint_control::message::ProcessId;
use stillpoint_control::secret::Secret;
use stillpoint_control::spec::{self, MachineSpec, SpecError};
use utoipa::ToSchema;

use super::pause::Profile;

/// A VM's name: safe as a part of paths and unit names.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, ToSchema)]
#[serde(try_from = "String", into = "String")]
#[schema(value_type = String)]
pub struct VmName(String);

impl VmName {
    /// As text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for VmName {
    type Error = SpecError;
    fn try_from(name: String) -> Result<Self, SpecError> {
        spec::validate_name(&name)?;
        Ok(Self(name))
    }
}

impl From<VmName> for String {
    fn from(name: VmName) -> Self {
        name.0
    }
}

impl std::fmt::Display for VmName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(&self.0)
    }
}

/// What its owner wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Wanted {
    /// That it runs.
    Running,
    /// That it is off.
    Stopped,
}

/// What it is.
///
/// ```text
///  starting ──▶ running ◀──▶ swapping
///     │            │            │
///     ▼            ▼            ▼
///   failed      stopped | crashed | lost (──▶ running, when it is found again)
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum VmState {
    /// Recorded; its process is being started.
    Starting,
    /// The guest runs.
    Running,
    /// The guest is being handed to another process.
    Swapping,
    /// It powered itself off, or was powered off.
    Stopped,
    /// Its process died and took the guest with it.
    Crashed,
    /// It never ran.
    Failed,
    /// Its process lives, or may live, and can't be spoken to. Tried again and again.
    Lost,
}

impl VmState {
    /// Whether a process may belong to it.
    pub fn is_active(self) -> bool {
        match self {
            Self::Starting | Self::Running | Self::Swapping | Self::Lost => true,
            Self::Stopped | Self::Crashed | Self::Failed => false,
        }
    }
}

impl std::fmt::Display for VmState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(match self {
            Self::Starting => "starting",
            Self::Running => "running",
            Self::Swapping => "swapping",
            Self::Stopped => "stopped",
            Self::Crashed => "crashed",
            Self::Failed => "failed",
            Self::Lost => "lost",
        })
    }
}

/// A VM, as it is recorded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VmRecord {
    /// Name.
    pub name: VmName,
    /// The machine.
    pub spec: MachineSpec,
    /// What its guest hears of itself, and how its pauses are announced.
    pub profile: Profile,
    /// Version of the release that runs it.
    pub release: String,
    /// What its owner wants.
    pub wanted: Wanted,
    /// What it is.
    pub state: VmState,
    /// Why, when it isn't what its owner wants.
    pub reason: Option<String>,
    /// Its process, while there is one.
    pub process: Option<ProcessId>,
    /// Proves its process.
    pub secret: Secret,
    /// Swaps it has lived through.
    pub swaps: u64,
    /// When it was asked for, nanoseconds since the Unix epoch.
    pub created_at_unix_ns: u64,
    /// When its state changed last.
    pub changed_at_unix_ns: u64,
}
