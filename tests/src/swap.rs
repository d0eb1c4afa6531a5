//! A swap, driven as the daemon does it: whole, or step by step.

use std::io::PipeReader;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::process::{Child, ExitStatus};
use std::time::Duration;

use anyhow::{Context, ensure};
use rustix::fs::MemfdFlags;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use stillpoint_control::client::{Client, ClientError};
use stillpoint_control::clock::Policy;
use stillpoint_control::message::{GuestState, Handover, Request};
use stillpoint_control::recovery::Recovery;
use stillpoint_control::report::{Outcome, Phase, ReleaseName, SwapReport};

use crate::patience::{self, PATIENCE, wait_for};
use crate::releases::Release;
use crate::start::{command, start, wait_ready};
use crate::vm::{Vm, binary};

/// The hard bound of a kvmclock's error after a swap, ns.
pub const CLOCK_BOUND_NS: u64 = 50;

/// How long a predecessor may take to clear up. It does that in time nobody else wants, of which a
/// busy machine has little.
const RETIREMENT: Duration = Duration::from_secs(150);

/// What a swap is allowed.
#[derive(Clone, Copy, Debug)]
pub struct Terms {
    /// The longest blackout.
    pub budget: Duration,
    /// The longest preparation.
    pub brownout: Duration,
    /// What the guest's clocks make of the pause; the machine's own policy if `None`.
    pub clock: Option<Policy>,
}

impl Default for Terms {
    /// So much that only a fault can break it, on any machine.
    fn default() -> Self {
        Self {
            budget: Duration::from_secs(20),
            brownout: PATIENCE,
            clock: None,
        }
    }
}

impl Terms {
    /// With this budget.
    pub fn budget(budget: Duration) -> Self {
        Self {
            budget,
            ..Self::default()
        }
    }
}

/// A successor that waits for its predecessor's offer.
#[derive(Debug)]
pub struct Successor {
    child: Child,
    to: Release,
    /// Id of the swap it was started for.
    pub swap: String,
    /// The predecessor's end of the handover socketpair; gone when it was given away.
    pub socket: Option<OwnedFd>,
    /// Where the saved state goes.
    pub state: OwnedFd,
}

impl Successor {
    /// Kills it.
    pub fn kill(&mut self) -> anyhow::Result<()> {
        Ok(self.child.kill()?)
    }

    /// Waits until it has ended by itself.
    pub fn wait_end(&mut self) -> anyhow::Result<ExitStatus> {
        patience::wait_end(&mut self.child, "the successor's end")
    }

    /// The request that hands a guest over to it.
    pub fn request(&self, terms: &Terms) -> anyhow::Result<Request> {
        Ok(Request::HandOver {
            swap: self.swap.clone(),
            to: ReleaseName {
                version: self.to.version().into(),
                sha256: String::new(),
            },
            budget_ns: Some(u64::try_from(terms.budget.as_nanos())?),
            brownout: terms.brownout,
            clock: terms.clock,
        })
    }

    /// Has `client`'s VMM hand its guest over, and waits for the outcome. Our duplicate of the
    /// predecessor's end is gone afterwards: the successor hears when the other one closes.
    pub fn ask(
        &mut self,
        client: &Client,
        terms: &Terms,
        progress: impl FnMut(&Phase),
    ) -> anyhow::Result<Result<Handover, ClientError>> {
        let request = self.request(terms)?;
        let socket = self.socket.take().context("a second handover to it")?;
        Ok(client.hand_over(&request, socket, self.state.as_fd(), progress))
    }
}

impl Drop for Successor {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Vm {
    /// Starts a successor, ready for the offer.
    pub fn start_successor(&mut self, to: Release) -> anyhow::Result<Successor> {
        self.swaps += 1;
        let state = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let (reader, successor) = self.start_beside(to, &["adopt"], |child, socket| {
            Ok(Successor {
                child,
                to,
                swap: format!("swap-{}", self.swaps),
                socket: Some(socket),
                state: rustix::fs::memfd_create("stillpoint-state", state)?,
            })
        })?;
        wait_ready(reader, "the successor", &self.dir.path().join("vmm.log"))?;
        Ok(successor)
    }

