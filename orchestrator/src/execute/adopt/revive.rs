//! One guest revived from its record, by the VMM of a release that reads its state.

use std::collections::BTreeMap;
use std::fs::File;
use std::sync::Arc;
use std::time::Duration;

use stillpoint_carveout::directory::{Entry, Jump};
use stillpoint_control::report::SwapReport;
use tokio::sync::Mutex;
use tokio::time::Instant;

use crate::agent::binaries::Binaries;
use crate::agent::find::Held;
use crate::agent::kexec;
use crate::agent::process::Process;
use crate::execute::Host;
use crate::execute::adopt::Turn;
use crate::execute::start::{How, PATIENCE, start_as, verified_by};
use crate::model::{Release, VmRecord, VmState, nonce_of};
use crate::store::Store;

/// Between two looks at a VMM that is about to run its guest.
const GLANCE: Duration = Duration::from_millis(5);
/// How long a VMM may take to tell of its guest's pause.
const REPORT_PATIENCE: Duration = Duration::from_secs(10);

/// A guest that was revived.
pub(super) struct Revived {
    pub(super) vm: VmRecord,
    pub(super) release: Release,
    pub(super) report: Option<SwapReport>,
    /// When it was known to run.
    pub(super) at: Instant,
    /// The TSC when it was stopped, if its record is read.
    kicked_tsc: Option<u64>,
}

impl Revived {
    /// How long after this reading of the TSC it ran, by its VMM's own account.
    pub(super) fn ran_after(&self, jump: &Jump, tsc: u64) -> Option<Duration> {
        let carried = jump.wall?;
        let stopped = carried.real_ns_at(tsc)? - carried.real_ns_at(self.kicked_tsc?)?;
        let stopped = Duration::from_nanos(u64::try_from(stopped).ok()?);
        Some(self.report.as_ref()?.blackout.host.saturating_sub(stopped))
    }
}

/// By what a guest is revived.
#[derive(Debug)]
pub(super) struct By<'a> {
    /// The jump's.
    pub(super) nonce: &'a str,
    /// The release, if it is not to be chosen.
    pub(super) release: Option<&'a str>,
    pub(super) verified: &'a Verified,
    /// With whom it goes, if not alone.
    pub(super) turn: Option<Turn>,
}

/// Revives one guest. On an error nothing of it runs.
pub(super) async fn revive(
    host: &Host,
    vm: &VmRecord,
    entry: &Entry,
    by: By<'_>,
) -> Result<Revived, String> {
    let label = host.carve_out.label(entry)?;
    let all = host.store.releases().await.map_err(|e| e.to_string())?;
    let release = match by.release {
        Some(named) => named_release(&all, named, label.format)?,
        None => release_for(&all, vm, label.format)?,
    };
    let how = How::Revive {
        place: host.carve_out.spec_of(entry),
        nonce: by.nonce.to_owned(),
        binary: by.verified.binary(&host.binaries, &release).await?,
        memory: host.carve_out.memory_of(entry)?.map(Arc::new),
    };
    let held = start_as(host, vm, &release, (&how, by.turn)).await?;
    Ok(Revived {
        kicked_tsc: Some(label.kicked_tsc),
        ..taken(host, vm, release, (held, &label.swap)).await
    })
}

/// The guest is its VMM's: nothing of it is held here any more.
async fn taken(
    host: &Host,
    vm: &VmRecord,
    release: Release,
    (held, swap): (Held, &str),
) -> Revived {
    host.carve_out.let_go(vm.name.as_str());
    let (process, at) = (held.process.id().clone(), Instant::now());
    host.observe_surely(&vm.name, VmState::Running, None, Some(process.clone()))
        .await;
    let report = host.expected(vm).last_report(swap, REPORT_PATIENCE).await;
    let mut vm = vm.clone();
    vm.process = Some(process);
    Revived {
        vm,
        release,
        report,
        at,
        kicked_tsc: None,
    }
}

