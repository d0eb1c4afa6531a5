//! How a rollout goes about it: what its operator decides before it starts.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use stillpoint_control::nanos;
use utoipa::ToSchema;

use super::amount::Amount;
use super::gate::{GateError, GateSpec};
use super::window::Window;

/// The first VMs or hosts of a rollout, watched for a while before others follow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(as = RolloutStage)]
pub struct Stage {
    /// How many of all that the rollout is to swap, those of earlier stages not counted.
    #[schema(value_type = String)]
    pub size: Amount,
    /// How long they run before others follow.
    #[serde(rename = "bake_ns", with = "nanos")]
    #[schema(value_type = u64)]
    pub bake: Duration,
}

/// How many swaps may be under way at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct AtOnce {
    /// In all.
    pub total: u32,
    /// On one host.
    pub per_host: u32,
    /// In one rack (fault domain).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub per_rack: Option<u32>,
    /// In one zone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub per_zone: Option<u32>,
}

/// What a swap's report may show at the worst. A swap beyond it has failed, though it moved.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Limits {
    /// The longest blackout.
    #[serde(
        rename = "blackout_ns",
        with = "some_nanos",
        default,
        skip_serializing_if = "Option::is_none"
    )]
    #[schema(value_type = Option<u64>)]
    pub blackout: Option<Duration>,
    /// The largest error of a guest's clock.
    #[serde(
        rename = "clock_error_ns",
        with = "some_nanos",
        default,
        skip_serializing_if = "Option::is_none"
    )]
    #[schema(value_type = Option<u64>)]
    pub clock_error: Option<Duration>,
    /// The longest brownout.
    #[serde(
        rename = "brownout_ns",
        with = "some_nanos",
        default,
        skip_serializing_if = "Option::is_none"
    )]
    #[schema(value_type = Option<u64>)]
    pub brownout: Option<Duration>,
}

/// How a rollout goes about it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(as = RolloutPolicy)]
pub struct Policy {
    /// Canaries, and further stages before all the rest.
    #[serde(default)]
    pub stages: Vec<Stage>,
    /// How many members of an availability set may be away, whatever made them so. At least one
    /// always may: a set of one member could never be swapped otherwise.
    #[schema(value_type = String)]
    pub set_budget: Amount,
    /// The same, of all VMs of the fleet.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub fleet_budget: Option<Amount>,
    /// How many swaps may be under way at once.
    pub at_once: AtOnce,
    /// How long guest and host must have been well before a swap, and after it until it is done.
    #[serde(rename = "well_for_ns", with = "nanos")]
    #[schema(value_type = u64)]
    pub well_for: Duration,
    /// How long before its pause each guest hears of it; each guest's own notice when absent.
    #[serde(
        rename = "notice_ns",
        with = "some_nanos",
        default,
        skip_serializing_if = "Option::is_none"
    )]
    #[schema(value_type = Option<u64>)]
    pub notice: Option<Duration>,
    /// How long a swap may take, the notice of its guests included; and then how long it may take
    /// until all is well.
    #[serde(rename = "deadline_ns", with = "nanos")]
    #[schema(value_type = u64)]
    pub deadline: Duration,
    /// Between two update domains of a set.
    #[serde(rename = "between_domains_ns", with = "nanos")]
    #[schema(value_type = u64)]
    pub between_domains: Duration,
    /// How often a swap is tried that was kept, so did no harm.
    pub tries: u8,
    /// Between two tries.
    #[serde(rename = "retry_after_ns", with = "nanos")]
    #[schema(value_type = u64)]
    pub retry_after: Duration,
    /// How many swaps may fail, of those tried so far. In all stages before the last: none.
    #[schema(value_type = String)]
    pub failures: Amount,
    /// Whether what a failing release touched is swapped back without asking.
    pub roll_back: bool,
    /// What a swap's report may show at the worst.
    #[serde(default)]
    pub limits: Limits,
    /// What is asked before each step and after it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub gates: Vec<GateSpec>,
    /// When swaps may begin; at any time if there are none.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schema(value_type = Vec<String>)]
    pub windows: Vec<Window>,
}

impl Default for Policy {
    /// One canary, ten minutes; then one at a time, and the first failure is the last.
    fn default() -> Self {
        Self {
            stages: vec![Stage {
                size: Amount::Count(1),
                bake: Duration::from_secs(600),
            }],
            set_budget: Amount::percent(20),
            fleet_budget: None,
            at_once: AtOnce {
                total: 1,
                per_host: 1,
                per_rack: None,
                per_zone: None,
            },
            well_for: Duration::from_secs(30),
            notice: None,
            deadline: Duration::from_secs(600),
            between_domains: Duration::ZERO,
            tries: 3,
            retry_after: Duration::from_secs(60),
            failures: Amount::Count(0),
            roll_back: true,
            limits: Limits::default(),
            gates: Vec::new(),
            windows: Vec::new(),
        }
    }
}

/// Durations that may be absent, as whole nanoseconds in JSON.
mod some_nanos {
    use std::time::Duration;

    use serde::{Deserialize, Deserializer, Serializer};
    use stillpoint_control::nanos;

