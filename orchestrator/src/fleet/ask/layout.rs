//! What a new rollout swaps, and whether it may: all that is checked before anything is written. Pure.

use std::collections::{BTreeMap, BTreeSet};

use super::{MOST_UNITS, NewRollout, bad, the_vm};
use crate::fleet::look::{Look, Place, Subject, Versioned};
use crate::fleet::record::{GuestRecord, RolloutId, RolloutRecord, UnitRecord, VmCard};
use crate::model::{Code, HostName, Moment, Problem, Rung};
use crate::plan::rollout::State;
use crate::plan::rollout::layout::{Layout, Remedy, Unit};
use crate::plan::rollout::seen::Phase;

/// Lays a rollout out, if it may be started.
pub fn lay_out(
    look: &Look,
    new: &NewRollout,
    id: RolloutId,
    now: Moment,
) -> Result<RolloutRecord, Problem> {
    let rung = rung(new)?;
    new.policy
        .check()
        .map_err(|e| bad(format!("field `policy`: {e}")))?;
    let remedy = Remedy::contained_in([rung]);
    // What is not built says so before anything else is looked for.
    remedy.check().map_err(|e| bad(e.to_string()))?;
    let wanted = match rung.takes_whole_host() {
        true => hosts(look, new, rung)?,
        false => guests(look, new)?,
    };
    is_free(look, &wanted)?;
    have_release(look, new, rung, &wanted)?;
    let tables = look.tables(None);
    let vms: BTreeMap<_, _> = tables.vms.iter().map(|(place, ix)| (*ix, place)).collect();
    let of_ix: BTreeMap<_, _> = tables.hosts.iter().map(|(name, ix)| (*ix, name)).collect();
    let subject = |unit: &Unit| -> Option<Subject> {
        Some(match unit.vm {
            Some(vm) => vms
                .get(&vm)
                .map(|&(host, vm)| (host.clone(), Some(vm.clone())))?,
            None => ((*of_ix.get(&unit.host)?).clone(), None),
        })
    };
    let is_wanted = |unit: &Unit| subject(unit).is_some_and(|subject| wanted.contains(&subject));
    // Who is a canary is drawn by lot, and by another one for each release.
    let seed = new.to.bytes().fold(0, |seed: u64, byte| {
        seed.wrapping_mul(31).wrapping_add(byte.into())
    });
    let stages = &new.policy.stages;
    let layout = Layout::of_units(&tables.fleet, &remedy, stages, seed, is_wanted);
    let layout = layout.map_err(|e| bad(e.to_string()))?;
    let units = layout.units.iter();
    let units = units.filter_map(|unit| unit_record(look, subject(unit)?, unit, now));
    Ok(RolloutRecord {
        id,
        component: new.component.clone(),
        budget_ns: new.budget_ns,
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

/// What is swapped, if what is asked for goes with it.
fn rung(new: &NewRollout) -> Result<Rung, Problem> {
    let rung: Rung = new
        .component
        .parse()
        .map_err(|e| bad(format!("field `component`: {e}")))?;
    if !rung.takes_whole_host() {
        return match new.budget_ns {
            None => Ok(rung),
            Some(_) => Err(bad(
                "field `budget_ns`: each guest has its own (`stillpoint run --blackout-budget`); it is given \
                 where a host is swapped with all its guests",
            )),
        };
    }
    if !new.vms.is_empty() || !new.exclude.is_empty() {
        return Err(bad(format!(
            "fields `vms` and `exclude`: a swap of {rung} takes all guests of a host together; name hosts, by \
             --host, --label or --set"
        )));
    }
    if new.budget_ns.is_none() && rung.not_built().is_none() {
        return Err(bad(format!(
            "field `budget_ns`: say how long the guests of a host may stand still while its {rung} is \
             swapped (--budget, 30s at most)"
        )));
    }
    if !rung.has_way_back() && new.policy.roll_back {
        return Err(bad(format!(
            "field `policy.roll_back`: a swap of {rung} has no way back; say --no-roll-back: where one fails the \
             rollout stops, and what was swapped stays"
        )));
    }
    Ok(rung)
}

fn unit_record(look: &Look, subject: Subject, unit: &Unit, now: Moment) -> Option<UnitRecord> {
    let (host, vm) = subject;
    let of_host = |(place, _): &(&Place, _)| place.0 == host;
    let (set, domain, from, guests) = match &vm {
        Some(vm) => {
            let card = look.vms.get(&(host.clone(), vm.clone()))?;
            (
                card.set.clone(),
                card.domain,
                card.release.clone(),
                Vec::new(),
            )
        }
        None => {
            let guests = look
                .vms
                .iter()
                .filter(of_host)
                .map(|((_, vm), card)| GuestRecord {
                    vm: vm.clone(),
                    set: card.set.clone(),
                    domain: card.domain,
                });
            let guests = guests.collect();
            let card = look.hosts.get(&host).and_then(|host| host.card.as_ref())?;
            (None, 0, card.whole(unit.rung).runs.clone(), guests)
        }
    };
    Some(UnitRecord {
        host,
        vm,
        guests,
        rung: unit.rung,
        stage: unit.stage,
        set,
        domain,
        from,
        phase: Phase::Waiting,
        tries: 0,
        since: now,
        order: None,
        note: None,
        blackout_ns: None,
        clock_error_ns: None,
        brownout_ns: None,
    })
}

/// Which hosts are asked for, by their names and labels; both must be there.
fn hosts_asked<'a>(
    look: &'a Look,
    new: &'a NewRollout,
) -> Result<impl Fn(&HostName) -> bool + 'a, Problem> {
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
    Ok(move |host: &HostName| {
        let is_named = new.hosts.iter().any(|name| name == host.as_str());
        (new.hosts.is_empty() || is_named) && has_labels(host)
    })
}

/// Whether all sets that are asked for are there.
fn are_sets(look: &Look, new: &NewRollout) -> Result<(), Problem> {
    let is_set = |set: &&String| look.vms.values().any(|card| card.set.as_ref() == Some(set));
    match new.sets.iter().find(|set| !is_set(set)) {
        None => Ok(()),
        Some(set) => {
            let message = format!("no VM of the fleet is in an availability set `{set}`");
            Err(Problem::new(Code::NotFound, message))
        }
    }
}

/// The VMs that a rollout is to swap.
fn guests(look: &Look, new: &NewRollout) -> Result<BTreeSet<Subject>, Problem> {
    are_sets(look, new)?;
    let of_host = hosts_asked(look, new)?;
    let chosen = |names: &[String]| -> Result<BTreeSet<Place>, Problem> {
        let places = names.iter().map(|name| the_vm(look, name).cloned());
        places.collect()
    };
    let (only, not) = (chosen(&new.vms)?, chosen(&new.exclude)?);
    let mut is_there = 0;
    let mut wanted = BTreeSet::new();
    for (place, card) in &look.vms {
        let of_set = card.set.as_ref().is_some_and(|set| new.sets.contains(set));
        let asked_for = (new.sets.is_empty() || of_set)
            && of_host(&place.0)
            && (only.is_empty() || only.contains(place))
            && !not.contains(place)
            && card.state.is_active();
        if asked_for && card.release == new.to {
            is_there += 1;
        } else if asked_for {
            wanted.insert((place.0.clone(), Some(place.1.clone())));
        }
    }
    match wanted.len() {
        0 if is_there > 0 => Err(bad(format!(
            "nothing is left to be done: all {is_there} VMs that were asked for run release {} already",
            new.to
        ))),
        0 => Err(bad("no VM that runs is among those that were asked for")),
        many => fits(many, "VMs").map(|()| wanted),
    }
}

/// What is said of the guests of a host.
fn guests_of<'a>(look: &'a Look, host: &'a HostName) -> impl Iterator<Item = &'a VmCard> {
    let all = look.vms.iter().filter(move |(place, _)| place.0 == *host);
    all.map(|(_, card)| card)
}

/// The hosts that a rollout is to swap with all their guests.
fn hosts(look: &Look, new: &NewRollout, rung: Rung) -> Result<BTreeSet<Subject>, Problem> {
    are_sets(look, new)?;
    let of_host = hosts_asked(look, new)?;
    let has_set = |host: &HostName| {
        let mut cards = guests_of(look, host);
        cards.any(|card| card.set.as_ref().is_some_and(|set| new.sets.contains(set)))
    };
    // A kernel without guests is booted as ever.
    let is_swapped = |host: &HostName| {
        let mut cards = guests_of(look, host);
        rung != Rung::Kernel || cards.any(|card| card.state.is_active())
    };
    let cards = look.hosts.iter();
    let cards = cards.filter_map(|(name, host)| Some((name, host.card.as_ref()?)));
    let asked_for = cards.filter(|(name, _)| {
        of_host(name) && is_swapped(name) && (new.sets.is_empty() || has_set(name))
    });
    let (there, wanted): (Vec<_>, Vec<_>) =
        asked_for.partition(|(_, card)| card.whole(rung).runs == new.to);
    let wanted: BTreeSet<Subject> = wanted
        .into_iter()
        .map(|(name, _)| (name.clone(), None))
        .collect();
    let taken: usize = wanted
        .iter()
        .map(|(host, _)| guests_of(look, host).count())
        .sum();
    match wanted.len() {
        0 if !there.is_empty() => Err(bad(format!(
            "nothing is left to be done: all {} hosts that were asked for run release {} already",
            there.len(),
            new.to
        ))),
        0 => Err(bad(match rung {
            Rung::Kernel => {
                "no host with guests that run is among those that were asked for; without guests boot the \
                             other kernel as ever"
            }
            _ => "no host is among those that were asked for",
        })),
        many => fits(many + taken, "hosts and guests").map(|()| wanted),
    }
}

/// Whether so many go into one rollout.
fn fits(many: usize, what: &str) -> Result<(), Problem> {
    if many <= MOST_UNITS {
        return Ok(());
    }
    Err(bad(format!(
        "{many} {what} are too many for one rollout, {MOST_UNITS} are the most; take one zone, host or \
         set after the other (--host, --set)"
    )))
}

/// Whether no other rollout has any of them. A host that is swapped as a whole is one with each of its guests.
fn is_free(look: &Look, wanted: &BTreeSet<Subject>) -> Result<(), Problem> {
    for Versioned { record, .. } in look.open() {
        let has = |unit: &UnitRecord, subject: &Subject| unit.takes(&subject.0, subject.1.as_ref());
        let taken = wanted.iter().find_map(|subject| {
            let mut units = record.units.iter();
            Some((subject, units.find(|unit| has(unit, subject))?))
        });
        if let Some((_, unit)) = taken {
            let what = match &unit.vm {
                Some(vm) => format!("VM {vm} on {}", unit.host),
                None => format!("host {} with all its guests", unit.host),
            };
            let message = format!(
                "rollout {} (to {}, {}) has {what} already; wait for its end, or end it: \
                 `stillpoint rollout abort {}`",
                record.id, record.to, record.state, record.id
            );
            return Err(Problem::new(Code::RolloutInProgress, message));
        }
    }
    Ok(())
}

/// Whether every host concerned has the release.
fn have_release(
    look: &Look,
    new: &NewRollout,
    rung: Rung,
    wanted: &BTreeSet<Subject>,
) -> Result<(), Problem> {
    let hosts: BTreeSet<&HostName> = wanted.iter().map(|(host, _)| host).collect();
    let lacks = |host: &&&HostName| {
        let card = look.hosts.get(**host).and_then(|host| host.card.as_ref());
        !card.is_some_and(|card| card.has(rung, &new.to))
    };
    let lacking: Vec<&str> = hosts.iter().filter(lacks).map(|h| h.as_str()).collect();
    if lacking.is_empty() {
        return Ok(());
    }
    let how = match rung {
        Rung::Kvm => "lay its modules out there first, in a folder of `stillpointd --kvm-dir`",
        Rung::Kernel => {
            "install its package there first (vmlinuz-VERSION in `stillpointd --boot-dir`)"
        }
        _ => "add it there first (`stillpoint release add`)",
    };
    let message = format!(
        "release {} is not on {}; {how}, or leave these hosts out",
        new.to,
        lacking.join(", ")
    );
    Err(Problem::new(Code::NotFound, message))
}

#[cfg(test)]
mod tests;
