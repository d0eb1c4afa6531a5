//! Whose signatures count: minisign's public keys, given to the daemon when it starts.
//!
//! A manifest is judged by the bytes that were signed. A signature counts if one of the keys made it,
//! and that key had not ended when the release was added; so a key that is replaced can be given an
//! end, and what it signed before stays good. Both of minisign's ways to sign are read.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, bail, ensure};
use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use jiff::civil::Date;
use jiff::tz::TimeZone;
use minisign_verify::{Error, PublicKey, Signature};

use crate::model::Signer;

/// The largest file of a key or a signature, bytes.
const MOST: u64 = 4 << 10;

/// The keys.
#[derive(Clone, Debug, Default)]
pub struct Trust(Arc<[Key]>);

#[derive(Clone, Debug)]
struct Key {
    id: String,
    key: PublicKey,
    /// Nothing that is added from then on, ns since the Unix epoch, may be signed by it.
    end: Option<(u64, Date)>,
}

/// Why a signature doesn't count.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum TrustError {
    /// Nobody's would.
    #[error(
        "this daemon was given no key to trust; start stillpointd with `--trust FILE` (the \
         publisher's minisign.pub)"
    )]
    NoKeys,
    /// It is no signature.
    #[error("the signature is none of minisign's ({0})")]
    Malformed(String),
    /// Not one of ours.
    #[error(
        "it is signed by the key {id}, which this daemon does not trust ({}); if it should, start \
         stillpointd with `--trust FILE` for it as well",
        among(.known)
    )]
    UnknownKey {
        /// Id of the key.
        id: String,
        /// Those that are trusted.
        known: Vec<String>,
    },
    /// Changed since, or signed by somebody who pretends.
    #[error(
        "its signature by the key {0} does not fit it: manifest or signature was changed after \
         signing, or the signature is forged"
    )]
    Wrong(String),
    /// Too late.
    #[error("it is signed by the key {id}, which ended on {end}: have it signed by a newer one")]
    Ended {
        /// Id of the key.
        id: String,
        /// When.
        end: Date,
    },
}

fn among(known: &[String]) -> String {
    format!("it trusts {}", known.join(", "))
}

impl Trust {
    /// Reads keys: each is written `FILE`, or `FILE,until=DATE`.
    pub fn load(given: &[String]) -> anyhow::Result<Self> {
        let keys = given
            .iter()
            .map(|text| Key::load(text).with_context(|| format!("cannot trust the key `{text}`")));
        Ok(Self(keys.collect::<anyhow::Result<_>>()?))
    }

    /// Whether there is no key.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whose signature this is, of a release that was added at that time (ns since the Unix epoch).
    pub fn verify(
        &self,
        manifest: &[u8],
        signature: &str,
        added_at_unix_ns: u64,
    ) -> Result<Signer, TrustError> {
        if self.is_empty() {
            return Err(TrustError::NoKeys);
        }
        let malformed = |error: &dyn std::fmt::Display| TrustError::Malformed(error.to_string());
        let read = Signature::decode(signature).map_err(|e| malformed(&e))?;
        let id = signature.lines().nth(1).and_then(key_id);
        let id = id.ok_or_else(|| malformed(&"its second line holds no key id"))?;
        let mut wrong = false;
        for key in self.0.iter().filter(|key| key.id == id) {
            match key.key.verify(manifest, &read, true) {
                Ok(()) => {
                    return match key.end {
                        Some((ns, end)) if added_at_unix_ns >= ns => {
                            Err(TrustError::Ended { id, end })
                        }
                        _ => Ok(Signer {
                            key_id: id,
                            comment: read.trusted_comment().to_owned(),
                        }),
                    };
                }
                Err(Error::UnexpectedKeyId) => {}
                Err(_) => wrong = true,
            }
        }
        if wrong {
            return Err(TrustError::Wrong(id));
        }
        let known = self.0.iter().map(|key| key.id.clone()).collect();
        Err(TrustError::UnknownKey { id, known })
    }
}

impl Key {
    fn load(text: &str) -> anyhow::Result<Self> {
        let (path, end) = match text.split_once(",until=") {
            None => (Path::new(text), None),
            Some((path, date)) => {
                let end: Date = date
                    .parse()
                    .with_context(|| format!("`{date}` is no date such as 2027-01-31"))?;
                let ns = end
                    .to_zoned_datetime(TimeZone::UTC)?
                    .timestamp()
                    .as_nanosecond();
                (Path::new(path), Some((u64::try_from(ns)?, end)))
            }
        };
        let text = key_file(path)?;
        let lines: Vec<_> = text
            .lines()
            .filter(|line| !line.trim().is_empty())
            .collect();
        // A bare key, as it is written in documentation, will do.
        let Some(line) = lines.last().filter(|_| lines.len() <= 2) else {
            bail!(
                "it is no public key of minisign's: it has {} lines",
                lines.len()
            );
        };
        let key = PublicKey::from_base64(line.trim())
            .map_err(|e| anyhow::anyhow!("it is no public key of minisign's: {e}"))?;
        let id = key_id(line.trim()).context("it is no public key of minisign's")?;
        Ok(Self { id, key, end })
    }
}

/// The text of a key file that nobody else could have changed.
fn key_file(path: &Path) -> anyhow::Result<String> {
    let path = std::path::absolute(path)?;
    let found = std::fs::metadata(&path)?;
    ensure!(found.is_file(), "it is not a regular file");
    ensure!(found.len() <= MOST, "it has more than {MOST} bytes");
    let uid = rustix::process::geteuid().as_raw();
    ensure!(
        found.uid() == 0 || found.uid() == uid,
        "it belongs to uid {}, who could put another key there; it must be root's, or uid {uid}'s",
        found.uid()
    );
    ensure!(
        found.mode() & 0o022 == 0,
        "others may write to it (mode {:04o}); `chmod go-w {}`",
        found.mode() & 0o7777,
        path.display()
    );
    Ok(std::fs::read_to_string(&path)?)
}

/// The id in a key or a signature, as `minisign` prints it: after two letters for the algorithm.
fn key_id(base64: &str) -> Option<String> {
    let bytes = BASE64_STANDARD.decode(base64.trim()).ok()?;
    let id: [u8; 8] = bytes.get(2..10)?.try_into().ok()?;
    Some(format!("{:016X}", u64::from_le_bytes(id)))
}

/// A manifest and its signature, as files.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Papers {
    /// What was signed.
    pub manifest: PathBuf,
    /// What `minisign -S` wrote.
    pub signature: PathBuf,
}

#[cfg(test)]
mod tests;
