//! The predecessor's side.
//!
//! ```text
//!  prepare ─▶ blackout: freeze, save, give up ─▶ retire
//!     └──────────┴── until it gave up, whatever fails lets the guest run on here
//! ```
//!
//! Everything up to `give_up` can be undone, and is, by the drop of the guard.

mod blackout;
mod prepare;

use std::os::fd::OwnedFd;
use std::time::Duration;

use rustix::fs::SealFlags;
use stillpoint_control::clock::Policy;
use stillpoint_control::message::Handover;
use stillpoint_control::recovery::Recovery;
use stillpoint_control::report::{
    Blackout, ClockReceipt, Margin, Outcome, Phase, ReleaseName, Side, SwapReport, WallClock,
};

use super::lend::Lending;
use super::{Body, Channel, ChannelError, Out, Phases};
use crate::faults;
use crate::machine::FreezeError;
use crate::machine::frozen::Guest;
use crate::vcpu::outside::Left;
use blackout::blackout;
pub use blackout::retire;
use prepare::{calm_down, prepare};

/// A handover as it was asked for.
#[derive(Debug)]
pub struct Errand {
    /// Id of the swap.
    pub swap: String,
    /// This process's release.
    pub from: ReleaseName,
    /// The successor's.
    pub to: ReleaseName,
    /// Our end of the socketpair.
    pub socket: OwnedFd,
    /// Where the saved state goes.
    pub state: OwnedFd,
    /// Listeners and log: control, console, console log.
    pub doors: [OwnedFd; 3],
    /// The longest blackout.
    pub budget: Duration,
    /// The longest preparation.
    pub brownout: Duration,
    /// What the guest's clocks make of the pause.
    pub clock: Policy,
    /// The VM's secret.
    pub secret: Vec<u8>,
    /// Swaps lived through.
    pub swaps: u64,
    /// The guest's directory.
    pub dir: String,
    /// When it was asked for, nanoseconds since the Unix epoch.
    pub started_at_unix_ns: u64,
}

/// Why the guest stays.
#[derive(Debug, thiserror::Error)]
pub enum KeptReason {
    /// The successor could not be heard, or refused.
    #[error("{what}: {source}")]
    Channel {
        /// In which phase.
        what: &'static str,
        /// What happened.
        source: ChannelError,
    },
    /// The guest did not come to rest, or could not be saved.
    #[error("{0}")]
    Freeze(#[from] FreezeError),
    /// The state could not be written.
    #[error("cannot write the saved state: {0}")]
    State(rustix::io::Errno),
    /// The budget would have been broken.
    #[error(
        "the blackout budget of {budget:?} would have been broken: {used:?} were gone when the \
         successor had loaded, and what follows takes about {reserve:?}"
    )]
    Budget {
        /// Allowed.
        budget: Duration,
        /// Gone.
        used: Duration,
        /// Needed still.
        reserve: Duration,
    },
    /// The successor did not take the guest in time.
    #[error("the successor did not take the guest within the budget; it was taken back")]
    NotTaken,
    /// The guest ended, or wants to begin anew.
    #[error("the guest switched itself off or reset while the swap was prepared")]
    GuestEnded,
    /// The clock's policy can't be kept.
    #[error("clock policy hold: {0}; use the policy advance")]
    Hold(&'static str),
    /// Our own fds.
    #[error("cannot hand over a file descriptor: {0}")]
    Fds(std::io::Error),
}

/// A handover under way, as the report will tell it.
#[derive(Debug)]
struct Log {
    phases: Vec<Phase>,
    format: u32,
    /// Whether both sides may wait for each other awake.
    awake: bool,
    state_bytes: u64,
    blackout: Duration,
    margin: Option<Margin>,
    /// How each vCPU came to rest.
    left: Vec<Left>,
    lending: Lending,
    /// The guest's wall clock less the host's, as its agent says.
    wall_error_ns: Option<i64>,
    /// What the guest got done before.
    recovery: Vec<Recovery>,
}

