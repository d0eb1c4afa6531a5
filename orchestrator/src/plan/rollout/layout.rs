//! What a rollout will swap, by which rung, and in which order: laid out once, when it is made.

use std::hash::{BuildHasher, BuildHasherDefault, DefaultHasher};

use super::fleet::{Column, Fleet, Host, Ix, Table, Vm};
use crate::model::{Domain, Rung, Stage};

/// One thing that is swapped as a whole: a VM's component, or a host's with all guests on it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unit {
    /// What is swapped.
    pub rung: Rung,
    /// The number of its stage: 0 for the canaries.
    pub stage: u8,
    /// The host.
    pub host: Ix<Host>,
    /// The VM; none if the rung takes the whole host.
    pub vm: Option<Ix<Vm>>,
}

impl Unit {
    /// The VMs that it takes away.
    pub fn members<'a>(&'a self, fleet: &'a Fleet) -> &'a [Ix<Vm>] {
        match &self.vm {
            Some(vm) => std::slice::from_ref(vm),
            None => fleet.guests(self.host),
        }
    }
}

/// What contains the fix that is rolled out, by rung; and what stands in the way of a rung.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Remedy {
    rungs: Vec<(Rung, Option<&'static str>)>,
}

impl Remedy {
    /// A fix that is in a release of each of these. What isn't built says so itself.
    pub fn contained_in(rungs: impl IntoIterator<Item = Rung>) -> Self {
        let mut rungs: Vec<_> = rungs
            .into_iter()
            .map(|rung| (rung, rung.not_built()))
            .collect();
        rungs.sort_by_key(|&(rung, _)| rung);
        rungs.dedup();
        Self { rungs }
    }

    /// The same where `rung` can be swapped, whatever it says. For simulations.
    #[must_use]
    pub fn suppose_built(mut self, rung: Rung) -> Self {
        for (_, why_not) in self.rungs.iter_mut().filter(|(r, _)| *r == rung) {
            *why_not = None;
        }
        self
    }

    /// The lowest rung that contains the fix and can be swapped.
    pub fn smallest(&self) -> Option<Rung> {
        let built = self.rungs.iter().find(|(_, why_not)| why_not.is_none());
        built.map(|&(rung, _)| rung)
    }

    /// Whether there is a rung by which the fix can be brought.
    ///
    /// # Errors
    /// There is none.
    pub fn check(&self) -> Result<Rung, LayoutError> {
        self.smallest().ok_or_else(|| no_rung(self))
    }

    /// The rungs that contain the fix and can't be swapped, and why.
    pub fn unavailable(&self) -> impl Iterator<Item = (Rung, &'static str)> {
        let rungs = self.rungs.iter();
        rungs.filter_map(|&(rung, why_not)| Some((rung, why_not?)))
    }
}

/// Why a rollout can't be laid out.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LayoutError {
    /// No rung will do.
    #[error("nothing that contains the fix can be swapped: {0}")]
    NoRung(String),
    /// The stages hold more than there is.
    #[error("too many stages: {0}, and 250 are the most")]
    Stages(usize),
}

/// The units of a rollout, in the order in which they are looked at: stage by stage, in each of
/// them by update domain.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Layout {
    /// The units.
    pub units: Table<Unit>,
    /// The unit of each VM; a VM that has none isn't touched by the rollout.
    pub unit_of: Column<Vm, Option<Ix<Unit>>>,
    /// How many stages there are, the last one counted.
    pub stages: u8,
}

impl Layout {
    /// Lays a rollout out over the hosts that `wanted` says.
    ///
    /// Who is a canary depends on `seed` and on names alone: it is a fair sample of hosts, sets and
    /// zones, and the same one whoever asks.
    ///
    /// # Errors
    /// There is no rung by which the fix could be brought.
    pub fn new(
        fleet: &Fleet,
        remedy: &Remedy,
        stages: &[Stage],
        seed: u64,
        wanted: impl Fn(Ix<Host>) -> bool,
    ) -> Result<Self, LayoutError> {
        Self::of_units(fleet, remedy, stages, seed, |unit| wanted(unit.host))
    }

    /// The same, over the units that `wanted` says.
    ///
    /// # Errors
    /// There is no rung by which the fix could be brought.
    pub fn of_units(
        fleet: &Fleet,
        remedy: &Remedy,
        stages: &[Stage],
        seed: u64,
        wanted: impl Fn(&Unit) -> bool,
    ) -> Result<Self, LayoutError> {
        let rung = remedy.check()?;
        let last = u8::try_from(stages.len())
            .ok()
            .filter(|&last| last <= 250)
            .ok_or(LayoutError::Stages(stages.len()))?;
        let mut units: Vec<Unit> = Vec::new();
        for host in fleet.hosts.keys() {
            let unit = |vm| Unit {
                rung,
                stage: last,
                host,
                vm,
            };
            if rung.takes_whole_host() {
                units.push(unit(None));
            } else {
                units.extend(fleet.guests(host).iter().map(|&vm| unit(Some(vm))));
            }
        }
        units.retain(wanted);
        draw_stages(fleet, &mut units, stages, seed);
        units.sort_by_cached_key(|unit| (unit.stage, first_domain(fleet, unit)));
        let mut unit_of: Column<Vm, Option<Ix<Unit>>> = vec![None; fleet.vms.len()].into();
        let units: Table<Unit> = units.into();
        for (ix, unit) in units.iter_enumerated() {
            for &vm in unit.members(fleet) {
                unit_of[vm] = Some(ix);
            }
        }
        Ok(Self {
            units,
            unit_of,
            stages: last + 1,
        })
    }
}

