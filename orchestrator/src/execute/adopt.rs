//! Guests that came into this kernel by a jump: revived from their records in the carve-out.
//!
//! ```text
//!  nonce of the command line = nonce of the directory?
//!    │ yes: the wall clock first ▶ for each guest whose record is stored for that jump, all at once:
//!    │      record its VM ▶ all stand at their gates ▶ its VMM: check, build, load, consume, enter ▶ its part is over
//!    │      (its VMM is there, as a daemon before this one died over it ▶ wait until it runs, or ends)
//!    └ no, or a record that is none of this jump's: nothing of it is run; its memory stays its own
//! ```
//!
//! What must be true: no guest is run whose record is not marked as stored, by its own VMM's
//! compare-and-swap; a guest that can't be revived keeps RAM and record, is told of by name, and holds up
//! nobody else. Before the API answers and before any VM's keeper looks: to a keeper, a VM without its
//! process has crashed.

mod kept;
mod revive;
mod together;

use std::sync::Arc;
use std::time::Duration;

use stillpoint_carveout::directory::{Directory, Entry, Jump};
use stillpoint_carveout::mark::Mark;
use stillpoint_carveout::wall;
use tokio::time::Instant;

use super::kernel::{Kept, phase};
use super::{Host, host, unix_ns};
use crate::agent::kexec;
use crate::model::{
    HostSwap, HostSwapState, JumpPhase, Share, SwapId, SwapRecord, SwapState, VmName, VmRecord,
    VmState, WallCorrection, Wanted, nonce_of,
};
use crate::store::StoreError;
pub(super) use kept::kept;
use kept::restored;
pub use revive::Verified;
pub(super) use revive::release_for;
use revive::{By, Revived, revive, underway};
pub(super) use together::Turn;

/// The tag of a VM by which it is revived before others: a number, and the higher comes first.
const PRIORITY: &str = "priority";

/// The jump that this kernel came by, if the directory knows it too.
fn arrived_by(directory: &Directory) -> Option<Jump> {
    let line = kexec::command_line();
    let nonce = nonce_of(&line)?;
    directory.jump.clone().filter(|jump| jump.nonce == nonce)
}

/// Revives every guest that came by the jump. To be called once, before anything looks at a VM. `verified` are
/// binaries that were verified meanwhile, `opening` is what this daemon took to get here.
pub async fn adopt_all(
    host: &Host,
    verified: Arc<Verified>,
    opening: Duration,
) -> Result<(), StoreError> {
    let Ok(directory) = host.carve_out.directory() else {
        return Ok(());
    };
    let Some(jump) = arrived_by(&directory) else {
        tell_of_others(host, &directory);
        return Ok(());
    };
    let Some((mut swap, parts)) = swap_of(host, &jump).await? else {
        return Ok(());
    };
    let mut phases = way_here(&jump, opening);
    let began = Instant::now();
    if !jump.arrived {
        set_clock(host, &mut swap, &jump).await;
        phases.push(phase("clock", Share::Ours, true, began.elapsed()));
    }
    if let Some(kernel) = &mut swap.kernel {
        kernel.phases.extend(phases);
        kernel.clock.get_or_insert_with(not_told);
    }
    // What is known by now, for a daemon that follows if this one dies; not before the guests, who wait.
    let noted = host.store.update_host_swap(&swap, &[]);
    let revived = revive_all(host, (&directory, &jump), parts, &verified);
    let (noted, revived) = tokio::join!(noted, revived);
    noted?;
    let (parts, adopted) = revived?;
    conclude(host, swap, parts, adopted).await
}

/// A daemon before this one set the clock, and died.
fn not_told() -> WallCorrection {
    let problem = "the daemon that set it ended before it told of it";
    WallCorrection {
        problem: Some(problem.into()),
        ..WallCorrection::default()
    }
}

