//! A release's papers: the manifest, by the very bytes that were signed, and the signature.

use std::fmt::Display;
use std::io::Read;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use super::{Addition, MANIFEST, SIGNATURE};
use crate::agent::trust::{Papers, Trust};
use crate::model::{Code, Manifest, Problem, Signer, VMM, validate_version};

/// The largest manifest or signature, bytes.
const MOST: u64 = 64 << 10;

/// A manifest that somebody signed whom we trust.
#[derive(Debug)]
pub(super) struct Signed {
    pub(super) manifest: Manifest,
    pub(super) signer: Signer,
    bytes: Vec<u8>,
    signature: String,
}

pub(super) fn not_trusted(path: &Path, why: impl Display) -> Problem {
    Problem::new(
        Code::NotTrusted,
        format!("the manifest {} is not trusted: {why}", path.display()),
    )
}

/// Reads papers, and verifies them as those of a release added at that time.
pub(super) fn read(
    papers: &Papers,
    trust: &Trust,
    added_at_unix_ns: u64,
) -> Result<Signed, Problem> {
    let path = &papers.manifest;
    let bytes = contents(path).map_err(|why| {
        let hint = "`stillpoint release manifest BINARY` writes one, to be signed by `minisign -S`; \
                    or add the release with `--unsigned`";
        Problem::new(
            Code::NotTrusted,
            format!("there is no manifest {} that can be read ({why}); {hint}", path.display()),
        )
    })?;
    let signature = contents(&papers.signature).map_err(|why| {
        not_trusted(
            path,
            format_args!(
                "its signature {} can't be read ({why}); give it by `--signature FILE`, or add the \
                 release with `--unsigned`",
                papers.signature.display()
            ),
        )
    })?;
    let signature = String::from_utf8_lossy(&signature).into_owned();
    let signer = trust
        .verify(&bytes, &signature, added_at_unix_ns)
        .map_err(|why| not_trusted(path, why))?;
    let manifest: Manifest = serde_json::from_slice(&bytes)
        .map_err(|e| not_trusted(path, format_args!("it is signed, and is no manifest: {e}")))?;
    Ok(Signed {
        manifest,
        signer,
        bytes,
        signature,
    })
}

/// What a small file holds. A FIFO in its place must not hang the daemon.
fn contents(path: &Path) -> Result<Vec<u8>, String> {
    let nonblock = rustix::fs::OFlags::NONBLOCK.bits();
    let file = std::fs::OpenOptions::new()
        .read(true)
        .custom_flags(i32::try_from(nonblock).unwrap_or(0))
        .open(path)
        .map_err(|e| e.to_string())?;
    if !file.metadata().is_ok_and(|found| found.is_file()) {
        return Err("it is not a regular file".into());
    }
    let mut bytes = Vec::new();
    let mut file = file.take(MOST + 1);
    file.read_to_end(&mut bytes).map_err(|e| e.to_string())?;
    if bytes.len() as u64 > MOST {
        return Err(format!("it has more than {MOST} bytes"));
    }
    Ok(bytes)
}

/// The manifest is of this binary, and says what the operator says.
pub(super) fn must_match(
    papers: &Papers,
    manifest: &Manifest,
    addition: &Addition,
    sha256: &str,
) -> Result<(), Problem> {
    let path = &papers.manifest;
    if manifest.component != VMM {
        let component = &manifest.component;
        return Err(not_trusted(
            path,
            format_args!("it is of `{component}`, not of the {VMM}"),
        ));
    }
    validate_version(&manifest.version)?;
    if let Some(version) = addition
        .version
        .as_ref()
        .filter(|v| **v != manifest.version)
    {
        let signed = &manifest.version;
        return Err(not_trusted(
            path,
            format_args!(
                "what is signed is version {signed}, and {version} was asked for (`--as`)"
            ),
        ));
    }
    if !addition.args.is_empty() && addition.args != manifest.args {
        let (args, signed) = (&addition.args, &manifest.args);
        return Err(not_trusted(
            path,
            format_args!(
                "what is signed has arguments {signed:?}, and {args:?} were given (`--arg`)"
            ),
        ));
    }
    if manifest.sha256 == sha256 {
        return Ok(());
    }
    Err(Problem::new(
        Code::DigestMismatch,
        format!(
            "the signed manifest {} is of another binary: {} has sha256 {sha256}, and {} was signed; \
             nothing was added",
            path.display(),
            addition.path.display(),
            manifest.sha256
        ),
    ))
}

/// The binary reads and writes what its manifest promises.
pub(super) fn must_be_so(
    papers: &Papers,
    manifest: &Manifest,
    said: &Manifest,
) -> Result<(), Problem> {
    if (&manifest.reads, &manifest.writes) == (&said.reads, &said.writes) {
        return Ok(());
    }
    Err(Problem::new(
        Code::NotARelease,
        format!(
            "the signed manifest {} says that it reads state formats {:?} and writes {:?}, and the \
             binary says {:?} and {:?}; have a manifest signed that is so (`stillpoint release \
             manifest`)",
            papers.manifest.display(),
            manifest.reads,
            manifest.writes,
            said.reads,
            said.writes
        ),
    ))
}

impl Signed {
    /// Puts them beside the binary, as they were signed.
    pub(super) fn keep(&self, dir: &Path) -> std::io::Result<()> {
        for (name, bytes) in [
            (MANIFEST, &self.bytes[..]),
            (SIGNATURE, self.signature.as_bytes()),
        ] {
            std::fs::write(dir.join(name), bytes)?;
            std::fs::File::open(dir.join(name))?.sync_all()?;
        }
        Ok(())
    }
}
