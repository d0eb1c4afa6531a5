//! Starts the VMM of a VM.

use std::fs::File;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use stillpoint_control::secret::Secret;
use stillpoint_control::spec::CarveOutSpec;

use super::Host;
use super::adopt::Turn;
use crate::agent::binaries::Binaries;
use crate::agent::find::{FindError, Held};
use crate::agent::places::VmDir;
use crate::agent::spawn::{self, GIVEN_FD, Job, MEMORY_FD, READY_FD};
use crate::model::{Release, VmRecord, VmState};

/// How long a VMM may take until its guest runs: huge pages of a large guest are zeroed meanwhile.
pub(super) const PATIENCE: Duration = Duration::from_secs(120);

/// Starts it. On `Err` nothing of it is left running, and the text says what, why, and what to
/// do.
pub async fn start(host: &Host, vm: &VmRecord) -> Result<Held, String> {
    let release = host.store.release(&vm.release).await;
    let release = release.map_err(|e| e.to_string())?;
    let release = release.ok_or_else(|| format!("release {} is not in the store", vm.release))?;
    start_as(host, vm, &release, (&How::Boot, None)).await
}

/// How a guest comes to run.
#[derive(Clone, Debug)]
pub(super) enum How {
    /// It boots.
    Boot,
    /// It goes on from its record.
    Revive {
        /// Where it lies.
        place: CarveOutSpec,
        /// The jump that it came by.
        nonce: String,
        /// The release's binary, verified.
        binary: Arc<File>,
        /// Its memfd, if it lies in one.
        memory: Option<Arc<OwnedFd>>,
    },
}

/// As [`start`], with this release, together with others.
pub(super) async fn start_as(
    host: &Host,
    vm: &VmRecord,
    release: &Release,
    (how, turn): (&How, Option<Turn>),
) -> Result<Held, String> {
    let dir = prepare(host, vm).await?;
    let gated = spawn_gated(host, vm, release, (&dir, how)).await?;
    let process = gated.process().id().clone();
    // Recorded before it runs anything: a daemon that dies now finds it again.
    host.observe(&vm.name, VmState::Starting, None, Some(process.clone()))
        .await
        .map_err(|e| e.to_string())?;
    host.scopes.enclose(&vm.name, process.pid, false).await;
    // Before the guest's first instruction.
    host.ways.fence(vm);
    if let Some(turn) = turn {
        turn.come().await;
    }
    let started = gated.let_go().map_err(|e| e.to_string())?;
    let ready = started.ready(PATIENCE).await.map_err(|e| e.to_string())?;
    match host.expected(vm).find().await {
        Ok(held) => Ok(held),
        Err(error) => {
            ready.kill().await;
            Err(format!("the VMM said it was ready, but: {error}"))
        }
    }
}

/// Makes the directory and the spec file; clears away what a dead VMM left.
async fn prepare(host: &Host, vm: &VmRecord) -> Result<VmDir, String> {
    let dir = host.dir(&vm.name);
    dir.create().map_err(|e| e.to_string())?;
    match host.expected(vm).find().await {
        Err(FindError::Nobody(_)) => dir.remove_stale_sockets(),
        _ => {
            let path = dir.control();
            return Err(format!(
                "something answers at {} that the daemon did not start for this VM; find its \
                 process with `ss -xlp` and end it",
                path.display()
            ));
        }
    }
    let spec = serde_json::to_vec_pretty(&vm.spec).map_err(|e| e.to_string())?;
    let path = dir.spec();
    std::fs::write(&path, spec).map_err(|e| format!("cannot write {}: {e}", path.display()))?;
    Ok(dir)
}

async fn spawn_gated(
    host: &Host,
    vm: &VmRecord,
    release: &Release,
    (dir, how): (&VmDir, &How),
) -> Result<spawn::Gated, String> {
    let binary = match how {
        How::Boot => verified(host, release).await?,
        // The same file description, whose digest was taken.
        How::Revive { binary, .. } => binary.try_clone().map_err(|e| e.to_string())?,
    };
    let mut args = match how {
        How::Boot => vec!["run".to_owned(), format!("--spec={}", dir.spec().display())],
        How::Revive {
            place,
            nonce,
            memory,
            ..
        } => {
            let place = serde_json::to_string(place).map_err(|e| e.to_string())?;
            let mut args = vec![
                "revive".to_owned(),
                format!("--place={place}"),
                format!("--nonce={nonce}"),
            ];
            // A release from before there was this does without, and refuses the place.
            args.extend(memory.as_ref().map(|_| format!("--memory-fd={MEMORY_FD}")));
            args
        }
    };
    let memory = match how {
        How::Revive {
            memory: Some(memory),
            ..
        } => Some(memory.try_clone().map_err(|e| e.to_string())?),
        _ => None,
    };
    args.extend([
        format!("--dir={}", dir.path().display()),
        format!("--ready-fd={READY_FD}"),
        format!("--secret-fd={GIVEN_FD}"),
    ]);
    args.extend(release_args(release));
    let given = secret_pipe(&vm.secret).map_err(|e| format!("cannot pass the secret: {e}"))?;
    let log = &dir.log();
    let job = Job {
        binary,
        args,
        given,
        memory,
        log,
    };
    spawn::spawn(job).map_err(|e| e.to_string())
}

/// The release's binary, its digest taken off the runtime's threads.
pub(super) async fn verified(host: &Host, release: &Release) -> Result<File, String> {
    verified_by(&host.binaries, release).await
}

/// As [`verified`], without a host.
pub(super) async fn verified_by(binaries: &Binaries, release: &Release) -> Result<File, String> {
    let (binaries, release) = (binaries.clone(), release.clone());
    tokio::task::spawn_blocking(move || binaries.verified(&release))
        .await
        .map_err(|e| e.to_string())?
        .map_err(|problem| problem.message)
}

/// What tells a process which release it is, and the release's own arguments.
pub(super) fn release_args(release: &Release) -> impl Iterator<Item = String> {
    let manifest = &release.manifest;
    [
        format!("--release-version={}", manifest.version),
        format!("--release-sha256={}", manifest.sha256),
    ]
    .into_iter()
    .chain(manifest.args.clone())
}

fn secret_pipe(secret: &Secret) -> std::io::Result<OwnedFd> {
    let (read, mut write) = std::io::pipe()?;
    // 32 bytes always fit into an empty pipe.
    write.write_all(secret.as_bytes())?;
    Ok(read.into())
}