/// Says what lies in the carve-out that this kernel did not come by.
fn tell_of_others(host: &Host, directory: &Directory) {
    for entry in &directory.entries {
        if host.carve_out.mark(entry) == Ok(Mark::Stored) {
            tracing::error!(
                vm = entry.vm,
                "it is stored in the carve-out for a jump that this kernel did not come by: it is not run, and \
                 its memory stays reserved"
            );
        }
    }
}

/// The swap that the jump is a part of; `None` if it is over already. A store that does not know it
/// learns it from the directory.
async fn swap_of(
    host: &Host,
    jump: &Jump,
) -> Result<Option<(HostSwap, Vec<SwapRecord>)>, StoreError> {
    let id = SwapId(jump.swap.clone());
    if let Some(known) = host.store.host_swap(&id).await? {
        if known.state.is_over() {
            return Ok(None);
        }
        let parts = host.store.open_parts(&id).await?;
        return Ok(Some((with_phases_of(known, jump), parts)));
    }
    let Ok(Kept { swap, parts }) = serde_json::from_str(&jump.kept) else {
        tracing::error!(swap = %id, "what the carve-out keeps of the swap can't be read: its guests are not run");
        return Ok(None);
    };
    host.store.update_host_swap(&swap, &parts).await?;
    Ok(Some((swap, parts)))
}

/// The store's record is of before the guests stood still, and the directory's newer; but one that a daemon before this one
/// wrote here is newer still.
fn with_phases_of(known: HostSwap, jump: &Jump) -> HostSwap {
    if known
        .kernel
        .as_ref()
        .is_some_and(|kernel| kernel.clock.is_some())
    {
        return known;
    }
    match serde_json::from_str::<Kept>(&jump.kept) {
        Ok(kept) => HostSwap {
            kernel: kept.swap.kernel,
            ..known
        },
        Err(_) => known,
    }
}

/// What the way here took, by the TSC: from the last reading before the jump to now.
fn way_here(jump: &Jump, opening: Duration) -> Vec<JumpPhase> {
    let now = wall::now();
    let away = jump.wall.and_then(|carried| {
        let due = carried.real_ns_at(now.tsc)?;
        u64::try_from(due - carried.late.real_ns).ok()
    });
    let up = Duration::try_from(rustix::time::clock_gettime(rustix::time::ClockId::Boottime));
    let (Some(away), Ok(up)) = (away.filter(|_| !jump.arrived), up) else {
        return Vec::new();
    };
    let away = Duration::from_nanos(away);
    vec![
        phase("kernel", Share::Kernel, true, away.saturating_sub(up)),
        phase(
            "start",
            Share::Kernel,
            true,
            up.min(away).saturating_sub(opening),
        ),
        phase("open", Share::Ours, true, opening),
    ]
}

/// The host's wall clock first: guests' clocks are judged by it, and so is everything that is recorded.
async fn set_clock(host: &Host, swap: &mut HostSwap, jump: &Jump) {
    let corrected = match jump.wall {
        Some(carried) => tokio::task::spawn_blocking(move || carried.correct())
            .await
            .map_err(|e| e.to_string())
            .and_then(|done| done.map_err(|e| e.to_string())),
        None => Err("no reading of it came along".into()),
    };
    let clock = match corrected {
        Ok(done) => WallCorrection {
            off_ns: Some(done.off_ns),
            left_ns: Some(done.left_ns),
            uncertain_ns: Some(done.uncertain_ns),
            problem: None,
        },
        Err(problem) => {
            tracing::error!("the host's wall clock is as the new kernel made it: {problem}");
            WallCorrection {
                off_ns: None,
                left_ns: None,
                uncertain_ns: None,
                problem: Some(problem),
            }
        }
    };
    if let Some(kernel) = &mut swap.kernel {
        kernel.clock = Some(clock);
    }
    let noted = host.carve_out.change(|directory| {
        if let Some(jump) = &mut directory.jump {
            jump.arrived = true;
        }
        Ok(())
    });
    if let Err(error) = noted {
        tracing::error!("not noted in the carve-out: {error}");
    }
}

