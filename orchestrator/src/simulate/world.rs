//! The pretended hosts, and the run of a rollout over them.

use std::time::Duration;

use serde::Serialize;

use super::cost::processor_time;
use super::events::{Chance, Event, Events};
use super::place;
use super::scenario::Scenario;
use crate::model::Moment;
use crate::plan::rollout::fleet::{Column, Fleet, Host, Ix, Vm};
use crate::plan::rollout::layout::{Layout, LayoutError, Remedy, Unit};
use crate::plan::rollout::seen::{Health, HostSeen, Phase, Progress, Releases, Seen, VmSeen};
use crate::plan::rollout::{Plan, Rollout, State, Way, plan};

/// Between two looks of the driver, while something is under way.
const LOOK: Duration = Duration::from_secs(30);
/// A simulated rollout that takes longer is given up.
const PATIENCE: Duration = Duration::from_secs(60 * 86_400);
/// A Tuesday at noon.
const START: Moment = Moment(1_795_521_600_000_000_000);

/// How things stood at one look.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Sample {
    /// Hours since the start.
    pub hours: f64,
    /// VMs on the new release.
    pub on_new: u32,
    /// VMs whose swap is under way or that are watched after it.
    pub held: u32,
    /// VMs that are not well because of the release.
    pub broken: u32,
    /// VMs that are not well for other reasons.
    pub ill: u32,
}

/// What became of a rollout.
#[derive(Clone, Debug, Serialize)]
pub struct Outcome {
    /// The scenario.
    pub name: String,
    /// Its seed.
    pub seed: u64,
    /// Hosts.
    pub hosts: u32,
    /// VMs.
    pub vms: u32,
    /// How the rollout ended; `unfinished` if it did not.
    pub ended: String,
    /// When it ended, in hours.
    pub hours: f64,
    /// Hours until half, 90 % and 99 % of the VMs were on the new release; absent if never.
    pub hours_to: [Option<f64>; 3],
    /// VMs that were ever on the new release, or on the way to it.
    pub touched: u32,
    /// VMs that the release broke.
    pub broken: u32,
    /// Swaps that were kept, and tried again.
    pub kept: u32,
    /// VM-hours lost to the release.
    pub vm_hours_lost: f64,
    /// VM-hours lost to hosts and guests that failed by themselves meanwhile.
    pub vm_hours_lost_otherwise: f64,
    /// The most VMs that were held at once.
    pub most_held: u32,
    /// Sets of which two update domains were ever held at once. Always none.
    pub sets_with_two_domains: u32,
    /// How often the planner was asked.
    pub plans: u32,
    /// What that cost on average, and at the worst, in milliseconds of processor time.
    pub plan_ms: [f64; 2],
    /// What the whole simulation took, in seconds of processor time.
    pub took_s: f64,
    /// How things stood over time; not in JSON, where it would be most of it.
    #[serde(skip)]
    pub samples: Vec<Sample>,
}

struct World<'a> {
    scenario: &'a Scenario,
    fleet: Fleet,
    rollout: Rollout,
    seen: Seen,
    events: Events,
    chance: Chance,
    /// Units whose new release broke them.
    breaks: Column<Unit, bool>,
    /// Guests that fell ill for reasons of their own.
    ill: Column<Vm, bool>,
    /// Until when a host is down.
    down_until: Column<Host, Moment>,
    count: Count,
}

#[derive(Default)]
struct Count {
    on_new: u32,
    held: u32,
    broken: u32,
    ill: u32,
    ever_broken: u32,
    touched: u32,
    kept: u32,
    plans: u32,
    planning: Duration,
    longest: Duration,
    two_domains: u32,
}

/// Runs a scenario.
///
/// # Panics
/// The scenario's policy or rung can't be: [`Scenario`]s are checked by those who make them.
pub fn run(scenario: &Scenario) -> Outcome {
    let began = processor_time();
    let mut world = World::new(scenario).expect("a rung that is supposed to be built can be taken");
    let mut samples = vec![world.sample()];
    while !world.rollout.state.is_over() && world.seen.now.since(START) < PATIENCE {
        let plan = world.plan();
        world.carry_out(&plan);
        if world.rollout.state == State::Stopped {
            break;
        }
        let Some(next) = world.next_look(&plan) else {
            break;
        };
        world.pass_to(next);
        samples.push(world.sample());
    }
    let took = processor_time().saturating_sub(began);
    world.outcome(samples, took)
}

