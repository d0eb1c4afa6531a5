//! Pauses of guests, and the events by which guests hear of them beforehand.
//!
//! A pause concerns one VM, or several of one host at once. Each availability set among them has an
//! event of its own, which all of the set's members see and any one of them can approve. The pause
//! starts when all of its events are approved, or at `not_before`.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use stillpoint_control::spec::{self, SpecError};
use utoipa::ToSchema;

use super::reach::{MAX_REACH, Reach};
use super::safeguards::MAX_WATCH_NS;
use super::swap::{SwapId, SwapState};
use super::vm::VmName;

/// The most tags of a VM.
const MAX_TAGS: usize = 50;
/// The most update domains or fault domains of an availability set.
const MAX_DOMAIN: u16 = 255;
/// The longest notice: what is announced must still mean something when it comes.
pub const MAX_NOTICE_NS: u64 = 35 * 24 * 3600 * 1_000_000_000;

/// What a guest hears of itself, and how its pauses are announced.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Profile {
    /// The availability set it belongs to; its members see each other's events.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub availability_set: Option<String>,
    /// Its update domain in the set.
    #[serde(default)]
    pub update_domain: u16,
    /// Its fault domain in the set.
    #[serde(default)]
    pub fault_domain: u16,
    /// Tags, shown to the guest.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub tags: BTreeMap<String, String>,
    /// How long before a pause its guest hears of it, ns; 15 minutes when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub notice_ns: Option<u64>,
    /// For how long it is watched after a swap, and put back if it isn't well, ns; 10 s when absent,
    /// and 0 for not at all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub watch_ns: Option<u64>,
    /// What of its host it can reach by its network, beside the metadata service: nothing when absent
    /// from what is asked for. Absent from a VM that is there already: everything, as before.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Vec<String>>)]
    pub reach: Option<Vec<Reach>>,
}

impl Profile {
    /// Checks every field; the error names it.
    pub fn validate(&self) -> Result<(), SpecError> {
        let field = |field, problem: String| Err(SpecError::Field { field, problem });
        if let Some(set) = &self.availability_set
            && spec::validate_name(set).is_err()
        {
            let text = format!("{set:?} is not 1 to 48 of a-z A-Z 0-9 . _ -");
            return field("profile.availability_set", text);
        }
        if self.update_domain > MAX_DOMAIN {
            let text = format!("{} is more than {MAX_DOMAIN}", self.update_domain);
            return field("profile.update_domain", text);
        }
        if self.fault_domain > MAX_DOMAIN {
            let text = format!("{} is more than {MAX_DOMAIN}", self.fault_domain);
            return field("profile.fault_domain", text);
        }
        // The guest reads them as `key:value;key:value`.
        let plain = |text: &str| text.len() <= 256 && !text.contains([';', ':', '\n', '\r']);
        if self.tags.len() > MAX_TAGS
            || !self.tags.iter().all(|(k, v)| {
                !k.is_empty() && plain(k) && v.len() <= 256 && !v.contains([';', '\n', '\r'])
            })
        {
            let text = format!(
                "at most {MAX_TAGS}, each of at most 256 bytes without `;` and line ends, keys \
                 without `:`"
            );
            return field("profile.tags", text);
        }
        if let Some(ns) = self.watch_ns.filter(|&ns| ns > MAX_WATCH_NS) {
            let text = format!("{ns} is more than {MAX_WATCH_NS}, a day");
            return field("profile.watch_ns", text);
        }
        if self
            .reach
            .as_ref()
            .is_some_and(|reach| reach.len() > MAX_REACH)
        {
            return field("profile.reach", format!("more than {MAX_REACH} entries"));
        }
        match self.notice_ns {
            Some(ns) if ns == 0 || ns > MAX_NOTICE_NS => field(
                "profile.notice_ns",
                format!("{ns} is not more than 0 and at most {MAX_NOTICE_NS}"),
            ),
            _ => Ok(()),
        }
    }
}

/// VMs that see and approve each other's events: an availability set, or a VM that is in none.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, ToSchema)]
#[serde(transparent)]
#[schema(value_type = String)]
pub struct Group(String);

impl Group {
    /// The one of this VM.
    pub fn of(vm: &VmName, profile: &Profile) -> Self {
        // A set and a VM of one name are different groups: a name holds no slash.
        Self(match &profile.availability_set {
            Some(set) => format!("set/{set}"),
            None => format!("vm/{vm}"),
        })
    }

    /// As text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// A pause's id.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, ToSchema)]
#[serde(transparent)]
#[schema(value_type = String)]
pub struct PauseId(pub String);

impl std::fmt::Display for PauseId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(&self.0)
    }
}

/// An event's id: a GUID, which guests may send back in either case.
#[derive(Clone, Debug, Eq, PartialOrd, Ord, Serialize, Deserialize, ToSchema)]
#[serde(transparent)]
#[schema(value_type = String)]
pub struct EventId(pub String);

