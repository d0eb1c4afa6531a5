//! Releases on disk: `releases/VERSION/{stillpoint-vmm,manifest.json,manifest.json.minisig}`.
//!
//! [`Binaries::verified`] verifies the manifest's signature, opens the binary, takes its digest
//! through that fd, and hands out the fd: what is executed is what was verified, whatever happens to
//! the path. Nothing of a release that is to be signed is executed before that.
//!
//! Unsigned releases are those that were added so, by an operator's word; it is recorded.

mod describe;
mod papers;

use sha2::{Digest, Sha256};
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use stillpoint_control::secret::hex;

use super::places::{check_private, private_dir};
use super::trust::{Papers, Trust};
use crate::model::{Code, Manifest, Problem, Release, Signer, validate_version};

const BINARY: &str = "stillpoint-vmm";
const MANIFEST: &str = "manifest.json";
const SIGNATURE: &str = "manifest.json.minisig";

/// The directory of releases, and whose signatures count.
#[derive(Clone, Debug)]
pub struct Binaries {
    dir: PathBuf,
    trust: Trust,
}

/// What to add.
#[derive(Clone, Debug)]
pub struct Addition {
    /// The binary.
    pub path: PathBuf,
    /// Version to add it under; what it says itself when absent.
    pub version: Option<String>,
    /// Arguments appended to its command line.
    pub args: Vec<String>,
    /// Its signed manifest; `None` to add it without.
    pub papers: Option<Papers>,
    /// When, nanoseconds since the Unix epoch.
    pub at_unix_ns: u64,
}

fn not_a_release(path: &Path, why: impl std::fmt::Display) -> Problem {
    let path = path.display();
    Problem::new(
        Code::NotARelease,
        format!("{path} is no release of the VMM: {why}; give the path of a stillpoint-vmm binary"),
    )
}

fn failed(what: &str, path: &Path, error: &std::io::Error) -> Problem {
    let code = match error.kind() {
        std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded => Code::StoreFull,
        _ => Code::Failed,
    };
    Problem::new(code, format!("cannot {what} {}: {error}", path.display()))
}

impl Binaries {
    /// In that state directory.
    pub fn new(state_dir: &Path, trust: Trust) -> Self {
        Self {
            dir: state_dir.join("releases"),
            trust,
        }
    }

    /// Whether there is a key whose signatures count.
    pub fn trusts_somebody(&self) -> bool {
        !self.trust.is_empty()
    }

    /// Where the binary of a version lies.
    pub fn path(&self, version: &str) -> PathBuf {
        self.dir.join(version).join(BINARY)
    }

    /// The binary, opened and verified: by the signature of its manifest, if it has one, and by its
    /// digest.
    pub fn verified(&self, release: &Release) -> Result<File, Problem> {
        let manifest = &release.manifest;
        let dir = self.dir.join(&manifest.version);
        for dir in [&self.dir, &dir] {
            check_private(dir).map_err(|e| Problem::new(Code::Failed, e.to_string()))?;
        }
        if release.signed_by.is_some() {
            self.verify_papers(&dir, release)?;
        }
        let path = self.path(&manifest.version);
        let mut file = File::open(&path).map_err(|e| failed("open the release", &path, &e))?;
        let found = digest(&mut file).map_err(|e| failed("read the release", &path, &e))?;
        if found == manifest.sha256 {
            return Ok(file);
        }
        Err(Problem::new(
            Code::DigestMismatch,
            format!(
                "the binary of release {} is not the one that was added: {} has sha256 {found}, \
                 and {} was added; it will not be run. Add it again under another version, or \
                 put the right file back",
                manifest.version,
                path.display(),
                manifest.sha256
            ),
        ))
    }

