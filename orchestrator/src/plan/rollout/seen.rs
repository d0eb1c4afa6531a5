//! What is seen of a fleet while a rollout goes on: how far each unit is, and how all are.
//!
//! ```text
//!            begin            moved             well for long enough
//!  waiting ────────▶ begun ────────▶ watched ────────────────────────▶ done
//!     ▲                │ │              │                               │
//!     └────── kept ────┘ │ too long     │ too long, or beyond a limit   │ bad while
//!     │                  ▼              ▼                               ▼ baking
//!     │ too often       spoilt ◀────────┴───────────────────────────────┘
//!     ▼                  │ begin the way back (from done too, when all is rolled back)
//!   failed               ▼           moved                  well for long enough
//!                   back begun ────────────▶ back watched ─────────────────────▶ back
//!                        │ ▲                     │ too long
//!                   kept ▼ │ again               ▼
//!                   back waiting ─ too often ─▶ stuck
//! ```
//!
//! The executor moves a unit from waiting to begun, and on to watched or back to waiting; the same
//! on the way back. All else is for the planner to say: its verdicts are recorded as they are.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::fleet::{Column, Host, Ix, Vm};
use super::layout::Unit;
use crate::model::{Moment, Rung};

/// How far a unit is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
#[schema(as = UnitPhase)]
pub enum Phase {
    /// Not begun, or kept and to be tried again.
    #[default]
    Waiting,
    /// An executor has it.
    Begun,
    /// It moved, and is watched.
    Watched,
    /// It moved, and was well for long enough.
    Done,
    /// Not moved, and not tried again. No harm was done.
    Failed,
    /// It was touched, and failed.
    Spoilt,
    /// An executor has it, on the way back.
    BackBegun,
    /// The way back was kept, and is to be tried again.
    BackWaiting,
    /// It runs on what it ran on before, and is watched.
    BackWatched,
    /// It runs on what it ran on before, and was well for long enough.
    Back,
    /// It could not be brought back.
    Stuck,
}

impl Phase {
    /// All of them.
    pub const ALL: [Self; 11] = [
        Self::Waiting,
        Self::Begun,
        Self::Watched,
        Self::Done,
        Self::Failed,
        Self::Spoilt,
        Self::BackBegun,
        Self::BackWaiting,
        Self::BackWatched,
        Self::Back,
        Self::Stuck,
    ];

    /// Whether a swap is under way, or has just been made: the unit's guests count as away.
    pub fn is_in_flight(self) -> bool {
        matches!(
            self,
            Self::Begun | Self::Watched | Self::BackBegun | Self::BackWatched
        )
    }

    /// Whether the rollout may have changed anything that isn't as before again.
    pub fn is_touched(self) -> bool {
        !matches!(self, Self::Waiting | Self::Failed | Self::Back)
    }

    /// Whether it is on its way back, or ended it.
    pub fn is_back(self) -> bool {
        matches!(
            self,
            Self::BackBegun | Self::BackWaiting | Self::BackWatched | Self::Back | Self::Stuck
        )
    }

    /// Whether the swap failed.
    pub fn is_failure(self) -> bool {
        match self {
            Self::Waiting | Self::Begun | Self::Watched | Self::Done => false,
            Self::Failed | Self::Spoilt | Self::BackBegun | Self::BackWaiting => true,
            Self::BackWatched | Self::Back | Self::Stuck => true,
        }
    }
}

/// How far a unit is, and since when.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// How far.
    pub phase: Phase,
    /// How often it was begun, on the way it is going.
    pub tries: u8,
    /// Since when it is so far.
    pub since: Moment,
}

/// How a guest is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
#[schema(as = GuestHealth)]
pub enum Health {
    /// Its agent is heard, or whatever else stands for that.
    Well,
    /// It is not well, or not heard of.
    #[default]
    Ill,
    /// Its owner has it switched off.
    Off,
}

/// What is seen of a VM.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct VmSeen {
    /// How its guest is.
    pub health: Health,
    /// Since when.
    pub since: Moment,
    /// Something else is being done to it: a swap by hand, a start, a stop.
    pub busy: bool,
    /// Its owner wants it left alone by this rollout.
    pub excluded: bool,
}

/// Which releases of a rollout a host has, by rung.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Releases(u8);

impl Releases {
    /// Those of all rungs.
    pub const ALL: Self = Self(0xff);

    /// These and that of `rung`.
    #[must_use]
    pub fn with(self, rung: Rung) -> Self {
        Self(self.0 | 1 << rung as u8)
    }

    /// Whether that of `rung` is among them.
    pub fn has(self, rung: Rung) -> bool {
        self.0 & 1 << rung as u8 != 0
    }
}

/// What is seen of a host.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HostSeen {
    /// Whether its daemon is heard and it has nothing to complain of.
    pub up: bool,
    /// Since when.
    pub since: Moment,
    /// Its operator wants it left alone.
    pub cordoned: bool,
    /// Its clock is not known to agree with that of whoever plans.
    pub clock_off: bool,
    /// Which of the rollout's releases it has.
    pub releases: Releases,
}

pub use crate::model::Gate;

impl Phase {
    /// The words for it.
    pub fn words(self) -> &'static str {
        match self {
            Self::Waiting => "waiting",
            Self::Begun => "being swapped",
            Self::Watched => "being watched",
            Self::Done => "done",
            Self::Failed => "failed, not moved",
            Self::Spoilt => "failed",
            Self::BackBegun => "being put back",
            Self::BackWaiting => "waiting to be put back",
            Self::BackWatched => "put back, being watched",
            Self::Back => "put back",
            Self::Stuck => "stuck",
        }
    }
}

/// What the record of a swap showed that was beyond its rollout's limits ([`super::evidence`]).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Breach {
    /// It did not succeed.
    Failed,
    /// The guest was not well after it.
    Unwell,
    /// The blackout was too long.
    Blackout,
    /// The guest's clock was too wrong.
    ClockError,
    /// The brownout was too long.
    Brownout,
}

/// All that is seen, at one moment.
#[derive(Clone, Debug, Default)]
pub struct Seen {
    /// When this was seen. The planner has no clock of its own.
    pub now: Moment,
    /// Hosts.
    pub hosts: Column<Host, HostSeen>,
    /// VMs.
    pub vms: Column<Vm, VmSeen>,
    /// Units of the rollout.
    pub units: Column<Unit, Progress>,
    /// Gates of the whole rollout.
    pub gates: Vec<Gate>,
    /// Units whose report was beyond a limit: in order, and few.
    pub breaches: Vec<(Ix<Unit>, Breach)>,
}

impl Seen {
    /// Whether a VM's guest can be reckoned with: nothing takes it away, whatever it might be.
    pub fn is_available(&self, vm: Ix<Vm>, host: Ix<Host>) -> bool {
        let seen = self.vms[vm];
        seen.health == Health::Well && !seen.busy && self.hosts[host].up
    }

    pub(super) fn breach(&self, unit: Ix<Unit>) -> Option<Breach> {
        let found = self.breaches.binary_search_by_key(&unit, |&(unit, _)| unit);
        found.ok().map(|at| self.breaches[at].1)
    }
}
