//! The guest's own wall clock: what its agent says of it, and what is done about it.
//!
//! A pause that the guest's clocks left out makes its `CLOCK_REALTIME` late by just as much, and
//! nobody in a stock guest notices by itself. The agent moves it on by the length of the pause, once
//! for each swap. A guest that somebody else has set meanwhile is left alone: its clock is not late
//! any more.
//!
//! Runs beside the guest, before the freeze and after the entry; never between. Whatever the agent
//! says or fails to say costs no swap, it only stands in the report. An agent that is too busy to
//! correct a clock at once is asked again beside everything else, for a minute: asking twice
//! corrects once.

use std::io;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant, SystemTime};

use kvm_bindings::{KVM_CLOCK_HOST_TSC, KVM_CLOCK_REALTIME, KVM_CLOCK_TSC_STABLE};
use stillpoint_agent::client::{AskError, Client, dial};
use stillpoint_agent::protocol::{self, Clocks, Manner};
use stillpoint_control::clock::{Correction, Policy};
use stillpoint_control::report::Step;
use stillpoint_state::sections::Clock;

use crate::clock::{Scale, host_tsc, is_master};
use crate::machine::Machine;

/// The guest's vsock on the host, in its directory.
const SOCKET: &str = "vsock.sock";
/// How long an agent may take to answer while nothing hangs on it.
const QUESTION: Duration = Duration::from_secs(1);
/// How long it may take to correct a clock that is wrong until it has.
const CORRECTION: Duration = Duration::from_secs(2);

/// For how long an agent that did not answer is asked again, and how often.
const PERSISTENCE: Duration = Duration::from_secs(60);
const AGAIN: Duration = Duration::from_secs(1);

/// The guest's wall clock after a swap.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct After {
    /// Its error, where an agent told what it says.
    pub error_ns: Option<i64>,
    /// What was done about it.
    pub steps: Vec<Step>,
}

/// A swap whose pause is to be made good.
#[derive(Clone, Copy, Debug)]
pub struct Pause<'a> {
    /// The swap.
    pub id: &'a str,
    /// What the guest's clocks made of it.
    pub policy: Policy,
    /// By how much they are late.
    pub held: Duration,
    /// The wall clock's error before.
    pub error_before_ns: Option<i64>,
}

/// The guest's `CLOCK_REALTIME` less the host's, if there is an agent that tells.
pub fn ask_error(machine: &Machine, dir: &str) -> Option<i64> {
    machine.spec().vsock?;
    let mut agent = connect(Path::new(dir), QUESTION).ok()?;
    error(&mut agent, machine).ok().flatten()
}

/// Whether the guest's agent answers.
pub fn is_heard(dir: &Path) -> bool {
    connect(dir, QUESTION).is_ok_and(|mut agent| agent.health().is_ok())
}

/// Makes good what the pause did to the guest's wall clock, and tells how it stands then.
pub fn after(machine: &Machine, dir: &Path, pause: Pause<'_>) -> After {
    let how = match pause.policy {
        Policy::Advance => None,
        Policy::Hold => machine.spec().correction(),
    };
    if machine.spec().vsock.is_none() {
        return After::default();
    }
    let patience = if how.is_some() { CORRECTION } else { QUESTION };
    let corrected = connect(dir, patience)
        .map_err(AskError::from)
        .and_then(|mut agent| settle(&mut agent, how, pause, |agent| error(agent, machine)));
    match (corrected, how) {
        (Ok(after), _) => after,
        (Err(problem), Some(how @ (Correction::Step | Correction::Slew))) => {
            persist(machine, dir, how, pause);
            After {
                error_ns: None,
                steps: vec![failed(how, pause.held, &problem)],
            }
        }
        (Err(_), _) => After::default(),
    }
}

