//! What a look at a swap beforehand says.

use serde::{Deserialize, Serialize};
use stillpoint_control::report::ReleaseName;
use utoipa::ToSchema;

use super::safeguards::Rehearsed;
use super::swap::SwapId;
use super::vm::VmName;
use crate::doctor::{Check, Status};

/// Whether a swap would work.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Preflight {
    /// Id of this look; its pause, if it made one, has its event by it.
    pub id: SwapId,
    /// The machine.
    pub vm: VmName,
    /// The release that runs it.
    pub from: ReleaseName,
    /// The one it would be swapped to.
    pub to: ReleaseName,
    /// Whether nothing is known that would keep the guest from moving.
    pub would_work: bool,
    /// How long the guest stood still for this, ns; 0 if it did not.
    pub peek_ns: u64,
    /// All that was looked at.
    pub checks: Vec<Check>,
    /// What the rehearsal showed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rehearsal: Option<Rehearsed>,
}

impl Preflight {
    /// Whether all of these leave a swap possible.
    pub fn judge(checks: &[Check]) -> bool {
        checks.iter().all(|check| check.status != Status::Fail)
    }
}
