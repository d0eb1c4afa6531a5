//! Changes of a host that is no component of ours: its guests stand still in their places while an
//! operator's command does it, or while the operator does it by hand.

use serde::{Deserialize, Serialize};
use stillpoint_control::message::ProcessId;
use utoipa::ToSchema;

use super::fleet::RolloutId;
use super::kernel::KernelJump;
use super::kvm_swap::KvmSwap;
use super::swap::{HOST, KVM, SwapId};
use super::vm::VmName;

/// How far it is.
///
/// ```text
///  wanted ──▶ in_progress ──▶ done | failed
///    └──▶ refused
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum HostSwapState {
    /// Recorded; its guests have their notice.
    Wanted,
    /// Guests stand still, or are about to.
    InProgress,
    /// The command did what it should, or the operator did, within the budget; every guest runs.
    Done,
    /// The command failed, or the budget ended; every guest runs, and `undo` was run.
    Failed,
    /// It did not begin: no command was run, and every guest runs.
    Refused,
}

impl HostSwapState {
    /// Whether nothing more will happen.
    pub fn is_over(self) -> bool {
        matches!(self, Self::Done | Self::Failed | Self::Refused)
    }
}

impl std::fmt::Display for HostSwapState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(match self {
            Self::Wanted => "wanted",
            Self::InProgress => "in progress",
            Self::Done => "done",
            Self::Failed => "failed",
            Self::Refused => "refused",
        })
    }
}

/// How a command ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum CommandEnd {
    /// With this exit status.
    Exit(i32),
    /// By this signal.
    Signal(i32),
    /// It ran longer than the budget: it was told to end, and the guests did not wait for it.
    Overran,
    /// It could not be started.
    NotStarted(String),
    /// The daemon that ran it died; nobody knows.
    Unknown,
}

impl CommandEnd {
    /// Whether it did what it should.
    pub fn is_success(&self) -> bool {
        *self == Self::Exit(0)
    }
}

impl std::fmt::Display for CommandEnd {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Exit(status) => write!(f, "exit status {status}"),
            Self::Signal(signal) => write!(f, "killed by signal {signal}"),
            Self::Overran => f.write_str("ran longer than the budget"),
            Self::NotStarted(why) => write!(f, "not started: {why}"),
            Self::Unknown => f.write_str("not known: the daemon died meanwhile"),
        }
    }
}

/// A change of the host, as it is recorded. What it was to each guest is in that guest's own swap
/// record, whose `part_of` is this one's id.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct HostSwap {
    /// Id.
    pub id: SwapId,
    /// The rollout that it is a step of.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rollout: Option<RolloutId>,
    /// KVM's modules, if it is they that are exchanged: the guests let go of KVM while they stand still.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kvm: Option<KvmSwap>,
    /// What is run while the guests stand still; empty if the operator does it by hand, or if modules are
    /// exchanged.
    pub command: Vec<String>,
    /// The jump into another kernel that it is, if it is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kernel: Option<KernelJump>,
    /// What a shell runs when it failed, after the guests run again.
    pub undo: Option<String>,
    /// The guests that stand still.
    pub vms: Vec<VmName>,
    /// The longest a guest stands still, ns.
    pub budget_ns: u64,
    /// How long before the guests hear of it, ns; each guest's own notice when absent.
    pub notice_ns: Option<u64>,
    /// Why the guests get no notice, if an operator chose so.
    pub no_notice: Option<String>,
    /// How far it is.
    pub state: HostSwapState,
    /// The step it is at, or was at when it ended.
    pub step: String,
    /// Why it ended so, when it is not done.
    pub reason: Option<String>,
    /// The command's process, once there is one.
    pub process: Option<ProcessId>,
    /// How the command ended.
    pub ended: Option<CommandEnd>,
    /// How `undo` ended, if it was run.
    pub undone: Option<CommandEnd>,
    /// The last of what command and undo printed.
    pub output: String,
    /// The longest any guest stood still, ns.
    pub pause_ns: Option<u64>,
    /// When it was asked for, nanoseconds since the Unix epoch.
    pub asked_at_unix_ns: u64,
    /// When it ended.
    pub ended_at_unix_ns: Option<u64>,
}

impl HostSwap {
    /// One that is asked for and not begun, of these guests and with this budget; the rest is the caller's.
    pub fn wanted(id: SwapId, vms: Vec<VmName>, budget_ns: u64, asked_at_unix_ns: u64) -> Self {
        Self {
            id,
            rollout: None,
            kvm: None,
            command: Vec::new(),
            kernel: None,
            undo: None,
            vms,
            budget_ns,
            notice_ns: None,
            no_notice: None,
            state: HostSwapState::Wanted,
            step: "recorded".into(),
            reason: None,
            process: None,
            ended: None,
            undone: None,
            output: String::new(),
            pause_ns: None,
            asked_at_unix_ns,
            ended_at_unix_ns: None,
        }
    }

    /// Whether the operator does it by hand.
    pub fn is_by_hand(&self) -> bool {
        self.command.is_empty() && self.kvm.is_none() && self.kernel.is_none()
    }

    /// The component that each guest's part is of.
    pub fn component(&self) -> &'static str {
        match self.kvm {
            Some(_) => KVM,
            None => HOST,
        }
    }

    /// The guests, in a line.
    pub fn guests(&self) -> String {
        let names: Vec<_> = self.vms.iter().map(VmName::as_str).collect();
        names.join(", ")
    }
}
