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

mod step;

use std::collections::BTreeSet;
use std::time::Duration;

use super::look::Look;
use super::record::DriverCard;
use super::{DRIVER, Fleet, LIVE, written};
use crate::execute::unix_ns;
use crate::model::Moment;
use crate::store::shared::{Change, Committed, Expect, Guard, Keep, Lease, SharedError};

pub(in crate::fleet) use step::hear;
pub(crate) use step::reason;
pub use step::{Step, step};

/// How long a driver that says nothing more is still the driver.
pub const LEASE: Duration = Duration::from_secs(5);
/// Between two looks when nothing is heard.
const TICK: Duration = Duration::from_secs(1);
/// Two looks are at least this far apart: changes come in swarms.
const BREATH: Duration = Duration::from_millis(50);

/// Stands for election again and again, and drives while elected.
pub async fn drive(fleet: Fleet) {
    let mut told = BTreeSet::new();
    loop {
        let mut changes = fleet.shared.changes();
        match elected(&fleet).await {
            Ok(Some(term)) => {
                tracing::info!(epoch = term.guard.created, "drives the fleet's rollouts");
                if let Err(error) = term.serve(&fleet, &mut told).await {
                    tracing::warn!("drives no more: {error}");
                }
            }
            Ok(None) => {}
            Err(error) => tracing::debug!("not elected: {error}"),
        }
        let _ = tokio::time::timeout(TICK, changes.changed()).await;
    }
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
    async fn serve(&self, fleet: &Fleet, told: &mut BTreeSet<String>) -> Result<(), SharedError> {
        let keep = self.keep(fleet);
        tokio::pin!(keep);
        loop {
            let mut changes = fleet.shared.changes();
            changes.mark_unchanged();
            let looked = tokio::select! {
                ended = &mut keep => return ended,
                looked = self.look(fleet, told) => looked,
            };
            let wait = match looked {
                Ok(wait) => wait,
                // The lease says whether it is over; a store that is away for a moment is no end.
                Err(error) => {
                    tracing::warn!("rollouts stand still: {error}");
                    TICK
                }
            };
            tokio::select! {
                ended = &mut keep => return ended,
                () = tokio::time::sleep(wait) => {}
                _ = changes.changed() => tokio::time::sleep(BREATH).await,
            }
        }
    }

    /// Keeps the lease; returns when it has ended.
    async fn keep(&self, fleet: &Fleet) -> Result<(), SharedError> {
        let mut kept = tokio::time::Instant::now();
        loop {
            tokio::time::sleep(LEASE / 4).await;
            match fleet.shared.keep(self.lease).await {
                Ok(true) => kept = tokio::time::Instant::now(),
                Ok(false) => return Ok(()),
                // Commits are guarded, so this is for order, not for safety.
                Err(error) if kept.elapsed() > LEASE => return Err(error),
                Err(_) => {}
            }
        }
    }

    /// One look at everything, and what follows from it. How long nothing will change by itself.
    async fn look(
        &self,
        fleet: &Fleet,
        told: &mut BTreeSet<String>,
    ) -> Result<Duration, SharedError> {
        let look = Look::of(&fleet.shared.list(LIVE).await?);
        for problem in &look.malformed {
            if told.insert(problem.clone()) {
                tracing::warn!("{problem}");
            }
        }
        let mut wait = TICK;
        for rollout in look.open() {
            let now = Moment(unix_ns());
            let epoch = self.guard.created;
            let Some(step) = step(&look, rollout, now, &fleet.me, epoch) else {
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
            fleet.shared.commit(step.changes, Some(&self.guard)).await?;
            wait = BREATH;
        }
        Ok(wait)
    }
}
