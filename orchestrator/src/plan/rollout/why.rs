//! Why a unit isn't begun now: one small value for each, and the sentence that it stands for.

use std::time::Duration;

use super::fleet::{Fleet, Host, Ix, Rack, Set, Vm, Zone};
use super::layout::Unit;
use super::seen::Phase;
use super::state::State;
use crate::model::{Domain, Moment, Rung};

/// Why a unit isn't begun now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Why {
    /// It is begun now.
    Begun,
    /// Nothing more is to be done with it, or it is on its way.
    Phase(Phase),
    /// The rollout as a whole begins nothing.
    Held(State),
    /// It just stopped by itself.
    JustStopped,
    /// A gate of the whole rollout fails, or is mute.
    Gate(u32),
    /// No maintenance window is open, or what is left of it is too short.
    Window(Moment),
    /// An earlier stage isn't through.
    Stage(u8),
    /// Too little of an earlier stage could be tried to say that it went well.
    NotProven(u8),
    /// An earlier stage went well so far and is watched for a while.
    Baking(u8, Moment),
    /// A guest of an earlier stage, swapped and found well, isn't well any more.
    CanaryIll(Ix<Vm>),
    /// The VM's owner wants it left alone.
    Excluded(Ix<Vm>),
    /// It is switched off.
    Off(Ix<Vm>),
    /// The host's operator wants it left alone.
    Cordoned,
    /// The host isn't well or isn't heard.
    HostDown,
    /// The host's clock disagrees with that of whoever plans, or was not compared with it yet.
    ClockOff,
    /// The host doesn't have the release.
    NoRelease(Rung),
    /// The guest isn't well.
    NotWell(Ix<Vm>),
    /// Guest or host are well again, but not yet for long enough.
    WellUntil(Moment),
    /// Something else is being done to the VM.
    Busy(Ix<Vm>),
    /// It was kept, and is tried again later.
    TryAgain(Moment),
    /// Members of another update domain of its set are away or not yet well again.
    DomainOpen(Ix<Set>, Domain),
    /// Another update domain of its set comes first.
    DomainFirst(Ix<Set>, Domain),
    /// Another update domain of its set was finished only just now.
    BetweenDomains(Ix<Set>, Moment),
    /// A swap of its host would take two update domains of one set at once.
    TwoDomains(Ix<Set>),
    /// A swap of its host would take more members of a set than may be away, even if all were well.
    NeverFits(Ix<Set>),
    /// As many members of its set as may be away are, or would be more than that.
    SetBudget(Ix<Set>),
    /// The same, of all VMs of the fleet.
    FleetBudget,
    /// Enough is under way on its host.
    HostFull(Ix<Host>),
    /// Enough is under way in its rack.
    RackFull(Ix<Rack>),
    /// Enough is under way in its zone.
    ZoneFull(Ix<Zone>),
    /// Enough is under way in all.
    Full,
}

/// What has to happen before a unit can be begun.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cause {
    /// Nothing: it is begun, under way or over.
    None,
    /// Another unit of this rollout has to end first.
    Own,
    /// That time has to come.
    Time(Moment),
    /// Something outside the rollout has to change: a host, a guest, a gate.
    Outside,
    /// A hand is needed.
    Hand,
}

impl Why {
    /// What has to happen first.
    pub fn cause(self) -> Cause {
        match self {
            Self::Begun | Self::Phase(_) => Cause::None,
            Self::JustStopped | Self::Stage(_) => Cause::Own,
            Self::DomainFirst(..) | Self::Full => Cause::Own,
            Self::HostFull(_) | Self::RackFull(_) | Self::ZoneFull(_) => Cause::Own,
            Self::Window(at) | Self::WellUntil(at) | Self::TryAgain(at) => Cause::Time(at),
            Self::Baking(_, at) | Self::BetweenDomains(_, at) => Cause::Time(at),
            // What this rollout has away counts here too, and may be all of it.
            Self::DomainOpen(..) | Self::SetBudget(_) | Self::FleetBudget => Cause::Outside,
            Self::Gate(_) | Self::HostDown | Self::ClockOff | Self::NotWell(_) => Cause::Outside,
            Self::CanaryIll(_) | Self::Off(_) | Self::Busy(_) => Cause::Outside,
            Self::Held(_) | Self::NotProven(_) | Self::Excluded(_) | Self::Cordoned => Cause::Hand,
            Self::NoRelease(_) | Self::TwoDomains(_) | Self::NeverFits(_) => Cause::Hand,
        }
    }

    /// Whether a rollout can end with such a unit never begun: nobody wants it swapped.
    pub fn is_left_out(self) -> bool {
        matches!(self, Self::Excluded(_) | Self::Off(_))
    }

    /// Whether it stands in the way of this unit and of no unit after it.
    pub(super) fn is_out_of_reach(self) -> bool {
        matches!(
            self,
            Self::Excluded(_)
                | Self::Off(_)
                | Self::Cordoned
                | Self::HostDown
                | Self::ClockOff
                | Self::NoRelease(_)
                | Self::NotWell(_)
                | Self::Busy(_)
                | Self::TwoDomains(_)
                | Self::NeverFits(_)
        )
    }

