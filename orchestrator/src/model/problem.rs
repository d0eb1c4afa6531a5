//! Why something was refused or failed, as API and command show it.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// A word for programs. Each has one HTTP status.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Code {
    /// The request can't be read, or a field of it can't be.
    BadRequest,
    /// The caller is another user.
    Forbidden,
    /// No such VM, swap or release.
    NotFound,
    /// A guest of this name runs already.
    NameTaken,
    /// The VM is not running.
    NotRunning,
    /// The VM is running.
    StillRunning,
    /// The event has started, or is over.
    TooLate,
    /// Another swap of this VM is going on.
    SwapInProgress,
    /// Another rollout has the VM.
    RolloutInProgress,
    /// The host is cordoned.
    Cordoned,
    /// A release of this version is there already, with another digest.
    ReleaseExists,
    /// The file is no release.
    NotARelease,
    /// The binary in the store is not the one that was added.
    DigestMismatch,
    /// The manifest has no signature, or none that this daemon trusts.
    NotTrusted,
    /// The release is below the pinned minimum.
    BelowPin,
    /// A guest is run by the release, or is on its way to it.
    ReleaseInUse,
    /// The release reads no state format that the running one writes.
    NoCommonFormat,
    /// The guest did not start.
    StartFailed,
    /// What was asked could not be recorded, so it was not done.
    StoreFull,
    /// The store failed.
    StoreFailed,
    /// A step failed for a reason of the host.
    Failed,
    /// The command could not reach the daemon.
    NoDaemon,
}

impl Code {
    /// The HTTP status that says the same.
    pub fn http_status(self) -> u16 {
        match self {
            Self::BadRequest => 400,
            Self::Forbidden => 403,
            Self::NotFound => 404,
            Self::NameTaken
            | Self::NotRunning
            | Self::StillRunning
            | Self::SwapInProgress
            | Self::RolloutInProgress
            | Self::Cordoned
            | Self::TooLate
            | Self::ReleaseExists
            | Self::ReleaseInUse
            | Self::BelowPin => 409,
            Self::NotARelease
            | Self::DigestMismatch
            | Self::NotTrusted
            | Self::NoCommonFormat
            | Self::StartFailed => 422,
            Self::StoreFull => 507,
            Self::StoreFailed | Self::Failed => 500,
            Self::NoDaemon => 503,
        }
    }
}

/// Why something was refused or failed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema, thiserror::Error)]
#[error("{message}")]
pub struct Problem {
    /// A word for programs.
    pub code: Code,
    /// What, why, and what to do.
    pub message: String,
}

impl Problem {
    /// A problem of that kind.
    pub fn new(code: Code, message: impl Into<String>) -> Self {
        Self {
            code,
            message: message.into(),
        }
    }

    /// No VM of that name.
    pub fn unknown_vm(name: &str) -> Self {
        let message = format!("no VM is called `{name}`; `stillpoint ls` shows those there are");
        Self::new(Code::NotFound, message)
    }
}
