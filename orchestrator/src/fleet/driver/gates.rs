//! Asks the gates of rollouts, beside the driver's looks: before each step and after it.
//!
//! ```text
//!   a step was made ─▶ nothing is known ─▶ asked, all at once ─▶ known, for a while ─▶ asked again
//! ```
//!
//! What was asked before a step says nothing of it: answers are of gates that were asked after the last step,
//! and not long ago. Until then a gate gives no answer, and nothing begins.

mod ask;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use tokio::task::JoinHandle;
use tokio::time::Instant;

use crate::fleet::record::{RolloutId, RolloutRecord};
use crate::model::{Gate, GateSaid, HostName, Moment};
use crate::plan::rollout::State;

/// Answers are as good for so long.
const FRESH: Duration = Duration::from_secs(5);
/// What is said of a gate of which nothing is known.
pub(super) const PENDING: &str = "it is being asked";

/// The gates of all rollouts under way.
#[derive(Debug)]
pub(super) struct Gates {
    dir: PathBuf,
    me: HostName,
    of: BTreeMap<RolloutId, Of>,
}

#[derive(Debug, Default)]
struct Of {
    under_way: Option<(Instant, JoinHandle<Vec<GateSaid>>)>,
    last: Option<(Instant, Vec<GateSaid>)>,
}

impl Drop for Of {
    fn drop(&mut self) {
        if let Some((_, task)) = self.under_way.take() {
            task.abort();
        }
    }
}

impl Gates {
    /// Of a driver on this host, whose commands lie in `dir`.
    pub(super) fn new(dir: PathBuf, me: HostName) -> Self {
        Self {
            dir,
            me,
            of: BTreeMap::new(),
        }
    }

    /// What a rollout's gates say now. Asks them where that isn't known.
    pub(super) async fn say(&mut self, record: &RolloutRecord, now: Moment) -> Vec<GateSaid> {
        let specs = &record.policy.gates;
        // The way back waits for no gate.
        if specs.is_empty() || record.state == State::RollingBack {
            self.of.remove(&record.id);
            return Vec::new();
        }
        let of = self.of.entry(record.id.clone()).or_default();
        if of
            .under_way
            .as_ref()
            .is_some_and(|(_, task)| task.is_finished())
            && let Some((begun, task)) = of.under_way.take()
            && let Ok(said) = task.await
        {
            of.last = Some((begun, said));
        }
        let is_fresh = |begun: Instant| begun.elapsed() < FRESH;
        let known = of.last.as_ref().filter(|(begun, _)| is_fresh(*begun));
        if known.is_none() && of.under_way.is_none() {
            let asked = ask::all(
                specs.clone(),
                self.dir.clone(),
                self.me.clone(),
                record.id.clone(),
                record.to.clone(),
            );
            of.under_way = Some((Instant::now(), tokio::spawn(asked)));
        }
        if let Some((_, said)) = known {
            return said.clone();
        }
        let pending = specs.iter().map(|spec| GateSaid {
            name: spec.name.clone(),
            verdict: Gate::Mute,
            why: PENDING.into(),
            since: now,
        });
        pending.collect()
    }

    /// Whether an answer is waited for.
    pub(super) fn is_asking(&self) -> bool {
        self.of.values().any(|of| of.under_way.is_some())
    }

    /// A step was made: what was said before it counts no more.
    pub(super) fn forget(&mut self, rollout: &RolloutId) {
        self.of.remove(rollout);
    }
}