/// Revives them all at once, those of the highest priority first, and tells when the last of them ran.
async fn revive_all(
    host: &Host,
    (directory, jump): (&Directory, &Jump),
    mut parts: Vec<SwapRecord>,
    verified: &Arc<Verified>,
) -> Result<(Vec<SwapRecord>, Duration), StoreError> {
    let (adopting, began) = (wall::tsc(), Instant::now());
    let mut vms = Vec::new();
    for part in &parts {
        let entry = directory.entry(part.vm.as_str());
        vms.push(match entry {
            Some(entry) => known(host, part, entry).await?,
            None => Err("it has no place in the carve-out".into()),
        });
    }
    let rank = |vm: &Result<VmRecord, String>| {
        let tags = vm.as_ref().ok().map(|vm| &vm.profile.tags);
        let number = tags.and_then(|tags| tags.get(PRIORITY)?.parse::<i64>().ok());
        std::cmp::Reverse(number.unwrap_or(0))
    };
    let mut order: Vec<usize> = (0..parts.len()).collect();
    order.sort_by_key(|&at| rank(&vms[at]));
    let ranks: Vec<_> = order.iter().map(|&at| rank(&vms[at])).collect();
    let mut tasks = Vec::new();
    for (at, turn) in order.into_iter().zip(together::turns(&ranks)) {
        let entry = directory.entry(parts[at].vm.as_str()).cloned();
        let (host, vm, nonce) = (host.clone(), vms[at].clone(), jump.nonce.clone());
        let (verified, swap) = (verified.clone(), jump.swap.clone());
        let revived = tokio::spawn(async move {
            match (vm, entry) {
                (Ok(vm), Some(entry)) => {
                    if let Some(revived) = underway(&host, &vm, &swap).await? {
                        return Ok(revived);
                    }
                    let by = By {
                        nonce: &nonce,
                        release: None,
                        verified: &verified,
                        turn: Some(turn),
                    };
                    revive(&host, &vm, &entry, by).await
                }
                (Err(why), _) => Err(why),
                (Ok(_), None) => Err("it has no place in the carve-out".into()),
            }
        });
        tasks.push((at, revived));
    }
    let mut last = Duration::ZERO;
    for (at, task) in tasks {
        let revived = task.await.map_err(|e| e.to_string()).and_then(|done| done);
        if let Ok(revived) = &revived {
            let ran = revived.ran_after(jump, adopting);
            last = last.max(ran.unwrap_or_else(|| revived.at.saturating_duration_since(began)));
        }
        end_part(host, &mut parts[at], revived).await;
    }
    Ok((parts, last))
}

/// The VM as the store knows it, or as the carve-out does.
async fn known(
    host: &Host,
    part: &SwapRecord,
    entry: &Entry,
) -> Result<Result<VmRecord, String>, StoreError> {
    if let Some(vm) = host.store.vm(&part.vm).await? {
        return Ok(Ok(vm));
    }
    let vm = match restored(&entry.kept) {
        Ok(vm) => vm,
        Err(why) => {
            return Ok(Err(format!(
                "what the carve-out keeps of it can't be read: {why}"
            )));
        }
    };
    host.store.put_vm(&vm).await?;
    Ok(Ok(vm))
}

/// Records what became of a guest.
async fn end_part(host: &Host, part: &mut SwapRecord, revived: Result<Revived, String>) {
    part.step = "done".into();
    part.ended_at_unix_ns = Some(unix_ns());
    match revived {
        Ok(Revived {
            vm,
            release,
            report,
            ..
        }) => {
            part.state = SwapState::Moved;
            part.to = release.name();
            part.report = report;
            let now = vm.process.map(|process| (VmState::Running, process));
            host.end_swap(part, now).await;
        }
        Err(why) => {
            tracing::error!(vm = %part.vm, "not revived: {why}");
            let reason = format!(
                "it was not revived after the jump: {why}. Its RAM and its record are kept; `stillpoint \
                 adopt` shows them, `stillpoint adopt --retry {}` tries again",
                part.vm
            );
            part.state = SwapState::Crashed;
            part.reason = Some(reason.clone());
            host.end_swap(part, None).await;
            host.observe_surely(&part.vm, VmState::Failed, Some(reason), None)
                .await;
        }
    }
}