impl<'a> World<'a> {
    fn new(scenario: &'a Scenario) -> Result<Self, LayoutError> {
        let fleet = place::fleet(scenario);
        let rung = scenario.rung;
        let remedy = Remedy::contained_in([rung]).suppose_built(rung);
        let stages = &scenario.policy.stages;
        let layout = Layout::new(&fleet, &remedy, stages, scenario.seed, |_| true)?;
        let vm = VmSeen {
            health: Health::Well,
            ..VmSeen::default()
        };
        let host = HostSeen {
            up: true,
            releases: Releases::default().with(rung),
            ..HostSeen::default()
        };
        let seen = Seen {
            now: START,
            hosts: vec![host; fleet.hosts.len()].into(),
            vms: vec![vm; fleet.vms.len()].into(),
            units: vec![Progress::default(); layout.units.len()].into(),
            ..Seen::default()
        };
        let mut world = Self {
            breaks: vec![false; layout.units.len()].into(),
            ill: vec![false; fleet.vms.len()].into(),
            down_until: vec![Moment::default(); fleet.hosts.len()].into(),
            rollout: Rollout {
                state: State::Running,
                policy: scenario.policy.clone(),
                layout,
                forgiven: 0,
            },
            scenario,
            fleet,
            seen,
            events: Events::default(),
            chance: Chance::new(scenario.seed),
            count: Count::default(),
        };
        world.next_failure(START, Event::AHostFails);
        world.next_failure(START, Event::AGuestFails);
        Ok(world)
    }

    fn plan(&mut self) -> Plan {
        let began = processor_time();
        let plan = plan(&self.rollout, &self.fleet, &self.seen);
        let took = processor_time().saturating_sub(began);
        self.count.plans += 1;
        self.count.planning += took;
        self.count.longest = self.count.longest.max(took);
        plan
    }

    // The executor.

    fn carry_out(&mut self, plan: &Plan) {
        for verdict in &plan.verdicts {
            self.set_phase(verdict.unit, verdict.phase, self.seen.now);
        }
        // The store takes so many records a second, and each step waits for its own.
        let each = Duration::from_secs(1) / self.scenario.store_per_second.max(1);
        for (n, begin) in (1..).zip(&plan.begin) {
            let from = self.seen.now.after(each * n);
            let again = self.seen.units[begin.unit].phase == Phase::BackWaiting;
            let progress = &mut self.seen.units[begin.unit];
            let first_back = begin.way == Way::Back && !again;
            progress.tries = if first_back { 1 } else { progress.tries + 1 };
            let phase = match begin.way {
                Way::Forward => Phase::Begun,
                Way::Back => Phase::BackBegun,
            };
            if begin.way == Way::Forward && progress.tries == 1 {
                self.count.touched += self.members(begin.unit);
            }
            self.set_phase(begin.unit, phase, from);
            let ends = from.after(self.swap_takes(begin.way));
            let event = Event::SwapEnds(begin.unit, begin.way);
            self.events.add(ends, event);
        }
        self.check_domains(plan);
        if let Some((state, _)) = plan.becomes {
            self.rollout.state = state;
        }
    }

    fn swap_takes(&mut self, way: Way) -> Duration {
        let swap = self.chance.about(self.scenario.swap);
        let notice = self.scenario.notice;
        // Who is broken isn't asked.
        if notice.is_zero() || way == Way::Back {
            return swap;
        }
        let minute = Duration::from_secs(60);
        if self.chance.is(self.scenario.answer) {
            swap + self.chance.wait(minute).min(notice)
        } else {
            swap + notice
        }
    }

    /// Counts sets of which two domains are held, by what is begun and nothing of the planner's.
    fn check_domains(&mut self, plan: &Plan) {
        for begin in &plan.begin {
            let unit = &self.rollout.layout.units[begin.unit];
            for &vm in unit.members(&self.fleet) {
                let Some(seat) = self.fleet.vms[vm].seat else {
                    continue;
                };
                // Members of a set are near one another by number.
                let set = seat.set;
                let own = usize::from(vm);
                let reach = 2 * self.scenario.set_size as usize;
                let near = own.saturating_sub(reach)..(own + reach).min(self.fleet.vms.len());
                let others = near.map(Ix::<Vm>::from).filter(|&vm| {
                    let other = self.fleet.vms[vm].seat;
                    other.is_some_and(|o| o.set == set && o.domain != seat.domain)
                });
                let mut held = others.filter_map(|vm| self.rollout.layout.unit_of[vm]);
                let two = held.any(|ix| self.seen.units[ix].phase.is_in_flight());
                self.count.two_domains += u32::from(two);
            }
        }
    }

