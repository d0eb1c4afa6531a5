//! How soon a guest got as much done again as before its swap: the slow time that follows a pause.
//!
//! Page tables that its new process has yet to fill, and KVM's own, cost a guest a fault for each page that it
//! touches; a blackout of a millisecond may be followed by a second at half speed, which no blackout shows.

use std::time::Duration;

use serde::{Deserialize, Serialize};

/// Of something that goes on all the time, and is counted: how it fared after a swap.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct Recovery {
    /// What is counted: `guest`, the work of all its vCPUs as it counts it in its probe table; or a device by
    /// its name, requests that it took.
    pub of: String,
    /// How many in a second, right before the swap.
    pub before_per_s: u64,
    /// From the last vCPU's entry to the moment from which on 95 % of that many were done. Absent if that did
    /// not come while it was watched.
    #[serde(default)]
    pub until_ns: Option<u64>,
    /// The time that what was not done until then would have taken before.
    #[serde(rename = "lost_ns", with = "crate::nanos")]
    #[cfg_attr(feature = "openapi", schema(value_type = u64))]
    pub lost: Duration,
    /// For how long it has been watched; 0 while it still is.
    #[serde(rename = "watched_ns", with = "crate::nanos")]
    #[cfg_attr(feature = "openapi", schema(value_type = u64))]
    pub watched: Duration,
}

impl Recovery {
    /// Whether the rest of it is known.
    pub fn is_known(&self) -> bool {
        !self.watched.is_zero()
    }
}