    /// The sentence that it stands for, said of `unit`.
    pub fn sentence(self, fleet: &Fleet, unit: &Unit, now: Moment) -> String {
        let host = &fleet.hosts[unit.host].name;
        let what = match unit.vm {
            Some(vm) => format!("VM {}", fleet.vms[vm].name),
            None => format!("host {host}"),
        };
        let vm = |vm: Ix<Vm>| &fleet.vms[vm].name;
        let set = |set: Ix<Set>| &fleet.sets[set].name;
        let wait = |at: Moment| said(at.since(now));
        match self {
            Self::Begun => format!("{what} is begun now"),
            Self::Phase(phase) => format!("{what} {}", phase_said(phase)),
            Self::Held(state) => format!("{what} waits: the rollout is {state}"),
            Self::JustStopped => format!("{what} waits: the rollout just stopped by itself"),
            Self::Gate(gate) => format!("{what} waits: gate {gate} doesn't pass"),
            Self::Window(at) => format!("{what} waits {} for a maintenance window", wait(at)),
            Self::Stage(stage) => format!("{what} waits for stage {stage} to be through"),
            Self::NotProven(stage) => format!(
                "{what} waits: too few of stage {stage} could be tried; make more of them \
                 reachable, or resume by hand"
            ),
            Self::Baking(stage, at) => {
                format!("{what} waits {} while stage {stage} is watched", wait(at))
            }
            Self::CanaryIll(ill) => format!(
                "{what} waits: VM {} was swapped before it and isn't well any more",
                vm(ill)
            ),
            Self::Excluded(of) => format!("{what} is left out: {} is excluded", vm(of)),
            Self::Off(of) => format!("{what} is left out: {} is switched off", vm(of)),
            Self::Cordoned => format!("{what} waits: host {host} is cordoned"),
            Self::HostDown => format!("{what} waits: host {host} isn't well"),
            Self::ClockOff => format!(
                "{what} waits: the clock of host {host} doesn't agree with the driver's, or was not compared with it \
                 yet; `stillpoint host ls` says by how much it is off"
            ),
            Self::NoRelease(rung) => {
                format!("{what} waits: host {host} doesn't have the {rung} release; add it there")
            }
            Self::NotWell(of) => format!("{what} waits: the guest of {} isn't well", vm(of)),
            Self::WellUntil(at) => {
                format!(
                    "{what} waits {}: it is well again only since a moment",
                    wait(at)
                )
            }
            Self::Busy(of) => format!("{what} waits: something else is being done to {}", vm(of)),
            Self::TryAgain(at) => {
                format!(
                    "{what} waits {}: its swap was kept, and is tried again",
                    wait(at)
                )
            }
            Self::DomainOpen(of, domain) => format!(
                "{what} waits: update domain {domain} of set {} is being swapped or isn't well \
                 again, and one goes at a time",
                set(of)
            ),
            Self::DomainFirst(of, domain) => {
                format!(
                    "{what} waits: update domain {domain} of set {} comes first",
                    set(of)
                )
            }
            Self::BetweenDomains(of, at) => format!(
                "{what} waits {}: another update domain of set {} has just ended",
                wait(at),
                set(of)
            ),
            Self::TwoDomains(of) => format!(
                "{what} waits: it runs two update domains of set {}, which a swap of the host \
                 would take at once; move a guest",
                set(of)
            ),
            Self::NeverFits(of) => format!(
                "{what} waits: it runs more members of set {} than may be away at once; move a \
                 guest, or raise the set's budget",
                set(of)
            ),
            Self::SetBudget(of) => {
                format!(
                    "{what} waits: no more members of set {} may be away now",
                    set(of)
                )
            }
            Self::FleetBudget => format!("{what} waits: no more VMs of the fleet may be away now"),
            Self::HostFull(_) => format!("{what} waits: enough is under way on host {host}"),
            Self::RackFull(rack) => format!(
                "{what} waits: enough is under way in rack {}",
                fleet.racks[rack].name
            ),
            Self::ZoneFull(zone) => format!(
                "{what} waits: enough is under way in zone {}",
                fleet.zones[zone].name
            ),
            Self::Full => format!("{what} waits: enough is under way in all"),
        }
    }
}

/// A time as people say it.
fn said(wait: Duration) -> String {
    // Whole seconds are enough, and up, so that it isn't said too early.
    let seconds = wait.as_secs() + u64::from(wait.subsec_nanos() > 0);
    match seconds {
        0..=119 => format!("{seconds} s"),
        120..=7_199 => format!("{} min", seconds.div_ceil(60)),
        _ => format!("{} h", seconds.div_ceil(3_600)),
    }
}

fn phase_said(phase: Phase) -> &'static str {
    match phase {
        Phase::Waiting => "waits",
        Phase::Begun => "is being swapped",
        Phase::Watched => "is swapped, and watched until it has been well for long enough",
        Phase::Done => "is done",
        Phase::Failed => "was kept too often; it runs on as before",
        Phase::Spoilt => "failed after its swap began",
        Phase::BackBegun => "is being swapped back",
        Phase::BackWaiting => "is to be swapped back, and waits for another try",
        Phase::BackWatched => "is swapped back, and watched until it has been well for long enough",
        Phase::Back => "failed, and runs on what it ran on before",
        Phase::Stuck => "failed, and could not be brought back; it needs a hand",
    }
}
