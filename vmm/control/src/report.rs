//! What every swap leaves behind: who, how it ended, how long each phase took, how long the
//! guest stood still as host and guest saw it, and what became of its clock.
//!
//! All times are nanoseconds; fields end in `_ns`.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::clock::{Correction, Policy};
use crate::recovery::Recovery;

/// A release, as it names itself.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct ReleaseName {
    /// Version, for people and for ordering.
    pub version: String,
    /// SHA-256 of the binary, lower-case hexadecimal; empty when the process doesn't know.
    #[serde(default)]
    pub sha256: String,
}

/// How a swap ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// The successor runs the guest.
    Moved,
    /// The predecessor runs the guest, as before.
    Kept,
    /// The guest stood still in its place while something of the host was changed, and runs on.
    Resumed,
    /// Not known yet who runs the guest; the agent settles it.
    InDoubt,
    /// The process that ran the guest died, and the guest with it, as in a power cut.
    Crashed,
}

impl std::fmt::Display for Outcome {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(match self {
            Self::Moved => "moved",
            Self::Kept => "kept",
            Self::Resumed => "resumed",
            Self::InDoubt => "in doubt",
            Self::Crashed => "crashed",
        })
    }
}

/// On which side of the handover a phase was spent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(rename_all = "snake_case")]
pub enum Side {
    /// The process that ran the guest before.
    Predecessor,
    /// The process that runs it after.
    Successor,
    /// The daemon.
    Agent,
}

/// One phase of a swap.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct Phase {
    /// `start`, `build`, `populate`; then `park`, `quiesce`, `save`, `seal`, `load`, `await`,
    /// `enter`.
    pub name: String,
    /// Where it was spent.
    pub side: Side,
    /// Whether the guest stood still meanwhile.
    pub in_blackout: bool,
    /// How long.
    #[serde(rename = "duration_ns", with = "crate::nanos")]
    #[cfg_attr(feature = "openapi", schema(value_type = u64))]
    pub duration: Duration,
}

/// How long the guest stood still.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct Blackout {
    /// From the kick of the first vCPU to the moment when the last was let into its first entry,
    /// on the clock both processes share (the TSC).
    #[serde(rename = "host_ns", with = "crate::nanos")]
    #[cfg_attr(feature = "openapi", schema(value_type = u64))]
    pub host: Duration,
    /// What each vCPU saw: the longest gap between two TSC readings of its own that overlaps
    /// the host's interval. `None` for a vCPU whose guest keeps no probe table, or that took no
    /// readings at the time (halted, offline).
    #[serde(default)]
    pub guest_ns: Vec<Option<u64>>,
    /// What each vCPU was out of the guest, where both processes of a VMM's swap tell.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub vcpus: Vec<Outside>,
}

/// For how long a vCPU was out of its guest, by its own thread's stamps.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct Outside {
    /// From the kick's `KVM_RUN` coming back in the predecessor to the first one's beginning in the successor.
    #[serde(rename = "out_ns", with = "crate::nanos")]
    #[cfg_attr(feature = "openapi", schema(value_type = u64))]
    pub out: Duration,
    /// What its threads waited for a core in that time, ready to run (`/proc/PID/schedstat`); where the kernel
    /// keeps no account, 0. They sleep while they wait for another vCPU, whatever that one waits for.
    #[serde(rename = "queued_ns", with = "crate::nanos")]
    #[cfg_attr(feature = "openapi", schema(value_type = u64))]
    pub queued: Duration,
}

impl Outside {
    /// Less its waits for a core.
    pub fn unqueued(&self) -> Duration {
        self.out.saturating_sub(self.queued)
    }
}

impl Blackout {
    /// The longest that any vCPU was out of its guest, each less its own waits for a core. `None` if nobody tells.
    pub fn unqueued_worst(&self) -> Option<Duration> {
        self.vcpus.iter().map(Outside::unqueued).max()
    }

    /// The longest that any vCPU saw.
    pub fn guest_worst(&self) -> Option<Duration> {
        self.guest_ns
            .iter()
            .flatten()
            .max()
            .map(|&ns| Duration::from_nanos(ns))
    }
}