    /// What lies in the store is still what was signed, by a key that still counts.
    fn verify_papers(&self, dir: &Path, release: &Release) -> Result<(), Problem> {
        let papers = Papers {
            manifest: dir.join(MANIFEST),
            signature: dir.join(SIGNATURE),
        };
        let signed = papers::read(&papers, &self.trust, release.added_at_unix_ns)?;
        if signed.manifest == release.manifest {
            return Ok(());
        }
        let version = &release.manifest.version;
        Err(papers::not_trusted(
            &papers.manifest,
            format_args!(
                "it is signed, and is not the one that release {version} was added with; put that \
                 one back, or remove the release and add it again"
            ),
        ))
    }

    /// Copies a binary in, asks the copy what it is, and gives it its place. Recording it is the
    /// caller's. Blocks.
    pub fn import(&self, addition: &Addition) -> Result<Release, Problem> {
        let source = open_source(&addition.path)?;
        private_dir(&self.dir).map_err(|e| Problem::new(Code::Failed, e.to_string()))?;
        let incoming = self.incoming(addition.at_unix_ns);
        private_dir(&incoming).map_err(|e| Problem::new(Code::Failed, e.to_string()))?;
        let imported = self.import_into(&incoming, source, addition);
        if imported.is_err() {
            let _ = std::fs::remove_dir_all(&incoming);
        }
        imported
    }

    fn import_into(
        &self,
        incoming: &Path,
        source: File,
        addition: &Addition,
    ) -> Result<Release, Problem> {
        let copy = |e| failed("copy the release to", incoming, &e);
        let path = incoming.join(BINARY);
        let sha256 = copy_in(source, &path).map_err(copy)?;
        let (manifest, signed_by) = match &addition.papers {
            Some(papers) => {
                let at = addition.at_unix_ns;
                let signed = papers::read(papers, &self.trust, at)?;
                papers::must_match(papers, &signed.manifest, addition, &sha256)?;
                // Only now is it known whose it is, so only now it is run.
                let said = describe::describe(&path);
                let said = said.map_err(|why| not_a_release(&addition.path, why))?;
                papers::must_be_so(papers, &signed.manifest, &said)?;
                signed.keep(incoming).map_err(copy)?;
                (signed.manifest, Some(signed.signer))
            }
            None => {
                let said = describe::describe(&path);
                let said = said.map_err(|why| not_a_release(&addition.path, why))?;
                let manifest = Manifest {
                    version: addition.version.clone().unwrap_or(said.version),
                    args: addition.args.clone(),
                    sha256,
                    ..said
                };
                validate_version(&manifest.version)?;
                let text = manifest_text(&manifest)?;
                std::fs::write(incoming.join(MANIFEST), text).map_err(copy)?;
                (manifest, None::<Signer>)
            }
        };
        for paper in [MANIFEST, SIGNATURE].map(|name| incoming.join(name)) {
            if paper.exists() {
                sync(&paper).map_err(copy)?;
            }
        }
        Ok(Release {
            manifest,
            signed_by,
            added_at_unix_ns: addition.at_unix_ns,
        })
    }

    fn incoming(&self, at_unix_ns: u64) -> PathBuf {
        self.dir.join(format!(".incoming-{at_unix_ns}"))
    }

    /// Gives an imported release its place, when it is known that the version is free.
    pub fn keep(&self, release: &Release) -> Result<(), Problem> {
        let from = self.incoming(release.added_at_unix_ns);
        let to = self.dir.join(&release.manifest.version);
        // What lies there is of an addition that was never recorded.
        let _ = std::fs::remove_dir_all(&to);
        // Its place is on disk before anybody is told that it has one: a power cut leaves all of it, or
        // a folder that no record names.
        sync(&from)
            .and_then(|()| std::fs::rename(&from, &to))
            .and_then(|()| sync(&self.dir))
            .map_err(|e| failed("put the release at", &to, &e))
    }

