//! A handover with the real ownership word and none of the rest.
//!
//! ```text
//!  predecessor ── offer (spec, secret, fds) ──▶ successor
//!              ◀── loaded ───────────────────
//!     seal, give up
//!              ── go(epoch) ────────────────▶  take
//!              ◀── running ──────────────────
//! ```

use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::{Context, bail};
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use serde::{Deserialize, Serialize};
use stillpoint_control::frame::{self, FrameError};
use stillpoint_control::message::{Handover, Ready, Reply, Request};
use stillpoint_control::ownership::{Epoch, Owner, Ownership};
use stillpoint_control::report::{Blackout, Outcome, Phase, ReleaseName, Side, SwapReport};
use stillpoint_control::secret::{Secret, hex, unhex};
use stillpoint_control::spec::MachineSpec;

use super::serve::{leave, serve};
use super::{Flags, Now, Toy, lock, release, say_ready};

/// Of one that hangs.
const FOREVER: Duration = Duration::from_secs(1000);

#[derive(Debug, Serialize, Deserialize)]
struct Offer {
    swap: String,
    spec: MachineSpec,
    dir: PathBuf,
    secret: String,
    from: ReleaseName,
    swaps: u64,
    next: Epoch,
    budget: u64,
    began_unix_ns: u64,
}

#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
enum Word {
    Loaded,
    Go(Epoch),
    Running,
}

fn now_unix_ns() -> u64 {
    let now = std::time::SystemTime::UNIX_EPOCH.elapsed();
    now.map_or(0, |now| u64::try_from(now.as_nanos()).unwrap_or(0))
}

fn report(offer: &Offer, to: ReleaseName, outcome: Outcome, reason: Option<String>) -> SwapReport {
    SwapReport {
        swap: offer.swap.clone(),
        vm: offer.spec.name.clone(),
        component: "vmm".into(),
        from: offer.from.clone(),
        to,
        outcome,
        reason,
        started_at_unix_ns: offer.began_unix_ns,
        vcpus: offer.spec.cpus.into(),
        memory_bytes: offer.spec.memory.size,
        state_format: 1,
        state_bytes: 0,
        budget: Duration::from_nanos(offer.budget),
        margin: None,
        phases: vec![Phase {
            name: "load".into(),
            side: Side::Successor,
            in_blackout: true,
            duration: Duration::from_micros(5),
        }],
        blackout: Blackout {
            host: Duration::from_micros(10),
            guest_ns: vec![Some(11_000)],
            vcpus: Vec::new(),
        },
        clock: None,
        recovery: Vec::new(),
        warnings: vec![],
    }
}

/// The predecessor's part.
pub(super) fn offer(
    toy: &Arc<Toy>,
    client: &OwnedFd,
    request: Request,
    fds: Vec<OwnedFd>,
) -> anyhow::Result<Reply> {
    let Request::HandOver {
        swap,
        to,
        budget_ns,
        ..
    } = request
    else {
        bail!("not a handover");
    };
    let [socket, _state] = <[OwnedFd; 2]>::try_from(fds)
        .map_err(|fds| anyhow::anyhow!("{} fds with a handover", fds.len()))?;
    let offer = {
        let mut now = lock(&toy.now);
        if now.swapping {
            let message = "a handover is going on".into();
            return Ok(Reply::Error {
                code: "busy".into(),
                message,
            });
        }
        now.swapping = true;
        Offer {
            swap,
            spec: toy.spec.clone(),
            dir: toy.dir.clone(),
            secret: hex(toy.secret.as_bytes()),
            from: toy.release.clone(),
            swaps: now.swaps,
            next: now.owner.epoch().next(),
            budget: budget_ns.unwrap_or(1_000_000_000),
            began_unix_ns: now_unix_ns(),
        }
    };
    match give(toy, client, &socket, &offer) {
        Ok(()) => {
            frame::send_json(client, &Reply::Handover(Handover::Moved), &[]).ok();
            leave(0)
        }
        Err(error) => {
            let report = report(&offer, to, Outcome::Kept, Some(format!("{error:#}")));
            let mut now = lock(&toy.now);
            now.swapping = false;
            now.report = Some(report.clone());
            let report = Box::new(report);
            Ok(Reply::Handover(Handover::Kept { report }))
        }
    }
}

