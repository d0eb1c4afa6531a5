//! Drives all rollouts, if it is elected: looks, plans, records, and looks again.
//!
//! ```text
//!   stand for election ──▶ elected: look ▶ hear answers ▶ plan ▶ commit (guarded) ▶ wait
//!        ▲                    │                                                       │
//!        └── lease over ◀─────┴───────────────────────────────────────────────────────┘
//! ```
//!
//! It keeps nothing from one look to the next, so whoever takes over goes on where the records are. Must
//! never: order a swap that the rollout's record doesn't say is begun, or write without its guard.

mod gates;
mod prune;
mod spans;
mod step;

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::time::Duration;

use super::look::Look;
use tokio::time::Instant;

use super::record::{ClocksRecord, DriverCard};
use super::{CLOCKS, DRIVER, Fleet, LIVE, clocks, written};
use crate::execute::unix_ns;
use crate::model::{HostName, Moment};
use crate::store::shared::{Change, Committed, Expect, Guard, Keep, Lease, SharedError};
use crate::traces::Traces;

use gates::Gates;
pub(in crate::fleet) use step::hear;
pub(crate) use step::reason;
pub use step::{Step, step};

/// How long a driver that says nothing more is still the driver.
pub const LEASE: Duration = Duration::from_secs(5);
/// How long a driver whose clock is wrong stands for no election.
const REST: Duration = Duration::from_secs(60);
/// Between two looks while gates are asked.
const ASKING: Duration = Duration::from_millis(200);
/// Between two looks when nothing is heard.
const TICK: Duration = Duration::from_secs(1);
/// Two looks are at least this far apart: changes come in swarms.
const BREATH: Duration = Duration::from_millis(50);

/// Stands for election again and again, and drives while elected.
pub async fn drive(fleet: Fleet, gate_dir: PathBuf, traces: Traces) {
    let mut told = BTreeSet::new();
    let mut rests: Option<Instant> = None;
    loop {
        let mut changes = fleet.shared.changes();
        // Who drives has a name: what it does is on record under it.
        let named =
            fleet.name_guard().is_some() && rests.is_none_or(|until| until <= Instant::now());
        let elected = match named {
            true => elected(&fleet).await,
            false => Ok(None),
        };
        match elected {
            Ok(Some(term)) => {
                tracing::info!(epoch = term.guard.created, "drives the fleet's rollouts");
                let mut gates = Gates::new(gate_dir.clone(), fleet.me.clone());
                match term.serve(&fleet, &mut told, &mut gates, &traces).await {
                    Ok(End::Over) => {}
                    Ok(End::WrongClock) => {
                        tracing::error!(
                            "drives no more: most other hosts' clocks disagree with this one's; set it right (chrony, timesyncd)"
                        );
                        let _ = fleet.shared.revoke(term.lease).await;
                        rests = Some(Instant::now() + REST);
                    }
                    Err(error) => tracing::warn!("drives no more: {error}"),
                }
            }
            Ok(None) => {}
            Err(error) => tracing::debug!("not elected: {error}"),
        }
        let _ = tokio::time::timeout(TICK, changes.changed()).await;
    }
}

/// How a driver's time in office ends.
enum End {
    /// Its lease is over.
    Over,
    /// Its clock is wrong.
    WrongClock,
}

/// A driver's time in office.
struct Term {
    lease: Lease,
    guard: Guard,
}

/// Whether this daemon is the driver from now on.
async fn elected(fleet: &Fleet) -> Result<Option<Term>, SharedError> {
    if fleet.shared.get(DRIVER).await?.is_some() {
        return Ok(None);
    }
    let lease = fleet.shared.lease(LEASE).await?;
    let card = DriverCard {
        host: fleet.me.clone(),
        since: Moment(unix_ns()),
    };
    let change = Change::keep(DRIVER, Expect::Absent, written(&card), Keep::With(lease));
    match fleet.shared.commit(vec![change], None).await {
        Ok(Committed::Done(created)) => {
            let guard = Guard {
                key: DRIVER.into(),
                created,
            };
            Ok(Some(Term { lease, guard }))
        }
        // Another was quicker; or nobody knows, and the lease must not keep the seat for nobody.
        other => {
            let _ = fleet.shared.revoke(lease).await;
            other.map(|_| None)
        }
    }
}

