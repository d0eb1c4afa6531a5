//! Which units are begun, and for every other one why not.
//!
//! The ways back come first, those of guests that are away before all others: they give
//! something back and take nothing. Then the units in the order of the layout, each asked in turn
//! what stands in its way, while all that is begun counts at once.

use super::fleet::{Fleet, Ix, Set, Vm};
use super::layout::Unit;
use super::seen::{Gate, Health, Phase, Progress, Seen};
use super::state::State;
use super::tally::{FullAt, StageTally, Tally, set_allows};
use super::why::{Cause, Why};
use super::{Because, Begin, Plan, Rollout, Turn, Way};
use crate::model::{Domain, Opening, opening};

/// Fills `plan` with steps and reasons, after `tally` was taken.
pub(super) fn choose(rollout: &Rollout, fleet: &Fleet, seen: &Seen, tally: Tally, plan: &mut Plan) {
    let mut choose = Choose {
        rollout,
        fleet,
        seen,
        tally,
        plan,
        unfinished: 0,
    };
    choose.list();
    let stopped = choose.plan.becomes.is_some();
    if !stopped && matches!(rollout.state, State::Running | State::RollingBack) {
        choose.bring_back(Guests::Away);
        choose.bring_back(Guests::Here);
    }
    choose.go_forward(stopped);
    if !stopped {
        choose.end();
    }
}

/// Which guests' ways back are looked at.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Guests {
    /// Those of which one is away already.
    Away,
    /// Those that are all here.
    Here,
}

struct Choose<'a> {
    rollout: &'a Rollout,
    fleet: &'a Fleet,
    seen: &'a Seen,
    tally: Tally,
    plan: &'a mut Plan,
    /// Units that wait and that somebody wants swapped.
    unfinished: u32,
}