async fn conclude(
    host: &Host,
    mut swap: HostSwap,
    mut parts: Vec<SwapRecord>,
    adopted: Duration,
) -> Result<(), StoreError> {
    // Those that were over when a daemon before this one died.
    let mut others = host.store.parts(&swap.id).await?;
    others.retain(|other| parts.iter().all(|part| part.id != other.id));
    parts.extend(others);
    let reports = parts.iter().filter_map(|part| part.report.as_ref());
    let pauses = reports.map(|report| report.blackout.host.as_nanos());
    swap.pause_ns = pauses.max().and_then(|ns| u64::try_from(ns).ok());
    if let Some(kernel) = &mut swap.kernel {
        kernel.to = Some(kexec::running());
        let adopted = phase("adopt", Share::Ours, true, adopted);
        kernel.phases.push(adopted);
    }
    let lost: Vec<_> = parts
        .iter()
        .filter(|part| part.state != SwapState::Moved)
        .map(|part| part.vm.as_str())
        .collect();
    let over = swap.pause_ns.is_some_and(|ns| ns > swap.budget_ns);
    (swap.state, swap.reason) = match lost.is_empty() {
        true => (HostSwapState::Done, None),
        false => (
            HostSwapState::Failed,
            Some(format!(
                "not revived, their memory kept: {}",
                lost.join(", ")
            )),
        ),
    };
    if over && swap.reason.is_none() {
        // After a jump a ceiling is a breach to be told of, and nothing that could be acted on.
        swap.reason = Some("the pause was longer than its budget".into());
    }
    swap.step = "done".into();
    host::end(host, &mut swap).await;
    Ok(())
}

/// Tries a guest again that could not be revived, by this release if one is named.
pub async fn retry(host: &Host, name: &VmName, release: Option<&str>) -> Result<VmRecord, String> {
    let directory = host.carve_out.directory()?;
    let entry = directory
        .entry(name.as_str())
        .ok_or_else(|| format!("`{name}` has no memory in the carve-out"))?;
    let mark = host.carve_out.mark(entry)?;
    if mark != Mark::Stored {
        return Err(format!(
            "`{name}` can't be run from its record, which is marked as {mark}: what it holds is of the past, or \
             nothing"
        ));
    }
    let jump = arrived_by(&directory).ok_or_else(|| {
        format!(
            "`{name}` was stored for a jump that this kernel did not come by: its disks may have changed \
             since, so it is not run from there. `stillpoint adopt --forget {name}` gives its memory back"
        )
    })?;
    let failed = |e: StoreError| e.to_string();
    let known = host.store.vm(name).await.map_err(failed)?;
    let vm = match known {
        Some(vm) if vm.state.is_active() => {
            return Err(format!("`{name}` is {} already", vm.state));
        }
        Some(vm) => vm,
        None => restored(&entry.kept)?,
    };
    let vm = VmRecord {
        state: VmState::Starting,
        wanted: Wanted::Running,
        reason: None,
        process: None,
        ..vm
    };
    host.store.put_vm(&vm).await.map_err(failed)?;
    let by = By {
        nonce: &jump.nonce,
        release,
        verified: &Verified::default(),
        turn: None,
    };
    match revive(host, &vm, entry, by).await {
        Ok(revived) => {
            let release = revived.release.manifest.version;
            if let Err(error) = host.store.revived_by(name, &release).await {
                tracing::error!(vm = %name, release, "it runs by this release, which is not recorded: {error}");
            }
            Ok(VmRecord {
                release,
                ..revived.vm
            })
        }
        Err(why) => {
            let reason = format!("it was not revived: {why}. Its RAM and its record are kept");
            host.observe_surely(name, VmState::Failed, Some(reason), None)
                .await;
            Err(why)
        }
    }
}