    /// Starts a process of that release beside the guest's, which does `verb` over a socketpair. `hold`
    /// makes of it and of our end what ends it when it is dropped; with that, where it says that it is ready.
    pub(crate) fn start_beside<T>(
        &self,
        to: Release,
        verb: &[&str],
        hold: impl FnOnce(Child, OwnedFd) -> anyhow::Result<T>,
    ) -> anyhow::Result<(PipeReader, T)> {
        let flags = SocketFlags::CLOEXEC;
        let (socket, theirs) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
        let (reader, writer) = std::io::pipe()?;
        let writer = OwnedFd::from(writer);
        let log = self.dir.path().join("vmm.log");
        let binary = binary(to, self.manner.uid, self.dir.path())?;
        let mut command = command(&binary, &log, self.manner)?;
        command.args(to.arguments()).args(verb);
        command
            .arg("--handover-fd")
            .arg(theirs.as_raw_fd().to_string());
        command
            .arg("--ready-fd")
            .arg(writer.as_raw_fd().to_string());
        let child = start(&mut command, &[&theirs, &writer])?;
        Ok((reader, hold(child, socket)?))
    }

    /// Swaps the VMM on these terms. `Ok` is the report, moved or kept.
    pub fn swap(&mut self, to: Release, terms: &Terms) -> anyhow::Result<SwapReport> {
        let mut successor = self.start_successor(to)?;
        match successor.ask(&self.client()?, terms, |_| {})?? {
            Handover::Moved => self.follow(successor),
            Handover::Kept { report } => Ok(*report),
        }
    }

    /// The guest has moved: waits for the predecessor's retirement and for the report.
    pub fn follow(&mut self, successor: Successor) -> anyhow::Result<SwapReport> {
        let swap = successor.swap.clone();
        let end = self.inherit(successor)?;
        ensure!(
            end.success(),
            "the predecessor did not retire but ended with {end}:\n{}",
            self.log()
        );
        self.report(&swap)
    }

    /// Takes the successor for the guest's VMM; gives how the predecessor ended.
    pub fn inherit(&mut self, mut successor: Successor) -> anyhow::Result<ExitStatus> {
        // From here on `self` ends the successor, and `successor` the predecessor.
        std::mem::swap(&mut self.child, &mut successor.child);
        let predecessor = &mut successor.child;
        wait_for("the predecessor's end", RETIREMENT, || {
            Ok(predecessor.try_wait()?)
        })
    }

    /// The report of a swap that was just made.
    pub fn report(&self, swap: &str) -> anyhow::Result<SwapReport> {
        wait_for(&format!("the report of {swap}"), PATIENCE, || {
            Ok(self.client()?.last_report()?.filter(|r| r.swap == swap))
        })
    }

    /// The same, when it is known how soon the guest was as fast again.
    pub fn report_of_recovery(&self, swap: &str) -> anyhow::Result<SwapReport> {
        wait_for(
            &format!("the recovery from {swap}"),
            PATIENCE,
            || match self.report(swap)? {
                report if report.recovery.iter().all(Recovery::is_known) => Ok(Some(report)),
                _ => Ok(None),
            },
        )
    }

    /// Swaps, and insists that it moved and that the report promises what it must.
    pub fn must_move(&mut self, to: Release) -> anyhow::Result<SwapReport> {
        let report = self.swap(to, &Terms::default())?;
        let broken = broken_promises(&report);
        ensure!(broken.is_empty(), "{broken:#?}\n{}", self.log());
        // What the one before calls itself is its own affair.
        ensure!(
            to == Release::Previous || report.to.version == to.version(),
            "moved to {:?}",
            report.to
        );
        Ok(report)
    }
}

/// Waits until a handover has begun. The VMM lets nobody in from then on: see [`Vm::onlooker`].
pub fn wait_swapping(onlooker: &Client) -> anyhow::Result<()> {
    wait_for("the handover's begin", PATIENCE, || {
        let state = onlooker.describe()?.state;
        Ok((state == GuestState::Swapping).then_some(()))
    })
}

/// What in the report of a swap is not as every swap that moved must have it.
pub fn broken_promises(report: &SwapReport) -> Vec<String> {
    if report.outcome != Outcome::Moved {
        return vec![format!("{}: {:?}", report.outcome, report.reason)];
    }
    let mut broken = report.warnings.clone();
    let mut must = |kept: bool, what: String| {
        if !kept {
            broken.push(what);
        }
    };
    let Some(clock) = &report.clock else {
        return vec!["the report says nothing of the clock".into()];
    };
    must(clock.masterclock_before, "no masterclock before".into());
    must(clock.masterclock_after, "no masterclock after".into());
    let delta = &clock.tsc_offset_delta;
    must(
        delta.iter().all(|&d| d == 0),
        format!("TSC offsets moved by {delta:?}"),
    );
    let error = clock.kvmclock_error_ns;
    must(
        error.is_some_and(|e| e.unsigned_abs() <= CLOCK_BOUND_NS),
        format!("kvmclock is off by {error:?} ns"),
    );
    must(
        report.state_bytes > 0 && !report.phases.is_empty(),
        "no account of the swap".into(),
    );
    broken
}
