//! What a rollout is as a whole.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// What a rollout is as a whole.
///
/// ```text
///           pause               stops by itself                 resume
///  paused ◀───────▶ running ───────────┬──────────▶ stopped ────────────▶ running
///                     │                │ may roll back
///                     ▼                ▼
///                  finished       rolling back ──▶ rolled back, or stuck
///
///  paused, running, stopped ──abort──▶ aborting ──▶ aborted
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
#[schema(as = RolloutState)]
pub enum State {
    /// It goes on.
    #[default]
    Running,
    /// Held by hand: nothing begins, what is under way ends.
    Paused,
    /// Held by itself, until a hand lets it go on.
    Stopped,
    /// It brings back all that it touched.
    RollingBack,
    /// It ends as soon as nothing is under way.
    Aborting,
    /// All is done that could be.
    Finished,
    /// All that it touched is as before.
    RolledBack,
    /// Something that it touched could not be brought back.
    Stuck,
    /// Ended by hand.
    Aborted,
}

impl State {
    /// Whether nothing more will happen.
    pub fn is_over(self) -> bool {
        matches!(
            self,
            Self::Finished | Self::RolledBack | Self::Stuck | Self::Aborted
        )
    }
}

impl std::fmt::Display for State {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(match self {
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Stopped => "stopped",
            Self::RollingBack => "rolling back",
            Self::Aborting => "aborting",
            Self::Finished => "finished",
            Self::RolledBack => "rolled back",
            Self::Stuck => "stuck",
            Self::Aborted => "aborted",
        })
    }
}
