//! What a certificate says: whose it is, in which role, for which names, how long.
//!
//! The role is a name of its own kind among the certificate's names, a URI: `urn:stillpoint:role:read`, `...:operate` or
//! `...:admin`. Any CA can write that; no public one will.

use std::fmt::Write;
use std::path::Path;

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, CertificateRevocationListDer};
use serde::{Deserialize, Serialize};
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{FromDer, X509Certificate};

use super::Role;

/// What a role's URI begins with.
const ROLE: &str = "urn:stillpoint:role:";

/// The URI that stands for a role.
pub fn role_uri(role: Role) -> String {
    format!("{ROLE}{role}")
}

/// What a certificate says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Certificate {
    /// Whose it is: its common name.
    pub name: String,
    /// What they may do, if it says exactly one role.
    pub role: Option<Role>,
    /// DNS names and addresses that it is good for.
    pub names: Vec<String>,
    /// Its serial number, in hex.
    pub serial: String,
    /// The common name of who issued it.
    pub issuer: String,
    /// Whether it may issue others.
    pub is_ca: bool,
    /// When it begins, seconds since the Unix epoch.
    pub from_unix_s: u64,
    /// When it ends.
    pub until_unix_s: u64,
}

/// Why a certificate can't be read.
#[derive(Debug, thiserror::Error)]
pub enum CertificateError {
    /// No file, or not in PEM.
    #[error("cannot read {path}: {problem}; a PEM file with {what} is wanted")]
    File {
        /// The file.
        path: std::path::PathBuf,
        /// What it should hold.
        what: &'static str,
        /// Why it can't be.
        problem: String,
    },
    /// No X.509.
    #[error("a certificate can't be read: {0}")]
    Malformed(String),
}

fn common_name(name: &x509_parser::x509::X509Name<'_>) -> String {
    let mut names = name.iter_common_name();
    let first = names.next().and_then(|name| name.as_str().ok());
    first.unwrap_or_default().to_owned()
}

/// A serial number, in hex, without the zeros that it may begin with.
pub fn hex(bytes: &[u8]) -> String {
    let mut text = String::new();
    for byte in bytes.iter().skip_while(|byte| **byte == 0) {
        // A String takes all.
        let _ = write!(text, "{byte:02x}");
    }
    text
}

fn seconds(time: x509_parser::time::ASN1Time) -> u64 {
    u64::try_from(time.timestamp()).unwrap_or(0)
}

impl Certificate {
    /// Reads one.
    pub fn of_der(der: &[u8]) -> Result<Self, CertificateError> {
        let (_, read) = X509Certificate::from_der(der)
            .map_err(|e| CertificateError::Malformed(e.to_string()))?;
        let mut names = Vec::new();
        let mut roles = Vec::new();
        let others = read
            .subject_alternative_name()
            .map_err(|e| CertificateError::Malformed(e.to_string()))?;
        for name in others.iter().flat_map(|others| &others.value.general_names) {
            match name {
                GeneralName::DNSName(name) => names.push((*name).to_owned()),
                GeneralName::IPAddress(bytes) => names.extend(address(bytes)),
                GeneralName::URI(uri) => roles.extend(uri.strip_prefix(ROLE).map(str::to_owned)),
                _ => {}
            }
        }
        // Two roles are none: nobody can have meant both.
        let role = match roles.as_slice() {
            [one] => Role::of_word(one),
            _ => None,
        };
        Ok(Self {
            name: common_name(read.subject()),
            role,
            names,
            serial: hex(read.raw_serial()),
            issuer: common_name(read.issuer()),
            is_ca: read.is_ca(),
            from_unix_s: seconds(read.validity().not_before),
            until_unix_s: seconds(read.validity().not_after),
        })
    }

    /// Reads the first of a PEM file.
    pub fn of_file(path: &Path) -> Result<Self, CertificateError> {
        let all = certificates(path)?;
        // There is one, or it would have been an error.
        Self::of_der(&all[0])
    }
}

fn address(bytes: &[u8]) -> Option<String> {
    if let Ok(four) = <[u8; 4]>::try_from(bytes) {
        return Some(std::net::Ipv4Addr::from(four).to_string());
    }
    let sixteen = <[u8; 16]>::try_from(bytes).ok()?;
    Some(std::net::Ipv6Addr::from(sixteen).to_string())
}

fn file(path: &Path, what: &'static str, problem: impl std::fmt::Display) -> CertificateError {
    CertificateError::File {
        path: path.to_owned(),
        what,
        problem: problem.to_string(),
    }
}

/// All certificates of a PEM file; at least one.
pub fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, CertificateError> {
    let what = "certificates";
    let read = CertificateDer::pem_file_iter(path).map_err(|e| file(path, what, e))?;
    let read: Result<Vec<_>, _> = read.collect();
    let read = read.map_err(|e| file(path, what, e))?;
    match read.is_empty() {
        true => Err(file(path, what, "it holds none")),
        false => Ok(read),
    }
}

/// A private key of a PEM file.
pub fn private_key(
    path: &Path,
) -> Result<rustls::pki_types::PrivateKeyDer<'static>, CertificateError> {
    let key = rustls::pki_types::PrivateKeyDer::from_pem_file(path);
    key.map_err(|e| file(path, "a private key", e))
}

/// All lists of revoked certificates of a PEM file, which may have none.
pub fn revoked(
    path: &Path,
) -> Result<Vec<CertificateRevocationListDer<'static>>, CertificateError> {
    let what = "a list of revoked certificates";
    let read =
        CertificateRevocationListDer::pem_file_iter(path).map_err(|e| file(path, what, e))?;
    let read: Result<Vec<_>, _> = read.collect();
    let read = read.map_err(|e| file(path, what, e))?;
    match read.is_empty() {
        true => Err(file(path, what, "it holds none")),
        false => Ok(read),
    }
}

/// Whose list of revoked certificates it is.
pub fn issuer(list: &CertificateRevocationListDer<'_>) -> Result<String, CertificateError> {
    let (_, read) = x509_parser::revocation_list::CertificateRevocationList::from_der(list)
        .map_err(|e| CertificateError::Malformed(e.to_string()))?;
    Ok(common_name(read.issuer()))
}

/// The serial numbers in a list of revoked certificates.
pub fn serials(list: &CertificateRevocationListDer<'_>) -> Result<Vec<String>, CertificateError> {
    let (_, read) = x509_parser::revocation_list::CertificateRevocationList::from_der(list)
        .map_err(|e| CertificateError::Malformed(e.to_string()))?;
    let all = read.iter_revoked_certificates();
    Ok(all.map(|one| hex(one.raw_serial())).collect())
}