    pub(super) fn serialize<S: Serializer>(
        duration: &Option<Duration>,
        to: S,
    ) -> Result<S::Ok, S::Error> {
        match duration {
            Some(duration) => nanos::serialize(duration, to),
            None => to.serialize_none(),
        }
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(
        from: D,
    ) -> Result<Option<Duration>, D::Error> {
        Ok(Option::<u64>::deserialize(from)?.map(Duration::from_nanos))
    }
}

/// A policy by which nothing could ever be done.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PolicyError {
    /// Nothing could ever begin.
    #[error("{0} is 0: nothing could ever begin; give at least 1")]
    Zero(&'static str),
    /// A step would have failed before it could be seen to be well.
    #[error(
        "a swap must be well for {well_for:?} to be done, and has failed after {deadline:?}: \
         give a deadline that is longer"
    )]
    NeverWell {
        /// The time it must be well.
        well_for: Duration,
        /// The time it has.
        deadline: Duration,
    },
    /// A step would have failed while its guests still have their notice.
    #[error(
        "guests hear of their pause {notice:?} before it, and a swap that takes longer than \
         {deadline:?} has failed: give a shorter notice or a longer deadline"
    )]
    NeverBegun {
        /// The notice.
        notice: Duration,
        /// The time of a swap, notice included.
        deadline: Duration,
    },
    /// No step fits into a window.
    #[error(
        "the window `{window}` is shorter than a swap may take ({deadline:?}), so none could ever \
         begin in it; give a longer window or a shorter deadline"
    )]
    WindowTooShort {
        /// The window.
        window: String,
        /// What it must hold.
        deadline: Duration,
    },
    /// A gate that could never pass.
    #[error(transparent)]
    Gate(#[from] GateError),
    /// Too many stages to count.
    #[error("{0} stages are too many; 250 are the most")]
    Stages(usize),
}

impl Policy {
    /// Whether anything could ever be done by it.
    ///
    /// # Errors
    /// Says what stands in the way.
    pub fn check(&self) -> Result<(), PolicyError> {
        let AtOnce {
            total,
            per_host,
            per_rack,
            per_zone,
        } = self.at_once;
        let counts = [
            ("the number of swaps at once", total),
            ("the number of swaps at once on a host", per_host),
            (
                "the number of swaps at once in a rack",
                per_rack.unwrap_or(1),
            ),
            (
                "the number of swaps at once in a zone",
                per_zone.unwrap_or(1),
            ),
            ("the number of tries", self.tries.into()),
        ];
        if let Some((what, _)) = counts.into_iter().find(|&(_, count)| count == 0) {
            return Err(PolicyError::Zero(what));
        }
        if self.stages.len() > 250 {
            return Err(PolicyError::Stages(self.stages.len()));
        }
        if self
            .stages
            .iter()
            .any(|stage| stage.size.at_least(u32::MAX) == 0)
        {
            return Err(PolicyError::Zero("the size of a stage"));
        }
        if self.well_for >= self.deadline {
            return Err(PolicyError::NeverWell {
                well_for: self.well_for,
                deadline: self.deadline,
            });
        }
        if let Some(notice) = self.notice
            && notice >= self.deadline
        {
            return Err(PolicyError::NeverBegun {
                notice,
                deadline: self.deadline,
            });
        }
        GateSpec::check(&self.gates)?;
        match self.windows.iter().find(|w| w.lasts() < self.deadline) {
            None => Ok(()),
            Some(window) => Err(PolicyError::WindowTooShort {
                window: window.to_string(),
                deadline: self.deadline,
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_policy_is_read_as_it_is_written() {
        let mut policy = Policy::default();
        policy.at_once.per_rack = Some(2);
        policy.notice = Some(Duration::from_secs(5));
        policy.limits.blackout = Some(Duration::from_millis(3));
        policy.windows = vec!["Sat 02:00 5h Europe/Berlin".parse().expect("window")];
        for policy in [policy, Policy::default()] {
            let text = serde_json::to_string(&policy).expect("JSON");
            let read: Policy = serde_json::from_str(&text).expect(&text);
            assert_eq!(read, policy, "{text}");
        }
    }

    #[test]
    fn policies_by_which_nothing_could_be_done_are_refused() {
        Policy::default().check().expect("the default");
        let refused = |change: fn(&mut Policy)| {
            let mut policy = Policy::default();
            change(&mut policy);
            policy.check().expect_err("refused").to_string()
        };
        assert!(refused(|p| p.at_once.per_rack = Some(0)).contains("in a rack is 0"));
        assert!(refused(|p| p.tries = 0).contains("tries is 0"));
        assert!(refused(|p| p.well_for = p.deadline).contains("longer"));
        assert!(refused(|p| p.stages[0].size = Amount::Count(0)).contains("stage is 0"));
        assert!(refused(|p| p.notice = Some(p.deadline)).contains("a shorter notice"));
        let short = |p: &mut Policy| {
            p.windows = vec!["Sat 02:00 5m Europe/Berlin".parse().expect("window")];
        };
        assert!(refused(short).contains("`Sat 02:00 5m Europe/Berlin` is shorter"));
    }
}
