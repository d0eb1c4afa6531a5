//! A fleet to simulate: zones, racks of forty, and sets whose members are on different hosts.

use crate::model::DomainCount;
use crate::plan::rollout::fleet::{Fleet, Ix};

use super::scenario::Scenario;

const ZONES: usize = 3;
const HOSTS_IN_RACK: usize = 40;

/// Makes the scenario's fleet. One VM in ten is in no set.
pub(super) fn fleet(scenario: &Scenario) -> Fleet {
    let hosts = scenario.size.hosts.max(1) as usize;
    let vms = scenario.size.vms as usize;
    let mut fleet = Fleet::default();
    let zones: Vec<_> = (0..ZONES)
        .map(|n| fleet.add_zone(format!("zone-{n}")))
        .collect();
    let mut racks = Vec::new();
    for host in 0..hosts {
        if host % HOSTS_IN_RACK == 0 {
            let zone = zones[racks.len() % ZONES];
            racks.push(fleet.add_rack(format!("rack-{}", racks.len()), zone));
        }
        fleet.add_host(format!("host-{host}"), racks[host / HOSTS_IN_RACK]);
    }
    let size = scenario.set_size.max(1) as usize;
    // Members of a set are neighbours by number, and so are on hosts far from one another.
    let stride = stride(hosts);
    let mut set = None;
    for vm in 0..vms {
        let host = Ix::from(vm * stride % hosts);
        let in_set = vm % 10 != 9;
        let joined = vm - vm / 10;
        if in_set && (set.is_none() || joined % size == 0) {
            set = Some(fleet.add_set(format!("set-{vm}"), DomainCount::default()));
        }
        fleet.add_vm(
            format!("vm-{vm}"),
            host,
            set.filter(|_| in_set).map(|set| (set, None)),
        );
    }
    fleet
}

/// A step through all hosts that visits each before any twice: about 0.6 of them, and coprime.
fn stride(hosts: usize) -> usize {
    let from = hosts * 618 / 1_000;
    let found = (from..hosts).find(|&step| coprime(step, hosts));
    found.unwrap_or(1)
}

fn coprime(a: usize, b: usize) -> bool {
    if b == 0 { a == 1 } else { coprime(b, a % b) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simulate::Size;

    #[test]
    fn guests_are_spread_and_sets_lie_on_different_hosts() {
        let size = Size {
            hosts: 100,
            vms: 1_000,
        };
        let fleet = fleet(&Scenario::ordinary(size, 1));
        let on: Vec<usize> = fleet
            .hosts
            .keys()
            .map(|host| fleet.guests(host).len())
            .collect();
        assert!(on.iter().all(|&guests| guests == 10), "{on:?}");
        for set in fleet.sets.keys() {
            let members = fleet
                .vms
                .iter()
                .filter(|vm| vm.seat.is_some_and(|s| s.set == set));
            let mut hosts: Vec<_> = members.map(|vm| vm.host).collect();
            assert!((1..=12).contains(&hosts.len()), "{}", hosts.len());
            hosts.sort_unstable();
            let all = hosts.len();
            hosts.dedup();
            assert_eq!(hosts.len(), all, "two members on one host");
        }
        let alone = fleet.vms.iter().filter(|vm| vm.seat.is_none()).count();
        assert_eq!(alone, 100);
    }
}
