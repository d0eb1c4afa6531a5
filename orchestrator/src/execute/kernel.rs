//! A swap of the host's kernel: its guests are stored beside their RAM, which no kernel counts as its
//! own or which live update keeps for the next, and the host jumps into another kernel by kexec. What happens
//! there is in [`super::adopt`].
//!
//! ```text
//!  load ▶ announce ▶ wait ▶ rehearse ▶ record ▶ preserve ▶ store all ─┬▶ directory: jump ▶ hold on ▶ sync ▶ the jump ▶ (adopt)
//!    │         │             │                     │                  │         │            │        └▶ it failed ─┐
//!    └─────────┴─────────────┴─▶ refused           └──────────────────┴─────────┴────────────┴▶ directory: no jump ─┴▶ resume all
//! ```
//!
//! The revival of each guest is rehearsed ([`super::kernel_check`]): for that it stands still, for a moment and by itself.
//!
//! Memfds are preserved while the guests run: every hole of them is filled then, which takes seconds.
//!
//! What can fail is tried before a guest stands still: the next kernel is loaded, with its command line,
//! while they run. Between the first record that is stored and the jump everything is taken back in the
//! one order that keeps a guest single: first the directory says that there is no jump, then each VMM
//! withdraws its record, and only then its guest runs on. A daemon that dies there changes nothing of
//! that: each VMM does its part at the ceiling, and the directory's jump needs a kernel that names it.

use std::time::Duration;

use stillpoint_carveout::directory::Jump;
use stillpoint_carveout::wall::{self, Carried, Point};
use tokio::time::Instant;

use super::host::{self, Part, Stood};
use super::{Host, unix_ns};
use crate::agent::kexec;
use crate::model::{
    HostSwap, HostSwapState, JumpPhase, KernelJump, Share, SwapRecord, nonce_of, with_nonce,
};
use crate::store::StoreError;

/// How long guests stand still at the most while their kernel shuts down: it may wait for disks that
/// write, and a guest that ran on meanwhile would be lost by the jump.
const SHUTDOWN: Duration = Duration::from_secs(120);
/// Of the budget so much must be left when the jump comes: from then on a ceiling is a figure in a
/// report, and no action.
const LEAST_LEFT: Duration = Duration::from_millis(200);

/// What the daemon keeps in the carve-out for the next one.
#[derive(Debug, serde::Serialize, serde::Deserialize)]
pub(super) struct Kept {
    /// The swap.
    pub(super) swap: HostSwap,
    /// Its guests' parts.
    pub(super) parts: Vec<SwapRecord>,
}

/// Carries it out. Returns only if the host is still this one.
pub(super) async fn carry_out(host: &Host, swap: &mut HostSwap) -> Result<(), StoreError> {
    if swap.state == HostSwapState::InProgress {
        return settle(host, swap).await;
    }
    let early = wall::now();
    let Some(mut jump) = swap.kernel.clone() else {
        return Ok(());
    };
    if let Err(why) = load(&mut jump).await {
        return host::refuse(host, swap, Vec::new(), why).await;
    }
    swap.kernel = Some(jump);
    let parts = match begin(host, swap).await? {
        Ok(parts) => parts,
        Err(why) => {
            unload().await;
            return host::refuse(host, swap, Vec::new(), why).await;
        }
    };
    // While the guests run: what is dirty now needs not be written while they stand still.
    flush_disks().await;
    let why = leave(host, swap, &parts, early).await;
    // Still here: nobody may be run from a record.
    give_up(host).await;
    let reports = host::resume_all(swap, &parts).await;
    unload().await;
    swap.pause_ns = host::longest(&reports);
    let parts = host::ended(parts, reports, unix_ns());
    let stood = Stood {
        ended: None,
        reason: Some(why),
        output: String::new(),
    };
    host::conclude(host, swap, parts, stood).await
}

