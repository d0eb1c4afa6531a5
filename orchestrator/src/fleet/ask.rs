//! What a hand can do to a rollout: start one, hold it, let it go on, end it. By any daemon of the fleet.
//!
//! Everything that can be checked is checked before anything is written; what is refused has changed
//! nothing.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::look::{Look, Place, Versioned, is_held};
use super::record::{HistoryStep, RolloutId, RolloutRecord, UnitRecord, VmCard};
use super::{Fleet, LIVE, OPEN, keys, written};
use crate::model::{Code, HostName, Labels, Moment, Policy, Problem, Rung, VMM};
use crate::plan::rollout::State;
use crate::plan::rollout::layout::{Layout, Remedy};
use crate::store::shared::{Change, Committed, Expect};

/// The most units of a rollout: its record must fit into one of etcd's, 1.5 MB.
pub const MOST_UNITS: usize = 2_500;
/// How often a change is tried that others were quicker with.
const TRIES: u32 = 16;

/// A rollout to be started.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NewRollout {
    /// Component: `vmm`.
    pub component: String,
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

/// Lays a rollout out, if it may be started.
pub fn lay_out(
    look: &Look,
    new: &NewRollout,
    id: RolloutId,
    now: Moment,
) -> Result<RolloutRecord, Problem> {
    if new.component != VMM {
        let given = &new.component;
        return Err(bad(format!(
            "field `component`: `{given}` can't be rolled out, only `{VMM}`"
        )));
    }
    new.policy
        .check()
        .map_err(|e| bad(format!("field `policy`: {e}")))?;
    let wanted = select(look, new)?;
    is_free(look, &wanted)?;
    have_release(look, new, &wanted)?;
    let tables = look.tables(None);
    let places: BTreeSet<_> = wanted
        .iter()
        .filter_map(|place| tables.vms.get(place))
        .collect();
    // Who is a canary is drawn by lot, and by another one for each release.
    let seed = new.to.bytes().fold(0, |seed: u64, byte| {
        seed.wrapping_mul(31).wrapping_add(byte.into())
    });
    let remedy = Remedy::contained_in([Rung::Vmm]);
    let layout = Layout::of_units(&tables.fleet, &remedy, &new.policy.stages, seed, |unit| {
        unit.vm.is_some_and(|vm| places.contains(&vm))
    });
    let layout = layout.map_err(|e| bad(e.to_string()))?;
    let by_number: std::collections::BTreeMap<_, _> =
        tables.vms.iter().map(|(place, ix)| (*ix, place)).collect();
    let units = layout.units.iter().filter_map(|unit| {
        let place = *by_number.get(&unit.vm?)?;
        let card = look.vms.get(place)?;
        Some(new_unit(place, card, unit.rung, unit.stage, now))
    });
    Ok(RolloutRecord {
        id,
        component: new.component.clone(),
        to: new.to.clone(),
        allow_downgrade: new.allow_downgrade,
        policy: new.policy.clone(),
        stages: layout.stages,
        state: State::Running,
        reason: None,
        gates: Vec::new(),
        forgiven: 0,
        units: units.collect(),
        steps: 0,
        asked_at: now,
        ended_at: None,
    })
}

