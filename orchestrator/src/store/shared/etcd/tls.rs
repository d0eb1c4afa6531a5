//! TLS to members of etcd: names are checked against a CA of the operator's choice, and no other.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{ClientConfig, RootCertStore};

use super::EtcdConfig;

/// Why there can be no TLS.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// Nobody said whom to trust.
    #[error(
        "the store speaks TLS (etcds://), and nobody said whose certificates count: give the CA's \
         with --store-ca FILE"
    )]
    NoCa,
    /// A file can't be read.
    #[error("cannot read {path}: {problem}; a PEM file with {what} is wanted")]
    File {
        /// The file.
        path: PathBuf,
        /// What it should hold.
        what: &'static str,
        /// Why it can't be.
        problem: String,
    },
    /// Certificate and key don't belong together, or can't be used.
    #[error("certificate and key can't be used: {0}")]
    Identity(rustls::Error),
    /// A name that no certificate can have.
    #[error("`{0}` is no name that a certificate could be checked against")]
    Name(String),
}

fn file(path: &Path, what: &'static str, problem: impl std::fmt::Display) -> TlsError {
    TlsError::File {
        path: path.to_owned(),
        what,
        problem: problem.to_string(),
    }
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let what = "certificates";
    let read = CertificateDer::pem_file_iter(path).map_err(|e| file(path, what, e))?;
    let read: Result<Vec<_>, _> = read.collect();
    let read = read.map_err(|e| file(path, what, e))?;
    if read.is_empty() {
        return Err(file(path, what, "it holds none"));
    }
    Ok(read)
}

/// What connections are made with; `None` where no member speaks TLS.
pub(super) fn client(config: &EtcdConfig) -> Result<Option<Arc<ClientConfig>>, TlsError> {
    if !config.endpoints.iter().any(|endpoint| endpoint.tls) {
        return Ok(None);
    }
    let ca = config.ca.as_deref().ok_or(TlsError::NoCa)?;
    let mut roots = RootCertStore::empty();
    for certificate in certificates(ca)? {
        let added = roots.add(certificate);
        added.map_err(|e| file(ca, "certificates", e))?;
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(TlsError::Identity)?
        .with_root_certificates(roots);
    let config = match &config.identity {
        None => builder.with_no_client_auth(),
        Some((certificate, key)) => {
            let chain = certificates(certificate)?;
            let secret = PrivateKeyDer::from_pem_file(key);
            let secret = secret.map_err(|e| file(key, "a private key", e))?;
            let with = builder.with_client_auth_cert(chain, secret);
            with.map_err(TlsError::Identity)?
        }
    };
    Ok(Some(Arc::new(config)))
}