impl Log {
    fn add(&mut self, name: &str, side: Side, in_blackout: bool, duration: Duration) {
        self.phases.push(Phase {
            name: name.to_owned(),
            side,
            in_blackout,
            duration,
        });
    }
}

/// Hands the guest over. `progress` hears of each phase before the freeze; `ended` is asked
/// whether the guest has ended meanwhile.
pub fn hand_over(
    guest: &mut Guest,
    errand: &Errand,
    channel: &mut Channel,
    mut progress: impl FnMut(&Phase),
    mut ended: impl FnMut() -> bool,
) -> Handover {
    let mut log = Log {
        phases: Vec::new(),
        format: 0,
        awake: false,
        state_bytes: 0,
        blackout: Duration::ZERO,
        margin: None,
        left: Vec::new(),
        lending: Lending::default(),
        wall_error_ns: None,
        recovery: Vec::new(),
    };
    let prepared = prepare(guest, errand, channel, &mut log, &mut ended);
    if let Some(phase) = log.phases.first() {
        progress(phase);
    }
    let result = prepared.and_then(|()| {
        // Whoever hears of the progress is at work for a moment, too.
        calm_down(guest, errand);
        blackout(guest, errand, channel, &mut log, &mut ended)
    });
    match result {
        Ok(()) => {
            let mut report = report(guest, errand, &log, Outcome::Moved, None);
            report.clock = Some(clock_before(&log));
            report.recovery = std::mem::take(&mut log.recovery);
            if let Ok(report) = serde_json::to_string(&report)
                && faults::reach(faults::Point::Retiring).is_ok()
            {
                let out = log.left.iter().map(|left| Out {
                    tsc: left.tsc,
                    queued_ns: u64::try_from(left.queued.as_nanos()).unwrap_or(u64::MAX),
                });
                let out = out.collect();
                let _ = channel.send(Body::Phases(Phases { report, out }), &[]);
            }
            Handover::Moved
        }
        // The word has the last say: if it speaks of somebody else, the guest is there, whatever
        // went wrong here.
        Err(_) if !guest.is_ours() => Handover::Moved,
        Err(reason) => {
            let text = reason.to_string();
            channel.refuse(&text);
            let report = report(guest, errand, &log, Outcome::Kept, Some(text));
            Handover::Kept {
                report: Box::new(report),
            }
        }
    }
}

/// Our part of the receipt.
fn clock_before(log: &Log) -> ClockReceipt {
    ClockReceipt {
        wall_clock: WallClock {
            error_before_ns: log.wall_error_ns,
            ..WallClock::default()
        },
        ..ClockReceipt::default()
    }
}

fn report(
    guest: &Guest,
    errand: &Errand,
    log: &Log,
    outcome: Outcome,
    reason: Option<String>,
) -> SwapReport {
    let machine = &guest.machine;
    SwapReport {
        swap: errand.swap.clone(),
        vm: machine.spec().name.clone(),
        component: "vmm".into(),
        from: errand.from.clone(),
        to: errand.to.clone(),
        outcome,
        reason,
        started_at_unix_ns: errand.started_at_unix_ns,
        vcpus: u32::try_from(machine.vcpu_count()).unwrap_or(u32::MAX),
        memory_bytes: machine.ram().size(),
        state_format: log.format,
        state_bytes: log.state_bytes,
        budget: errand.budget,
        margin: log.margin,
        phases: log.phases.clone(),
        blackout: Blackout {
            host: log.blackout,
            ..Blackout::default()
        },
        clock: None,
        recovery: Vec::new(),
        warnings: Vec::new(),
    }
}

/// Writes the state and seals it: nobody can change it after this, ourselves included.
fn write_sealed(fd: &OwnedFd, bytes: &[u8]) -> Result<(), rustix::io::Errno> {
    let mut at = 0;
    while at < bytes.len() {
        at += rustix::io::pwrite(fd, &bytes[at..], at as u64)?;
    }
    let seals = SealFlags::WRITE | SealFlags::GROW | SealFlags::SHRINK | SealFlags::SEAL;
    rustix::fs::fcntl_add_seals(fd, seals)
}