impl PartialEq for EventId {
    fn eq(&self, other: &Self) -> bool {
        self.0.eq_ignore_ascii_case(&other.0)
    }
}

impl std::fmt::Display for EventId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(&self.0)
    }
}

/// How far a pause is.
///
/// ```text
///  scheduled ──▶ started ──▶ over
///      │
///      └──▶ cancelled
/// ```
///
/// Guests see it while it is scheduled or started; then it is gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum PauseState {
    /// Announced.
    Scheduled,
    /// About to come, going on, or just past.
    Started,
    /// Past.
    Over,
    /// Withdrawn before it started; no pause came of it.
    Cancelled,
}

impl PauseState {
    /// Whether guests see it.
    pub fn is_open(self) -> bool {
        matches!(self, Self::Scheduled | Self::Started)
    }
}

impl std::fmt::Display for PauseState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(match self {
            Self::Scheduled => "scheduled",
            Self::Started => "started",
            Self::Over => "over",
            Self::Cancelled => "cancelled",
        })
    }
}

/// Who said "go".
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Approver {
    /// A VM of the group, from within.
    Vm(VmName),
    /// An operator.
    Operator,
}

/// That somebody said "go".
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Approval {
    /// Who.
    pub by: Approver,
    /// When, nanoseconds since the Unix epoch.
    pub at_unix_ns: u64,
}

/// What one group hears of a pause.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Notice {
    /// The event's id, the same through all its states.
    pub event: EventId,
    /// Who hears it.
    pub group: Group,
    /// The VMs of the group that are paused.
    pub vms: Vec<VmName>,
    /// Who said "go", if somebody did. One is enough for the group.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub approval: Option<Approval>,
}

/// What a pause was, measured.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Measured {
    /// How its swap ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub outcome: Option<SwapState>,
    /// Why it ended so, when the guest did not move.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// How long the guest stood still by the host's clock, ns; absent if it never did.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pause_ns: Option<u64>,
    /// The step of the guest's clock: what it read afterwards less what it should have read, ns.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub clock_step_ns: Option<i64>,
}

/// A pause, announced.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Pause {
    /// Id.
    pub id: PauseId,
    /// How far it is.
    pub state: PauseState,
    /// The swap it is for.
    pub swap: SwapId,
    /// What it is for, in words for the guest.
    pub description: String,
    /// Before that it does not start unless it is approved; seconds since the Unix epoch.
    pub not_before_unix_s: u64,
    /// How long it is expected to be, ns.
    pub expected_ns: u64,
    /// Why nobody was given notice, when an operator chose so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub no_notice: Option<String>,
    /// One for each group.
    pub notices: Vec<Notice>,
    /// When it was announced, nanoseconds since the Unix epoch.
    pub announced_at_unix_ns: u64,
    /// When it started.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub started_at_unix_ns: Option<u64>,
    /// When it was over or cancelled.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ended_at_unix_ns: Option<u64>,
    /// What it was; absent until then.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub measured: Option<Measured>,
}

impl Pause {
    /// Whether all groups said "go".
    pub fn is_approved(&self) -> bool {
        self.notices.iter().all(|notice| notice.approval.is_some())
    }

    /// The notice to this group.
    pub fn notice_to(&self, group: &Group) -> Option<&Notice> {
        self.notices.iter().find(|notice| notice.group == *group)
    }

    /// The VMs that are paused.
    pub fn vms(&self) -> impl Iterator<Item = &VmName> {
        self.notices.iter().flat_map(|notice| &notice.vms)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_set_and_a_vm_of_one_name_are_two_groups() {
        let vm = VmName::try_from("web".to_owned()).expect("name");
        let alone = Group::of(&vm, &Profile::default());
        let profile = Profile {
            availability_set: Some("web".into()),
            ..Profile::default()
        };
        assert_ne!(alone, Group::of(&vm, &profile));
    }

    #[test]
    fn profiles_that_can_not_be_name_their_field() {
        let refused = |change: fn(&mut Profile)| {
            let mut profile = Profile::default();
            profile.validate().expect("the default");
            change(&mut profile);
            profile.validate().expect_err("refused").to_string()
        };
        assert!(refused(|p| p.availability_set = Some("a/b".into())).contains("availability_set"));
        assert!(refused(|p| p.update_domain = 256).contains("update_domain"));
        assert!(refused(|p| p.fault_domain = 256).contains("fault_domain"));
        assert!(refused(|p| p.notice_ns = Some(0)).contains("notice_ns"));
        assert!(refused(|p| p.watch_ns = Some(u64::MAX)).contains("watch_ns"));
        assert!(refused(|p| p.reach = Some(vec![Reach::Dns; 33])).contains("reach"));
        assert!(refused(|p| drop(p.tags.insert("a:b".into(), String::new()))).contains("tags"));
        assert!(refused(|p| drop(p.tags.insert("a".into(), "b;c".into()))).contains("tags"));
    }
}