impl Choose<'_> {
    /// What each unit is, before anything is begun.
    fn list(&mut self) {
        let phases = self.seen.units.iter().map(|p| Why::Phase(p.phase));
        self.plan.whys = phases.collect();
        for verdict in &self.plan.verdicts {
            self.plan.whys[verdict.unit] = Why::Phase(verdict.phase);
        }
    }

    // The way back.

    fn bring_back(&mut self, which: Guests) {
        if self.tally.to_put_back == 0 {
            return;
        }
        for ix in self.rollout.layout.units.keys() {
            let progress = self.seen.units[ix];
            // What was judged just now is looked at in the next plan.
            let is_new = self.plan.whys[ix] != Why::Phase(progress.phase);
            if is_new || !self.is_to_put_back(progress) {
                continue;
            }
            let unit = &self.rollout.layout.units[ix];
            let all_here = unit
                .members(self.fleet)
                .iter()
                .all(|&vm| self.is_available(vm, unit));
            if all_here != (which == Guests::Here) {
                continue;
            }
            self.unfinished += 1;
            match self.may_go_back(unit, progress, all_here) {
                Ok(()) => self.begin(ix, Way::Back),
                Err(why) => self.leave(ix, why),
            }
        }
    }

    fn is_to_put_back(&self, progress: Progress) -> bool {
        let rolling_back = self.rollout.state == State::RollingBack;
        match progress.phase {
            Phase::Spoilt => rolling_back || self.rollout.policy.roll_back,
            Phase::BackWaiting => true,
            Phase::Done => rolling_back,
            _ => false,
        }
    }

    fn may_go_back(&self, unit: &Unit, progress: Progress, all_here: bool) -> Result<(), Why> {
        let host = self.seen.hosts[unit.host];
        if host.cordoned {
            return Err(Why::Cordoned);
        }
        if !host.up {
            return Err(Why::HostDown);
        }
        for &vm in unit.members(self.fleet) {
            if self.seen.vms[vm].busy {
                return Err(Why::Busy(vm));
            }
        }
        if progress.phase == Phase::BackWaiting {
            self.wait_for_retry(progress)?;
        }
        for (set, domain) in self.seats(unit) {
            let row = &self.tally.sets[set];
            // Guests that are away lose nothing, so only what is under way stands in their way.
            let busy = if all_here {
                row.moving.or(row.unwell)
            } else {
                row.moving
            };
            if let Some(other) = busy.other_than(domain) {
                return Err(Why::DomainOpen(set, other));
            }
        }
        self.fits_budgets(unit)?;
        self.fits_limits(unit)
    }

    // Forward.

    fn go_forward(&mut self, stopped: bool) {
        let mut shut = self.shut(stopped);
        let mut stage = 0;
        for ix in self.rollout.layout.units.keys() {
            if self.plan.whys[ix] != Why::Phase(Phase::Waiting) {
                continue;
            }
            while shut.is_none() && stage < self.rollout.layout.units[ix].stage {
                shut = self.shut_after(stage);
                stage += 1;
            }
            if shut.is_none() && self.tally.under_way >= self.rollout.policy.at_once.total {
                shut = Some(Why::Full);
            }
            let unit = &self.rollout.layout.units[ix];
            let answer = match shut {
                // Before all else, or a rollout that is held would never be seen to be through.
                Some(why) => Err(self.left_out(unit).unwrap_or(why)),
                None => self.may_go(unit, self.seen.units[ix]),
            };
            match answer {
                Ok(()) => self.begin(ix, Way::Forward),
                Err(why) => {
                    self.unfinished += u32::from(!why.is_left_out());
                    self.leave(ix, why);
                }
            }
        }
    }

    /// What stands in the way of every unit.
    fn shut(&self, stopped: bool) -> Option<Why> {
        if self.rollout.state != State::Running {
            return Some(Why::Held(self.rollout.state));
        }
        if stopped {
            return Some(Why::JustStopped);
        }
        let gate = self.seen.gates.iter().position(|&gate| gate != Gate::Pass);
        if let Some(gate) = gate {
            return Some(Why::Gate(u32::try_from(gate).unwrap_or(u32::MAX)));
        }
        let policy = &self.rollout.policy;
        let now = self.seen.now;
        match opening(&policy.windows, now) {
            Opening::ClosedUntil(opens) => Some(Why::Window(opens)),
            // What is begun must be able to end before it closes.
            Opening::OpenUntil(closes) if closes < now.after(policy.deadline) => {
                Some(Why::Window(match opening(&policy.windows, closes) {
                    Opening::ClosedUntil(opens) => opens,
                    Opening::OpenUntil(_) => closes,
                }))
            }
            Opening::OpenUntil(_) => None,
        }
    }

    /// What stands in the way of all units after those of stage `number`.
    fn shut_after(&self, number: u8) -> Option<Why> {
        let stage = self.tally.stages[usize::from(number)];
        let is_behind = number < self.tally.reached;
        if stage.units == 0 || is_behind {
            return None;
        }
        if stage.open > 0 {
            return Some(Why::Stage(number));
        }
        if !is_proven(stage) {
            return Some(Why::NotProven(number));
        }
        if let Some(ill) = stage.ill {
            return Some(Why::CanaryIll(ill));
        }
        let policy = &self.rollout.policy;
        let bake = policy
            .stages
            .get(usize::from(number))
            .map(|stage| stage.bake);
        let until = stage.last.after(bake.unwrap_or_default());
        (until > self.seen.now).then_some(Why::Baking(number, until))
    }

    fn left_out(&self, unit: &Unit) -> Option<Why> {
        let members = unit.members(self.fleet);
        if let Some(&vm) = members.iter().find(|&&vm| self.seen.vms[vm].excluded) {
            return Some(Why::Excluded(vm));
        }
        // A whole host is swapped though some of its guests are off.
        let off = unit
            .vm
            .filter(|&vm| self.seen.vms[vm].health == Health::Off);
        off.map(Why::Off)
    }

    fn may_go(&self, unit: &Unit, progress: Progress) -> Result<(), Why> {
        if let Some(why) = self.left_out(unit) {
            return Err(why);
        }
        self.is_well(unit)?;
        if progress.tries > 0 {
            self.wait_for_retry(progress)?;
        }
        self.fits_domains(unit)?;
        self.fits_budgets(unit)?;
        self.fits_limits(unit)
    }

    /// What isn't known to be well isn't touched.
    fn is_well(&self, unit: &Unit) -> Result<(), Why> {
        let host = self.seen.hosts[unit.host];
        if host.cordoned {
            return Err(Why::Cordoned);
        }
        if !host.up {
            return Err(Why::HostDown);
        }
        if host.clock_off {
            return Err(Why::ClockOff);
        }
        if !host.releases.has(unit.rung) {
            return Err(Why::NoRelease(unit.rung));
        }
        let mut since = host.since;
        for &vm in unit.members(self.fleet) {
            let guest = self.seen.vms[vm];
            match guest.health {
                Health::Ill => return Err(Why::NotWell(vm)),
                _ if guest.busy => return Err(Why::Busy(vm)),
                Health::Well => since = since.max(guest.since),
                Health::Off => {}
            }
        }
        self.fits_ever(unit)?;
        let from = since.after(self.rollout.policy.well_for);
        if from > self.seen.now {
            return Err(Why::WellUntil(from));
        }
        Ok(())
    }

    /// Whether a host's guests could ever be taken together.
    fn fits_ever(&self, unit: &Unit) -> Result<(), Why> {
        if unit.vm.is_some() {
            return Ok(());
        }
        let seats: Vec<_> = self.seats(unit).collect();
        for &(set, domain) in &seats {
            let mine = seats.iter().filter(|seat| seat.0 == set);
            if mine.clone().any(|seat| seat.1 != domain) {
                return Err(Why::TwoDomains(set));
            }
            if mine.count() > set_allows(&self.rollout.policy, self.fleet, set) as usize {
                return Err(Why::NeverFits(set));
            }
        }
        Ok(())
    }

    /// One update domain of a set at a time.
    fn fits_domains(&self, unit: &Unit) -> Result<(), Why> {
        for (set, domain) in self.seats(unit) {
            let row = &self.tally.sets[set];
            let open = row.moving.or(row.unwell).or(row.spoilt);
            if let Some(other) = open.other_than(domain) {
                return Err(Why::DomainOpen(set, other));
            }
            if let Some(first) = row.first.filter(|&first| first != domain) {
                return Err(Why::DomainFirst(set, first));
            }
            if let Some((ended, _)) = row.last.filter(|&(_, last)| last != domain) {
                let until = ended.after(self.rollout.policy.between_domains);
                if until > self.seen.now {
                    return Err(Why::BetweenDomains(set, until));
                }
            }
        }
        Ok(())
    }

    // Both ways.

    fn wait_for_retry(&self, progress: Progress) -> Result<(), Why> {
        let again = progress.since.after(self.rollout.policy.retry_after);
        if again > self.seen.now {
            return Err(Why::TryAgain(again));
        }
        Ok(())
    }

    /// Whoever is away counts, whatever made it so; and who is away already is not taken away.
    fn fits_budgets(&self, unit: &Unit) -> Result<(), Why> {
        let members = unit.members(self.fleet).iter();
        let taken = members.filter(|&&vm| self.is_available(vm, unit));
        let mut all = 0;
        for &vm in taken.clone() {
            all += 1;
            let Some(seat) = self.fleet.vms[vm].seat else {
                continue;
            };
            let of_set = taken.clone().filter_map(|&vm| self.fleet.vms[vm].seat);
            let of_set = of_set.filter(|other| other.set == seat.set).count();
            let away = self.tally.sets[seat.set].away as usize + of_set;
            if away > set_allows(&self.rollout.policy, self.fleet, seat.set) as usize {
                return Err(Why::SetBudget(seat.set));
            }
        }
        let Some(budget) = self.rollout.policy.fleet_budget else {
            return Ok(());
        };
        let total = u32::try_from(self.fleet.vms.len()).unwrap_or(u32::MAX);
        if all > 0 && self.tally.away + all > budget.at_most(total).max(1) {
            return Err(Why::FleetBudget);
        }
        Ok(())
    }

    fn fits_limits(&self, unit: &Unit) -> Result<(), Why> {
        let at_once = self.rollout.policy.at_once;
        match self.tally.full_at(self.fleet, unit.host, at_once) {
            None => Ok(()),
            Some(FullAt::Host(host)) => Err(Why::HostFull(host)),
            Some(FullAt::Rack(rack)) => Err(Why::RackFull(rack)),
            Some(FullAt::Zone(zone)) => Err(Why::ZoneFull(zone)),
            Some(FullAt::All) => Err(Why::Full),
        }
    }

    fn begin(&mut self, ix: Ix<Unit>, way: Way) {
        let unit = &self.rollout.layout.units[ix];
        let because = match way {
            Way::Back if self.rollout.state == State::RollingBack => Because::RollBack,
            Way::Back => Because::Repair,
            Way::Forward if unit.stage + 1 < self.rollout.layout.stages => Because::Canary,
            Way::Forward => Because::Turn,
        };
        self.tally.note_under_way(self.fleet, self.seen, unit);
        self.tally.stages[usize::from(unit.stage)].open += 1;
        self.plan.whys[ix] = Why::Begun;
        self.plan.begin.push(Begin {
            unit: ix,
            way,
            because,
            notice: self.rollout.policy.notice,
        });
    }

    /// Notes why a unit isn't begun, and what follows from that for those after it.
    fn leave(&mut self, ix: Ix<Unit>, why: Why) {
        self.plan.whys[ix] = why;
        if let Cause::Time(at) = why.cause() {
            self.plan.look_at(at);
        }
        let unit = &self.rollout.layout.units[ix];
        let is_forward = self.seen.units[ix].phase == Phase::Waiting;
        if !is_forward {
            return;
        }
        let stage = &mut self.tally.stages[usize::from(unit.stage)];
        stage.left_out += u32::from(why.is_left_out());
        if why.is_out_of_reach() {
            return;
        }
        stage.open += 1;
        if self.comes_before_others(why) {
            let seats: Vec<_> = self.seats(unit).collect();
            for (set, domain) in seats {
                self.tally.sets[set].first.get_or_insert(domain);
            }
        }
    }

    /// A domain that has begun to go, or is about to, goes to its end: units that only wait for
    /// others of the rollout, or for a moment, keep their sets from opening another domain.
    fn comes_before_others(&self, why: Why) -> bool {
        match why {
            Why::HostFull(_) | Why::RackFull(_) | Why::ZoneFull(_) => true,
            Why::TryAgain(_) | Why::WellUntil(_) => true,
            Why::SetBudget(set) => !self.tally.sets[set].moving.is_empty(),
            Why::FleetBudget => self.tally.under_way > 0,
            _ => false,
        }
    }

    /// Ends a rollout of which nothing is left to be done.
    fn end(&mut self) {
        let nothing_left = self.tally.under_way == 0 && self.unfinished == 0;
        let state = match self.rollout.state {
            State::Running if nothing_left => State::Finished,
            State::Aborting if self.tally.under_way == 0 => State::Aborted,
            State::RollingBack if self.tally.under_way == 0 && self.tally.to_put_back == 0 => {
                if self.tally.stuck > 0 {
                    State::Stuck
                } else {
                    State::RolledBack
                }
            }
            _ => return,
        };
        self.plan.becomes = Some((state, Turn::NothingLeft));
    }

    fn is_available(&self, vm: Ix<Vm>, unit: &Unit) -> bool {
        self.seen.is_available(vm, unit.host)
    }

    fn seats<'u>(&'u self, unit: &'u Unit) -> impl Iterator<Item = (Ix<Set>, Domain)> + 'u {
        let members = unit.members(self.fleet).iter();
        let seats = members.filter_map(|&vm| self.fleet.vms[vm].seat);
        seats.map(|seat| (seat.set, seat.domain))
    }
}

/// Whether enough of a stage could be tried to say that it went well: half of what was wanted.
fn is_proven(stage: StageTally) -> bool {
    let wanted = stage.units - stage.left_out;
    wanted > 0 && stage.settled * 2 >= wanted
}