/// Asks again and again, on a thread of its own: this one has the machine to see to.
fn persist(machine: &Machine, dir: &Path, how: Correction, pause: Pause<'_>) {
    let (dir, id) = (dir.to_owned(), pause.id.to_owned());
    let (khz, offset) = (machine.tsc_khz(), machine.tsc_offset().unwrap_or(0));
    let (held, error_before_ns) = (pause.held, pause.error_before_ns);
    let attempt = move || -> Result<After, AskError> {
        let pause = Pause {
            id: &id,
            policy: Policy::Hold,
            held,
            error_before_ns,
        };
        let error = |agent: &mut Agent| {
            let clocks = agent.clocks()?;
            Ok(error_of(&clocks, &host_clock(khz), offset))
        };
        settle(&mut connect(&dir, CORRECTION)?, Some(how), pause, error)
    };
    let thread = std::thread::Builder::new().name("correct".into());
    let spawned = thread.spawn(move || {
        let deadline = Instant::now() + PERSISTENCE;
        while Instant::now() < deadline {
            std::thread::sleep(AGAIN);
            if let Ok(After { error_ns, steps }) = attempt() {
                tracing::info!(
                    ?steps,
                    error_ns,
                    "the guest's wall clock was corrected late"
                );
                return;
            }
        }
        tracing::warn!(
            ?held,
            "the guest's agent does not answer: its wall clock stays late"
        );
    });
    if let Err(error) = spawned {
        tracing::warn!(%error, "no thread to correct the guest's wall clock by");
    }
}

/// The host's wall clock at a TSC, without a machine at hand: right to what two readings take.
fn host_clock(khz: u32) -> Clock {
    let before = host_tsc();
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    let width = host_tsc().saturating_sub(before);
    Clock {
        flags: KVM_CLOCK_REALTIME | KVM_CLOCK_HOST_TSC | KVM_CLOCK_TSC_STABLE,
        realtime: now.map_or(0, |now| u64::try_from(now.as_nanos()).unwrap_or(0)),
        host_tsc: before + width / 2,
        tsc_khz: khz,
        ..Clock::default()
    }
}

type Agent = Client<UnixStream>;

fn connect(dir: &Path, patience: Duration) -> io::Result<Agent> {
    let stream = dial(&dir.join(SOCKET), protocol::PORT, patience)?;
    stream.set_read_timeout(Some(patience))?;
    stream.set_write_timeout(Some(patience))?;
    Ok(Client::new(stream))
}

fn failed(how: Correction, held: Duration, error: &dyn std::error::Error) -> Step {
    let mut why = error.to_string();
    if let Some(cause) = error.source() {
        why = format!("{why}: {cause}");
    }
    Step {
        how,
        by_ns: nanos(held),
        problem: Some(format!(
            "the guest's wall clock was late by the pause that was held, {held:?}, when this was \
             written: {why}. Its agent is asked again for a minute; else set it in the guest, or \
             have it done by ptp_kvm and a daemon that may step"
        )),
    }
}

fn nanos(time: Duration) -> i64 {
    i64::try_from(time.as_nanos()).unwrap_or(i64::MAX)
}

/// One talk with an agent. `error` asks it for the wall clock's error.
fn settle(
    agent: &mut Agent,
    how: Option<Correction>,
    pause: Pause<'_>,
    error: impl Fn(&mut Agent) -> Result<Option<i64>, AskError>,
) -> Result<After, AskError> {
    let manner = match how {
        Some(Correction::Step) => Manner::Step,
        Some(Correction::Slew) => Manner::Slew,
        Some(Correction::Ptp) | None => {
            let error_ns = error(agent)?;
            return Ok(After {
                error_ns,
                steps: Vec::new(),
            });
        }
    };
    let by_ns = nanos(pause.held);
    let late = is_late(error(agent)?, pause.error_before_ns, by_ns);
    let mut steps = Vec::new();
    if let (true, Some(how)) = (late, how) {
        agent.correct(protocol::Correction {
            id: pause.id.to_owned(),
            by_ns,
            how: manner,
        })?;
        steps.push(Step {
            how,
            by_ns,
            problem: None,
        });
    }
    Ok(After {
        error_ns: error(agent)?,
        steps,
    })
}

/// Whether the clock is late by the pause still. Who knows no error from before takes it for late:
/// nothing else sets a guest's clock as a rule.
fn is_late(now: Option<i64>, before: Option<i64>, held_ns: i64) -> bool {
    match (now, before) {
        (Some(now), Some(before)) => before.saturating_sub(now) > held_ns / 2,
        _ => true,
    }
}

fn error(agent: &mut Agent, machine: &Machine) -> Result<Option<i64>, AskError> {
    let clocks = agent.clocks()?;
    let host = machine.clock().ok();
    let offset = machine.tsc_offset().unwrap_or(0);
    Ok(host.and_then(|host| error_of(&clocks, &host, offset)))
}

