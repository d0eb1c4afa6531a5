//! Certificate, key, CA and list of revoked certificates of the door, from files that are read anew when they
//! change: what was renewed or revoked counts from the next connection on, without a restart.
//!
//! Must never: let anybody in by papers that can't be read. Who can't tell whom to trust trusts nobody.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;

use rustls::server::WebPkiClientVerifier;
use rustls::{RootCertStore, ServerConfig};

use super::certificate::{CertificateError, certificates, private_key, revoked, serials};

/// Where they lie.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TlsFiles {
    /// This daemon's certificate, and those between it and the CA.
    pub certificate: PathBuf,
    /// Its key.
    pub key: PathBuf,
    /// The CA whose clients are let in.
    pub ca: PathBuf,
    /// Its list of revoked certificates.
    pub revoked: Option<PathBuf>,
}

/// Why there can be no TLS.
#[derive(Debug, thiserror::Error)]
pub enum PapersError {
    /// A file.
    #[error(transparent)]
    File(#[from] CertificateError),
    /// Certificate and key don't belong together, or can't be used.
    #[error("certificate {certificate} and key {key} can't be used: {source}")]
    Identity {
        /// The certificate.
        certificate: PathBuf,
        /// The key.
        key: PathBuf,
        /// Why not.
        source: rustls::Error,
    },
    /// The CA, or its list, can't be used.
    #[error("the CA {ca} or its list of revoked certificates can't be used: {problem}")]
    Ca {
        /// The CA.
        ca: PathBuf,
        /// Why not.
        problem: String,
    },
}

/// How a file was when it was read.
type Stamp = Option<(SystemTime, u64)>;

#[derive(Debug)]
struct Read {
    stamps: Vec<Stamp>,
    config: Arc<ServerConfig>,
    revoked: BTreeSet<String>,
}

/// The files, and what was read of them last.
#[derive(Debug)]
pub struct Papers {
    files: TlsFiles,
    read: Mutex<Read>,
}

impl Papers {
    /// Reads them.
    pub fn open(files: TlsFiles) -> Result<Self, PapersError> {
        let read = read(&files)?;
        Ok(Self {
            files,
            read: Mutex::new(read),
        })
    }

    /// What connections are to be made with now.
    pub fn now(&self) -> Result<Arc<ServerConfig>, PapersError> {
        let mut last = self.read.lock().unwrap_or_else(PoisonError::into_inner);
        if stamps(&self.files) != last.stamps {
            *last = read(&self.files)?;
            tracing::info!(certificate = %self.files.certificate.display(), "certificates were changed, and are read anew");
        }
        Ok(last.config.clone())
    }

    /// Whether a certificate was revoked. All are where the list can't be read.
    pub fn is_revoked(&self, serial: &str) -> bool {
        if let Err(error) = self.now() {
            tracing::warn!("nobody is let in from other machines: {error}");
            return true;
        }
        let last = self.read.lock().unwrap_or_else(PoisonError::into_inner);
        last.revoked.contains(serial)
    }
}

fn stamps(files: &TlsFiles) -> Vec<Stamp> {
    let all = [&files.certificate, &files.key, &files.ca];
    let all = all.into_iter().chain(&files.revoked);
    let stamp = |path: &PathBuf| {
        let found = std::fs::metadata(path).ok()?;
        Some((found.modified().ok()?, found.len()))
    };
    all.map(stamp).collect()
}

fn read(files: &TlsFiles) -> Result<Read, PapersError> {
    // Before the files: one that changes in between is read once more.
    let stamps = stamps(files);
    let bad_ca = |problem: &dyn std::fmt::Display| PapersError::Ca {
        ca: files.ca.clone(),
        problem: problem.to_string(),
    };
    let mut roots = RootCertStore::empty();
    for certificate in certificates(&files.ca)? {
        roots.add(certificate).map_err(|e| bad_ca(&e))?;
    }
    let lists = match &files.revoked {
        Some(path) => revoked(path)?,
        None => Vec::new(),
    };
    let mut all = BTreeSet::new();
    for list in &lists {
        all.extend(serials(list)?);
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider.clone())
        .with_crls(lists)
        .only_check_end_entity_revocation()
        .build()
        .map_err(|e| bad_ca(&e))?;
    let chain = certificates(&files.certificate)?;
    let key = private_key(&files.key)?;
    let identity = |source| PapersError::Identity {
        certificate: files.certificate.clone(),
        key: files.key.clone(),
        source,
    };
    // With 1.3 alone nothing of a certificate goes over the wire in the clear.
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(identity)?
        .with_client_cert_verifier(verifier)
        .with_single_cert(chain, key)
        .map_err(identity)?;
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(Read {
        stamps,
        config: Arc::new(config),
        revoked: all,
    })
}

/// Whether others could read a key's file.
pub fn is_open_to_others(path: &Path) -> bool {
    use std::os::unix::fs::MetadataExt;
    std::fs::metadata(path).is_ok_and(|found| found.mode() & 0o077 != 0)
}
