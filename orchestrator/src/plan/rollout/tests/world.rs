//! A small fleet that does what the planner says, badly.

use std::time::Duration;

use proptest::prelude::*;
use typed_index_collections::TiVec;

use super::super::fleet::{Column, Fleet, Ix};
use super::super::layout::{Layout, Remedy, Unit};
use super::super::seen::{Breach, Gate, Health, HostSeen, Phase, Releases, Seen, VmSeen};
use super::super::{Plan, Rollout, State, Way, plan};
use crate::model::{Amount, AtOnce, Domain, DomainCount, Moment, Policy, Rung, Stage};

/// What a case is made of; all else follows from `seed`.
#[derive(Clone, Debug)]
pub(super) struct Case {
    pub(super) seed: u64,
    pub(super) hosts: usize,
    pub(super) vms: usize,
    pub(super) sets: usize,
    pub(super) domains: u8,
    pub(super) whole_hosts: bool,
    pub(super) policy: Policy,
    pub(super) weather: Weather,
    /// For how many turns things go wrong.
    pub(super) storm: usize,
}

/// How likely each thing is, in a turn, for each that it can happen to.
#[derive(Clone, Debug, Default)]
pub(super) struct Weather {
    /// A swap is kept.
    pub(super) kept: f64,
    /// A swap takes another turn.
    pub(super) slow: f64,
    /// A swap hangs.
    pub(super) hang: f64,
    /// The new release breaks its guest.
    pub(super) bad_release: f64,
    /// A swap's report is beyond a limit.
    pub(super) breach: f64,
    /// A guest falls ill by itself, is switched off, is busy, or recovers.
    pub(super) guests: f64,
    /// A host vanishes, is cordoned, loses a release, or recovers.
    pub(super) hosts: f64,
    /// A VM is excluded, the rollout is paused, resumed or aborted.
    pub(super) hands: f64,
    /// A gate fails, or is mute.
    pub(super) gates: f64,
}

fn seconds(range: std::ops::Range<u64>) -> impl Strategy<Value = Duration> {
    range.prop_map(Duration::from_secs)
}

fn amount() -> impl Strategy<Value = Amount> {
    prop_oneof![
        (0..4_u32).prop_map(Amount::Count),
        (0..60_u16).prop_map(Amount::percent),
    ]
}

fn policy() -> impl Strategy<Value = Policy> {
    let size = prop_oneof![
        (1..4_u32).prop_map(Amount::Count),
        (1..50_u16).prop_map(Amount::percent)
    ];
    let stage = (size, seconds(0..600)).prop_map(|(size, bake)| Stage { size, bake });
    let at_once = (
        1..12_u32,
        1..3_u32,
        proptest::option::of(1..4_u32),
        proptest::option::of(1..6_u32),
    );
    let at_once = at_once.prop_map(|(total, per_host, per_rack, per_zone)| AtOnce {
        total,
        per_host,
        per_rack,
        per_zone,
    });
    let times = (
        seconds(0..60),
        seconds(61..300),
        seconds(0..200),
        seconds(0..90),
    );
    let window = prop_oneof![
        3 => Just(vec![]),
        1 => Just(vec!["daily 02:00 6m Europe/Berlin".to_owned()]),
        1 => Just(vec!["Mon,Wed 12:00 6m UTC".to_owned(), "Sat 00:00 7m UTC".to_owned()]),
    ];
    (
        proptest::collection::vec(stage, 0..3),
        (amount(), proptest::option::of(amount()), amount()),
        at_once,
        times,
        (1..4_u8, any::<bool>(), any::<bool>()),
        window,
    )
        .prop_map(
            |(stages, budgets, at_once, times, (tries, roll_back, between), windows)| Policy {
                stages,
                set_budget: budgets.0,
                fleet_budget: budgets.1,
                failures: budgets.2,
                at_once,
                well_for: times.0,
                deadline: times.1,
                between_domains: if between { times.2 } else { Duration::ZERO },
                retry_after: times.3,
                tries,
                roll_back,
                windows: windows
                    .iter()
                    .map(|text| text.parse().expect("a window"))
                    .collect(),
                ..Policy::default()
            },
        )
}