fn give(toy: &Toy, client: &OwnedFd, socket: &OwnedFd, offer: &Offer) -> anyhow::Result<()> {
    let budget = Duration::from_nanos(offer.budget);
    set_socket_timeout(socket, Timeout::Recv, Some(budget))?;
    let fds = [
        toy.memory.as_fd(),
        toy.ownership.as_fd(),
        toy.control.as_fd(),
        toy.console.as_fd(),
    ];
    frame::send_json(socket, offer, &fds).context("offer")?;
    let (word, _): (Word, _) = frame::receive_json(socket).context("the successor to load")?;
    anyhow::ensure!(word == Word::Loaded, "{word:?} instead of Loaded");
    let phase = Phase {
        name: "adopt".into(),
        side: Side::Successor,
        in_blackout: false,
        duration: Duration::from_millis(1),
    };
    // Whoever asked may be gone; the handover goes on.
    frame::send_json(client, &Reply::Progress(phase), &[]).ok();
    if toy.flags.has_fault("slow") {
        std::thread::sleep(Duration::from_millis(1500));
    }
    if toy.flags.has_fault("die-before-seal") {
        std::process::abort();
    }
    let owner = lock(&toy.now).owner;
    let epoch = toy.ownership.seal(owner)?;
    if toy.flags.has_fault("die-sealed") {
        std::process::abort();
    }
    if toy.flags.has_fault("hang-sealed") {
        std::thread::sleep(FOREVER);
    }
    toy.ownership.give_up(epoch)?;
    if toy.flags.has_fault("hang-given-up") {
        std::thread::sleep(FOREVER);
    }
    let went = frame::send_json(socket, &Word::Go(epoch), &[])
        .and_then(|()| frame::receive_json::<Word>(socket).map(drop));
    if let Err(error) = went {
        let held = toy.ownership.reclaim(epoch)?;
        lock(&toy.now).owner = held;
        return Err(error).context("the successor to run");
    }
    Ok(())
}

/// The successor's part.
pub(super) fn adopt(flags: Flags) -> anyhow::Result<()> {
    eprintln!("toy: adopt");
    let ready = flags.fd("ready-fd")?;
    if flags.has_fault("crash-before-ready") {
        eprintln!("toy: crashing as told");
        std::process::abort();
    }
    let socket = flags.fd("handover-fd")?.context("--handover-fd")?;
    say_ready(ready, &Ready::Yes)?;
    let (offer, fds): (Offer, _) = frame::receive_json(&socket).context("wait for the offer")?;
    let [memory, page, control, console] = <[OwnedFd; 4]>::try_from(fds)
        .map_err(|fds| anyhow::anyhow!("{} fds with an offer", fds.len()))?;
    let ownership = Ownership::map(page)?;
    if flags.has_fault("crash-on-offer") {
        std::process::abort();
    }
    if flags.has_fault("hang") {
        std::thread::sleep(FOREVER);
    }
    frame::send_json(&socket, &Word::Loaded, &[])?;
    let owner = take(&socket, &ownership, offer.next)?;
    frame::send_json(&socket, &Word::Running, &[]).ok();
    // So that SO_PEERCRED names us.
    rustix::net::listen(&control, 16)?;
    if flags.has_fault("die-after-take") {
        std::process::abort();
    }
    if flags.has_fault("hang-after-take") {
        std::thread::sleep(FOREVER);
    }
    let to = release(&flags);
    let secret = unhex(&offer.secret).and_then(|bytes| Secret::from_bytes(&bytes));
    let toy = Toy {
        release: to.clone(),
        secret: secret.context("a secret")?,
        spec: offer.spec.clone(),
        dir: offer.dir.clone(),
        now: Mutex::new(Now {
            owner,
            swaps: offer.swaps + 1,
            swapping: false,
            standing: None,
            report: Some(report(&offer, to, Outcome::Moved, None)),
        }),
        flags,
        memory,
        ownership,
        control,
        console,
    };
    serve(Arc::new(toy))
}

fn take(socket: &OwnedFd, ownership: &Ownership, next: Epoch) -> anyhow::Result<Owner> {
    match frame::receive_json::<Word>(socket) {
        Ok((Word::Go(epoch), _)) => Ok(ownership.take(epoch)?),
        Ok((word, _)) => bail!("{word:?} instead of Go"),
        // The predecessor is gone. Sealed counts as given up.
        Err(FrameError::Closed) => Ok(ownership.take_from_dead(next)?),
        Err(error) => Err(error.into()),
    }
}