/// The guest whose VMM a daemon before this one started, and died: nobody but that VMM can run it, which may have consumed
/// its record already. `None` if there is none, or it ended, at its gate or before it ran anything.
pub(super) async fn underway(
    host: &Host,
    vm: &VmRecord,
    swap: &str,
) -> Result<Option<Revived>, String> {
    let Some(process) = vm.process.as_ref().and_then(|id| Process::open(id).ok()) else {
        return Ok(None);
    };
    let deadline = Instant::now() + PATIENCE;
    loop {
        // It listens from its start on, and answers when its guest runs.
        match host.expected(vm).find().await {
            Ok(held) => {
                tracing::warn!(vm = %vm.name, "a daemon before this one revived it, and ended over it: it runs");
                let release = recorded(host, &held.description.release.version).await?;
                return Ok(Some(taken(host, vm, release, (held, swap)).await));
            }
            Err(_) if !process.is_alive() => return Ok(None),
            Err(error) if Instant::now() >= deadline => {
                return Err(format!(
                    "process {}, which a daemon before this one started for it, does neither run it nor end: {error}",
                    process.id().pid
                ));
            }
            Err(_) => tokio::time::sleep(GLANCE).await,
        }
    }
}

async fn recorded(host: &Host, version: &str) -> Result<Release, String> {
    let found = host
        .store
        .release(version)
        .await
        .map_err(|e| e.to_string())?;
    found.ok_or_else(|| format!("it runs by release {version}, which is not in the store"))
}

/// The release that ran it, or the newest that reads its state.
pub(in crate::execute) fn release_for(
    all: &[Release],
    vm: &VmRecord,
    format: u32,
) -> Result<Release, String> {
    let reads = |release: &&Release| release.manifest.reads.contains(&format);
    let own = all
        .iter()
        .filter(reads)
        .find(|release| release.manifest.version == vm.release);
    let other = || all.iter().rev().find(reads);
    own.or_else(other).cloned().ok_or_else(|| {
        format!(
            "no release in the store reads its state (format {format}); add one with `stillpoint release \
             add`, then `stillpoint adopt --retry {}`",
            vm.name
        )
    })
}

/// The one that an operator names.
fn named_release(all: &[Release], named: &str, format: u32) -> Result<Release, String> {
    let found = all.iter().find(|one| one.manifest.version == named);
    let found = found.ok_or_else(|| {
        format!("release {named} is not in the store; `stillpoint release ls` lists those that are")
    })?;
    match found.manifest.reads.contains(&format) {
        true => Ok(found.clone()),
        false => Err(format!(
            "release {named} does not read its state, which is in format {format}: it reads {:?}",
            found.manifest.reads
        )),
    }
}

/// The binaries of releases that were verified: once for all guests that they run.
#[derive(Debug, Default)]
pub struct Verified(Mutex<BTreeMap<String, Arc<File>>>);

impl Verified {
    /// Begins with the releases of the store's guests, beside whatever else a daemon does first, if this kernel was jumped
    /// into. What can't be verified is told of when a guest needs it.
    pub fn ahead(binaries: &Binaries, store: &Store) -> Arc<Self> {
        let verified = Arc::new(Self::default());
        if nonce_of(&kexec::command_line()).is_some() {
            let (ahead, binaries, store) = (verified.clone(), binaries.clone(), store.clone());
            tokio::spawn(async move {
                let vms = store.vms().await.unwrap_or_default();
                let carved = vms.iter().filter(|vm| vm.spec.memory.carve_out.is_some());
                for vm in carved {
                    if let Ok(Some(release)) = store.release(&vm.release).await {
                        let _ = ahead.binary(&binaries, &release).await;
                    }
                }
            });
        }
        verified
    }

    async fn binary(&self, binaries: &Binaries, release: &Release) -> Result<Arc<File>, String> {
        // Held over the verification: others wait for its end, and not to do the same beside it.
        let mut known = self.0.lock().await;
        if let Some(file) = known.get(&release.manifest.version) {
            return Ok(file.clone());
        }
        let file = Arc::new(verified_by(binaries, release).await?);
        known.insert(release.manifest.version.clone(), file.clone());
        Ok(file)
    }
}
