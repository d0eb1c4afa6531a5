//! What the fleet's page shows, gathered.

use std::collections::BTreeMap;

use crate::api::Desk;
use crate::fleet::explain::{self, HostView, RolloutSummary, RolloutView};
use crate::fleet::look::Look;
use crate::model::{Moment, Problem, VmState};
use crate::plan::rollout::seen::{Health, Phase};

/// A guest in its update domain.
#[derive(Clone, Debug)]
pub(super) struct Seat {
    pub(super) vm: String,
    pub(super) host: String,
    pub(super) release: String,
    pub(super) state: VmState,
    pub(super) health: Health,
    /// How far it is in a rollout that goes on.
    pub(super) phase: Option<Phase>,
}

/// What the fleet's page shows.
#[derive(Clone, Debug)]
pub(super) struct FleetShown {
    pub(super) store: String,
    pub(super) hosts: Vec<HostView>,
    /// Guests by set and update domain; those in no set last.
    pub(super) sets: BTreeMap<(bool, String, u16), Vec<Seat>>,
    pub(super) open: Vec<RolloutView>,
    pub(super) rollouts: Vec<RolloutSummary>,
}

pub(super) async fn fleet(desk: &Desk, now: Moment) -> Result<FleetShown, Problem> {
    let look = desk.fleet.look().await?;
    let driver = desk.fleet.driver().await?.map(|card| card.host);
    let open = look.open().map(|rollout| {
        let mut view = explain::view(&look, &rollout.record, now);
        view.driver.clone_from(&driver);
        view
    });
    let open: Vec<RolloutView> = open.collect();
    let mut rollouts: Vec<RolloutSummary> = look
        .rollouts
        .iter()
        .map(|rollout| explain::summary(&rollout.record))
        .collect();
    rollouts.reverse();
    rollouts.truncate(20);
    Ok(FleetShown {
        store: desk.fleet.shared.said(),
        hosts: desk.fleet.hosts().await?,
        sets: seats(&look, &open),
        open,
        rollouts,
    })
}

fn seats(look: &Look, open: &[RolloutView]) -> BTreeMap<(bool, String, u16), Vec<Seat>> {
    let mut sets: BTreeMap<(bool, String, u16), Vec<Seat>> = BTreeMap::new();
    for ((host, vm), card) in &look.vms {
        let mut units = open.iter().flat_map(|view| &view.rollout.units);
        let unit = units.find(|unit| unit.takes(host, Some(vm)));
        let key = match &card.set {
            Some(set) => (false, set.clone(), card.domain),
            None => (true, String::new(), 0),
        };
        sets.entry(key).or_default().push(Seat {
            vm: vm.to_string(),
            host: host.to_string(),
            release: card.release.clone(),
            state: card.state,
            health: card.health,
            phase: unit.map(|unit| unit.phase),
        });
    }
    sets
}
