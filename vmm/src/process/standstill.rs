//! A guest that stands still in its place while something of its host is changed.
//!
//! ```text
//!  Running ──Freeze──▶ Frozen ──Resume, PowerOff, the ceiling, the guest's own end──▶ Running
//!          ──Store──▶ Frozen, and stored beside RAM ([`super::jump`]) ── withdrawn first ──┘
//! ```
//!
//! Everything stays where it is: threads, KVM's fds, RAM. So there is nothing to carry, and nothing
//! that could be lost: who froze it may die, and the guest runs on at its ceiling. Its clocks include
//! the pause, which KVM sees to by itself; its watchdogs are told, and what became of its clock is
//! measured all the same, as whoever changes a host may disturb its clocksource.

use std::collections::VecDeque;
use std::path::Path;
use std::sync::mpsc::Receiver;
use std::time::{Duration, Instant};

use stillpoint_control::clock::Policy;
use stillpoint_control::message::{GuestState, Reply, Request};
use stillpoint_control::report::{
    Blackout, ClockReceipt, Outcome, Phase, Side, SwapReport, WallClock,
};
use stillpoint_control::spec::MAX_BUDGET;
use stillpoint_state::sections::Clock;

use super::jump::Stored;
use super::{ENTER_PATIENCE, End, Process, refusal};
use crate::clock::{self, Scale, host_tsc};
use crate::event::{Event, Job};
use crate::handover::{correct, measure};
use crate::machine::frozen::Frozen;
use crate::vcpu::Entered;

/// Why a guest runs on again.
#[derive(Debug)]
enum Ended {
    /// Somebody asked, who waits for the report.
    Asked(Job),
    /// It stood still as long as it may.
    Ceiling,
    /// It ended, or is to end.
    Over,
}

/// What is known of a pause when it begins.
#[derive(Clone, Copy, Debug)]
pub(super) struct Terms<'a> {
    /// Id of the swap.
    pub(super) swap: &'a str,
    /// The longest it may be.
    pub(super) ceiling: Duration,
    /// The guest's wall clock less the host's, as its agent says.
    pub(super) wall_error_ns: Option<i64>,
    /// When it was asked for.
    pub(super) started_at_unix_ns: u64,
}

/// What was seen of a pause.
struct Seen {
    swap: String,
    ceiling: Duration,
    drained: Duration,
    marks: Vec<(&'static str, Duration)>,
    kicked_tsc: u64,
    /// The kvmclock next to the kick, and next to the entry.
    clocks: [Option<Clock>; 2],
    entered: Entered,
    wall_error_ns: Option<i64>,
    started_at_unix_ns: u64,
}

impl Process {
    /// Has the guest stand still until it is to run on.
    pub(super) fn stand_still(&mut self, job: Job) -> Option<End> {
        let (swap, nonce, ceiling) = match job.request {
            Request::Freeze { swap, ceiling } => (swap, None, ceiling),
            Request::Store {
                swap,
                nonce,
                ceiling,
            } => (swap, Some(nonce), ceiling),
            _ => return None,
        };
        if ceiling.is_zero() || ceiling > MAX_BUDGET {
            let message = format!("a pause of {ceiling:?} is not more than 0 and at most 30 s");
            let _ = job.reply.send(refusal("bad_request", message));
            return None;
        }
        let place = match nonce.as_ref().map(|_| self.record_place()).transpose() {
            Ok(place) => place,
            Err(why) => {
                let _ = job.reply.send(refusal("bad_request", why));
                return None;
            }
        };
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        let wall_error_ns = correct::ask_error(&self.guest.machine, &self.dir);
        let mut frozen = match self.guest.freeze(ceiling) {
            Ok(frozen) => frozen,
            Err(error) => {
                let _ = job.reply.send(refusal("failed", error.to_string()));
                return None;
            }
        };
        let before = frozen.machine().clock().ok();
        let terms = Terms {
            swap: &swap,
            ceiling,
            wall_error_ns,
            started_at_unix_ns: now.map_or(0, |d| u64::try_from(d.as_nanos()).unwrap_or(0)),
        };
        let stored = place
            .zip(nonce)
            .map(|(place, nonce)| Stored::store(&mut frozen, place, &nonce, &terms, &self.desk));
        let stored = match stored.transpose() {
            Ok(stored) => stored,
            // Nothing of it may be run from, and the guard lets the guest run on.
            Err(why) => {
                let _ = job.reply.send(refusal("failed", why));
                return None;
            }
        };
        self.desk.set_state(GuestState::Frozen);
        let _ = job.reply.send(match &stored {
            None => Reply::Frozen,
            Some(stored) => stored.told(frozen.kicked.elapsed()),
        });
        // The caller's thread reads to the end of replies.
        drop(job.reply);
        let ended = await_end(&self.events, &mut self.waiting, &mut frozen, &swap);
        if let Some(Err(why)) = stored.map(Stored::withdraw) {
            // Somebody may run it from there: it must not run here as well.
            tracing::error!("{why}; the guest stays still here, and this process ends");
            frozen.stay_still();
            return Some(End::Moved);
        }
        let seen = Seen {
            ceiling,
            drained: frozen.drained,
            kicked_tsc: frozen.kicked_tsc,
            clocks: [before, frozen.machine().clock().ok()],
            marks: std::mem::take(&mut frozen.timing.marks),
            wall_error_ns: terms.wall_error_ns,
            started_at_unix_ns: terms.started_at_unix_ns,
            swap: terms.swap.to_owned(),
            entered: run_on(frozen),
        };
        self.desk.set_state(GuestState::Running);
        let report = self.report(seen, &ended);
        self.desk.set_last_swap(&report.swap);
        self.desk.set_report(report.clone());
        if let Ended::Asked(job) = ended {
            let report = Box::new(report);
            let _ = job.reply.send(Reply::Resumed { report });
        }
        None
    }

