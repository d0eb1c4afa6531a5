//! The audit log: who asked this daemon for a change, in which role, and what came of it.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::auth::Role;

/// What came of what was asked.
///
/// ```text
///  under way ──▶ done | refused | failed
///      │
///      └──▶ cut off: the daemon died, or the caller went away, before an answer
///  denied: not begun, for want of the role
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// It was begun, and not answered yet.
    UnderWay,
    /// It was answered well: done, or on record as to be done.
    Done,
    /// It can't be done as asked; nothing was changed.
    Refused,
    /// It failed.
    Failed,
    /// The caller lacks the role; nothing was changed.
    Denied,
    /// Nobody heard an answer. What became of it is in the journal.
    CutOff,
}

impl std::fmt::Display for Outcome {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(match self {
            Self::UnderWay => "under way",
            Self::Done => "done",
            Self::Refused => "refused",
            Self::Failed => "failed",
            Self::Denied => "denied",
            Self::CutOff => "cut off",
        })
    }
}

/// Something that was asked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct AuditEntry {
    /// Its number; they rise, and none is given twice.
    pub number: u64,
    /// When it was asked, nanoseconds since the Unix epoch.
    pub at_unix_ns: u64,
    /// Who: `uid N`, the name of a certificate, or `the page's key`.
    pub who: String,
    /// From where: a process of this host, or an address and the certificate's number.
    pub from: String,
    /// In which role.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub role: Option<Role>,
    /// The request's method.
    pub method: String,
    /// And its path.
    pub path: String,
    /// The first part of its body.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub body: Option<String>,
    /// What came of it.
    pub outcome: Outcome,
    /// The status of the answer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub status: Option<u16>,
    /// What the answer said, where it was no good one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// When it was answered, nanoseconds since the Unix epoch.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ended_unix_ns: Option<u64>,
}
