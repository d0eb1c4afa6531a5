//! TLS to members of etcd: names are checked against a CA of the operator's choice, and no other.

use std::path::PathBuf;
use std::sync::Arc;

use rustls::{CertificateError, ClientConfig, RootCertStore};

use super::EtcdConfig;
use crate::auth::certificate::{certificates, private_key};

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
    #[error(transparent)]
    File(#[from] crate::auth::certificate::CertificateError),
    /// The CA's certificate can't be used.
    #[error("the CA {path} can't be used: {source}")]
    Ca {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: rustls::Error,
    },
    /// Certificate and key don't belong together, or can't be used.
    #[error("certificate and key can't be used: {0}")]
    Identity(rustls::Error),
    /// A name that no certificate can have.
    #[error("`{0}` is no name that a certificate could be checked against")]
    Name(String),
}

/// What is wrong with a member's certificate, in words.
pub(super) fn explain(error: &std::io::Error) -> String {
    let inside = error
        .get_ref()
        .and_then(|inside| inside.downcast_ref::<rustls::Error>());
    match inside {
        Some(rustls::Error::InvalidCertificate(problem)) => match problem {
            CertificateError::Expired | CertificateError::ExpiredContext { .. } => {
                "its certificate has expired; renew it at that member".into()
            }
            CertificateError::UnknownIssuer | CertificateError::BadSignature => {
                format!("{error}: its certificate is of another CA than --store-ca")
            }
            _ => error.to_string(),
        },
        _ => error.to_string(),
    }
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
        added.map_err(|source| TlsError::Ca {
            path: ca.to_owned(),
            source,
        })?;
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
            let secret = private_key(key)?;
            let with = builder.with_client_auth_cert(chain, secret);
            with.map_err(TlsError::Identity)?
        }
    };
    Ok(Some(Arc::new(config)))
}
