//! All that is in the shared store, as the planner reads it. Pure: a snapshot goes in, tables come out.
//!
//! What can't be read is passed over and named: a host without a card isn't up, a guest without one isn't
//! known to be well, and a rollout that can't be read doesn't move.

use std::collections::{BTreeMap, BTreeSet};

use super::clocks::Skew;
use super::keys::WHOLE_HOST;
use super::record::{
    Alive, Answer, ClocksRecord, Cordon, Far, HostCard, Order, RolloutRecord, UnitRecord, VmCard,
};
use super::{ALIVE, ANSWERS, CLOCKS, CORDONS, HOSTS, ORDERS, ROLLOUTS, VMS, read};
use crate::model::{DomainCount, HostName, Moment, VmName};
use crate::plan::rollout::evidence;
use crate::plan::rollout::fleet::{Column, Fleet, Host, Ix, Vm};
use crate::plan::rollout::layout::{Layout, Unit};
use crate::plan::rollout::seen::{Breach, Health, HostSeen, Phase, Releases, Seen, VmSeen};
use crate::plan::rollout::{Rollout, State};
use crate::store::shared::{Entry, SharedError, Snapshot};

/// A VM of the fleet.
pub type Place = (HostName, VmName);
/// What an order is of: a VM, or a host with all its guests.
pub type Subject = (HostName, Option<VmName>);

/// A record, and the version that was seen.
#[derive(Clone, Debug)]
pub struct Versioned<T> {
    /// The record.
    pub record: T,
    /// Its version.
    pub version: u64,
}

/// What is known of a host.
#[derive(Clone, Debug, Default)]
pub struct HostLook {
    /// What it says of itself.
    pub card: Option<HostCard>,
    /// That it is heard.
    pub alive: Option<Alive>,
    /// The version of that record.
    pub alive_version: u64,
    /// That it is to be left alone.
    pub cordon: Option<Cordon>,
}

/// All records, at one moment.
#[derive(Clone, Debug, Default)]
pub struct Look {
    /// Hosts.
    pub hosts: BTreeMap<HostName, HostLook>,
    /// VMs.
    pub vms: BTreeMap<Place, VmCard>,
    /// Rollouts, oldest first.
    pub rollouts: Vec<Versioned<RolloutRecord>>,
    /// Orders.
    pub orders: BTreeMap<Subject, Order>,
    /// Answers.
    pub answers: BTreeMap<Subject, Answer>,
    /// Hosts whose clocks disagree with the driver's.
    pub clocks: Option<ClocksRecord>,
    /// Hosts whose clocks could not be compared with the driver's yet; known to the driver alone.
    pub uncompared: BTreeSet<HostName>,
    /// What could not be read.
    pub malformed: Vec<String>,
    /// Which store it is.
    pub origin: String,
}

impl Look {
    /// All that a snapshot of what is so now holds.
    pub fn of(snapshot: &Snapshot) -> Self {
        let mut look = Self {
            origin: snapshot.origin.clone(),
            ..Self::default()
        };
        for entry in &snapshot.entries {
            if let Err(error) = look.take(entry) {
                look.malformed.push(error.to_string());
            }
        }
        look
    }

    fn take(&mut self, entry: &Entry) -> Result<(), SharedError> {
        let key = entry.key.as_str();
        if let Some(host) = key.strip_prefix(HOSTS) {
            self.host(entry, host)?.card = Some(read(entry)?);
        } else if let Some(host) = key.strip_prefix(ALIVE) {
            let alive = read(entry)?;
            let of = self.host(entry, host)?;
            of.alive = Some(alive);
            of.alive_version = entry.version;
        } else if key == CLOCKS {
            self.clocks = Some(read(entry)?);
        } else if let Some(host) = key.strip_prefix(CORDONS) {
            self.host(entry, host)?.cordon = Some(read(entry)?);
        } else if let Some(at) = key.strip_prefix(VMS) {
            let (host, vm) = subject(entry, at)?;
            let vm = vm.ok_or_else(|| wrong(entry, "its key names no VM"))?;
            self.vms.insert((host, vm), read(entry)?);
        } else if let Some(at) = key.strip_prefix(ORDERS) {
            self.orders.insert(subject(entry, at)?, read(entry)?);
        } else if let Some(at) = key.strip_prefix(ANSWERS) {
            self.answers.insert(subject(entry, at)?, read(entry)?);
        } else if key.starts_with(ROLLOUTS) {
            let record = read(entry)?;
            let version = entry.version;
            self.rollouts.push(Versioned { record, version });
        }
        Ok(())
    }

