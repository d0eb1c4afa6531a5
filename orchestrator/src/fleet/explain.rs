//! Rollouts and hosts as people and programs read them: with the planner's reason for every unit.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::clocks::Skew;
use super::driver::hear;
use super::look::{Look, Place};
use super::record::{ComponentCard, DriverCard, RolloutId, RolloutRecord, UnitRecord};
use super::{DRIVER, Fleet};
use crate::model::{GateSaid, HostName, Labels, Moment, Problem, VmName};
use crate::plan::rollout::seen::Phase;
use crate::plan::rollout::{Cause, State, Waits, Why, plan};

/// A rollout in a list.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct RolloutSummary {
    /// Its id.
    pub id: RolloutId,
    /// Version of the release that is rolled out.
    pub to: String,
    /// What it is as a whole.
    pub state: State,
    /// Why, in words.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// Units that run the release, and were well for long enough.
    pub done: usize,
    /// Units that failed.
    pub failed: usize,
    /// All units.
    pub units: usize,
    /// When it was asked for, nanoseconds since the Unix epoch.
    pub asked_at_unix_ns: u64,
}

/// Why a unit isn't begun now.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct UnitWhy {
    /// Its host.
    pub host: HostName,
    /// The VM; absent where the host is swapped with all its guests.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vm: Option<VmName>,
    /// The sentence.
    pub why: String,
    /// What it waits for: `nothing` (it is begun, under way or over), `rollout` (other units), `time`,
    /// `outside`, or `hand`.
    pub waits_for: String,
}

/// How many units wait for what.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct WaitsView {
    /// For other units of the rollout.
    pub rollout: u32,
    /// For a time to come.
    pub time: u32,
    /// For something outside: a host, a guest, a gate.
    pub outside: u32,
    /// For a hand.
    pub hand: u32,
}

impl From<Waits> for WaitsView {
    fn from(waits: Waits) -> Self {
        Self {
            rollout: waits.own,
            time: waits.time,
            outside: waits.outside,
            hand: waits.hand,
        }
    }
}

/// A rollout, and why each unit isn't begun now.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct RolloutView {
    /// The record.
    pub rollout: RolloutRecord,
    /// Of each unit, in their order, why it isn't begun now.
    pub whys: Vec<UnitWhy>,
    /// How many wait for what.
    pub waits: WaitsView,
    /// The host whose daemon drives; absent while nobody does.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub driver: Option<HostName>,
}

/// A host of the fleet.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct HostView {
    /// Its name.
    pub name: HostName,
    /// Whether its daemon is heard.
    pub alive: bool,
    /// Since when, nanoseconds since the Unix epoch.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub since_unix_ns: Option<u64>,
    /// Whether its clock disagrees with the driver's, and by how much at least.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub clock: Option<Skew>,
    /// Why it is to be left alone, if it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cordon: Option<String>,
    /// Its zone.
    pub zone: String,
    /// Its fault domain.
    pub fault_domain: String,
    /// Its labels.
    #[serde(default, skip_serializing_if = "Labels::is_empty")]
    pub labels: Labels,
    /// Versions of the VMM that it has.
    pub releases: Vec<String>,
    /// Its KVM.
    #[serde(default)]
    pub kvm: ComponentCard,
    /// Its kernel.
    #[serde(default)]
    pub kernel: ComponentCard,
    /// Version of its daemon.
    pub daemon: String,
    /// Guests that run there.
    pub guests: usize,
    /// Whether its daemon drives the rollouts.
    pub drives: bool,
    /// Whether it is the host that was asked.
    pub is_this: bool,
}

/// What is seen of a rollout now, and why each unit isn't begun.
pub fn view(look: &Look, record: &RolloutRecord, now: Moment) -> RolloutView {
    let mut record = record.clone();
    hear(look, &mut record, now);
    let tables = look.tables(Some(&record));
    let rollout = tables.rollout(&record);
    let seen = look.seen(&tables, &record, now);
    let planned = plan(&rollout, &tables.fleet, &seen);
    let waits = planned.waits().into();
    let whys = rollout.layout.units.iter_enumerated().zip(&record.units);
    let whys = whys.map(|((ix, unit), named)| {
        let why = match planned.whys[ix] {
            // It is over, and waits for nothing.
            Why::Held(state) if state.is_over() && named.phase != Phase::Waiting => {
                Why::Phase(named.phase)
            }
            why => why,
        };
        UnitWhy {
            host: named.host.clone(),
            vm: named.vm.clone(),
            why: match why {
                Why::Gate(gate) => gate_said(&record, named, gate),
                why => why.sentence(&tables.fleet, unit, now),
            },
            waits_for: match why.cause() {
                Cause::None => "nothing",
                Cause::Own => "rollout",
                Cause::Time(_) => "time",
                Cause::Outside => "outside",
                Cause::Hand => "hand",
            }
            .into(),
        }
    });
    let whys = whys.collect();
    RolloutView {
        whys,
        waits,
        rollout: record,
        driver: None,
    }
}