/// What an earlier daemon of this very boot left, or one whose jump never arrived.
async fn settle(host: &Host, swap: &mut HostSwap) -> Result<(), StoreError> {
    give_up(host).await;
    let parts = host::parts(host, swap).await?;
    let reports = host::resume_all(swap, &parts).await;
    unload().await;
    swap.pause_ns = host::longest(&reports);
    let parts = host::ended(parts, reports, unix_ns());
    let line = kexec::command_line();
    let jump = swap.kernel.as_ref();
    let why = match jump.is_some_and(|jump| nonce_of(&line) == Some(&jump.nonce)) {
        true => {
            "the daemon ended while it adopted its guests, and what came along of the others ended with it"
        }
        false => {
            "the daemon ended in the middle of it, and the host came by no jump of it to where it is"
        }
    };
    let stood = Stood {
        ended: None,
        reason: Some(why.into()),
        output: String::new(),
    };
    host::conclude(host, swap, parts, stood).await
}

async fn load(jump: &mut KernelJump) -> Result<(), String> {
    let began = Instant::now();
    let (image, initrd) = (jump.image.clone(), jump.initrd.clone());
    let line = with_nonce(&jump.command_line, &jump.nonce);
    let load = move || kexec::load(&image, initrd.as_deref(), &line);
    let loaded = tokio::task::spawn_blocking(load).await;
    loaded
        .map_err(|e| e.to_string())?
        .map_err(|e| e.to_string())?;
    jump.phases
        .push(phase("load", Share::Ours, false, began.elapsed()));
    Ok(())
}

async fn unload() {
    let _ = tokio::task::spawn_blocking(kexec::unload).await;
}

async fn flush_disks() {
    let _ = tokio::task::spawn_blocking(rustix::fs::sync).await;
}

pub(super) fn phase(name: &str, share: Share, in_blackout: bool, took: Duration) -> JumpPhase {
    JumpPhase {
        name: name.to_owned(),
        share,
        in_blackout,
        duration_ns: u64::try_from(took.as_nanos()).unwrap_or(u64::MAX),
    }
}

/// Waits for its time, and records that it begins. An error says why it does not.
async fn begin(host: &Host, swap: &mut HostSwap) -> Result<Result<Vec<Part>, String>, StoreError> {
    if let Some(why) = host::await_clearance(host, swap).await? {
        return Ok(Err(why));
    }
    let mut parts = host::parts(host, swap).await?;
    if parts.is_empty() {
        return Ok(Err("none of its guests runs any more".into()));
    }
    // One that was started meanwhile would end with the kernel, without a word.
    if let Some(other) = left_out(host, swap).await? {
        return Ok(Err(format!(
            "`{other}` runs by now and is no part of it; ask again"
        )));
    }
    if let Err(why) = rehearse(host, swap, &mut parts).await? {
        return Ok(Err(why));
    }
    swap.state = HostSwapState::InProgress;
    swap.step = match host.carve_out.is_live_update() {
        true => "preserve",
        false => "store",
    }
    .into();
    let records: Vec<_> = parts.iter_mut().map(Part::begin).collect();
    host.store.update_host_swap(swap, &records).await?;
    host.tell_host_swap(swap);
    Ok(Ok(parts))
}

/// Rehearses what the guests will go through under the next kernel, if that was not left out.
async fn rehearse(
    host: &Host,
    swap: &mut HostSwap,
    parts: &mut [Part],
) -> Result<Result<(), String>, StoreError> {
    if !swap.kernel.as_ref().is_some_and(|jump| jump.rehearse) {
        return Ok(Ok(()));
    }
    swap.step = "rehearse".into();
    host.tell_host_swap(swap);
    let began = Instant::now();
    let rehearsed = super::kernel_check::rehearse_parts(host, swap, parts).await;
    let phase = phase("rehearse", Share::Ours, false, began.elapsed());
    if let Some(jump) = &mut swap.kernel {
        jump.phases.push(phase);
    }
    let records: Vec<_> = parts.iter().map(Part::record).collect();
    if let Err((_, longest)) = &rehearsed {
        // The only pause that there was of it.
        swap.pause_ns = host::whole_ns(*longest);
    }
    host.store.update_host_swap(swap, &records).await?;
    Ok(rehearsed.map_err(|(why, _)| why))
}

async fn left_out(host: &Host, swap: &HostSwap) -> Result<Option<String>, StoreError> {
    let vms = host.store.vms().await?;
    let others = vms.into_iter().filter(|vm| vm.state.is_active());
    let other = others
        .map(|vm| vm.name)
        .find(|name| !swap.vms.contains(name));
    Ok(other.map(String::from))
}

