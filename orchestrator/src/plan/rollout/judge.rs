//! What has ended, and how; and on the way what there is to be counted.

use super::fleet::{Fleet, Ix, Vm};
use super::layout::Unit;
use super::seen::{Gate, Health, Phase, Progress, Seen};
use super::state::State;
use super::tally::Tally;
use super::{Plan, Rollout, Saw, Verdict};
use crate::model::Moment;

/// Judges every unit, notes the verdicts in `plan`, and counts all as it is after them.
pub(super) fn judge(rollout: &Rollout, fleet: &Fleet, seen: &Seen, plan: &mut Plan) -> Tally {
    let mut tally = Tally::new(fleet, rollout.layout.stages);
    // Stages are in order, so the last unit that was begun is of the latest stage reached. One that
    // was kept was begun: a stage that was reached stays so.
    let last_tried = seen
        .units
        .iter()
        .rposition(|p| p.phase != Phase::Waiting || p.tries > 0);
    let reached = last_tried.map_or(0, |at| rollout.layout.units.raw[at].stage);
    tally.reached = reached;
    let mut judge = Judge {
        rollout,
        fleet,
        seen,
        plan,
        tally,
    };
    judge.look_at_guests();
    judge.look_at_units();
    judge.tally
}

struct Judge<'a> {
    rollout: &'a Rollout,
    fleet: &'a Fleet,
    seen: &'a Seen,
    plan: &'a mut Plan,
    tally: Tally,
}

/// How a unit that is watched looks.
enum Look {
    /// All is well since then.
    WellSince(Moment),
    /// Something isn't.
    Bad(Saw),
}