fn weather() -> impl Strategy<Value = Weather> {
    let rarely = || prop_oneof![2 => Just(0.0), 2 => 0.0..0.05, 1 => 0.0..0.5];
    let swaps = (rarely(), rarely(), rarely(), rarely(), 0.0..0.7);
    let others = (rarely(), rarely(), rarely(), rarely());
    (swaps, others).prop_map(|(swaps, others)| Weather {
        kept: swaps.0,
        hang: swaps.1,
        bad_release: swaps.2,
        breach: swaps.3,
        slow: swaps.4,
        guests: others.0 * 0.3,
        hosts: others.1 * 0.3,
        hands: others.2 * 0.2,
        gates: others.3,
    })
}

/// Any case.
pub(super) fn case() -> impl Strategy<Value = Case> {
    let size = (1..9_usize, 0..30_usize, 0..4_usize, 1..6_u8);
    (
        any::<u64>(),
        size,
        any::<bool>(),
        policy(),
        weather(),
        0..80_usize,
    )
        .prop_map(
            |(seed, (hosts, vms, sets, domains), whole_hosts, policy, weather, storm)| Case {
                seed,
                hosts,
                vms,
                sets,
                domains,
                whole_hosts,
                policy,
                weather,
                storm,
            },
        )
}

/// A fleet in which a rollout goes on.
pub(super) struct World {
    pub(super) fleet: Fleet,
    pub(super) rollout: Rollout,
    pub(super) seen: Seen,
    weather: Weather,
    rng: fastrand::Rng,
    /// Where each unit's truth is kept, which the planner only sees parts of.
    truth: Column<Unit, Truth>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Truth {
    begun_forward: u32,
    runs_new: bool,
    broken_by_it: bool,
    hangs: bool,
}

impl World {
    pub(super) fn new(case: &Case) -> Self {
        let mut rng = fastrand::Rng::with_seed(case.seed);
        let fleet = fleet(case, &mut rng);
        let rung = match (case.whole_hosts, case.seed % 2) {
            (true, 0) => Rung::Kernel,
            (true, _) => Rung::Kvm,
            (false, _) => Rung::Vmm,
        };
        let remedy = Remedy::contained_in([rung]).suppose_built(rung);
        let layout = Layout::new(&fleet, &remedy, &case.policy.stages, case.seed, |_| true);
        let layout = layout.expect("a layout");
        case.policy
            .check()
            .expect("a policy by which something can be done");
        let host = HostSeen {
            up: true,
            releases: Releases::default().with(rung),
            ..Default::default()
        };
        let vm = VmSeen {
            health: Health::Well,
            ..Default::default()
        };
        let seen = Seen {
            // A Tuesday.
            now: Moment(1_795_500_000_000_000_000),
            hosts: vec![host; fleet.hosts.len()].into(),
            vms: vec![vm; fleet.vms.len()].into(),
            units: TiVec::from(vec![Default::default(); layout.units.len()]),
            gates: vec![Gate::Pass; 2],
            breaches: vec![],
        };
        let truth = vec![Truth::default(); layout.units.len()].into();
        let rollout = Rollout {
            state: State::Running,
            policy: case.policy.clone(),
            layout,
            forgiven: 0,
        };
        Self {
            fleet,
            rollout,
            seen,
            weather: case.weather.clone(),
            rng,
            truth,
        }
    }

    pub(super) fn turn(&self) -> Plan {
        plan(&self.rollout, &self.fleet, &self.seen)
    }

    pub(super) fn ever_begun(&self) -> impl Iterator<Item = Ix<Unit>> {
        let rows = self.truth.iter_enumerated();
        rows.filter(|(_, truth)| truth.begun_forward > 0)
            .map(|(ix, _)| ix)
    }

    pub(super) fn runs_new(&self, ix: Ix<Unit>) -> bool {
        self.truth[ix].runs_new
    }

