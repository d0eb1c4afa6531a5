//! What a rehearsal showed: whether another release could load this guest as it is now.

use std::time::Duration;

use serde::{Deserialize, Serialize};

/// How a rehearsal ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// The other release loaded the guest's state and saved the same again; or, where no state was
    /// asked for, built its machine.
    Passed,
    /// It could not, or saved something else.
    Failed,
    /// It was called off for a reason of the guest's; nothing is known.
    CalledOff,
}

/// How far a rehearsal came.
///
/// ```text
///  build ──▶ peek ──▶ load ──▶ compare ──▶ done
///    └── without a peek ──────────────────▶ done
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(rename_all = "snake_case")]
pub enum Stage {
    /// The other release builds the machine: CPUID, TSC, memory slots, places of devices.
    Build,
    /// The guest stands still for as long as its state is saved.
    Peek,
    /// The other release loads that state, and saves it again.
    Load,
    /// What was saved twice is compared.
    Compare,
    /// All of it was done.
    Done,
}

/// What a rehearsal showed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct Rehearsal {
    /// How it ended.
    pub verdict: Verdict,
    /// How far it came.
    pub stage: Stage,
    /// Why it did not pass.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// What was not the same when it was saved again, by section and field.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub differences: Vec<String>,
    /// Format of the state; 0 if none was agreed on.
    #[serde(default)]
    pub state_format: u32,
    /// Bytes of the state; 0 if none was saved.
    #[serde(default)]
    pub state_bytes: u64,
    /// How long the guest stood still for it; 0 if it did not.
    #[serde(rename = "peek_ns", with = "crate::nanos", default)]
    #[cfg_attr(feature = "openapi", schema(value_type = u64))]
    pub peek: Duration,
    /// How long the other release took to build its machine.
    #[serde(rename = "build_ns", with = "crate::nanos", default)]
    #[cfg_attr(feature = "openapi", schema(value_type = u64))]
    pub build: Duration,
    /// How long it took to load the state.
    #[serde(rename = "load_ns", with = "crate::nanos", default)]
    #[cfg_attr(feature = "openapi", schema(value_type = u64))]
    pub load: Duration,
    /// All of it, from the first word to the last.
    #[serde(rename = "took_ns", with = "crate::nanos", default)]
    #[cfg_attr(feature = "openapi", schema(value_type = u64))]
    pub took: Duration,
}

impl Rehearsal {
    /// One that has not begun.
    pub fn begin() -> Self {
        Self {
            verdict: Verdict::CalledOff,
            stage: Stage::Build,
            reason: None,
            differences: Vec::new(),
            state_format: 0,
            state_bytes: 0,
            peek: Duration::ZERO,
            build: Duration::ZERO,
            load: Duration::ZERO,
            took: Duration::ZERO,
        }
    }
}