    fn members(&self, ix: Ix<Unit>) -> u32 {
        let members = self.rollout.layout.units[ix].members(&self.fleet);
        u32::try_from(members.len()).unwrap_or(u32::MAX)
    }

    fn set_phase(&mut self, ix: Ix<Unit>, phase: Phase, since: Moment) {
        let members = self.members(ix);
        let progress = &mut self.seen.units[ix];
        match (progress.phase.is_in_flight(), phase.is_in_flight()) {
            (false, true) => self.count.held += members,
            (true, false) => self.count.held -= members,
            _ => {}
        }
        progress.phase = phase;
        progress.since = since;
    }

    // What happens.

    /// When to look again; none if nothing could change.
    fn next_look(&self, plan: &Plan) -> Option<Moment> {
        let soon = self.seen.now.after(LOOK);
        if self.count.held > 0 || !plan.verdicts.is_empty() || plan.becomes.is_some() {
            return Some(soon);
        }
        let next = plan
            .look_again
            .into_iter()
            .chain(self.events.next_at())
            .min();
        next.map(|at| at.max(soon))
    }

    fn pass_to(&mut self, until: Moment) {
        while let Some((at, event)) = self.events.pop_until(until) {
            self.seen.now = at;
            self.happen(at, event);
        }
        self.seen.now = until;
    }

    fn happen(&mut self, at: Moment, event: Event) {
        match event {
            Event::SwapEnds(ix, way) => self.swap_ends(at, ix, way),
            Event::Breaks(ix) => self.break_guests(at, ix),
            Event::AHostFails => {
                self.a_host_fails(at);
                self.next_failure(at, event);
            }
            Event::AGuestFails => {
                let vm = Ix::from(self.chance.one_of(self.fleet.vms.len()));
                if self
                    .seen
                    .vms
                    .get(vm)
                    .is_some_and(|seen| seen.health == Health::Well)
                {
                    self.set_health(vm, Health::Ill, at);
                    self.ill[vm] = true;
                    self.count.ill += 1;
                    let heals = at.after(self.chance.wait(self.scenario.guest_fails.1));
                    self.events.add(heals, Event::GuestHeals(vm));
                }
                self.next_failure(at, event);
            }
            Event::HostHeals(host) => {
                self.seen.hosts[host].up = true;
                self.seen.hosts[host].since = at;
                self.count.ill -= self.guests(host);
            }
            Event::GuestHeals(vm) => {
                self.count.ill -= 1;
                self.ill[vm] = false;
                let unit = self.rollout.layout.unit_of[vm];
                if unit.is_some_and(|ix| self.breaks[ix]) {
                    self.count.broken += 1;
                } else {
                    self.set_health(vm, Health::Well, at);
                }
            }
        }
    }

    fn a_host_fails(&mut self, at: Moment) {
        let host = Ix::from(self.chance.one_of(self.fleet.hosts.len()));
        if !self.seen.hosts[host].up {
            return;
        }
        let heals = at.after(self.chance.wait(self.scenario.host_fails.1));
        self.seen.hosts[host].up = false;
        self.seen.hosts[host].since = at;
        self.down_until[host] = heals;
        self.count.ill += self.guests(host);
        self.events.add(heals, Event::HostHeals(host));
    }

    fn guests(&self, host: Ix<Host>) -> u32 {
        u32::try_from(self.fleet.guests(host).len()).unwrap_or(u32::MAX)
    }

    fn next_failure(&mut self, now: Moment, event: Event) {
        let (each, count) = match event {
            Event::AHostFails => (self.scenario.host_fails.0, self.scenario.size.hosts),
            _ => (self.scenario.guest_fails.0, self.scenario.size.vms),
        };
        if count > 0 {
            let wait = self.chance.wait(each / count);
            self.events.add(now.after(wait), event);
        }
    }