/// The error of a reading by the guest, against one by the host, on the TSC that both share.
fn error_of(guest: &Clocks, host: &Clock, offset: i64) -> Option<i64> {
    if !is_master(host.flags) || host.flags & KVM_CLOCK_REALTIME == 0 {
        return None;
    }
    let reading = guest.realtime;
    let width = reading.tsc_after.checked_sub(reading.tsc_before)?;
    let read = (reading.tsc_before + width / 2).wrapping_sub(offset.cast_unsigned());
    let since = Scale::of_khz(host.tsc_khz).ns_between(read, host.host_tsc);
    let right = host.realtime.checked_add_signed(-since)?;
    Some(reading.ns.wrapping_sub(right).cast_signed())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{BufRead, BufReader, Write};

    const HELD: Duration = Duration::from_secs(28);

    fn pause(before: Option<i64>) -> Pause<'static> {
        Pause {
            id: "swap-7",
            policy: Policy::Hold,
            held: HELD,
            error_before_ns: before,
        }
    }

    /// An agent that gives these answers, one to each request; gives what it was asked.
    fn agent(answers: &'static [&'static str]) -> (Agent, std::thread::JoinHandle<Vec<String>>) {
        let (ours, theirs) = UnixStream::pair().expect("socketpair");
        let thread = std::thread::spawn(move || {
            let mut lines = BufReader::new(theirs.try_clone().expect("dup")).lines();
            let mut asked = Vec::new();
            for answer in answers {
                let Some(Ok(line)) = lines.next() else { break };
                asked.push(line);
                writeln!(&theirs, "{answer}").expect("answer");
            }
            asked
        });
        (Client::new(ours), thread)
    }

    #[test]
    fn a_late_clock_is_moved_on_by_the_pause_and_once() {
        let (mut agent, asked) = agent(&[r#"{"ok":{"again":false}}"#]);
        let errors = std::cell::RefCell::new(vec![120, -nanos(HELD) + 100]);
        let error = |_: &mut Agent| Ok(errors.borrow_mut().pop());
        let after = settle(&mut agent, Some(Correction::Step), pause(Some(90)), error);
        let after = after.expect("corrected");
        assert_eq!(after.error_ns, Some(120));
        assert_eq!(after.steps.len(), 1);
        assert_eq!(after.steps[0].by_ns, nanos(HELD));
        let asked = asked.join().expect("agent");
        assert_eq!(
            asked,
            [r#"{"do":"correct","id":"swap-7","by_ns":28000000000,"how":"step"}"#]
        );
    }

    #[test]
    fn a_clock_that_somebody_set_meanwhile_is_left_alone() {
        let (mut agent, asked) = agent(&[]);
        let error = |_: &mut Agent| Ok(Some(95));
        let after = settle(&mut agent, Some(Correction::Step), pause(Some(90)), error);
        assert_eq!(after.expect("settled").steps, []);
        drop(agent);
        assert_eq!(asked.join().expect("agent"), [""; 0]);
        assert!(is_late(Some(0), None, 5), "not known before: it is late");
    }

    #[test]
    fn an_agent_that_refuses_is_told_of_in_the_report() {
        const REFUSAL: &str = r#"{"error":{"code":"failed","text":"not permitted"}}"#;
        let (mut agent, _asked) = agent(&[REFUSAL]);
        let error = |_: &mut Agent| Ok(None);
        let problem =
            settle(&mut agent, Some(Correction::Step), pause(None), error).expect_err("refused");
        let step = failed(Correction::Step, HELD, &problem);
        let text = step.problem.expect("a problem");
        assert!(
            text.contains("28s") && text.contains("not permitted"),
            "{text}"
        );
    }

    #[test]
    fn readings_meet_on_the_tsc() {
        let host = Clock {
            flags: KVM_CLOCK_TSC_STABLE | KVM_CLOCK_HOST_TSC | KVM_CLOCK_REALTIME,
            realtime: 1_000_000_000,
            host_tsc: 5_000_000,
            tsc_khz: 1_000_000,
            ..Clock::default()
        };
        let reading = protocol::Reading {
            // 1 ms before the host's reading, and 40 ns fast.
            ns: 999_000_040,
            tsc_before: 3_999_990 - 700,
            tsc_after: 4_000_010 - 700,
        };
        let clocks = Clocks {
            clocksource: protocol::Clocksource::default(),
            realtime: reading,
            monotonic: reading,
            monotonic_raw: reading,
            boottime: reading,
            ptp_kvm: None,
        };
        let error = error_of(&clocks, &host, -700).expect("an error");
        assert!((38..=42).contains(&error), "{error}");
        assert!(host_clock(1_000_000).realtime > 1 << 60, "after 2006");
        let blind = Clock { flags: 0, ..host };
        assert_eq!(error_of(&clocks, &blind, -700), None);
    }
}