fn new_unit(place: &Place, card: &VmCard, rung: Rung, stage: u8, now: Moment) -> UnitRecord {
    UnitRecord {
        host: place.0.clone(),
        vm: place.1.clone(),
        rung,
        stage,
        set: card.set.clone(),
        domain: card.domain,
        from: card.release.clone(),
        phase: crate::plan::rollout::seen::Phase::Waiting,
        tries: 0,
        since: now,
        order: None,
        note: None,
        blackout_ns: None,
        clock_error_ns: None,
        brownout_ns: None,
    }
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

/// The VMs that a rollout is to swap.
fn select(look: &Look, new: &NewRollout) -> Result<Vec<Place>, Problem> {
    for set in &new.sets {
        let mut cards = look.vms.values();
        if !cards.any(|card| card.set.as_ref() == Some(set)) {
            let message = format!("no VM of the fleet is in an availability set `{set}`");
            return Err(Problem::new(Code::NotFound, message));
        }
    }
    for host in &new.hosts {
        if !look.hosts.keys().any(|known| known.as_str() == host) {
            let message = format!("no host `{host}`; `stillpoint host ls` shows those there are");
            return Err(Problem::new(Code::NotFound, message));
        }
    }
    let has_labels = |host: &HostName| {
        let card = look.hosts.get(host).and_then(|host| host.card.as_ref());
        let has = |(name, value)| card.is_some_and(|card| card.labels.get(name) == Some(value));
        new.labels.iter().all(has)
    };
    if !new.labels.is_empty() && !look.hosts.keys().any(has_labels) {
        let labels = new
            .labels
            .iter()
            .map(|(name, value)| format!("{name}={value}"));
        let message = format!(
            "no host has the labels {}; `stillpoint host ls` shows those there are",
            labels.collect::<Vec<_>>().join(", ")
        );
        return Err(Problem::new(Code::NotFound, message));
    }
    let chosen = |names: &[String]| -> Result<BTreeSet<Place>, Problem> {
        let places = names.iter().map(|name| the_vm(look, name).cloned());
        places.collect()
    };
    let (only, not) = (chosen(&new.vms)?, chosen(&new.exclude)?);
    let mut is_there = 0;
    let mut wanted = Vec::new();
    for (place, card) in &look.vms {
        let of_set = card.set.as_ref().is_some_and(|set| new.sets.contains(set));
        let of_host = new.hosts.iter().any(|host| host == place.0.as_str());
        let asked_for = (new.sets.is_empty() || of_set)
            && (new.hosts.is_empty() || of_host)
            && has_labels(&place.0)
            && (only.is_empty() || only.contains(place))
            && !not.contains(place)
            && card.state.is_active();
        if asked_for && card.release == new.to {
            is_there += 1;
        } else if asked_for {
            wanted.push(place.clone());
        }
    }
    match wanted.len() {
        0 if is_there > 0 => Err(bad(format!(
            "nothing is left to be done: all {is_there} VMs that were asked for run release {} already",
            new.to
        ))),
        0 => Err(bad("no VM that runs is among those that were asked for")),
        many if many > MOST_UNITS => Err(bad(format!(
            "{many} VMs are too many for one rollout, {MOST_UNITS} are the most; take one zone, host or \
             set after the other (--host, --set)"
        ))),
        _ => Ok(wanted),
    }
}

/// Whether no other rollout has any of them.
fn is_free(look: &Look, wanted: &[Place]) -> Result<(), Problem> {
    for Versioned { record, .. } in look.open() {
        let has = |(host, vm): &&Place| {
            let mut units = record.units.iter();
            units.any(|unit| unit.host == *host && unit.vm == *vm)
        };
        if let Some((host, vm)) = wanted.iter().find(has) {
            let message = format!(
                "rollout {} (to {}, {}) has VM {vm} on {host} already; wait for its end, or end it: \
                 `stillpoint rollout abort {}`",
                record.id, record.to, record.state, record.id
            );
            return Err(Problem::new(Code::RolloutInProgress, message));
        }
    }
    Ok(())
}

/// Whether every host concerned has the release.
fn have_release(look: &Look, new: &NewRollout, wanted: &[Place]) -> Result<(), Problem> {
    let hosts: BTreeSet<&HostName> = wanted.iter().map(|(host, _)| host).collect();
    let lacks = |host: &&&HostName| {
        let card = look.hosts.get(**host).and_then(|host| host.card.as_ref());
        !card.is_some_and(|card| card.releases.contains(&new.to))
    };
    let lacking: Vec<&str> = hosts.iter().filter(lacks).map(|h| h.as_str()).collect();
    if lacking.is_empty() {
        return Ok(());
    }
    let message = format!(
        "release {} is not on {}; add it there first (`stillpoint release add`), or leave these hosts out",
        new.to,
        lacking.join(", ")
    );
    Err(Problem::new(Code::NotFound, message))
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
            let line = format!("started: {} VMs, to release {}", record.units.len(), new.to);
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