    /// Removes what additions left behind that were cut off. To be called before there can be others.
    pub fn clear_away(&self) {
        let left = std::fs::read_dir(&self.dir).into_iter().flatten().flatten();
        for entry in left.filter(|entry| entry.file_name().as_bytes().starts_with(b".incoming-")) {
            tracing::warn!(path = %entry.path().display(), "removed a release that was not added to its end");
            let _ = std::fs::remove_dir_all(entry.path());
        }
    }

    /// Forgets an imported release that got no place.
    pub fn discard(&self, release: &Release) {
        let _ = std::fs::remove_dir_all(self.incoming(release.added_at_unix_ns));
    }

    /// Removes a release that is not recorded any more.
    pub fn remove(&self, version: &str) -> Result<(), Problem> {
        let dir = self.dir.join(version);
        match std::fs::remove_dir_all(&dir) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                Err(failed("remove the release at", &dir, &e))
            }
            _ => Ok(()),
        }
    }
}

/// Puts a file, or the names in a folder, on disk.
fn sync(path: &Path) -> std::io::Result<()> {
    File::open(path)?.sync_all()
}

fn open_source(path: &Path) -> Result<File, Problem> {
    // A FIFO in place of the file must not hang the daemon.
    let nonblock = rustix::fs::OFlags::NONBLOCK.bits();
    let file = std::fs::OpenOptions::new()
        .read(true)
        .custom_flags(i32::try_from(nonblock).unwrap_or(0))
        .open(path)
        .map_err(|e| not_a_release(path, format_args!("it can't be opened ({e})")))?;
    let found = file
        .metadata()
        .map_err(|e| not_a_release(path, format_args!("it can't be looked at ({e})")))?;
    if !found.is_file() {
        return Err(not_a_release(path, "it is not a regular file"));
    }
    if found.mode() & 0o111 == 0 {
        return Err(not_a_release(path, "it is not executable"));
    }
    let mut magic = [0; 4];
    let mut file = file;
    if file.read_exact(&mut magic).is_err() || magic != *b"\x7fELF" {
        return Err(not_a_release(path, "it is not an ELF binary"));
    }
    file.seek(SeekFrom::Start(0))
        .map_err(|e| not_a_release(path, format_args!("it can't be read ({e})")))?;
    Ok(file)
}

fn digest(file: &mut File) -> std::io::Result<String> {
    let mut hasher = Sha256::new();
    file.seek(SeekFrom::Start(0))?;
    std::io::copy(file, &mut hasher)?;
    Ok(hex(&hasher.finalize()))
}

/// Copies a binary, so that nobody but us can change it; gives the digest of the copy.
fn copy_in(mut source: File, path: &Path) -> std::io::Result<String> {
    let mut target = std::fs::OpenOptions::new()
        .create_new(true)
        .write(true)
        .mode(0o700)
        .open(path)?;
    std::io::copy(&mut source, &mut target)?;
    target.set_permissions(std::fs::Permissions::from_mode(0o500))?;
    target.sync_all()?;
    // A file open for writing can't be executed (ETXTBSY).
    drop(target);
    digest(&mut File::open(path)?)
}

/// The manifest of a binary, to be signed. Runs it.
pub fn manifest_of(
    path: &Path,
    version: Option<String>,
    args: Vec<String>,
) -> Result<Vec<u8>, Problem> {
    let mut source = open_source(path)?;
    let said = describe::describe(path).map_err(|why| not_a_release(path, why))?;
    let manifest = Manifest {
        version: version.unwrap_or(said.version),
        sha256: digest(&mut source).map_err(|e| failed("read", path, &e))?,
        args,
        ..said
    };
    validate_version(&manifest.version)?;
    manifest_text(&manifest)
}

fn manifest_text(manifest: &Manifest) -> Result<Vec<u8>, Problem> {
    let mut text = serde_json::to_vec_pretty(manifest)
        .map_err(|e| Problem::new(Code::Failed, e.to_string()))?;
    text.push(b'\n');
    Ok(text)
}

#[cfg(test)]
mod tests;