    fn swap_ends(&mut self, at: Moment, ix: Ix<Unit>, way: Way) {
        let phase = self.seen.units[ix].phase;
        if !matches!(phase, Phase::Begun | Phase::BackBegun) {
            // It took too long, and was judged so.
            return;
        }
        let host = self.rollout.layout.units[ix].host;
        if !self.seen.hosts[host].up {
            let event = Event::SwapEnds(ix, way);
            self.events
                .add(self.down_until[host].after(self.scenario.swap), event);
            return;
        }
        let kept = self.chance.is(self.scenario.kept);
        self.count.kept += u32::from(kept);
        let next = match (way, kept) {
            (Way::Forward, true) => Phase::Waiting,
            (Way::Forward, false) => Phase::Watched,
            (Way::Back, true) => Phase::BackWaiting,
            (Way::Back, false) => Phase::BackWatched,
        };
        self.set_phase(ix, next, at);
        match next {
            Phase::Watched => {
                self.count.on_new += self.members(ix);
                if self.chance.is(self.scenario.release.breaks) {
                    let shows = self.chance.wait(self.scenario.release.shows_after);
                    self.events.add(at.after(shows), Event::Breaks(ix));
                }
            }
            Phase::BackWatched => {
                self.count.on_new -= self.members(ix);
                self.mend(at, ix);
            }
            _ => {}
        }
    }

    fn break_guests(&mut self, at: Moment, ix: Ix<Unit>) {
        let phase = self.seen.units[ix].phase;
        if matches!(phase, Phase::BackWatched | Phase::Back) {
            return;
        }
        self.breaks[ix] = true;
        for vm in self.rollout.layout.units[ix].members(&self.fleet).to_vec() {
            self.count.ever_broken += 1;
            if !self.ill[vm] {
                self.set_health(vm, Health::Ill, at);
                self.count.broken += 1;
            }
        }
    }

    fn mend(&mut self, at: Moment, ix: Ix<Unit>) {
        if !std::mem::take(&mut self.breaks[ix]) {
            return;
        }
        for vm in self.rollout.layout.units[ix].members(&self.fleet).to_vec() {
            // One that is ill by itself too stays so until it heals.
            if !self.ill[vm] {
                self.set_health(vm, Health::Well, at);
                self.count.broken -= 1;
            }
        }
    }

    fn set_health(&mut self, vm: Ix<Vm>, health: Health, at: Moment) {
        self.seen.vms[vm].health = health;
        self.seen.vms[vm].since = at;
    }

    // What is told of it.

    fn sample(&self) -> Sample {
        Sample {
            hours: self.seen.now.since(START).as_secs_f64() / 3_600.0,
            on_new: self.count.on_new,
            held: self.count.held,
            broken: self.count.broken,
            ill: self.count.ill,
        }
    }

    fn outcome(self, samples: Vec<Sample>, took: Duration) -> Outcome {
        let size = self.scenario.size;
        let hours_to = [0.5, 0.9, 0.99].map(|share| {
            let enough = (f64::from(size.vms) * share).ceil();
            let first = samples
                .iter()
                .find(|s| size.vms > 0 && f64::from(s.on_new) >= enough);
            first.map(|sample| sample.hours)
        });
        let lost = |of: fn(&Sample) -> u32| {
            let steps = samples.windows(2);
            steps
                .map(|pair| f64::from(of(&pair[0])) * (pair[1].hours - pair[0].hours))
                .sum()
        };
        let count = &self.count;
        let ms = |time: Duration| time.as_secs_f64() * 1e3;
        let over = self.rollout.state.is_over() || self.rollout.state == State::Stopped;
        Outcome {
            name: self.scenario.name.clone(),
            seed: self.scenario.seed,
            hosts: size.hosts,
            vms: size.vms,
            ended: if over {
                self.rollout.state.to_string()
            } else {
                "unfinished".into()
            },
            hours: samples.last().map_or(0.0, |sample| sample.hours),
            hours_to,
            touched: count.touched,
            broken: count.ever_broken,
            kept: count.kept,
            vm_hours_lost: lost(|sample| sample.broken),
            vm_hours_lost_otherwise: lost(|sample| sample.ill),
            most_held: samples.iter().map(|sample| sample.held).max().unwrap_or(0),
            sets_with_two_domains: count.two_domains,
            plans: count.plans,
            plan_ms: [ms(count.planning / count.plans.max(1)), ms(count.longest)],
            took_s: took.as_secs_f64(),
            samples,
        }
    }
}
