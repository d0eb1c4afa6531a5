//! What guards a swap before its freeze and after it: the rehearsal, the watch, the way back.

use serde::{Deserialize, Serialize};
use stillpoint_control::rehearsal::Rehearsal;
use utoipa::ToSchema;

use super::swap::SwapId;

/// For how long a guest is watched after a swap when nobody said otherwise, ns.
pub const DEFAULT_WATCH_NS: u64 = 10_000_000_000;
/// The longest that one may be watched, ns.
pub const MAX_WATCH_NS: u64 = 24 * 3600 * 1_000_000_000;

/// What guards a swap. The default is nothing at all, as it was for swaps of older daemons.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Safeguards {
    /// It is rehearsed before its freeze, and not begun if that fails.
    pub rehearse: bool,
    /// For how long the guest is watched afterwards, ns; 0 for not at all.
    pub watch_ns: u64,
    /// If it is not well meanwhile, it is swapped back.
    pub way_back: bool,
    /// What the rehearsal showed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rehearsal: Option<Rehearsed>,
    /// What could be seen of the guest before the swap.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub before: Option<Before>,
    /// How it was afterwards.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub health: Option<Health>,
    /// This swap is the way back of that one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub way_back_of: Option<SwapId>,
    /// The way back of this swap.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub put_back_by: Option<SwapId>,
}

/// A rehearsal of a swap, or why there was none.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Rehearsed {
    /// It was rehearsed.
    Told(Rehearsal),
    /// It could not be.
    Unknown {
        /// Why not.
        why: String,
    },
}

/// What of a guest gave signs of life before its swap: only that can be missed afterwards.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Before {
    /// Its agent answered.
    pub agent: bool,
    /// Its heartbeat went on.
    pub beats: bool,
    /// Devices that had failed already.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub failed: Vec<String>,
}

/// How a guest is after a swap.
///
/// ```text
///  watching ──all was seen to be well──▶ well_so_far ──its time is over──▶ well
///      └─────────── something was not, for too long ──┴──▶ unwell
///  any of the first two ── the VM ended, or another swap began ──▶ ended
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum HealthState {
    /// Nothing bad was seen, and not everything good yet.
    Watching,
    /// Everything was seen to be well.
    WellSoFar,
    /// It was well when its time was over.
    Well,
    /// It was not.
    Unwell,
    /// Something else became of the guest before that could be said.
    Ended,
}

impl HealthState {
    /// Whether it is still looked at.
    pub fn is_open(self) -> bool {
        matches!(self, Self::Watching | Self::WellSoFar)
    }
}

impl std::fmt::Display for HealthState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(match self {
            Self::Watching => "being watched",
            Self::WellSoFar => "well so far",
            Self::Well => "well",
            Self::Unwell => "not well",
            Self::Ended => "no longer watched",
        })
    }
}

/// How a guest is after a swap, and what is the matter.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Health {
    /// How it is.
    pub state: HealthState,
    /// What is wrong, or, of one that is no longer watched, why not.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub problems: Vec<String>,
    /// What to do, where something is left to be done by hand.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub remedy: Option<String>,
    /// Since when, nanoseconds since the Unix epoch.
    pub since_unix_ns: u64,
}

impl Health {
    /// In this state from now on.
    pub fn new(state: HealthState, problems: Vec<String>, now_unix_ns: u64) -> Self {
        Self {
            state,
            problems,
            remedy: None,
            since_unix_ns: now_unix_ns,
        }
    }
}
