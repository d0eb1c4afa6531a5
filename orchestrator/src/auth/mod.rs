//! Who calls, and what they may do.
//!
//! | module | what it holds |
//! |---|---|
//! | [`Role`], [`Caller`] | what everything else speaks of |
//! | [`peer`] | who is at the other end of the Unix socket: the kernel says, by uid and groups |
//! | [`certificate`] | what a certificate says: a name, a role, how long |
//! | [`tls`] | the door for other machines: TLS with certificates on both sides |
//! | [`files`] | the door's certificate, key, CA and list of revoked ones, read anew when they change |
//! | [`ca`] | a small CA, for those who have none |
//!
//! Which route of the API needs which role is one table, in `api/roles.rs`; what was asked of the daemon and by
//! whom is recorded by `api/gate.rs`. Must never: take a name or a role from what a request says of itself.

pub mod ca;
pub mod certificate;
pub mod files;
pub mod peer;
pub mod tls;

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use files::Papers;

/// What somebody may do. Each role may do all that those before it may.
#[derive(
    Clone,
    Copy,
    Debug,
    PartialEq,
    Eq,
    PartialOrd,
    Ord,
    Serialize,
    Deserialize,
    ToSchema,
    clap::ValueEnum,
)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// Looks at everything but the audit log.
    Read,
    /// Swaps guests between releases that are there, stops them, approves and cancels pauses, steers rollouts.
    Operate,
    /// All: starts guests with files of the host, adds releases, changes the host itself, reads the audit log.
    Admin,
}

impl Role {
    /// The word for it.
    pub fn word(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Operate => "operate",
            Self::Admin => "admin",
        }
    }

    /// The role of that word.
    pub fn of_word(word: &str) -> Option<Self> {
        [Self::Read, Self::Operate, Self::Admin]
            .into_iter()
            .find(|role| role.word() == word)
    }
}

impl std::fmt::Display for Role {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.word())
    }
}

/// Who calls, as the kernel or a certificate says.
#[derive(Clone, Debug)]
pub struct Caller {
    /// Who: `uid 0`, a certificate's name, or `the page's key`.
    pub who: String,
    /// From where.
    pub from: String,
    /// What they may do; nothing when absent.
    pub role: Option<Role>,
    /// What to do about a role that is missing.
    pub remedy: String,
    /// The certificate, where one was shown.
    pub shown: Option<Shown>,
}

/// A certificate that was good when its connection was made.
#[derive(Clone, Debug)]
pub struct Shown {
    /// Its serial number.
    pub serial: String,
    /// When it ends, seconds since the Unix epoch.
    pub until_unix_s: u64,
    /// The papers of the door it came by, which tell whether it was revoked since.
    pub papers: Arc<Papers>,
}

impl Caller {
    /// Why the certificate that was shown counts no more, if it doesn't. Connections outlive certificates.
    pub fn lapsed(&self, now_unix_s: u64) -> Option<String> {
        let shown = self.shown.as_ref()?;
        let who = &self.who;
        if now_unix_s > shown.until_unix_s {
            return Some(format!(
                "the certificate of `{who}` has expired; get a new one (`stillpoint auth renew`)"
            ));
        }
        let revoked = shown.papers.is_revoked(&shown.serial);
        revoked.then(|| format!("the certificate of `{who}` was revoked"))
    }
}

/// An error with all that it came of: what the other side has against us stands at its end.
pub(crate) fn whole(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text.push_str(&format!(": {error}"));
        source = error.source();
    }
    text
}