/// What became of the guest's clock: the receipt of a swap.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct ClockReceipt {
    /// What the guest's clocks make of the pause.
    pub policy: Policy,
    /// From the reading of the clock in the predecessor to the first entry, the last vCPU's, in
    /// the successor.
    #[serde(rename = "pause_ns", with = "crate::nanos", default)]
    #[cfg_attr(feature = "openapi", schema(value_type = u64))]
    pub pause: Duration,
    /// How much of it the guest's clocks left out; 0 for `advance`.
    #[serde(rename = "held_ns", with = "crate::nanos", default)]
    #[cfg_attr(feature = "openapi", schema(value_type = u64))]
    pub held: Duration,
    /// For each vCPU: TSC offset read back in the successor less the one it was to have (the
    /// predecessor's, and for `hold` the pause before that), cycles. Empty where the kernel tells
    /// none.
    #[serde(default)]
    pub tsc_offset_delta: Vec<i64>,
    /// What the guest's own pvclock page says now less what the page of before would have said
    /// at the same guest TSC, ns. `None` when the guest has no kvmclock, or when every vCPU that
    /// has one was halted and stayed so: KVM writes the page when the vCPU wakes.
    pub kvmclock_error_ns: Option<i64>,
    /// The error the calibrated loop left, as `KVM_GET_CLOCK` showed it, ns.
    pub loop_error_ns: Option<i64>,
    /// Tries of the calibrated loop.
    pub tries: u32,
    /// What the loop took.
    #[serde(rename = "loop_ns", with = "crate::nanos", default)]
    #[cfg_attr(feature = "openapi", schema(value_type = u64))]
    pub loop_time: Duration,
    /// What it cost its thread in CPU time: a thread that loses its core takes longer and costs
    /// the same.
    #[serde(rename = "loop_cpu_ns", with = "crate::nanos", default)]
    #[cfg_attr(feature = "openapi", schema(value_type = u64))]
    pub loop_cpu: Duration,
    /// Whether KVM's masterclock was on before the swap.
    pub masterclock_before: bool,
    /// Whether it is on after it.
    pub masterclock_after: bool,
    /// For each vCPU: whether its guest is told, by its kvmclock, that it stood still, so that its
    /// watchdogs keep quiet. One without a kvmclock can't be.
    #[serde(default)]
    pub told_of_pause: Vec<bool>,
    /// The guest's wall clock less the host's, before and after.
    #[serde(default)]
    pub wall_clock: WallClock,
    /// What was done about wall-clock time in the guest afterwards.
    #[serde(default)]
    pub steps: Vec<Step>,
    /// How the clock was carried when the exact way was not open, and why.
    pub fallback: Option<String>,
}

/// The guest's wall clock less the host's.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct WallClock {
    /// Which of the guest's wall clocks: `agent`, what its `CLOCK_REALTIME` says; `kvmclock`, what
    /// a guest reads that asks KVM's clock (Linux does at its boot). Empty if neither was there.
    pub of: String,
    /// Before the swap, ns.
    pub error_before_ns: Option<i64>,
    /// After it, and after what `steps` did, ns.
    pub error_after_ns: Option<i64>,
}

/// A correction of wall-clock time in the guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct Step {
    /// How.
    pub how: Correction,
    /// By how much, ns.
    pub by_ns: i64,
    /// Why it was not done; absent if it was.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub problem: Option<String>,
}

/// The budget at the point of no return. The guest is given up only if both together are no more
/// than the budget.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct Margin {
    /// For how long the guest had stood still.
    #[serde(rename = "used_ns", with = "crate::nanos")]
    #[cfg_attr(feature = "openapi", schema(value_type = u64))]
    pub used: Duration,
    /// What is kept for what follows: what the successor's load took a moment ago, or what the
    /// guest's entry into its present process took, whichever was more.
    #[serde(rename = "reserve_ns", with = "crate::nanos")]
    #[cfg_attr(feature = "openapi", schema(value_type = u64))]
    pub reserve: Duration,
}

impl Margin {
    /// Whether the guest may be given up within this budget.
    pub fn is_within(&self, budget: Duration) -> bool {
        self.used + self.reserve <= budget
    }
}

/// The report of one swap.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct SwapReport {
    /// The swap's id.
    pub swap: String,
    /// The machine's name.
    pub vm: String,
    /// Component: `vmm`, or `host` for anything else of the host.
    pub component: String,
    /// The release before.
    pub from: ReleaseName,
    /// The release after (or the one that was refused).
    pub to: ReleaseName,
    /// How it ended.
    pub outcome: Outcome,
    /// Why it ended so, when it did not move; or what else was out of the ordinary.
    pub reason: Option<String>,
    /// When it was asked for, nanoseconds since the Unix epoch.
    pub started_at_unix_ns: u64,
    /// vCPUs of the machine.
    pub vcpus: u32,
    /// Guest RAM, bytes.
    pub memory_bytes: u64,
    /// Format of the saved state, and its size in bytes.
    pub state_format: u32,
    /// See `state_format`.
    pub state_bytes: u64,
    /// What the swap was allowed.
    #[serde(rename = "budget_ns", with = "crate::nanos")]
    #[cfg_attr(feature = "openapi", schema(value_type = u64))]
    pub budget: Duration,
    /// How the budget stood when the predecessor had to decide whether to give the guest up; absent
    /// if it never came to that.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub margin: Option<Margin>,
    /// Every phase, in order.
    pub phases: Vec<Phase>,
    /// How long the guest stood still. For a swap that was kept: how long it was frozen in vain.
    pub blackout: Blackout,
    /// The clock; `None` when the guest never moved.
    pub clock: Option<ClockReceipt>,
    /// How soon the guest got as much done again as before, for each thing that was counted and went on often
    /// enough to judge by. Known some time after the rest, see [`Recovery::is_known`].
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub recovery: Vec<Recovery>,
    /// Bounds that were broken and other things an operator should read.
    pub warnings: Vec<String>,
}
