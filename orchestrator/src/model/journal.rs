//! The journal: what was asked of the daemon and what came of it, line by line, in the order in which it
//! was written to disk.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::swap::SwapId;
use super::vm::VmName;

/// What a line tells.
///
/// ```text
///  asked ──▶ step ──▶ ... ──▶ done | undone
///              │  ▲
///              ▼  │   a daemon that starts anew finds it unfinished
///             found
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum JournalKind {
    /// A daemon started, or ended in order.
    Daemon,
    /// Something is wanted; nothing was done for it.
    Asked,
    /// It is under way.
    Step,
    /// A daemon that started found it unfinished, and goes on with it or undoes it.
    Found,
    /// It is so as it was asked.
    Done,
    /// It is over, and not as it was asked.
    Undone,
}

impl std::fmt::Display for JournalKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(match self {
            Self::Daemon => "daemon",
            Self::Asked => "asked",
            Self::Step => "step",
            Self::Found => "found",
            Self::Done => "done",
            Self::Undone => "undone",
        })
    }
}

/// One line.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct JournalEntry {
    /// Its number; they rise, and none is given twice.
    pub number: u64,
    /// When it was written, nanoseconds since the Unix epoch.
    pub at_unix_ns: u64,
    /// The machine, if it is about one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vm: Option<VmName>,
    /// The swap, if it is about one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub swap: Option<SwapId>,
    /// What it tells.
    pub kind: JournalKind,
    /// For people.
    pub text: String,
}
