//! Why the CA could not do as asked.

use std::path::PathBuf;

use crate::auth::certificate::CertificateError;

/// Why the CA could not do as asked. Nothing was changed.
#[derive(Debug, thiserror::Error)]
pub enum CaError {
    /// A file or directory.
    #[error("cannot {what} {path}: {source}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// With what.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// There is a CA already.
    #[error("there is a CA in {0} already; it was left as it is. Give another --dir")]
    Exists(PathBuf),
    /// There is none.
    #[error(
        "there is no CA in {0}; make one with `stillpoint auth init`, or say where it is with --dir"
    )]
    None(PathBuf),
    /// The register can't be read.
    #[error("the CA's register {path} can't be read ({problem}); nothing was issued or revoked")]
    Register {
        /// The file.
        path: PathBuf,
        /// Why not.
        problem: String,
    },
    /// A name that can't be one.
    #[error(
        "`{0}` can't be a name here: 1 to 64 of a-z A-Z 0-9 . _ -, the first a letter or number"
    )]
    Name(String),
    /// Nothing of that name was issued.
    #[error("no certificate was issued to `{0}`; `stillpoint auth ls` shows those that were")]
    Unknown(String),
    /// A certificate of that name is good.
    #[error(
        "`{0}` has a certificate that is good; `stillpoint auth renew {0}` issues it anew, `stillpoint auth revoke {0}` \
         ends it"
    )]
    Taken(String),
    /// It would outlive its CA.
    #[error(
        "that is longer than the CA itself lasts, which ends {0}; give a shorter --lifetime, or make a new CA"
    )]
    TooLong(String),
    /// A daemon without a name can't be checked.
    #[error(
        "a daemon's certificate needs a DNS name or an address by which it is called: --dns or --address"
    )]
    NoName,
    /// A certificate can't be read.
    #[error(transparent)]
    Certificate(#[from] CertificateError),
    /// A certificate can't be made.
    #[error("the certificate can't be made: {0}")]
    Make(#[from] rcgen::Error),
}