/// Stores the guests and jumps. Says why the host is still here.
async fn leave(host: &Host, swap: &mut HostSwap, parts: &[Part], early: Point) -> String {
    let budget = Duration::from_nanos(swap.budget_ns);
    let Some(mut jump) = swap.kernel.clone() else {
        return "it is no jump".into();
    };
    match preserve(host, parts).await {
        Ok(None) => {}
        Ok(Some(took)) => {
            let phase = phase("preserve", Share::Ours, false, took);
            jump.phases.push(phase);
            // Only told: the guests wait for no record.
            swap.step = "store".into();
            host.tell_host_swap(swap);
        }
        Err(why) => return why,
    }
    let began = Instant::now();
    if let Err(why) = host::store_all(swap, parts, &jump.nonce).await {
        return why;
    }
    jump.phases
        .push(phase("store", Share::Ours, true, began.elapsed()));
    // What guests wrote up to now; nobody writes any more. Before the directory is written, so that it tells
    // of this too.
    let flushing = Instant::now();
    flush_disks().await;
    jump.phases
        .push(phase("sync", Share::Ours, true, flushing.elapsed()));
    swap.kernel = Some(jump);
    swap.step = "jump".into();
    if let Err(why) = announce(host, swap, parts, early).await {
        return why;
    }
    if began.elapsed() + LEAST_LEFT > budget {
        return format!(
            "storing the guests took {:?} of the budget of {budget:?}: too little is left for a jump",
            began.elapsed()
        );
    }
    if let Err(why) = host::await_jump_all(swap, parts, SHUTDOWN).await {
        return why;
    }
    tracing::info!(swap = %swap.id, "every guest is stored: jumping");
    let failed = tokio::task::spawn_blocking(kexec::jump).await;
    match failed {
        Ok(error) => format!("the jump failed: {error}"),
        Err(error) => format!("the jump failed: {error}"),
    }
}

/// Has live update keep the guests' memory, where that is what outlives the kernel; tells what it took.
async fn preserve(host: &Host, parts: &[Part]) -> Result<Option<Duration>, String> {
    if !host.carve_out.is_live_update() {
        return Ok(None);
    }
    let began = Instant::now();
    let vms: Vec<_> = parts.iter().map(Part::vm).collect();
    let guests = super::kernel_check::memfds(host, &vms).await?;
    let carve_out = host.carve_out.clone();
    let kept = tokio::task::spawn_blocking(move || carve_out.preserve(&guests)).await;
    kept.map_err(|e| e.to_string())
        .and_then(|done| done)
        .map_err(|why| format!("the guests' memory is not preserved: {why}"))?;
    Ok(Some(began.elapsed()))
}

/// Writes into the directory that the jump comes, with all that the next daemon needs.
async fn announce(
    host: &Host,
    swap: &HostSwap,
    parts: &[Part],
    early: Point,
) -> Result<(), String> {
    let Some(kernel) = &swap.kernel else {
        return Err("it is no jump".into());
    };
    let records: Vec<_> = parts.iter().map(Part::record).collect();
    let vms: Vec<_> = parts
        .iter()
        .map(|part| (part.vm().name.to_string(), super::adopt::kept(part.vm())))
        .collect();
    let kept = Kept {
        swap: swap.clone(),
        parts: records,
    };
    let kept = serde_json::to_string(&kept).map_err(|e| e.to_string())?;
    let late = wall::now();
    host.carve_out.change(|directory| {
        for (name, kept) in vms {
            let mut entries = directory.entries.iter_mut();
            let entry = entries.find(|entry| entry.vm == name);
            entry
                .ok_or_else(|| format!("`{name}` has no place in the carve-out"))?
                .kept = kept;
        }
        directory.jump = Some(Jump {
            nonce: kernel.nonce.clone(),
            swap: swap.id.0.clone(),
            from: kernel.from.clone(),
            arrived: false,
            wall: Some(Carried { early, late }),
            kept,
        });
        Ok(())
    })
}

/// There is no jump. A directory that can't be written is harmless: no kernel names the nonce.
async fn give_up(host: &Host) {
    let cleared = host.carve_out.change(|directory| {
        directory.jump = None;
        Ok(())
    });
    if let Err(error) = cleared {
        tracing::error!("the jump stays in the directory: {error}");
    }
    // No guest need wait for that.
    let session = host.carve_out.release();
    tokio::task::spawn_blocking(move || drop(session));
}
