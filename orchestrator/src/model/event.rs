//! What happens, for those who listen.

use serde::{Deserialize, Serialize};
use stillpoint_control::report::Phase;
use utoipa::ToSchema;

use super::host_swap::HostSwapState;
use super::pause::{EventId, PauseState};
use super::swap::{SwapId, SwapState};
use super::vm::{VmName, VmState};

/// One thing that happened.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event {
    /// A VM's state changed.
    Vm {
        /// The machine.
        vm: VmName,
        /// What it is now.
        state: VmState,
        /// Why, when it isn't what its owner wants.
        reason: Option<String>,
    },
    /// A VM's record was removed.
    Removed {
        /// The machine.
        vm: VmName,
    },
    /// A swap began a step, or ended.
    Swap {
        /// The swap.
        swap: SwapId,
        /// The machine.
        vm: VmName,
        /// How far it is.
        state: SwapState,
        /// The step it is at.
        step: String,
        /// Why it ended so, when it did not move.
        reason: Option<String>,
    },
    /// A swap of the host began a step, or ended.
    HostSwap {
        /// The swap.
        swap: SwapId,
        /// How far it is.
        state: HostSwapState,
        /// The step it is at.
        step: String,
        /// Why it ended so, when it is not done.
        reason: Option<String>,
    },
    /// A phase of a swap ended.
    Phase {
        /// The swap.
        swap: SwapId,
        /// The machine.
        vm: VmName,
        /// The phase.
        phase: Phase,
    },
    /// A pause of the machine was announced, approved, started, cancelled, or is over.
    Notice {
        /// The machine.
        vm: VmName,
        /// The event that its guest reads.
        notice: EventId,
        /// The swap it is for.
        swap: SwapId,
        /// How far the pause is.
        state: PauseState,
        /// Before that it does not start unless it is approved; seconds since the Unix epoch.
        not_before_unix_s: u64,
        /// Whether it is approved.
        approved: bool,
    },
}

impl Event {
    /// The machine it is about; `None` if it is about the host.
    pub fn vm(&self) -> Option<&VmName> {
        match self {
            Self::Vm { vm, .. }
            | Self::Removed { vm }
            | Self::Swap { vm, .. }
            | Self::Phase { vm, .. }
            | Self::Notice { vm, .. } => Some(vm),
            Self::HostSwap { .. } => None,
        }
    }
}
