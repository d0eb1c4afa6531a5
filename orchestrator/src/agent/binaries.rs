//! Releases on disk: `releases/VERSION/{stillpoint-vmm,manifest.json}`.
//!
//! [`Binaries::verified`] opens a binary, takes its digest through that fd, and hands out the
//! fd: what is executed is what was verified, whatever happens to the path.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use sha2::{Digest, Sha256};
use stillpoint_control::secret::hex;

use super::places::private_dir;
use crate::model::{Code, Manifest, Problem, Release, VMM, validate_version};

/// How long a binary may take to say what it is.
const PATIENCE: Duration = Duration::from_secs(10);
const BINARY: &str = "stillpoint-vmm";

/// The directory of releases.
#[derive(Clone, Debug)]
pub struct Binaries(PathBuf);

/// What to add.
#[derive(Clone, Debug)]
pub struct Addition {
    /// The binary.
    pub path: PathBuf,
    /// Version to add it under; what it says itself when absent.
    pub version: Option<String>,
    /// Arguments appended to its command line.
    pub args: Vec<String>,
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
    pub fn new(state_dir: &Path) -> Self {
        Self(state_dir.join("releases"))
    }

    /// Where the binary of a version lies.
    pub fn path(&self, version: &str) -> PathBuf {
        self.0.join(version).join(BINARY)
    }

    /// The binary, opened and verified.
    pub fn verified(&self, release: &Release) -> Result<File, Problem> {
        let manifest = &release.manifest;
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

    /// Copies a binary in, asks the copy what it is, and gives it its place. Recording it is the
    /// caller's. Blocks.
    pub fn import(&self, addition: &Addition) -> Result<Release, Problem> {
        let source = open_source(&addition.path)?;
        private_dir(&self.0).map_err(|e| Problem::new(Code::Failed, e.to_string()))?;
        let incoming = self.0.join(format!(".incoming-{}", addition.at_unix_ns));
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
        mut source: File,
        addition: &Addition,
    ) -> Result<Release, Problem> {
        let path = incoming.join(BINARY);
        let copy = |e| failed("copy the release to", &path, &e);
        let mut target = std::fs::OpenOptions::new()
            .create_new(true)
            .write(true)
            .mode(0o700)
            .open(&path)
            .map_err(copy)?;
        std::io::copy(&mut source, &mut target).map_err(copy)?;
        target
            .set_permissions(std::fs::Permissions::from_mode(0o500))
            .and_then(|()| target.sync_all())
            .map_err(copy)?;
        // A file open for writing can't be executed (ETXTBSY).
        drop(target);
        let mut manifest = describe(&path).map_err(|why| not_a_release(&addition.path, why))?;
        if let Some(version) = &addition.version {
            manifest.version.clone_from(version);
        }
        validate_version(&manifest.version)?;
        manifest.args.clone_from(&addition.args);
        let mut file = File::open(&path).map_err(copy)?;
        manifest.sha256 = digest(&mut file).map_err(copy)?;
        let text = serde_json::to_vec_pretty(&manifest)
            .map_err(|e| Problem::new(Code::Failed, e.to_string()))?;
        std::fs::write(incoming.join("manifest.json"), text).map_err(copy)?;
        sync(&incoming.join("manifest.json")).map_err(copy)?;
        Ok(Release {
            manifest,
            added_at_unix_ns: addition.at_unix_ns,
        })
    }

    /// Gives an imported release its place, when it is known that the version is free.
    pub fn keep(&self, release: &Release) -> Result<(), Problem> {
        let from = self
            .0
            .join(format!(".incoming-{}", release.added_at_unix_ns));
        let to = self.0.join(&release.manifest.version);
        // What lies there is of an addition that was never recorded.
        let _ = std::fs::remove_dir_all(&to);
        // Its place is on disk before anybody is told that it has one: a power cut leaves all of it, or
        // a folder that no record names.
        sync(&from)
            .and_then(|()| std::fs::rename(&from, &to))
            .and_then(|()| sync(&self.0))
            .map_err(|e| failed("put the release at", &to, &e))
    }

    /// Removes what additions left behind that were cut off. To be called before there can be others.
    pub fn clear_away(&self) {
        let left = std::fs::read_dir(&self.0).into_iter().flatten().flatten();
        for entry in left.filter(|entry| entry.file_name().as_bytes().starts_with(b".incoming-")) {
            tracing::warn!(path = %entry.path().display(), "removed a release that was not added to its end");
            let _ = std::fs::remove_dir_all(entry.path());
        }
    }

    /// Forgets an imported release that got no place.
    pub fn discard(&self, release: &Release) {
        let from = self
            .0
            .join(format!(".incoming-{}", release.added_at_unix_ns));
        let _ = std::fs::remove_dir_all(from);
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

/// Asks a binary what it is.
fn describe(path: &Path) -> Result<Manifest, String> {
    let child = spawn_describe(path).map_err(|e| format!("it can't be run ({e})"))?;
    let output = output_within(child, PATIENCE)?;
    let manifest: Manifest = serde_json::from_slice(&output)
        .map_err(|e| format!("`describe --json` prints no manifest ({e})"))?;
    if manifest.component != VMM {
        return Err(format!("it is a release of `{}`", manifest.component));
    }
    if manifest.reads.is_empty() || manifest.writes.is_empty() {
        return Err("it says that it reads or writes no state format".into());
    }
    Ok(manifest)
}

/// A child that another thread forks while the copy is open for writing keeps it open until its
/// exec, and nobody can execute the copy until then (`ETXTBSY`).
fn spawn_describe(path: &Path) -> std::io::Result<std::process::Child> {
    let deadline = std::time::Instant::now() + PATIENCE;
    loop {
        let spawned = Command::new(path)
            .args(["describe", "--json"])
            .env_clear()
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn();
        match spawned {
            Err(error)
                if error.kind() == std::io::ErrorKind::ExecutableFileBusy
                    && std::time::Instant::now() < deadline =>
            {
                std::thread::sleep(Duration::from_millis(5));
            }
            other => return other,
        }
    }
}

/// What a child prints; it is killed when it takes longer than `patience`.
fn output_within(mut child: std::process::Child, patience: Duration) -> Result<Vec<u8>, String> {
    let Some(mut stdout) = child.stdout.take() else {
        return Err("its output can't be read".into());
    };
    let (sender, output) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        let read = stdout.by_ref().take(1 << 20).read_to_end(&mut bytes);
        let _ = sender.send(read.map(|_| bytes));
    });
    let bytes = output.recv_timeout(patience);
    if bytes.is_err() {
        let _ = child.kill();
    }
    let status = child
        .wait()
        .map_err(|e| format!("it can't be waited for ({e})"))?;
    match bytes {
        Err(_) => Err(format!("`describe --json` took longer than {patience:?}")),
        Ok(Err(e)) => Err(format!("its output can't be read ({e})")),
        Ok(Ok(_)) if !status.success() => Err(format!("`describe --json` failed ({status})")),
        Ok(Ok(bytes)) => Ok(bytes),
    }
}

#[cfg(test)]
mod tests;