    fn host(&mut self, entry: &Entry, name: &str) -> Result<&mut HostLook, SharedError> {
        let name = HostName::try_from(name.to_owned()).map_err(|e| wrong(entry, e))?;
        Ok(self.hosts.entry(name).or_default())
    }

    /// Whether a host's daemon is heard.
    pub fn is_alive(&self, host: &HostName) -> bool {
        let look = self.hosts.get(host);
        look.is_some_and(|look| look.alive.is_some() && look.card.is_some())
    }

    /// By how much a host's clock disagrees with the driver's, at least.
    pub fn skew(&self, host: &HostName) -> Option<Skew> {
        self.clocks.as_ref()?.off.get(host).copied()
    }

    /// The rollouts that aren't over.
    pub fn open(&self) -> impl Iterator<Item = &Versioned<RolloutRecord>> {
        let all = self.rollouts.iter();
        all.filter(|rollout| !rollout.record.state.is_over())
    }

    /// The fleet as the planner's tables, with whatever a rollout names that is no more.
    pub fn tables(&self, rollout: Option<&RolloutRecord>) -> Tables {
        let mut tables = Tables::default();
        let mut zones = BTreeMap::new();
        let mut racks = BTreeMap::new();
        let units = rollout.map_or(&[][..], |rollout| &rollout.units);
        let named = units.iter().map(|unit| &unit.host);
        let names = self
            .hosts
            .keys()
            .chain(self.vms.keys().map(|(host, _)| host));
        for name in names.chain(named) {
            if tables.hosts.contains_key(name) {
                continue;
            }
            let card = self.hosts.get(name).and_then(|host| host.card.as_ref());
            let (zone, rack) = card.map_or(("unknown", "unknown"), |card| {
                (card.zone.as_str(), card.fault_domain.as_str())
            });
            let fleet = &mut tables.fleet;
            let zone_ix = *zones.entry(zone).or_insert_with(|| fleet.add_zone(zone));
            let rack_ix = racks.entry((zone, rack));
            let rack_ix = *rack_ix.or_insert_with(|| fleet.add_rack(rack, zone_ix));
            let ix = fleet.add_host(name.as_str(), rack_ix);
            tables.hosts.insert(name.clone(), ix);
        }
        let mut sets = BTreeMap::new();
        let known = self.vms.iter().map(|((host, vm), card)| {
            let seat = card.set.as_deref().map(|set| (set, card.domain));
            (host, vm, seat)
        });
        // A host's guests are those that it has now.
        let gone = units.iter().filter_map(|unit| {
            let seat = unit.set.as_deref().map(|set| (set, unit.domain));
            Some((&unit.host, unit.vm.as_ref()?, seat))
        });
        for (host, vm, seat) in known.chain(gone) {
            let place = (host.clone(), vm.clone());
            let Some(&host) = tables.hosts.get(host) else {
                continue;
            };
            if tables.vms.contains_key(&place) {
                continue;
            }
            let fleet = &mut tables.fleet;
            let seat = seat.map(|(set, domain)| {
                let ix = sets.entry(set);
                let ix = *ix.or_insert_with(|| fleet.add_set(set, DomainCount::default()));
                // A number that sets don't have is of before there were fleets: it counts as the first.
                let domain = u8::try_from(domain).ok();
                let domain = domain.and_then(|number| crate::model::Domain::new(number).ok());
                (ix, Some(domain.unwrap_or(first_domain())))
            });
            let ix = fleet.add_vm(vm.as_str(), host, seat);
            tables.vms.insert(place, ix);
        }
        tables
    }