/// What a unit waits for, where it is a gate.
fn gate_said(record: &RolloutRecord, unit: &UnitRecord, gate: u32) -> String {
    let said = usize::try_from(gate)
        .ok()
        .and_then(|at| record.gates.get(at));
    let words = said.map_or_else(|| "a gate is being asked".into(), GateSaid::words);
    match &unit.vm {
        Some(vm) => format!("VM {vm} waits: {words}"),
        None => format!("host {} waits: {words}", unit.host),
    }
}

/// A rollout in a list.
pub fn summary(record: &RolloutRecord) -> RolloutSummary {
    let count = |is: fn(Phase) -> bool| record.units.iter().filter(|unit| is(unit.phase)).count();
    RolloutSummary {
        id: record.id.clone(),
        to: record.to.clone(),
        state: record.state,
        reason: record.reason.clone(),
        done: count(|phase| phase == Phase::Done),
        failed: count(Phase::is_failure),
        units: record.units.len(),
        asked_at_unix_ns: record.asked_at.0,
    }
}

/// In one sentence, why a VM isn't being updated now.
pub fn explain(look: &Look, place: &Place, now: Moment) -> String {
    let has = |record: &RolloutRecord| {
        let mut units = record.units.iter();
        units.position(|unit| unit.takes(&place.0, Some(&place.1)))
    };
    let of_one = look
        .open()
        .find_map(|rollout| Some((&rollout.record, has(&rollout.record)?)));
    let (host, vm) = place;
    let with_host = |unit: &UnitRecord| match (unit.vm.is_some(), unit.rung) {
        (true, _) => String::new(),
        (false, rung) => {
            let back = if rung.has_way_back() {
                ""
            } else {
                ", which has no way back"
            };
            format!("VM {vm} stands still with all guests of its host for its {rung}{back}: ")
        }
    };
    let Some((record, at)) = of_one else {
        let last = look.rollouts.iter().rev().find_map(|rollout| {
            let at = has(&rollout.record)?;
            Some((&rollout.record, &rollout.record.units[at]))
        });
        return match last {
            None => format!("VM {vm} on {host} is in no rollout"),
            Some((record, unit)) => format!(
                "VM {vm} on {host} is in no rollout that goes on; of the last one, {} to {}, which is {}, \
                 {} is {}",
                record.id,
                record.to,
                record.state,
                if unit.vm.is_some() { "it" } else { "its host" },
                unit.phase.words()
            ),
        };
    };
    let view = view(look, record, now);
    let why = view.whys.get(at).map_or("", |why| why.why.as_str());
    let unit = &record.units[at];
    let note = unit.note.as_deref();
    let note = note.map_or(String::new(), |note| format!(" ({note})"));
    format!(
        "{}{why}{note}; rollout {} to {} is {}",
        with_host(unit),
        record.id,
        record.to,
        record.state
    )
}

impl Fleet {
    /// Who drives.
    pub async fn driver(&self) -> Result<Option<DriverCard>, Problem> {
        let entry = self.shared.get(DRIVER).await?;
        Ok(entry.as_ref().map(super::read).transpose()?)
    }

    /// All hosts.
    pub async fn hosts(&self) -> Result<Vec<HostView>, Problem> {
        let look = self.look().await?;
        let driver = self.driver().await?.map(|card| card.host);
        let view = |(name, host): (&HostName, &super::look::HostLook)| {
            let card = host.card.as_ref();
            let guests = look.vms.iter();
            let guests = guests.filter(|((h, _), card)| h == name && card.state.is_active());
            HostView {
                alive: look.is_alive(name),
                since_unix_ns: host.alive.as_ref().map(|alive| alive.since.0),
                clock: look.skew(name),
                cordon: host.cordon.as_ref().map(|cordon| cordon.reason.clone()),
                zone: card.map_or_else(String::new, |card| card.zone.clone()),
                fault_domain: card.map_or_else(String::new, |card| card.fault_domain.clone()),
                labels: card.map_or_else(Labels::new, |card| card.labels.clone()),
                releases: card.map_or_else(Vec::new, |card| card.releases.clone()),
                kernel: card.map_or_else(ComponentCard::default, |card| card.kernel.clone()),
                kvm: card.map_or_else(ComponentCard::default, |card| card.kvm.clone()),
                daemon: card.map_or_else(String::new, |card| card.daemon.clone()),
                guests: guests.count(),
                drives: driver.as_ref() == Some(name),
                is_this: *name == self.me,
                name: name.clone(),
            }
        };
        Ok(look.hosts.iter().map(view).collect())
    }
}
