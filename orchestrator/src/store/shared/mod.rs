//! What the daemons of a fleet share: records under keys, changed by compare-and-put only.
//!
//! | store | for | who sees it |
//! |---|---|---|
//! | [`Memory`] | simulations and tests | this process |
//! | [`Sqlite`] | one host; the default | this daemon |
//! | [`Etcd`](etcd::Etcd) | a fleet | every daemon |
//!
//! All three keep one law, and one suite of tests asks it of each: a commit is made as a whole or not at
//! all; each record has one version, which every change of it raises; whoever changes a record says which
//! version it saw, and a guard says whose word counts.
//!
//! Must never: hold anything that a running guest needs. A store that is away stops rollouts, and nothing
//! else.

pub mod etcd;
mod memory;
mod mirror;
mod sqlite;

use std::time::Duration;

use tokio::sync::watch;

use crate::model::{Code, Problem};

pub use memory::Memory;
pub use sqlite::Sqlite;

/// A record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Where it is.
    pub key: String,
    /// What it is.
    pub value: Vec<u8>,
    /// The revision of the commit that changed it last.
    pub version: u64,
    /// The revision of the commit that made it. One that was removed and made again has another.
    pub created: u64,
}

/// Records as they were together at one moment.
#[derive(Clone, Debug, Default)]
pub struct Snapshot {
    /// By key.
    pub entries: Vec<Entry>,
    /// The revision of the store at that moment.
    pub revision: u64,
    /// Which store it is: revisions of two have nothing to do with each other.
    pub origin: String,
}

/// What a record must be for a change to be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Expect {
    /// It isn't there.
    Absent,
    /// It was not changed since.
    Version(u64),
    /// Whatever it is: for those that have one writer.
    Anything,
}

/// How long a record is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Keep {
    /// Until it is removed.
    Always,
    /// Its writer tells it anew when it starts, so it need not outlive the store's process.
    Retold,
    /// As long as its lease.
    With(Lease),
}

/// What becomes of a record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Become {
    /// This.
    Value(Vec<u8>, Keep),
    /// Nothing.
    Gone,
}

/// One record's part in a commit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change {
    /// Which.
    pub key: String,
    /// What it must be.
    pub expect: Expect,
    /// What it becomes.
    pub to: Become,
}

impl Change {
    /// Puts a value that is kept.
    pub fn put(key: impl Into<String>, expect: Expect, value: Vec<u8>) -> Self {
        Self::keep(key, expect, value, Keep::Always)
    }

    /// Puts a value that is kept for so long.
    pub fn keep(key: impl Into<String>, expect: Expect, value: Vec<u8>, keep: Keep) -> Self {
        Self {
            key: key.into(),
            expect,
            to: Become::Value(value, keep),
        }
    }

    /// Removes it.
    pub fn remove(key: impl Into<String>, expect: Expect) -> Self {
        Self {
            key: key.into(),
            expect,
            to: Become::Gone,
        }
    }
}

/// Whose commits count: the record at this key must be the one that was made at that revision.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Guard {
    /// The key.
    pub key: String,
    /// When it was made.
    pub created: u64,
}

/// A lease: records that hang on it are removed when it ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Lease(pub i64);

/// What became of a commit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Committed {
    /// All of it was done, at this revision.
    Done(u64),
    /// A record was not what was expected, or the guard did not hold. Nothing was changed.
    Refused,
}

/// Why the shared store could not do as asked.
#[derive(Debug, thiserror::Error)]
pub enum SharedError {
    /// This host's own store.
    #[error(transparent)]
    Own(#[from] super::StoreError),
    /// etcd.
    #[error(transparent)]
    Etcd(#[from] etcd::EtcdError),
    /// A record can't be read.
    #[error(
        "the record `{key}` of the shared store can't be read ({problem}); it was left as it is. \
         Remove it, or put back what was there"
    )]
    Malformed {
        /// Where.
        key: String,
        /// Why not.
        problem: String,
    },
}

impl From<SharedError> for Problem {
    fn from(error: SharedError) -> Self {
        match error {
            SharedError::Own(error) => error.into(),
            error => Self::new(Code::StoreFailed, error.to_string()),
        }
    }
}

/// One of the three. Clones are the same store.
#[derive(Clone, Debug)]
pub enum Shared {
    /// In memory.
    Memory(Memory),
    /// In this host's own store.
    Sqlite(Sqlite),
    /// In etcd.
    Etcd(etcd::Etcd),
}

impl Shared {
    /// All records whose keys begin so.
    pub async fn list(&self, prefix: &str) -> Result<Snapshot, SharedError> {
        match self {
            Self::Memory(store) => Ok(store.list(prefix)),
            Self::Sqlite(store) => Ok(store.list(prefix).await?),
            Self::Etcd(store) => Ok(store.list(prefix).await?),
        }
    }

    /// One record.
    pub async fn get(&self, key: &str) -> Result<Option<Entry>, SharedError> {
        let mut found = self.list(key).await?.entries.into_iter();
        Ok(found.find(|entry| entry.key == key))
    }

    /// Makes all changes, or none.
    pub async fn commit(
        &self,
        changes: Vec<Change>,
        guard: Option<&Guard>,
    ) -> Result<Committed, SharedError> {
        match self {
            Self::Memory(store) => Ok(store.commit(&changes, guard)),
            Self::Sqlite(store) => Ok(store.commit(changes, guard).await?),
            Self::Etcd(store) => Ok(store.commit(&changes, guard).await?),
        }
    }

    /// Takes a lease that ends so long after it was kept last.
    pub async fn lease(&self, lasts: Duration) -> Result<Lease, SharedError> {
        match self {
            Self::Memory(store) => Ok(store.lease(lasts)),
            Self::Sqlite(store) => Ok(store.lease().await?),
            Self::Etcd(store) => Ok(store.lease(lasts).await?),
        }
    }

    /// Keeps it; `false` if it has ended.
    pub async fn keep(&self, lease: Lease) -> Result<bool, SharedError> {
        match self {
            Self::Memory(store) => Ok(store.keep(lease)),
            Self::Sqlite(_) => Ok(true),
            Self::Etcd(store) => Ok(store.keep(lease).await?),
        }
    }

    /// Ends it.
    pub async fn revoke(&self, lease: Lease) -> Result<(), SharedError> {
        match self {
            Self::Memory(store) => store.revoke(lease),
            Self::Sqlite(store) => store.revoke(lease).await,
            Self::Etcd(store) => store.revoke(lease).await?,
        }
        Ok(())
    }

    /// Changes whenever a record did. It says that there is something to look at, not what; and it
    /// may say so once too often.
    pub fn changes(&self) -> watch::Receiver<u64> {
        match self {
            Self::Memory(store) => store.changes(),
            Self::Sqlite(store) => store.changes(),
            Self::Etcd(store) => store.changes(),
        }
    }

    /// What it is, for people.
    pub fn said(&self) -> String {
        match self {
            Self::Memory(_) => "memory".into(),
            Self::Sqlite(_) => "this host's own store (SQLite)".into(),
            Self::Etcd(store) => store.said(),
        }
    }
}