    /// What is seen of the fleet in a rollout, at that moment.
    pub fn seen(&self, tables: &Tables, rollout: &RolloutRecord, now: Moment) -> Seen {
        let mut seen = Seen {
            now,
            hosts: vec![HostSeen::default(); tables.fleet.hosts.len()].into(),
            vms: vec![VmSeen::default(); tables.fleet.vms.len()].into(),
            units: rollout.units.iter().map(|unit| unit.progress()).collect(),
            gates: rollout.gates.iter().map(|said| said.verdict).collect(),
            breaches: Vec::new(),
        };
        for (name, &ix) in &tables.hosts {
            seen.hosts[ix] = self.host_seen(name, rollout);
        }
        for (place, &ix) in &tables.vms {
            seen.vms[ix] = self.vm_seen(place);
        }
        for (at, unit) in rollout.units.iter().enumerate() {
            let answer = self.answer(rollout, at);
            let is_watched = matches!(unit.phase, Phase::Watched | Phase::BackWatched);
            // Until all is known of its swap it has not been well for any time.
            let is_open = is_watched && !answer.is_some_and(|answer| answer.far.is_all_known());
            for (vm, card) in tables.members(self, unit) {
                let swap = card.and_then(|card| card.swap.as_ref());
                let own = match (swap, &unit.order) {
                    (Some(swap), Some(order)) => is_of_order(&swap.0, &order.0),
                    _ => false,
                };
                let busy = card.is_some_and(|card| card.busy);
                seen.vms[vm].busy = busy || (swap.is_some() && !own);
                if is_open {
                    seen.vms[vm].since = now;
                }
            }
            let breach = answer.and_then(|answer| breach(rollout, answer));
            if let (Phase::Watched, Some(breach)) = (unit.phase, breach) {
                seen.breaches.push((Ix::from(at), breach));
            }
        }
        seen
    }

    fn host_seen(&self, name: &HostName, rollout: &RolloutRecord) -> HostSeen {
        let Some(host) = self.hosts.get(name) else {
            return HostSeen::default();
        };
        let rung = rollout.rung();
        let card = host.card.as_ref();
        let has = card.is_some_and(|card| card.has(rung, &rollout.to));
        HostSeen {
            up: self.is_alive(name),
            since: host.alive.as_ref().map_or(Moment(0), |alive| alive.since),
            cordoned: host.cordon.is_some(),
            clock_off: self.skew(name).is_some()
                || (!rollout.policy.windows.is_empty() && self.uncompared.contains(name)),
            releases: match has {
                true => Releases::default().with(rung),
                false => Releases::default(),
            },
        }
    }

    fn vm_seen(&self, place: &Place) -> VmSeen {
        match self.vms.get(place) {
            Some(card) => VmSeen {
                health: card.health,
                since: card.since,
                busy: card.busy || card.swap.is_some(),
                excluded: false,
            },
            // Its host, which is heard, has no such VM any more.
            None if self.is_alive(&place.0) => VmSeen {
                health: Health::Off,
                ..VmSeen::default()
            },
            None => VmSeen::default(),
        }
    }

    /// What became of a unit's order.
    pub(super) fn answer(&self, rollout: &RolloutRecord, unit: usize) -> Option<&Answer> {
        let unit = rollout.units.get(unit)?;
        let answer = self.answers.get(&unit.subject())?;
        (Some(&answer.order) == unit.order.as_ref()).then_some(answer)
    }
}

