//! What a hand can do to a rollout: start one, hold it, let it go on, end it. By any daemon of the fleet.
//!
//! Everything that can be checked is checked before anything is written; what is refused has changed
//! nothing.

mod layout;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::look::{Look, Place, Versioned, is_held};
use super::record::{HistoryStep, RolloutId, RolloutRecord};
use super::{Fleet, LIVE, OPEN, keys, written};
use crate::model::{Code, Labels, Moment, Policy, Problem};
use crate::plan::rollout::State;
use crate::store::shared::{Change, Committed, Expect};

pub use layout::lay_out;

/// The most units of a rollout, with the guests of hosts: its record must fit into one of etcd's, 1.5 MB.
pub const MOST_UNITS: usize = 2_500;
/// How often a change is tried that others were quicker with.
const TRIES: u32 = 16;

/// A rollout to be started.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NewRollout {
    /// What is swapped: `vmm`, guest by guest; `kvm` or `kernel`, with all guests of a host together.
    pub component: String,
    /// The longest that guests of a host stand still that is swapped with all of them, ns.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub budget_ns: Option<u64>,
    /// Version of the release to roll out.
    pub to: String,
    /// How it goes about it.
    pub policy: Policy,
    /// Only VMs of these availability sets; all when empty.
    #[serde(default)]
    pub sets: Vec<String>,
    /// Only VMs on these hosts; all when empty.
    #[serde(default)]
    pub hosts: Vec<String>,
    /// Only VMs on hosts that have all these labels.
    #[serde(default, skip_serializing_if = "Labels::is_empty")]
    pub labels: Labels,
    /// Only these VMs, as NAME or HOST/NAME; all when empty.
    #[serde(default)]
    pub vms: Vec<String>,
    /// None of these VMs.
    #[serde(default)]
    pub exclude: Vec<String>,
    /// Roll out a release below the pinned minimum.
    #[serde(default)]
    pub allow_downgrade: bool,
    /// Only say what would be done.
    #[serde(default)]
    pub dry_run: bool,
}

/// What a hand does to a rollout.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Act {
    /// Nothing more begins; what is under way ends.
    Pause,
    /// It goes on. Failures so far are forgiven.
    Resume,
    /// It ends as soon as nothing is under way. What moved stays.
    Abort,
    /// All that it touched is put back.
    RollBack,
}

fn bad(message: impl Into<String>) -> Problem {
    Problem::new(Code::BadRequest, message)
}

/// The VMs that a name stands for: `NAME`, or `HOST/NAME`.
fn named<'a>(look: &'a Look, name: &'a str) -> impl Iterator<Item = &'a Place> {
    look.vms.keys().filter(move |(host, vm)| {
        let full = name.split_once('/');
        full.map_or(vm.as_str() == name, |(h, v)| {
            host.as_str() == h && vm.as_str() == v
        })
    })
}

/// The VM that a name stands for.
pub fn the_vm<'a>(look: &'a Look, name: &'a str) -> Result<&'a Place, Problem> {
    let mut found = named(look, name);
    match (found.next(), found.next()) {
        (Some(place), None) => Ok(place),
        (Some(_), Some(_)) => Err(bad(format!(
            "several hosts have a VM called `{name}`; say which, as HOST/{name}"
        ))),
        (None, _) => {
            let message = format!("no VM of the fleet is called `{name}`");
            Err(Problem::new(Code::NotFound, message))
        }
    }
}

impl Fleet {
    /// All that is so now.
    pub async fn look(&self) -> Result<Look, Problem> {
        self.is_us()?;
        Ok(Look::of(&self.shared.list(LIVE).await?))
    }

    /// Starts a rollout in the name of whom `by` says, unless it is a dry run; what it is laid out as.
    pub async fn start(
        &self,
        new: &NewRollout,
        id: RolloutId,
        by: &str,
        now: Moment,
    ) -> Result<RolloutRecord, Problem> {
        for _ in 0..TRIES {
            // Before the look: whoever starts another one after it makes this commit fail.
            let open = self.shared.get(OPEN).await?;
            let look = self.look().await?;
            let mut record = lay_out(&look, new, id.clone(), now)?;
            if new.dry_run {
                return Ok(record);
            }
            record.steps = 1;
            let expect = open.map_or(Expect::Absent, |entry| Expect::Version(entry.version));
            let line = format!("started: {}, to release {}", record.what(), new.to);
            let changes = vec![
                Change::put(OPEN, expect, written(&record.id)),
                Change::put(keys::rollout(&id), Expect::Absent, written(&record)),
                self.by_hand(&record, line, by, now),
            ];
            if let Committed::Done(_) = self.shared.commit(changes, None).await? {
                return Ok(record);
            }
        }
        Err(Problem::new(
            Code::Failed,
            "other rollouts are started all the time; ask again",
        ))
    }

