//! The fleet as the planner reads it: tables, and numbers that lead from one to the other.
//!
//! A fleet of a million VMs is looked at anew for every step, so rows are small and are found
//! by number. Names are for those who read what was planned.

use std::fmt;
use std::hash::{Hash, Hasher};
use std::marker::PhantomData;

use typed_index_collections::TiVec;

use crate::model::{Domain, DomainCount};

/// The number of a row in the table of `Of`: numbers of different tables don't mix.
pub struct Ix<Of>(u32, PhantomData<fn() -> Of>);

/// A table whose rows are found by their own kind of number.
pub type Table<Of> = TiVec<Ix<Of>, Of>;
/// A column beside the table of `Of`.
pub type Column<Of, T> = TiVec<Ix<Of>, T>;

/// A host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Host {
    /// Its name.
    pub name: Box<str>,
    /// Where it stands.
    pub rack: Ix<Rack>,
}

/// A rack, or whatever fails together: a fault domain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rack {
    /// Its name.
    pub name: Box<str>,
    /// Where it stands.
    pub zone: Ix<Zone>,
}

/// A zone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Zone {
    /// Its name.
    pub name: Box<str>,
}

/// An availability set: VMs that do the same work, so that some may be away.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Set {
    /// Its name.
    pub name: Box<str>,
    /// How many update domains it has.
    pub domains: DomainCount,
    /// How many members it has.
    pub members: u32,
}

/// A VM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Vm {
    /// Its name.
    pub name: Box<str>,
    /// Who runs it.
    pub host: Ix<Host>,
    /// Its place in an availability set, if it is in one.
    pub seat: Option<Seat>,
}

/// A VM's place in an availability set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seat {
    /// The set.
    pub set: Ix<Set>,
    /// The update domain in it.
    pub domain: Domain,
}

/// All hosts and VMs, and how they belong together.
#[derive(Clone, Debug, Default)]
pub struct Fleet {
    /// Zones.
    pub zones: Table<Zone>,
    /// Racks.
    pub racks: Table<Rack>,
    /// Hosts.
    pub hosts: Table<Host>,
    /// Availability sets.
    pub sets: Table<Set>,
    /// VMs.
    pub vms: Table<Vm>,
    /// The VMs of each host, in the order in which they came.
    guests: Column<Host, Vec<Ix<Vm>>>,
}

impl Fleet {
    /// Adds a zone.
    pub fn add_zone(&mut self, name: impl Into<Box<str>>) -> Ix<Zone> {
        self.zones.push_and_get_key(Zone { name: name.into() })
    }

    /// Adds a rack.
    pub fn add_rack(&mut self, name: impl Into<Box<str>>, zone: Ix<Zone>) -> Ix<Rack> {
        let name = name.into();
        self.racks.push_and_get_key(Rack { name, zone })
    }

    /// Adds a host.
    pub fn add_host(&mut self, name: impl Into<Box<str>>, rack: Ix<Rack>) -> Ix<Host> {
        let name = name.into();
        self.guests.push(Vec::new());
        self.hosts.push_and_get_key(Host { name, rack })
    }

    /// Adds an availability set that has no members yet.
    pub fn add_set(&mut self, name: impl Into<Box<str>>, domains: DomainCount) -> Ix<Set> {
        let name = name.into();
        self.sets.push_and_get_key(Set {
            name,
            domains,
            members: 0,
        })
    }

    /// Adds a VM. In a set it gets the update domain whose turn it is, unless one is given.
    pub fn add_vm(
        &mut self,
        name: impl Into<Box<str>>,
        host: Ix<Host>,
        seat: Option<(Ix<Set>, Option<Domain>)>,
    ) -> Ix<Vm> {
        let seat = seat.map(|(set, given)| {
            let row = &mut self.sets[set];
            let next = Domain::of_joined(row.members as usize, row.domains);
            row.members += 1;
            let domain = given.unwrap_or(next);
            Seat { set, domain }
        });
        let name = name.into();
        let vm = self.vms.push_and_get_key(Vm { name, host, seat });
        self.guests[host].push(vm);
        vm
    }

    /// The VMs on a host.
    pub fn guests(&self, host: Ix<Host>) -> &[Ix<Vm>] {
        &self.guests[host]
    }

    /// The zone in which a host stands.
    pub fn zone_of(&self, host: Ix<Host>) -> Ix<Zone> {
        self.racks[self.hosts[host].rack].zone
    }
}

impl<Of> From<usize> for Ix<Of> {
    /// # Panics
    /// More rows than a number can tell apart: 4 thousand million.
    fn from(number: usize) -> Self {
        let number = u32::try_from(number).expect("tables have fewer than 2^32 rows");
        Self(number, PhantomData)
    }
}

impl<Of> From<Ix<Of>> for usize {
    fn from(ix: Ix<Of>) -> Self {
        ix.0 as Self
    }
}

// By hand: derived ones would ask the same of `Of`, of which there is nothing in here.
impl<Of> Clone for Ix<Of> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<Of> Copy for Ix<Of> {}
impl<Of> PartialEq for Ix<Of> {
    fn eq(&self, other: &Self) -> bool {
        self.0 == other.0
    }
}
impl<Of> Eq for Ix<Of> {}
impl<Of> PartialOrd for Ix<Of> {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}
impl<Of> Ord for Ix<Of> {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.0.cmp(&other.0)
    }
}
impl<Of> Hash for Ix<Of> {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.0.hash(state);
    }
}
impl<Of> fmt::Debug for Ix<Of> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "#{}", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn members_join_domains_in_turn_unless_one_is_given() {
        let mut fleet = Fleet::default();
        let zone = fleet.add_zone("z");
        let rack = fleet.add_rack("r", zone);
        let host = fleet.add_host("h", rack);
        let set = fleet.add_set("web", DomainCount::new(2).expect("two"));
        let given = Domain::new(7).expect("seven");
        for domain in [None, None, Some(given), None] {
            fleet.add_vm("vm", host, Some((set, domain)));
        }
        let domains = fleet.vms.iter().filter_map(|vm| vm.seat);
        let domains: Vec<u8> = domains.map(|seat| seat.domain.number()).collect();
        assert_eq!(domains, [0, 1, 7, 1]);
        assert_eq!((fleet.sets[set].members, fleet.guests(host).len()), (4, 4));
        assert_eq!(fleet.zone_of(host), zone);
    }
}
