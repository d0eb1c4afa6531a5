//! What a pause is to the guest's clocks: policies, and what goes with them.
//!
//! | | `advance` | `hold` |
//! |---|---|---|
//! | TSC, kvmclock, `CLOCK_MONOTONIC` | include the pause | leave it out |
//! | `CLOCK_REALTIME` at the first instruction | as right as before | late by the pause, until it is corrected |
//! | timers | due when they were due | due later by the pause |
//! | needs | nothing | a host that can move a guest's TSC, and a correction |

use serde::{Deserialize, Serialize};

/// What the guest's clocks make of a pause.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(rename_all = "snake_case")]
pub enum Policy {
    /// They include it, and are right at the first instruction.
    #[default]
    Advance,
    /// They leave it out; wall-clock time is corrected afterwards.
    Hold,
}

impl Policy {
    /// Its word.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Advance => "advance",
            Self::Hold => "hold",
        }
    }
}

impl std::fmt::Display for Policy {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(self.as_str())
    }
}

impl std::str::FromStr for Policy {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "advance" => Ok(Self::Advance),
            "hold" => Ok(Self::Hold),
            _ => Err(format!(
                "`{text}` is no clock policy; write advance or hold"
            )),
        }
    }
}

/// How wall-clock time is corrected after a pause that was held.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(rename_all = "snake_case")]
pub enum Correction {
    /// The guest's agent sets it, by the length of the pause, at once.
    Step,
    /// The guest's agent has it run faster until it is right: 500 ppm, so 2000 s for each second.
    Slew,
    /// The guest sees to it by itself: ptp_kvm, and a daemon that is allowed to step.
    Ptp,
}

/// The clock of a machine.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct ClockSpec {
    /// What its swaps do unless they say otherwise.
    #[serde(default, skip_serializing_if = "is_default")]
    pub policy: Policy,
    /// How wall-clock time is corrected after `hold`; by the agent if absent and there is a vsock
    /// device.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub correction: Option<Correction>,
    /// Whether a pause counts as time stolen from the guest's vCPUs, where the guest keeps such an
    /// account.
    #[serde(default, skip_serializing_if = "is_default")]
    pub steal: bool,
    /// Whether there is a vmclock device, which tells the guest of every swap and of a TSC that
    /// was disturbed.
    #[serde(default, skip_serializing_if = "is_default")]
    pub vmclock: bool,
}

/// Whether a field may be left out.
pub(crate) fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

impl ClockSpec {
    /// How a pause that was held would be corrected; `None` if nothing would.
    pub fn corrects(&self, has_vsock: bool) -> Option<Correction> {
        let agent = has_vsock.then_some(Correction::Step);
        match self.correction {
            Some(Correction::Step | Correction::Slew) if !has_vsock => None,
            chosen => chosen.or(agent),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_there_and_back() {
        for policy in [Policy::Advance, Policy::Hold] {
            assert_eq!(policy.as_str().parse(), Ok(policy));
            let json = serde_json::to_string(&policy).expect("json");
            assert_eq!(json, format!("\"{policy}\""));
        }
        let error = "stop".parse::<Policy>().expect_err("no policy");
        assert!(error.contains("advance or hold"), "{error}");
    }

    #[test]
    fn a_default_clock_says_nothing() {
        let json = serde_json::to_string(&ClockSpec::default()).expect("json");
        assert_eq!(json, "{}");
    }

    #[test]
    fn what_needs_the_agent_needs_a_way_to_it() {
        let with = |correction| ClockSpec {
            correction,
            ..ClockSpec::default()
        };
        assert_eq!(with(None).corrects(false), None);
        assert_eq!(with(None).corrects(true), Some(Correction::Step));
        assert_eq!(with(Some(Correction::Slew)).corrects(false), None);
        let ptp = Some(Correction::Ptp);
        assert_eq!(with(ptp).corrects(false), ptp);
    }
}