/// Whether a swap is what an order asked for, its way back, or a guest's part of it.
fn is_of_order(swap: &str, order: &str) -> bool {
    swap.strip_prefix(order)
        .is_some_and(|rest| rest.is_empty() || rest == "-back" || rest.starts_with('.'))
}

fn breach(rollout: &RolloutRecord, answer: &Answer) -> Option<Breach> {
    let limits = &rollout.policy.limits;
    match (answer.far, &answer.worst, &answer.swap) {
        (Far::Failed, ..) => Some(Breach::Failed),
        (Far::Lost, ..) => Some(Breach::Unwell),
        (_, Some(worst), _) => worst.breach(limits),
        (_, None, Some(swap)) => evidence::breach(swap, limits),
        (_, None, None) => None,
    }
}

fn first_domain() -> crate::model::Domain {
    crate::model::Domain::of_joined(0, DomainCount::default())
}

fn wrong(entry: &Entry, problem: impl std::fmt::Display) -> SharedError {
    SharedError::Malformed {
        key: entry.key.clone(),
        problem: problem.to_string(),
    }
}

/// What the rest of a key names.
fn subject(entry: &Entry, at: &str) -> Result<Subject, SharedError> {
    let (host, vm) = at
        .split_once('/')
        .ok_or_else(|| wrong(entry, "its key names no VM"))?;
    let host = HostName::try_from(host.to_owned()).map_err(|e| wrong(entry, e))?;
    let vm = match vm {
        WHOLE_HOST => None,
        vm => Some(VmName::try_from(vm.to_owned()).map_err(|e| wrong(entry, e))?),
    };
    Ok((host, vm))
}

/// The fleet as the planner reads it, and where each host and VM is in it.
#[derive(Clone, Debug, Default)]
pub struct Tables {
    /// The tables.
    pub fleet: Fleet,
    /// Hosts.
    pub hosts: BTreeMap<HostName, Ix<Host>>,
    /// VMs.
    pub vms: BTreeMap<Place, Ix<Vm>>,
}

impl Tables {
    /// The VMs that a unit takes away, each with what is said of it.
    fn members<'a>(
        &'a self,
        look: &'a Look,
        unit: &UnitRecord,
    ) -> Vec<(Ix<Vm>, Option<&'a VmCard>)> {
        let of = |place: &Place| Some((*self.vms.get(place)?, look.vms.get(place)));
        if let Some(vm) = &unit.vm {
            return of(&(unit.host.clone(), vm.clone())).into_iter().collect();
        }
        let of_host = self.vms.keys().filter(|(host, _)| *host == unit.host);
        of_host.filter_map(of).collect()
    }

    /// A rollout as the planner reads it.
    pub fn rollout(&self, record: &RolloutRecord) -> Rollout {
        let mut unit_of: Column<Vm, Option<Ix<Unit>>> = vec![None; self.fleet.vms.len()].into();
        let mut layout = Layout {
            stages: record.stages,
            ..Layout::default()
        };
        for (at, unit) in record.units.iter().enumerate() {
            // Tables were made with this rollout, so both are there.
            let host = self.hosts.get(&unit.host).copied();
            let vm = unit.vm.as_ref();
            let vm = vm.and_then(|vm| self.vms.get(&(unit.host.clone(), vm.clone())).copied());
            let unit = Unit {
                rung: unit.rung,
                stage: unit.stage,
                host: host.unwrap_or(Ix::from(0)),
                vm,
            };
            for &vm in unit.members(&self.fleet) {
                unit_of[vm] = Some(Ix::from(at));
            }
            layout.units.push(unit);
        }
        layout.unit_of = unit_of;
        Rollout {
            state: record.state,
            policy: record.policy.clone(),
            layout,
            forgiven: record.forgiven,
        }
    }
}

/// Whether a hand may still do anything to a rollout in that state.
pub(super) fn is_held(state: State) -> bool {
    matches!(state, State::Paused | State::Stopped)
}
