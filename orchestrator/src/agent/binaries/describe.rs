//! What a binary says it is.

use std::io::Read;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use crate::model::{Manifest, VMM};

/// How long a binary may take to say what it is.
const PATIENCE: Duration = Duration::from_secs(10);

/// Asks a binary what it is.
pub(super) fn describe(path: &Path) -> Result<Manifest, String> {
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
