//! Rehearses a swap: a throw-away process of the other release builds the machine and loads the guest's
//! state, over a private view of its RAM, while the guest runs. Nothing comes of it but the answer. A jump of the host
//! is rehearsed so too, by the release that would revive the guest: with its record in place of its state.
//!
//! ```text
//!  spawn ▶ (its scope) ▶ let go ▶ its Ready ▶ ask the guest's VMM ─▶ Told ▶ it has ended
//!     └───────── it does not know rehearsals, or the VMM does not ──▶ Unknown
//! ```
//!
//! The process is not recorded: it has nothing of the guest, and ends by itself when the other side
//! of its socketpair closes.

use std::time::Duration;

use stillpoint_control::client::ClientError;
use stillpoint_control::clock::Policy;
use stillpoint_control::message::Request;
use stillpoint_control::rehearsal::{Rehearsal, Verdict};
use tokio::time::Instant;

use super::Host;
use super::start::{release_args, verified};
use crate::agent::pair::{self, Channel};
use crate::agent::process::{Exit, Process};
use crate::agent::spawn::{self, GIVEN_FD, Job, READY_FD, SpawnError};
use crate::model::{Rehearsed, Release, VmRecord};

/// How long the process may take to come up.
const READY_PATIENCE: Duration = Duration::from_secs(30);
/// How long all of a rehearsal may take once it has: a successor has as long to prepare.
const PATIENCE: Duration = Duration::from_secs(30);
/// What may come on top before the VMM counts as mute.
const MARGIN: Duration = Duration::from_secs(5);
/// How long the process may take to end afterwards.
const END_PATIENCE: Duration = Duration::from_secs(5);
/// With this a command ends that does not know its verb.
const USAGE: Exit = Exit::Code(2);
/// By which a record is stored for a rehearsal. Jumps have theirs in hexadecimal, so no kernel's command line names it.
const NONCE: &str = "rehearsal";

/// Of what it is a rehearsal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Of {
    /// Of a handover to a successor.
    Handover,
    /// Of a revival under the host's next kernel.
    Revival,
}

/// What is to be rehearsed.
#[derive(Clone, Copy, Debug)]
pub(super) struct Terms {
    /// Whether the guest's state is saved for it, for which it stands still.
    pub(super) peek: bool,
    /// The longest that it may stand still; its own budget if `None`.
    pub(super) budget_ns: Option<u64>,
    /// What its clocks would make of the pause; its own policy if `None`.
    pub(super) clock: Option<Policy>,
    /// Which swap.
    pub(super) of: Of,
}

/// Rehearses a swap of `vm` to `release`. `Err`: the release can't even be started, so a swap to it
/// would fail too; says why.
pub(super) async fn rehearse(
    host: &Host,
    vm: &VmRecord,
    release: &Release,
    terms: Terms,
) -> Result<Rehearsed, String> {
    let began = Instant::now();
    let version = &release.manifest.version;
    let nonce = (terms.of == Of::Revival).then(|| NONCE.to_owned());
    let Channel {
        predecessor: ours,
        successor: theirs,
    } = pair::channel().map_err(|e| format!("cannot make the rehearsal's socketpair: {e}"))?;
    let mut args = vec![
        "rehearse".to_owned(),
        format!("--handover-fd={GIVEN_FD}"),
        format!("--ready-fd={READY_FD}"),
    ];
    args.extend(nonce.iter().map(|nonce| format!("--nonce={nonce}")));
    args.extend(release_args(release));
    let job = Job {
        binary: verified(host, release).await?,
        args,
        given: theirs,
        memory: None,
        log: &host.dir(&vm.name).log(),
    };
    let gated = spawn::spawn(job).map_err(|e| e.to_string())?;
    // Where a successor would be: what it is allowed there is what it is rehearsed with.
    let pid = gated.process().id().pid;
    host.scopes.enclose(&vm.name, pid, true).await;
    let started = gated.let_go().map_err(|e| e.to_string())?;
    let process = match started.ready(READY_PATIENCE).await {
        Ok(process) => process,
        Err(SpawnError::Crashed { exit: USAGE, .. }) => {
            let why = format!("release {version} does not know how to rehearse");
            return Ok(Rehearsed::Unknown { why });
        }
        Err(error) => return Err(format!("release {version} did not come up: {error}")),
    };
    let request = Request::Rehearse {
        peek: terms.peek,
        budget_ns: terms.budget_ns,
        patience: PATIENCE,
        clock: terms.clock,
        nonce,
    };
    let told = host
        .expected(vm)
        .rehearse(request, ours, PATIENCE + MARGIN)
        .await;
    let rehearsed = match told {
        Ok(told) => Rehearsed::Told(with_end(told, &process).await),
        Err(ClientError::Refused { code, .. }) if code == "bad_request" => {
            let why = format!(
                "release {}, which runs the guest, does not know how to rehearse",
                vm.release
            );
            Rehearsed::Unknown { why }
        }
        Err(error) => Rehearsed::Unknown {
            why: format!("the guest's VMM did not rehearse: {error}"),
        },
    };
    if !process.ends_within(END_PATIENCE).await {
        process.kill().await;
    }
    tracing::info!(vm = %vm.name, version, took = ?began.elapsed(), ?rehearsed, "rehearsed");
    Ok(rehearsed)
}

/// Of a process that died the end says more than the connection that closed.
async fn with_end(mut told: Rehearsal, process: &Process) -> Rehearsal {
    if told.verdict == Verdict::Failed && process.ends_within(Duration::from_millis(200)).await {
        let exit = process.exit();
        if let (Some(reason), Exit::Signal(_)) = (&mut told.reason, &exit) {
            reason.push_str(&format!("; the process that rehearsed {exit}"));
        }
    }
    told
}

/// Why a swap that was rehearsed so is not begun; `None` if nothing is known against it.
pub(super) fn refusal(rehearsed: &Rehearsed) -> Option<String> {
    let Rehearsed::Told(told) = rehearsed else {
        return None;
    };
    if told.verdict != Verdict::Failed {
        return None;
    }
    let mut text = format!(
        "its rehearsal failed: {}",
        told.reason
            .as_deref()
            .unwrap_or("for no reason that it said")
    );
    if !told.differences.is_empty() {
        text.push_str(&format!(" ({})", told.differences.join("; ")));
    }
    text.push_str(
        ". The guest goes on in the release that it has; `swap vmm --check` shows more, and \
         `--no-rehearsal` swaps without",
    );
    Some(text)
}