    fn report(&self, seen: Seen, ended: &Ended) -> SwapReport {
        let machine = &self.guest.machine;
        let khz = machine.tsc_khz();
        let release = self.desk.release();
        let offset = machine.tsc_offset().unwrap_or(0);
        let guest = |tsc: u64| tsc.wrapping_add_signed(offset);
        let window = guest(seen.kicked_tsc)..guest(seen.entered.tsc);
        let host = clock::duration(seen.entered.tsc.saturating_sub(seen.kicked_tsc), khz);
        let reason = match ended {
            Ended::Asked(_) => None,
            Ended::Ceiling => Some(format!(
                "nobody had it run on within {:?}: it did so by itself",
                seen.ceiling
            )),
            Ended::Over => Some("the guest ended, or was to end".to_owned()),
        };
        let mut report = SwapReport {
            swap: seen.swap.clone(),
            vm: machine.spec().name.clone(),
            component: "host".into(),
            from: release.clone(),
            to: release.clone(),
            outcome: Outcome::Resumed,
            reason,
            started_at_unix_ns: seen.started_at_unix_ns,
            vcpus: u32::try_from(machine.vcpu_count()).unwrap_or(u32::MAX),
            memory_bytes: machine.ram().size(),
            state_format: 0,
            state_bytes: 0,
            budget: seen.ceiling,
            margin: None,
            phases: phases(&seen),
            blackout: Blackout {
                host,
                guest_ns: measure::guest_gaps(machine, Some(window)),
                vcpus: Vec::new(),
            },
            clock: Some(receipt(&seen, host)),
            recovery: Vec::new(),
            warnings: Vec::new(),
        };
        let pause = correct::Pause {
            id: &seen.swap,
            policy: Policy::Advance,
            held: Duration::ZERO,
            error_before_ns: seen.wall_error_ns,
        };
        let after = correct::after(machine, Path::new(&self.dir), pause);
        if let (Some(receipt), Some(error)) = (&mut report.clock, after.error_ns) {
            receipt.wall_clock = WallClock {
                of: "agent".into(),
                error_before_ns: seen.wall_error_ns,
                error_after_ns: Some(error),
            };
        }
        report.warnings = measure::warnings(&report);
        report
    }
}

/// Waits until the guest is to run on.
fn await_end(
    events: &Receiver<Event>,
    waiting: &mut VecDeque<Event>,
    frozen: &mut Frozen<'_>,
    swap: &str,
) -> Ended {
    let mut deadline = frozen.deadline;
    let ended = loop {
        let left = deadline.saturating_duration_since(Instant::now());
        match events.recv_timeout(left) {
            Err(_) => break Ended::Ceiling,
            Ok(Event::Control(job)) => match &job.request {
                Request::Resume { swap: of } if of == swap => break Ended::Asked(job),
                Request::AwaitJump { swap: of, ceiling } if of == swap => {
                    deadline = Instant::now() + *ceiling;
                    let _ = job.reply.send(Reply::Done);
                }
                Request::PowerOff => {
                    waiting.push_back(Event::Control(job));
                    break Ended::Over;
                }
                other => {
                    let message = match other {
                        Request::Resume { swap: of } => {
                            format!("this guest stands still for {swap}, not for {of}")
                        }
                        _ => "this guest stands still while its host is changed".to_owned(),
                    };
                    let _ = job.reply.send(refusal("busy", message));
                }
            },
            // Said by a vCPU or a device before they came to rest.
            Ok(event) => {
                waiting.push_back(event);
                break Ended::Over;
            }
        }
    };
    frozen.timing.mark("stand");
    ended
}

/// Lets the guest run on. Vcpus that do not come in tell so by themselves.
fn run_on(frozen: Frozen<'_>) -> Entered {
    let machine = frozen.machine();
    let passed = host_tsc().saturating_sub(frozen.kicked_tsc);
    let stolen = match machine.spec().clock.steal {
        true => clock::duration(passed, machine.tsc_khz()),
        false => Duration::ZERO,
    };
    frozen
        .resume(stolen, ENTER_PATIENCE)
        .unwrap_or_else(|error| {
            tracing::error!(%error, "not every vCPU came in after a pause");
            Entered {
                tsc: host_tsc(),
                vcpus: Vec::new(),
            }
        })
}

fn phases(seen: &Seen) -> Vec<Phase> {
    let phase = |name: &str, in_blackout, duration| Phase {
        name: name.to_owned(),
        side: Side::Predecessor,
        in_blackout,
        duration,
    };
    let drain = phase("drain", false, seen.drained);
    let marks = seen.marks.iter();
    std::iter::once(drain)
        .chain(marks.map(|(name, duration)| phase(name, true, *duration)))
        .collect()
}

/// The clock went on by itself; whether it kept to its line, KVM tells.
fn receipt(seen: &Seen, pause: Duration) -> ClockReceipt {
    let master = |clock: &Option<Clock>| clock.is_some_and(|clock| clock::is_master(clock.flags));
    let [before, after] = &seen.clocks;
    ClockReceipt {
        policy: Policy::Advance,
        pause,
        kvmclock_error_ns: before
            .as_ref()
            .zip(after.as_ref())
            .and_then(|(a, b)| off_line(a, b)),
        masterclock_before: master(before),
        masterclock_after: master(after),
        told_of_pause: seen.entered.told(),
        ..ClockReceipt::default()
    }
}

/// How far a kvmclock is off the line that the reading before and the TSC draw, ns.
fn off_line(before: &Clock, after: &Clock) -> Option<i64> {
    if !clock::is_master(before.flags) || !clock::is_master(after.flags) {
        return None;
    }
    let cycles = after.host_tsc.checked_sub(before.host_tsc)?;
    let due = before
        .clock
        .checked_add(Scale::of_khz(before.tsc_khz).ns(cycles))?;
    Some(after.clock.wrapping_sub(due).cast_signed())
}

#[cfg(test)]
mod tests {
    use kvm_bindings::{KVM_CLOCK_HOST_TSC, KVM_CLOCK_TSC_STABLE};

    use super::*;

    #[test]
    fn a_clock_is_judged_by_its_own_line() {
        let at = |clock, host_tsc| Clock {
            clock,
            host_tsc,
            flags: KVM_CLOCK_TSC_STABLE | KVM_CLOCK_HOST_TSC,
            tsc_khz: 1_000_000,
            ..Clock::default()
        };
        let error = off_line(&at(5_000, 100), &at(1_005_000 + 30, 1_000_100)).expect("an error");
        assert!((29..=31).contains(&error), "{error}");
        let early = off_line(&at(5_000, 100), &at(1_005_000 - 30, 1_000_100)).expect("an error");
        assert!((-31..=-29).contains(&early), "{early}");
        let blind = Clock {
            flags: 0,
            ..at(1, 1)
        };
        assert_eq!(off_line(&at(1, 1), &blind), None);
    }
}
