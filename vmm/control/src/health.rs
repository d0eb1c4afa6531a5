//! Signs of life of a guest and of what runs it. Each is a counter or a state at one moment; what
//! they mean is for whoever compares two looks.

use serde::{Deserialize, Serialize};

use crate::recovery::Recovery;

/// One look.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct Signs {
    /// Each vCPU.
    pub vcpus: Vec<VcpuSign>,
    /// Each virtio device.
    pub devices: Vec<DeviceSign>,
    /// Whether the guest's agent answered; absent where the machine has no way to ask one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub agent: Option<bool>,
    /// How soon it got as much done again as before its last swap; empty until that is known, and where nothing
    /// was counted.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub recovery: Vec<Recovery>,
}

/// One vCPU.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct VcpuSign {
    /// How often its thread came back from the guest. Each look has it come back once more, so a
    /// vCPU that runs or halts counts on from look to look, and one that is stuck does not.
    pub turns: u64,
    /// The guest's own heartbeat on it, where the guest keeps a probe table: its latest reading of
    /// the TSC.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub beat: Option<u64>,
}

/// One virtio device.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct DeviceSign {
    /// Its name in the machine.
    pub name: String,
    /// It has failed, and waits for a reset by its driver.
    pub failed: bool,
    /// Its thread has not let go of it for as long as the look waited.
    #[serde(default)]
    pub stuck: bool,
    /// Requests under way outside of it, with a disk for example.
    pub in_flight: u64,
    /// Queues from which it takes whatever the driver puts there.
    pub queues: Vec<QueueSign>,
}

/// One queue.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct QueueSign {
    /// Which.
    pub queue: u32,
    /// Requests that the driver has put there and the device has not taken.
    pub waiting: u16,
    /// Requests taken so far, modulo 2^16.
    pub taken: u16,
}