impl Judge<'_> {
    /// Counts who is away. Few are, so it is the VMs and hosts that are gone through, and only for
    /// those that are away it is asked whose fault it may be.
    fn look_at_guests(&mut self) {
        let seen = self.seen;
        for (vm, row) in seen.vms.iter_enumerated() {
            if row.health != Health::Well || row.busy {
                self.away(vm);
            }
        }
        for (host, row) in seen.hosts.iter_enumerated() {
            if row.up {
                continue;
            }
            for &vm in self.fleet.guests(host) {
                let guest = seen.vms[vm];
                if guest.health == Health::Well && !guest.busy {
                    self.away(vm);
                }
            }
        }
    }

    fn away(&mut self, vm: Ix<Vm>) {
        self.tally.note_away(self.fleet, vm);
        let Some(ix) = self.rollout.layout.unit_of[vm] else {
            return;
        };
        let progress = self.seen.units[ix];
        if !progress.phase.is_touched() {
            return;
        }
        if let Some(seat) = self.fleet.vms[vm].seat {
            self.tally.sets[seat.set].unwell.add(seat.domain);
        }
        let stage = self.rollout.layout.units[ix].stage;
        if progress.phase == Phase::Done && self.seen.vms[vm].health == Health::Ill {
            self.tally.stages[usize::from(stage)].ill = Some(vm);
            self.judge_baking(ix, vm);
        }
    }

    /// A canary that falls ill before others followed it has failed, if it stays so.
    fn judge_baking(&mut self, ix: Ix<Unit>, vm: Ix<Vm>) {
        let stage = self.rollout.layout.units[ix].stage;
        let is_last = stage + 1 >= self.rollout.layout.stages;
        if is_last || stage < self.tally.reached || self.is_judged(ix) {
            return;
        }
        let ill_since = self.seen.units[ix].since.max(self.seen.vms[vm].since);
        if self.is_over(ill_since.after(self.rollout.policy.deadline)) {
            self.say(ix, Phase::Spoilt, Saw::FellIll(vm));
        }
    }

    fn look_at_units(&mut self) {
        // Those that were judged already, in the order of the units.
        self.plan.verdicts.sort_by_key(|verdict| verdict.unit);
        let mut judged = std::mem::take(&mut self.plan.verdicts)
            .into_iter()
            .peekable();
        for (ix, &progress) in self.seen.units.iter_enumerated() {
            let verdict = match judged.next_if(|verdict| verdict.unit == ix) {
                Some(verdict) => Some((verdict.phase, verdict.saw)),
                None => self.verdict(ix, progress),
            };
            let mut after = progress;
            if let Some((phase, saw)) = verdict {
                self.say(ix, phase, saw);
                after.phase = phase;
                after.since = self.seen.now;
            }
            self.count(ix, after);
        }
    }

    /// What is to be said of a unit now.
    fn verdict(&mut self, ix: Ix<Unit>, progress: Progress) -> Option<(Phase, Saw)> {
        let policy = &self.rollout.policy;
        let too_late = progress.since.after(policy.deadline);
        let tries_are_used_up = progress.tries >= policy.tries;
        match progress.phase {
            Phase::Waiting if tries_are_used_up => Some((Phase::Failed, Saw::KeptTooOften)),
            Phase::BackWaiting if tries_are_used_up => Some((Phase::Stuck, Saw::KeptTooOften)),
            // What is begun may have been touched, and whether it was nobody said in time.
            Phase::Begun if self.is_over(too_late) => Some((Phase::Spoilt, Saw::TooLong)),
            Phase::BackBegun if self.is_over(too_late) => Some((Phase::Stuck, Saw::TooLong)),
            Phase::Watched => self.judge_watched(ix, progress),
            Phase::BackWatched => self.judge_well(ix, progress, Phase::Back, Phase::Stuck),
            Phase::Waiting | Phase::Begun | Phase::Done | Phase::Failed | Phase::Spoilt => None,
            Phase::BackBegun | Phase::BackWaiting | Phase::Back | Phase::Stuck => None,
        }
    }

    fn judge_watched(&mut self, ix: Ix<Unit>, progress: Progress) -> Option<(Phase, Saw)> {
        if self.rollout.state == State::RollingBack {
            return Some((Phase::Spoilt, Saw::Recalled));
        }
        if let Some(breach) = self.seen.breach(ix) {
            return Some((Phase::Spoilt, Saw::Breach(breach)));
        }
        if self.seen.gates.contains(&Gate::Mute) {
            return None;
        }
        if self.seen.gates.contains(&Gate::Fail) {
            let too_late = progress.since.after(self.rollout.policy.deadline);
            return self.is_over(too_late).then_some((Phase::Spoilt, Saw::Gate));
        }
        self.judge_well(ix, progress, Phase::Done, Phase::Spoilt)
    }

    /// `good` after it was well for long enough, `bad` after it wasn't in time.
    fn judge_well(
        &mut self,
        ix: Ix<Unit>,
        progress: Progress,
        good: Phase,
        bad: Phase,
    ) -> Option<(Phase, Saw)> {
        let policy = &self.rollout.policy;
        let look = self.look(&self.rollout.layout.units[ix]);
        let saw = match look {
            Look::WellSince(since) => {
                let from = since.max(progress.since);
                if self.is_over(from.after(policy.well_for)) {
                    return Some((good, Saw::Well));
                }
                Saw::Flapping
            }
            Look::Bad(saw) => saw,
        };
        let too_late = progress.since.after(policy.deadline);
        self.is_over(too_late).then_some((bad, saw))
    }

    /// A guest that its owner switched off says nothing about the release.
    fn look(&self, unit: &Unit) -> Look {
        let host = self.seen.hosts[unit.host];
        if !host.up {
            return Look::Bad(Saw::HostDown);
        }
        let mut since = host.since;
        for &vm in unit.members(self.fleet) {
            let guest = self.seen.vms[vm];
            match guest.health {
                Health::Well => since = since.max(guest.since),
                Health::Ill => return Look::Bad(Saw::NotWell(vm)),
                Health::Off => {}
            }
        }
        Look::WellSince(since)
    }

    /// Whether that time has come; if not, it is one to look again.
    fn is_over(&mut self, at: Moment) -> bool {
        self.seen.now >= at || {
            self.plan.look_at(at);
            false
        }
    }

    fn is_judged(&self, ix: Ix<Unit>) -> bool {
        self.plan.verdicts.iter().any(|verdict| verdict.unit == ix)
    }

    fn say(&mut self, unit: Ix<Unit>, phase: Phase, saw: Saw) {
        self.plan.verdicts.push(Verdict { unit, phase, saw });
    }

    /// Counts a unit as it is after its verdict.
    fn count(&mut self, ix: Ix<Unit>, progress: Progress) {
        let phase = progress.phase;
        let unit = &self.rollout.layout.units[ix];
        self.tally.note_phase(phase);
        let stage = &mut self.tally.stages[usize::from(unit.stage)];
        stage.units += 1;
        if phase == Phase::Waiting {
            return;
        }
        if phase.is_in_flight() {
            stage.open += 1;
            self.tally.note_under_way(self.fleet, self.seen, unit);
            return;
        }
        stage.settled += 1;
        stage.last = stage.last.max(progress.since);
        let rollout = self.rollout;
        let rolling_back = rollout.state == State::RollingBack;
        let spoilt = matches!(phase, Phase::Spoilt | Phase::BackWaiting);
        let put_back = spoilt && (rolling_back || rollout.policy.roll_back);
        if put_back || (rolling_back && phase == Phase::Done) {
            self.tally.to_put_back += 1;
        }
        if put_back {
            stage.open += 1;
        }
        let paused_between = !rollout.policy.between_domains.is_zero();
        if !put_back && !paused_between {
            return;
        }
        for &vm in unit.members(self.fleet) {
            let Some(seat) = self.fleet.vms[vm].seat else {
                continue;
            };
            let set = &mut self.tally.sets[seat.set];
            if put_back {
                set.spoilt.add(seat.domain);
            } else if phase.is_touched() || phase == Phase::Back {
                set.last = set.last.max(Some((progress.since, seat.domain)));
            }
        }
    }
}

impl Plan {
    /// Time alone may change the answer then.
    pub(super) fn look_at(&mut self, at: Moment) {
        self.look_again = Some(self.look_again.map_or(at, |earlier| earlier.min(at)));
    }
}
