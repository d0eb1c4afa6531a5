//! What is counted before anything is chosen: who is away, what is under way, what failed.

use super::fleet::{Column, Fleet, Host, Ix, Rack, Set, Vm, Zone};
use super::layout::Unit;
use super::seen::{Phase, Seen};
use super::state::State;
use super::{Rollout, Turn};
use crate::model::{AtOnce, Domain, Moment, Policy};

/// Update domains of one set: bit n stands for domain n.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Domains(u32);

impl Domains {
    pub(super) fn add(&mut self, domain: Domain) {
        self.0 |= 1 << domain.number();
    }

    /// One of them that isn't `domain`.
    pub(super) fn other_than(self, domain: Domain) -> Option<Domain> {
        let others = self.0 & !(1 << domain.number());
        let number = u8::try_from(others.trailing_zeros()).ok()?;
        Domain::new(number).ok()
    }

    pub(super) fn is_empty(self) -> bool {
        self.0 == 0
    }

    pub(super) fn or(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

/// What is counted of an availability set.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct SetTally {
    /// Members that are away, whatever made them so.
    pub(super) away: u32,
    /// Domains with members under way.
    pub(super) moving: Domains,
    /// Domains with members that the rollout touched and that are away.
    pub(super) unwell: Domains,
    /// Domains with members that failed and are to be put back.
    pub(super) spoilt: Domains,
    /// A domain that has to wait for a moment, and comes before all others.
    pub(super) first: Option<Domain>,
    /// The domain that was finished last, and when.
    pub(super) last: Option<(Moment, Domain)>,
}

/// What is counted of a stage.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct StageTally {
    /// Its units.
    pub(super) units: u32,
    /// Those under way, begun now, or that may be begun later without any change outside.
    pub(super) open: u32,
    /// Those that nobody wants swapped.
    pub(super) left_out: u32,
    /// Those that are over, well or not.
    pub(super) settled: u32,
    /// When the last of them was settled.
    pub(super) last: Moment,
    /// A guest that was well after its swap, and isn't any more.
    pub(super) ill: Option<Ix<Vm>>,
}

/// All that is counted.
#[derive(Debug)]
pub(super) struct Tally {
    pub(super) sets: Column<Set, SetTally>,
    pub(super) stages: Vec<StageTally>,
    on_host: Column<Host, u32>,
    in_rack: Column<Rack, u32>,
    in_zone: Column<Zone, u32>,
    /// Units under way.
    pub(super) under_way: u32,
    /// VMs of the fleet that are away.
    pub(super) away: u32,
    /// Units that failed, and units that were begun at all.
    pub(super) failed: u32,
    pub(super) tried: u32,
    /// Units that could not be brought back.
    pub(super) stuck: u32,
    /// Units that may have to be put back.
    pub(super) to_put_back: u32,
    /// The latest stage of which anything was begun.
    pub(super) reached: u8,
}

/// Where no more may be under way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum FullAt {
    Host(Ix<Host>),
    Rack(Ix<Rack>),
    Zone(Ix<Zone>),
    All,
}

impl Tally {
    pub(super) fn new(fleet: &Fleet, stages: u8) -> Self {
        Self {
            sets: vec![SetTally::default(); fleet.sets.len()].into(),
            stages: vec![StageTally::default(); usize::from(stages)],
            on_host: vec![0; fleet.hosts.len()].into(),
            in_rack: vec![0; fleet.racks.len()].into(),
            in_zone: vec![0; fleet.zones.len()].into(),
            under_way: 0,
            away: 0,
            failed: 0,
            tried: 0,
            stuck: 0,
            to_put_back: 0,
            reached: 0,
        }
    }

    /// Counts a VM as away.
    pub(super) fn note_away(&mut self, fleet: &Fleet, vm: Ix<Vm>) {
        self.away += 1;
        if let Some(seat) = fleet.vms[vm].seat {
            self.sets[seat.set].away += 1;
        }
    }

    /// Counts a unit as under way, and those of its members as away that aren't anyhow.
    pub(super) fn note_under_way(&mut self, fleet: &Fleet, seen: &Seen, unit: &Unit) {
        let rack = fleet.hosts[unit.host].rack;
        self.under_way += 1;
        self.on_host[unit.host] += 1;
        self.in_rack[rack] += 1;
        self.in_zone[fleet.racks[rack].zone] += 1;
        for &vm in unit.members(fleet) {
            if let Some(seat) = fleet.vms[vm].seat {
                self.sets[seat.set].moving.add(seat.domain);
            }
            if seen.is_available(vm, unit.host) {
                self.note_away(fleet, vm);
            }
        }
    }

    /// Counts how far a unit is.
    pub(super) fn note_phase(&mut self, phase: Phase) {
        self.tried += u32::from(phase != Phase::Waiting);
        self.failed += u32::from(phase.is_failure());
        self.stuck += u32::from(phase == Phase::Stuck);
    }

    /// Where there is no room for one more unit on `host`.
    pub(super) fn full_at(&self, fleet: &Fleet, host: Ix<Host>, at_once: AtOnce) -> Option<FullAt> {
        let rack = fleet.hosts[host].rack;
        let zone = fleet.racks[rack].zone;
        if self.under_way >= at_once.total {
            return Some(FullAt::All);
        }
        if self.on_host[host] >= at_once.per_host {
            return Some(FullAt::Host(host));
        }
        if at_once
            .per_rack
            .is_some_and(|most| self.in_rack[rack] >= most)
        {
            return Some(FullAt::Rack(rack));
        }
        let zone_full = at_once
            .per_zone
            .is_some_and(|most| self.in_zone[zone] >= most);
        zone_full.then_some(FullAt::Zone(zone))
    }

    /// Whether the rollout has to stop, for what failed.
    pub(super) fn stop(&self, rollout: &Rollout) -> Option<(State, Turn)> {
        if rollout.state != State::Running {
            return None;
        }
        let early = self.reached + 1 < rollout.layout.stages;
        let allowed = if early {
            0
        } else {
            rollout.policy.failures.at_most(self.tried)
        };
        let failed = self.failed.saturating_sub(rollout.forgiven);
        let state = if rollout.policy.roll_back {
            State::RollingBack
        } else {
            State::Stopped
        };
        (failed > allowed).then_some((state, Turn::Failures { failed, allowed }))
    }
}

/// How many members of a set may be away.
pub(super) fn set_allows(policy: &Policy, fleet: &Fleet, set: Ix<Set>) -> u32 {
    policy.set_budget.at_most(fleet.sets[set].members).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_of_several_domains_is_named_that_is_another() {
        let domain = |number| Domain::new(number).expect("a domain");
        let mut domains = Domains::default();
        assert_eq!(domains.other_than(domain(3)), None);
        domains.add(domain(3));
        assert_eq!(domains.other_than(domain(3)), None);
        assert_eq!(domains.other_than(domain(0)), Some(domain(3)));
        domains.add(domain(19));
        assert_eq!(domains.other_than(domain(3)), Some(domain(19)));
        assert!(!domains.is_empty());
    }
}