fn no_rung(remedy: &Remedy) -> LayoutError {
    let reasons: Vec<String> = remedy
        .unavailable()
        .map(|(rung, why)| format!("{rung}: {why}"))
        .collect();
    LayoutError::NoRung(if reasons.is_empty() {
        "no component was named".into()
    } else {
        reasons.join("; ")
    })
}

/// Draws each stage's units by lot from those that are left.
fn draw_stages(fleet: &Fleet, units: &mut [Unit], stages: &[Stage], seed: u64) {
    let total = u32::try_from(units.len()).unwrap_or(u32::MAX);
    if stages.is_empty() {
        return;
    }
    let mut drawn: Vec<(u64, usize)> = units
        .iter()
        .enumerate()
        .map(|(at, unit)| (lot(fleet, unit, seed), at))
        .collect();
    let mut first = 0;
    for (number, stage) in (0..).zip(stages) {
        let left = &mut drawn[first..];
        let size = (stage.size.at_least(total) as usize).min(left.len());
        if size < left.len() {
            left.select_nth_unstable(size);
        }
        for &(_, at) in &left[..size] {
            units[at].stage = number;
        }
        first += size;
    }
}

fn lot(fleet: &Fleet, unit: &Unit, seed: u64) -> u64 {
    // Without random keys: the same in every process.
    let hasher = BuildHasherDefault::<DefaultHasher>::default();
    match unit.vm {
        Some(vm) => hasher.hash_one((seed, &fleet.vms[vm].name)),
        None => hasher.hash_one((seed, &fleet.hosts[unit.host].name)),
    }
}

fn first_domain(fleet: &Fleet, unit: &Unit) -> Option<Domain> {
    let seats = unit
        .members(fleet)
        .iter()
        .filter_map(|&vm| fleet.vms[vm].seat);
    seats.map(|seat| seat.domain).min()
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::model::{Amount, DomainCount};

    fn fleet() -> Fleet {
        let mut fleet = Fleet::default();
        let zone = fleet.add_zone("z");
        let rack = fleet.add_rack("r", zone);
        let set = fleet.add_set("s", DomainCount::default());
        for n in 0..10 {
            let host = fleet.add_host(format!("h{n}"), rack);
            for m in 0..3 {
                fleet.add_vm(format!("vm{n}-{m}"), host, Some((set, None)));
            }
        }
        fleet
    }

    fn stage(size: &str) -> Stage {
        Stage {
            size: size.parse().expect("an amount"),
            bake: Duration::ZERO,
        }
    }

    fn sizes(layout: &Layout) -> Vec<usize> {
        let of = |stage| layout.units.iter().filter(|u| u.stage == stage).count();
        (0..layout.stages).map(of).collect()
    }

    #[test]
    fn the_smallest_rung_that_is_built_is_taken() {
        let fleet = fleet();
        let remedy = Remedy::contained_in([Rung::Kernel, Rung::Vmm, Rung::Backend]);
        let layout = Layout::new(&fleet, &remedy, &[], 0, |_| true).expect("a layout");
        assert!(
            layout
                .units
                .iter()
                .all(|u| u.rung == Rung::Vmm && u.vm.is_some())
        );
        let above: Vec<Rung> = remedy.unavailable().map(|(rung, _)| rung).collect();
        assert_eq!(above, [Rung::Backend]);
    }

    #[test]
    fn a_rung_that_is_not_built_is_refused_with_its_reason() {
        let remedy = Remedy::contained_in([Rung::Backend]);
        let refused = Layout::new(&fleet(), &remedy, &[], 0, |_| true).expect_err("not built");
        assert!(
            refused
                .to_string()
                .contains("backend: devices run inside the VMM"),
            "{refused}"
        );
        let none = Remedy::contained_in([]);
        let refused = Layout::new(&fleet(), &none, &[], 0, |_| true).expect_err("no rung");
        assert!(refused.to_string().contains("no component"), "{refused}");
    }

    #[test]
    fn a_rung_of_the_host_takes_all_its_guests_together() {
        let fleet = fleet();
        let remedy = Remedy::contained_in([Rung::Kvm, Rung::Kernel]);
        let layout = Layout::new(&fleet, &remedy, &[], 0, |_| true).expect("a layout");
        assert_eq!(layout.units.len(), 10);
        assert!(
            layout
                .units
                .iter()
                .all(|unit| unit.members(&fleet).len() == 3)
        );
        assert!(layout.unit_of.iter().all(Option::is_some));
    }

    #[test]
    fn stages_have_the_sizes_that_were_asked_for_and_are_the_same_for_all() {
        let fleet = fleet();
        let remedy = Remedy::contained_in([Rung::Vmm]);
        let draw = |seed| {
            let stages = [stage("1"), stage("10%")];
            Layout::new(&fleet, &remedy, &stages, seed, |_| true).expect("a layout")
        };
        assert_eq!(sizes(&draw(7)), [1, 3, 26]);
        assert_eq!(draw(7), draw(7));
        let canary = |seed| draw(seed).units.first().map(|unit| unit.vm);
        assert!(
            (0..50).any(|seed| canary(seed) != canary(7)),
            "always the same canary"
        );
        let domains = |stage| {
            let units = draw(7).units;
            let units = units.into_iter().filter(move |unit| unit.stage == stage);
            units
                .map(|unit| first_domain(&fleet, &unit))
                .collect::<Vec<_>>()
        };
        assert!(domains(2).is_sorted());
    }

    #[test]
    fn more_canaries_than_there_are_hosts_are_all_hosts() {
        let remedy = Remedy::contained_in([Rung::Vmm]);
        let stages = [stage("1000"), stage("50%")];
        let layout = Layout::new(&fleet(), &remedy, &stages, 0, |_| true).expect("a layout");
        assert_eq!(sizes(&layout), [30, 0, 0]);
        assert_eq!(Amount::Count(1000).at_least(30), 30);
    }
}
