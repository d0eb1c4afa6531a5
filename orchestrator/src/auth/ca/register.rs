//! What a CA issued and what became of it, in a file; and how its files are written.

use std::fs::File;
use std::io::Write;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::FlockOperation;
use serde::{Deserialize, Serialize};

use super::CaError;
use crate::auth::Role;

/// What a certificate is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// A daemon, or a member of etcd.
    Daemon,
    /// Somebody who calls one.
    Client,
}

/// What became of a certificate.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Is {
    /// It counts.
    Good,
    /// Its time is over.
    Expired,
    /// It was revoked.
    Revoked,
}

impl Is {
    /// In a word.
    pub fn word(self) -> &'static str {
        match self {
            Self::Good => "good",
            Self::Expired => "expired",
            Self::Revoked => "revoked",
        }
    }
}

/// A certificate that was issued.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// To whom.
    pub name: String,
    /// What for.
    pub kind: Kind,
    /// A client's role.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub role: Option<Role>,
    /// A daemon's names and addresses.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub names: Vec<String>,
    /// Its serial number, in hex.
    pub serial: String,
    /// When it begins, seconds since the Unix epoch.
    pub from_unix_s: u64,
    /// When it ends.
    pub until_unix_s: u64,
    /// When it was revoked, if it was.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub revoked_at_unix_s: Option<u64>,
}

impl Entry {
    /// What it is at that time.
    pub fn is(&self, now_unix_s: u64) -> Is {
        match self.revoked_at_unix_s {
            Some(_) => Is::Revoked,
            None if now_unix_s > self.until_unix_s => Is::Expired,
            None => Is::Good,
        }
    }
}

/// All of them.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(super) struct Register {
    /// How many lists of revoked certificates were made: each has a number.
    pub(super) lists: u64,
    /// Oldest first.
    pub(super) issued: Vec<Entry>,
}

impl Register {
    pub(super) fn last(&self, name: &str) -> Option<&Entry> {
        self.issued.iter().rev().find(|entry| entry.name == name)
    }

    pub(super) fn good(&self, name: &str, now_unix_s: u64) -> Option<&Entry> {
        let mut all = self.issued.iter();
        all.find(|entry| entry.name == name && entry.is(now_unix_s) == Is::Good)
    }
}

/// The bytes of a serial number.
pub(super) fn bytes(hex: &str) -> Option<Vec<u8>> {
    let even = match hex.len() % 2 {
        0 => hex.to_owned(),
        _ => format!("0{hex}"),
    };
    let pairs = (0..even.len()).step_by(2);
    pairs
        .map(|at| u8::from_str_radix(even.get(at..at + 2)?, 16).ok())
        .collect()
}

fn io(what: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> CaError {
    let path = path.to_owned();
    move |source| CaError::Io { what, path, source }
}

/// Makes a directory that only its owner can look into.
pub(super) fn make_dir(path: &Path) -> Result<(), CaError> {
    let mut builder = std::fs::DirBuilder::new();
    let made = builder.recursive(true).mode(0o700).create(path);
    made.map_err(io("make the directory", path))
}

/// The register, while nobody else changes it.
pub(super) struct Locked {
    path: PathBuf,
    _lock: File,
}

impl Locked {
    pub(super) fn take(dir: &Path) -> Result<Self, CaError> {
        let path = dir.join("lock");
        let lock = File::options()
            .create(true)
            .append(true)
            .mode(0o600)
            .open(&path);
        let lock = lock.map_err(io("open", &path))?;
        rustix::fs::flock(&lock, FlockOperation::LockExclusive)
            .map_err(|e| io("lock", &path)(e.into()))?;
        Ok(Self {
            path: dir.join("register.json"),
            _lock: lock,
        })
    }

    pub(super) fn load(&self) -> Result<Register, CaError> {
        let text = std::fs::read(&self.path).map_err(io("read", &self.path))?;
        serde_json::from_slice(&text).map_err(|e| CaError::Register {
            path: self.path.clone(),
            problem: e.to_string(),
        })
    }

    pub(super) fn save(&self, register: &Register) -> Result<(), CaError> {
        // A plain tree with text for keys.
        let text = serde_json::to_vec_pretty(register).unwrap_or_default();
        write(&self.path, &text, true)
    }
}

/// Replaces a file as a whole; after it, it is on disk.
pub(super) fn write(path: &Path, bytes: &[u8], private: bool) -> Result<(), CaError> {
    let new = path.with_extension("new");
    let _ = std::fs::remove_file(&new);
    let mode = if private { 0o600 } else { 0o644 };
    let file = File::options()
        .write(true)
        .create_new(true)
        .mode(mode)
        .open(&new);
    let mut file = file.map_err(io("write", &new))?;
    let written = file.write_all(bytes).and_then(|()| file.sync_all());
    written.map_err(io("write", &new))?;
    std::fs::rename(&new, path).map_err(io("write", path))?;
    let dir = path.parent().unwrap_or(Path::new("/"));
    let synced = File::open(dir).and_then(|dir| dir.sync_all());
    synced.map_err(io("write", path))
}
