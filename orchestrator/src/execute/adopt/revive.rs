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
use crate::agent::kexec;
use crate::execute::Host;
use crate::execute::adopt::Turn;
use crate::execute::start::{How, start_as, verified_by};
use crate::model::{Release, VmRecord, VmState, nonce_of};
use crate::store::Store;

/// How long a VMM may take to tell of its guest's pause.
const REPORT_PATIENCE: Duration = Duration::from_secs(10);

/// A guest that was revived.
pub(super) struct Revived {
    pub(super) vm: VmRecord,
    pub(super) release: Release,
    pub(super) report: Option<SwapReport>,
    /// When it was known to run.
    pub(super) at: Instant,
    /// The TSC when it was stopped.
    kicked_tsc: u64,
}

impl Revived {
    /// How long after this reading of the TSC it ran, by its VMM's own account.
    pub(super) fn ran_after(&self, jump: &Jump, tsc: u64) -> Option<Duration> {
        let carried = jump.wall?;
        let stopped = carried.real_ns_at(tsc)? - carried.real_ns_at(self.kicked_tsc)?;
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
    host.carve_out.let_go(vm.name.as_str());
    let (process, at) = (held.process.id().clone(), Instant::now());
    host.observe_surely(&vm.name, VmState::Running, None, Some(process.clone()))
        .await;
    let report = host
        .expected(vm)
        .last_report(&label.swap, REPORT_PATIENCE)
        .await;
    let mut vm = vm.clone();
    vm.process = Some(process);
    Ok(Revived {
        vm,
        release,
        report,
        at,
        kicked_tsc: label.kicked_tsc,
    })
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