impl Term {
    /// Drives until the lease is over or the store can't be used.
    async fn serve(
        &self,
        fleet: &Fleet,
        told: &mut BTreeSet<String>,
        gates: &mut Gates,
        traces: &Traces,
    ) -> Result<End, SharedError> {
        let keep = self.keep(fleet);
        tokio::pin!(keep);
        loop {
            let mut changes = fleet.shared.changes();
            changes.mark_unchanged();
            let looked = tokio::select! {
                ended = &mut keep => return ended.map(|()| End::Over),
                looked = self.look(fleet, told, gates, traces) => looked,
            };
            let wait = match looked {
                Ok(Some(wait)) => wait,
                Ok(None) => return Ok(End::WrongClock),
                // The lease says whether it is over; a store that is away for a moment is no end.
                Err(error) => {
                    tracing::warn!("rollouts stand still: {error}");
                    TICK
                }
            };
            tokio::select! {
                ended = &mut keep => return ended.map(|()| End::Over),
                () = tokio::time::sleep(wait) => {}
                _ = changes.changed() => tokio::time::sleep(BREATH).await,
            }
        }
    }

    /// Keeps the lease; returns when it has ended.
    async fn keep(&self, fleet: &Fleet) -> Result<(), SharedError> {
        let mut kept = Instant::now();
        loop {
            tokio::time::sleep(LEASE / 4).await;
            match fleet.shared.keep(self.lease).await {
                Ok(true) => kept = Instant::now(),
                Ok(false) => return Ok(()),
                // Commits are guarded, so this is for order, not for safety.
                Err(error) if kept.elapsed() > LEASE => return Err(error),
                Err(_) => {}
            }
        }
    }

    /// One look at everything, and what follows from it. How long nothing will change by itself; `None` if this host's
    /// clock is wrong.
    async fn look(
        &self,
        fleet: &Fleet,
        told: &mut BTreeSet<String>,
        gates: &mut Gates,
        traces: &Traces,
    ) -> Result<Option<Duration>, SharedError> {
        let begun = Instant::now();
        let mut look = Look::of(&fleet.shared.list(LIVE).await?);
        fleet
            .clocks
            .note(&look, begun, Instant::now(), Moment(unix_ns()));
        if !self.compare_clocks(fleet, &mut look).await? {
            return Ok(None);
        }
        for problem in &look.malformed {
            if told.insert(problem.clone()) {
                tracing::warn!("{problem}");
            }
        }
        let mut wait = TICK;
        for rollout in look.open() {
            let now = Moment(unix_ns());
            let epoch = self.guard.created;
            let said = gates.say(&rollout.record, now).await;
            let Some(step) = step(&look, rollout, now, &fleet.me, epoch, &said) else {
                continue;
            };
            for line in &step.lines {
                tracing::info!(rollout = %rollout.record.id, "{line}");
            }
            if let Some(at) = step.look_again {
                wait = wait.min(at.since(now).max(BREATH));
            }
            if step.changes.is_empty() {
                continue;
            }
            // Refused: a hand was quicker, or this driver is none any more. The next look shows.
            let done = fleet.shared.commit(step.changes, Some(&self.guard)).await?;
            if let (Committed::Done(_), Some(after)) = (done, &step.record) {
                traces.tell(spans::of_step(&rollout.record, after));
            }
            if step.moved {
                gates.forget(&rollout.record.id);
            }
            wait = BREATH;
        }
        if let Some(id) = prune::prune(fleet, &look, &self.guard).await? {
            tracing::info!(rollout = %id, "pruned: it is over, and {} others ended after it", prune::KEPT);
            wait = BREATH;
        }
        if gates.is_asking() {
            wait = wait.min(ASKING);
        }
        Ok(Some(wait))
    }

    /// Puts into a look what is known of the hosts' clocks, and on record what is new; whether our own may be right.
    async fn compare_clocks(&self, fleet: &Fleet, look: &mut Look) -> Result<bool, SharedError> {
        let off = fleet.clocks.off();
        let heard = look
            .hosts
            .iter()
            .filter(|(name, host)| **name != fleet.me && host.alive.is_some());
        let others: Vec<&HostName> = heard.map(|(name, _)| name).collect();
        if clocks::is_ours_wrong(&off, others.len()) {
            return Ok(false);
        }
        let uncompared = others
            .into_iter()
            .filter(|name| !fleet.clocks.is_compared(name));
        look.uncompared = uncompared.cloned().collect();
        let before = look.clocks.as_ref().map(|record| &record.off);
        let is_news = clocks::is_news(before.unwrap_or(&BTreeMap::new()), &off);
        let record = ClocksRecord {
            driver: fleet.me.clone(),
            off,
        };
        if is_news {
            for (host, skew) in &record.off {
                tracing::warn!(%host, "its clock is {skew} of this driver's; nothing is begun there");
            }
            let change = Change::put(CLOCKS, Expect::Anything, written(&record));
            fleet.shared.commit(vec![change], Some(&self.guard)).await?;
        }
        look.clocks = Some(record);
        Ok(true)
    }
}