    pub(super) fn times_begun(&self, ix: Ix<Unit>) -> u32 {
        self.truth[ix].begun_forward
    }

    /// Nothing goes wrong from now on, and what went wrong by itself is mended.
    pub(super) fn calm(&mut self) {
        let release = self.weather.bad_release;
        self.weather = Weather {
            bad_release: release,
            ..Weather::default()
        };
        let now = self.seen.now;
        for host in &mut self.seen.hosts {
            if !host.up {
                host.since = now;
            }
            *host = HostSeen {
                up: true,
                since: host.since,
                cordoned: false,
                clock_off: false,
                releases: Releases::ALL,
            };
        }
        self.seen.gates.fill(Gate::Pass);
        for vm in self.fleet.vms.keys() {
            self.seen.vms[vm].busy = false;
            self.seen.vms[vm].excluded = false;
            self.heal(vm);
        }
        if self.rollout.state == State::Paused {
            self.rollout.state = State::Running;
        }
    }

    fn set_health(&mut self, vm: Ix<super::super::fleet::Vm>, health: Health) {
        let row = &mut self.seen.vms[vm];
        if row.health != health {
            row.health = health;
            row.since = self.seen.now;
        }
    }

    /// Mends a guest, unless it is the new release that breaks it.
    fn heal(&mut self, vm: Ix<super::super::fleet::Vm>) {
        let unit = self.rollout.layout.unit_of[vm];
        if !unit.is_some_and(|ix| self.truth[ix].broken_by_it) {
            self.set_health(vm, Health::Well);
        }
    }

    pub(super) fn carry_out(&mut self, plan: &Plan) {
        for verdict in &plan.verdicts {
            self.set_phase(verdict.unit, verdict.phase);
        }
        for begin in &plan.begin {
            let progress = &mut self.seen.units[begin.unit];
            let first_back = begin.way == Way::Back && progress.phase != Phase::BackWaiting;
            progress.tries = if first_back { 1 } else { progress.tries + 1 };
            let truth = &mut self.truth[begin.unit];
            truth.begun_forward += u32::from(begin.way == Way::Forward);
            truth.hangs = self.rng.f64() < self.weather.hang;
            self.set_phase(
                begin.unit,
                match begin.way {
                    Way::Forward => Phase::Begun,
                    Way::Back => Phase::BackBegun,
                },
            );
        }
        if let Some((state, _)) = plan.becomes {
            self.rollout.state = state;
        }
        self.pass_time(plan);
        self.execute();
        self.weather_happens();
        let units = &self.seen.units;
        self.seen
            .breaches
            .retain(|&(ix, _)| units[ix].phase == Phase::Watched);
    }

    fn pass_time(&mut self, plan: &Plan) {
        let idle = plan.begin.is_empty() && !self.seen.units.iter().any(|u| u.phase.is_in_flight());
        let step = Duration::from_secs(self.rng.u64(1..60));
        let next = self.seen.now.after(step);
        // Where only time can help the next turn is when it does.
        self.seen.now = match plan.look_again {
            Some(at) if idle => at.max(self.seen.now),
            _ => next,
        };
    }

    fn set_phase(&mut self, ix: Ix<Unit>, phase: Phase) {
        let progress = &mut self.seen.units[ix];
        progress.phase = phase;
        progress.since = self.seen.now;
    }

    fn execute(&mut self) {
        for ix in self.rollout.layout.units.keys() {
            let phase = self.seen.units[ix].phase;
            if !matches!(phase, Phase::Begun | Phase::BackBegun) || self.truth[ix].hangs {
                continue;
            }
            if self.rng.f64() < self.weather.slow {
                continue;
            }
            let kept = self.rng.f64() < self.weather.kept;
            let next = match (phase, kept) {
                (Phase::Begun, true) => Phase::Waiting,
                (Phase::Begun, false) => Phase::Watched,
                (_, true) => Phase::BackWaiting,
                (_, false) => Phase::BackWatched,
            };
            if !kept {
                self.moved(ix, next);
            }
            self.set_phase(ix, next);
        }
    }