    fn by_hand(&self, record: &RolloutRecord, line: String, by: &str, now: Moment) -> Change {
        let history = HistoryStep {
            at: now,
            by: format!("{by}, on {}", self.me),
            lines: vec![line],
        };
        let key = keys::step(&record.id, record.steps);
        Change::put(key, Expect::Absent, written(&history))
    }

    /// A rollout.
    pub async fn rollout(&self, id: &RolloutId) -> Result<Versioned<RolloutRecord>, Problem> {
        self.is_us()?;
        let entry = self.shared.get(&keys::rollout(id)).await?;
        let entry = entry.ok_or_else(|| {
            let message =
                format!("no rollout `{id}`; `stillpoint rollout ls` shows those there are");
            Problem::new(Code::NotFound, message)
        })?;
        Ok(Versioned {
            record: super::read(&entry)?,
            version: entry.version,
        })
    }

    /// Does something to a rollout, in the name of whom `by` says.
    pub async fn act(
        &self,
        id: &RolloutId,
        act: Act,
        by: &str,
        now: Moment,
    ) -> Result<RolloutRecord, Problem> {
        for _ in 0..TRIES {
            let Versioned {
                mut record,
                version,
            } = self.rollout(id).await?;
            let Some(line) = turn(&mut record, act)? else {
                return Ok(record);
            };
            record.steps += 1;
            let changes = vec![
                Change::put(
                    keys::rollout(id),
                    Expect::Version(version),
                    written(&record),
                ),
                self.by_hand(&record, line, by, now),
            ];
            if let Committed::Done(_) = self.shared.commit(changes, None).await? {
                return Ok(record);
            }
        }
        let message = format!("rollout {id} changes all the time; ask again");
        Err(Problem::new(Code::Failed, message))
    }

    /// What was done in a rollout, step by step.
    pub async fn history(&self, id: &RolloutId) -> Result<Vec<HistoryStep>, Problem> {
        self.rollout(id).await?;
        let prefix = format!("{}{id}/", super::HISTORY);
        let entries = self.shared.list(&prefix).await?.entries;
        let steps = entries.iter().map(|entry| Ok(super::read(entry)?));
        steps.collect()
    }
}

/// Makes a record what a hand wants; the line for its history, or `None` if it is so already.
fn turn(record: &mut RolloutRecord, act: Act) -> Result<Option<String>, Problem> {
    let state = record.state;
    let too_late = |what: &str| {
        let message = format!("rollout {} is {state}: {what}", record.id);
        Err(Problem::new(Code::TooLate, message))
    };
    if state.is_over() {
        return too_late("nothing more can be done to it");
    }
    if act == Act::RollBack && !record.rung().has_way_back() {
        return too_late(&format!(
            "a swap of {} has no way back; `stillpoint rollout abort` ends it, and what was swapped stays",
            record.component
        ));
    }
    let (to, line) = match (act, state) {
        (Act::Pause, State::Paused | State::Stopped) => return Ok(None),
        (Act::Pause, State::Running) => (State::Paused, "paused"),
        (Act::Resume, State::Running) => return Ok(None),
        (Act::Resume, held) if is_held(held) => (State::Running, "resumed"),
        (Act::Abort, State::Aborting) => return Ok(None),
        (Act::Abort, State::Running | State::Paused | State::Stopped) => {
            (State::Aborting, "to be ended; what moved stays")
        }
        (Act::RollBack, State::RollingBack) => return Ok(None),
        (Act::RollBack, State::Running | State::Paused | State::Stopped) => {
            (State::RollingBack, "to be rolled back")
        }
        (_, State::RollingBack) => {
            return too_late("what it touched is being put back, and that goes to its end");
        }
        _ => return too_late("it ends as soon as nothing is under way"),
    };
    if state == State::Stopped && to == State::Running {
        let failed = record.units.iter().filter(|unit| unit.phase.is_failure());
        record.forgiven = u32::try_from(failed.count()).unwrap_or(u32::MAX);
    }
    record.state = to;
    record.reason = Some("by hand".into());
    Ok(Some(line.to_owned()))
}