    fn moved(&mut self, ix: Ix<Unit>, next: Phase) {
        let forward = next == Phase::Watched;
        let bad = forward && self.rng.f64() < self.weather.bad_release;
        if forward && self.rng.f64() < self.weather.breach {
            self.seen.breaches.push((ix, Breach::Blackout));
            self.seen.breaches.sort_unstable();
        }
        self.truth[ix].runs_new = forward;
        self.truth[ix].broken_by_it = bad;
        let members = self.rollout.layout.units[ix].members(&self.fleet).to_vec();
        for vm in members {
            if bad {
                self.set_health(vm, Health::Ill);
            } else if !forward && self.seen.vms[vm].health == Health::Ill {
                self.heal(vm);
            }
        }
    }

    fn weather_happens(&mut self) {
        let now = self.seen.now;
        for vm in self.fleet.vms.keys() {
            if self.rng.f64() >= self.weather.guests {
                continue;
            }
            match self.rng.u8(0..8) {
                0 | 1 => self.set_health(vm, Health::Ill),
                2 => self.set_health(vm, Health::Off),
                3 => self.seen.vms[vm].busy ^= true,
                _ => self.heal(vm),
            }
        }
        for host in &mut self.seen.hosts {
            if self.rng.f64() >= self.weather.hosts {
                continue;
            }
            match self.rng.u8(0..6) {
                0 | 1 => {
                    host.up ^= true;
                    host.since = now;
                }
                2 => host.cordoned ^= true,
                3 => host.releases = Releases::default(),
                4 => host.clock_off ^= true,
                _ => host.releases = Releases::ALL,
            }
        }
        for gate in &mut self.seen.gates {
            if self.rng.f64() < self.weather.gates {
                *gate = [Gate::Fail, Gate::Mute, Gate::Pass, Gate::Pass][self.rng.usize(0..4)];
            }
        }
        self.hands_happen();
    }

    fn hands_happen(&mut self) {
        for vm in &mut self.seen.vms {
            if self.rng.f64() < self.weather.hands * 0.2 {
                vm.excluded ^= true;
            }
        }
        if self.rng.f64() >= self.weather.hands {
            return;
        }
        let failures = self
            .seen
            .units
            .iter()
            .filter(|u| u.phase.is_failure())
            .count();
        self.rollout.state = match (self.rollout.state, self.rng.u8(0..12)) {
            (State::Running | State::Paused, 0) => State::Aborting,
            (State::Running, _) => State::Paused,
            (State::Paused, _) => State::Running,
            (State::Stopped, _) => {
                self.rollout.forgiven = u32::try_from(failures).expect("few");
                State::Running
            }
            (state, _) => state,
        };
    }
}

fn fleet(case: &Case, rng: &mut fastrand::Rng) -> Fleet {
    let mut fleet = Fleet::default();
    let zones: Vec<_> = (0..2)
        .map(|n| fleet.add_zone(format!("zone-{n}")))
        .collect();
    let racks: Vec<_> = (0..4)
        .map(|n| fleet.add_rack(format!("rack-{n}"), zones[n % 2]))
        .collect();
    for n in 0..case.hosts {
        fleet.add_host(format!("host-{n}"), racks[rng.usize(0..4)]);
    }
    let count = DomainCount::new(case.domains).expect("few");
    let sets: Vec<_> = (0..case.sets)
        .map(|n| fleet.add_set(format!("set-{n}"), count))
        .collect();
    for n in 0..case.vms {
        let host = Ix::from(rng.usize(0..case.hosts));
        let seat = rng.choice(&sets).filter(|_| rng.u8(0..4) > 0).map(|&set| {
            let given = Domain::new(rng.u8(0..case.domains)).expect("few");
            (set, (rng.u8(0..5) == 0).then_some(given))
        });
        fleet.add_vm(format!("vm-{n}"), host, seat);
    }
    fleet
}
