//! One cell: brought about, waited for, judged.

use std::process::Child;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use rustix::process::{Resource, Signal};

use super::acts::{self, Full, HANG, SLOW, signal, state};
use super::host::{AMPLE, GUEST, SHORT, fails_at, stops_at};
use super::{Act, Cell, Host, Whom, expected};
use crate::patience::{PATIENCE, wait_for};

/// How a cell went.
#[derive(Clone, Debug)]
pub struct Verdict {
    /// What came of the swap: `moved`, `kept`, `crashed`, and `late` behind it if only when the
    /// process that hung went on.
    pub outcome: String,
    /// What the specification says.
    pub expected: Vec<String>,
    /// The blackout that the report tells of.
    pub blackout: Duration,
    /// The error of the guest's kvmclock, by its own page, if the report tells of it.
    pub clock_ns: Option<i64>,
    /// How long the cell took.
    pub took: Duration,
}

impl Verdict {
    /// It is as it must be.
    pub fn is_good(&self) -> bool {
        self.expected.contains(&self.outcome)
    }
}

/// The three processes of a swap under way.
#[derive(Clone, Copy, Debug)]
struct Three {
    predecessor: u32,
    successor: u32,
    daemon: u32,
}

impl Three {
    fn of(self, whom: Whom) -> u32 {
        match whom {
            Whom::Predecessor => self.predecessor,
            Whom::Successor => self.successor,
            Whom::Daemon => self.daemon,
        }
    }
}

/// Runs one cell, and judges the guest after it. An error is a promise broken, or a test that
/// could not be made.
pub fn run(host: &mut Host, cell: &Cell) -> anyhow::Result<Verdict> {
    let expected = expected(cell)?;
    let began = Instant::now();
    let armed = match cell.act {
        Act::Error => fails_at(cell.point),
        _ => stops_at(cell.point),
    };
    let (from, to) = match cell.at {
        Whom::Predecessor => (armed, "good".to_owned()),
        _ => ("good".to_owned(), armed),
    };
    host.has(&to)?;
    let predecessor = host.ready(&from)?;
    let before = host.record()?["id"].clone();
    // What hangs before the freeze breaks no budget; what comes after it should not either.
    let runs = ["offered", "adopt"].contains(&cell.point);
    let budget = match cell.act {
        Act::Hang if !runs => SHORT,
        _ => AMPLE,
    };
    // All but a little, before anything is frozen: on a busy machine it takes seconds.
    let full = (cell.act == Act::Disk)
        .then(|| Full::almost(&host.dir))
        .transpose()?;
    let mut asked = host.swap(&to, budget)?;
    let outcome = bring_about(host, cell, full, predecessor, &before);
    // Whoever asked hears the end from a daemon that lives, and none from one that died.
    end(&mut asked);
    let outcome = outcome.with_context(|| format!("{cell}\n{}", host.log()))?;
    let record = host.record()?;
    judge(host, &outcome, predecessor, &record, &from, &to)
        .with_context(|| format!("{cell}: {outcome}; {record:#}\n{}", host.log()))?;
    let ns = record["report"]["blackout"]["host_ns"].as_u64();
    Ok(Verdict {
        outcome,
        expected,
        blackout: Duration::from_nanos(ns.unwrap_or(0)),
        clock_ns: record["report"]["clock"]["kvmclock_error_ns"].as_i64(),
        took: began.elapsed(),
    })
}

fn end(asked: &mut Child) {
    let _ = asked.kill();
    let _ = asked.wait();
}

/// Waits for the point, acts, lets go, and waits for the end. Gives the outcome.
fn bring_about(
    host: &mut Host,
    cell: &Cell,
    full: Option<Full>,
    predecessor: u32,
    before: &serde_json::Value,
) -> anyhow::Result<String> {
    let successor = wait_for("the successor", PATIENCE, || {
        let record = host.record()?;
        let new = record["id"] != *before;
        Ok(record["successor"]["pid"].as_u64().filter(|_| new))
    })?;
    let three = Three {
        predecessor,
        successor: u32::try_from(successor)?,
        daemon: host.daemon.pid(),
    };
    if cell.act == Act::Error {
        return over(host, Instant::now() + PATIENCE)?.context("it does not end");
    }
    let (at, target) = (three.of(cell.at), three.of(cell.whom));
    wait_for("the point", PATIENCE, || {
        ensure!(state(at).is_some(), "the process ended before the point");
        Ok(acts::is_stopped(at).then_some(()))
    })?;
    let outcome = act(host, cell, full, at, target);
    // None is left behind in a state that would spoil the next cell.
    signal(at, Signal::CONT)?;
    for resource in [Resource::As, Resource::Nofile] {
        if state(target).is_some() {
            acts::restore(target, resource)?;
        }
    }
    outcome
}

fn act(
    host: &mut Host,
    cell: &Cell,
    mut full: Option<Full>,
    at: u32,
    target: u32,
) -> anyhow::Result<String> {
    let soon = || Instant::now() + PATIENCE;
    if let Some(full) = &mut full {
        full.fill_to_the_last_byte();
    }
    match cell.act {
        Act::Kill if cell.whom == Whom::Daemon => {
            host.daemon.kill()?;
            signal(at, Signal::CONT)?;
            host.daemon.restart()?;
        }
        Act::Kill => signal(target, Signal::KILL)?,
        Act::Both => return alone(host, cell, at, target),
        Act::Hang => return hang(host, at, target),
        Act::Slow => {
            signal(target, Signal::STOP)?;
            std::thread::sleep(SLOW);
            signal(target, Signal::CONT)?;
        }
        Act::Memory => acts::exhaust(target, Resource::As)?,
        Act::Fds => acts::exhaust(target, Resource::Nofile)?,
        Act::Disk | Act::Error => {}
    }
    signal(at, Signal::CONT)?;
    if let Some(full) = full {
        // The two processes end it between themselves; then there is room to write it down.
        let ends = Instant::now() + SLOW * 10;
        let early = over(host, ends);
        full.end()?;
        if let Ok(Some(outcome)) = early {
            return Ok(outcome);
        }
    }
    if matches!(cell.act, Act::Memory | Act::Fds) {
        return match cell.whom {
            Whom::Daemon => starved(host, target),
            _ => short(host, target),
        };
    }
    over(host, soon())?.context("it does not end")
}

/// A VMM without memory or descriptors. One that runs its guest, and has nothing left to answer with, is told
/// from one that died only when there is enough again.
fn short(host: &mut Host, target: u32) -> anyhow::Result<String> {
    if let Some(outcome) = over(host, Instant::now() + HANG)? {
        return Ok(outcome);
    }
    if state(target).is_some() {
        acts::restore(target, Resource::As)?;
        acts::restore(target, Resource::Nofile)?;
    }
    let late = over(host, Instant::now() + PATIENCE)?.context("it does not end")?;
    Ok(format!("{late} late"))
}

/// Both the target and the daemon are dead: what is left settles it, and the daemon that is started then
/// only finds out how.
fn alone(host: &mut Host, cell: &Cell, at: u32, target: u32) -> anyhow::Result<String> {
    host.daemon.kill()?;
    signal(target, Signal::KILL)?;
    signal(at, Signal::CONT)?;
    if expected(cell)?.iter().all(|outcome| outcome != "crashed") {
        host.goes_on().context("with no daemon")?;
    }
    host.daemon.restart()?;
    over(host, Instant::now() + PATIENCE)?.context("it does not end")
}

/// A daemon without memory or descriptors: it may die of it, and is started again then, as its unit
/// would; or it goes on when there is enough again.
fn starved(host: &mut Host, target: u32) -> anyhow::Result<String> {
    std::thread::sleep(SLOW * 10);
    if state(target).is_some() {
        acts::restore(target, Resource::As)?;
        acts::restore(target, Resource::Nofile)?;
    }
    if state(target).is_none() {
        host.daemon.kill()?;
        host.daemon.restart()?;
    }
    over(host, Instant::now() + PATIENCE)?.context("it does not end")
}

/// The target stands still. If nothing ends the swap in spite of that, it goes on at last.
fn hang(host: &mut Host, at: u32, target: u32) -> anyhow::Result<String> {
    signal(target, Signal::STOP)?;
    if at != target {
        signal(at, Signal::CONT)?;
    }
    let until = Instant::now() + HANG;
    let early = if target == host.daemon.pid() {
        // Nobody tells; the two end it between themselves meanwhile.
        std::thread::sleep(SLOW * 40);
        None
    } else {
        over(host, until)?
    };
    signal(target, Signal::CONT)?;
    if let Some(outcome) = early {
        return Ok(outcome);
    }
    let late = over(host, Instant::now() + PATIENCE)?.context("it does not end")?;
    let itself = target == host.daemon.pid();
    Ok(if itself { late } else { format!("{late} late") })
}

/// The end of the last swap by its record; none if it isn't over by then.
pub(super) fn over(host: &Host, until: Instant) -> anyhow::Result<Option<String>> {
    loop {
        let record = host.record()?;
        let state = record["state"].as_str().unwrap_or_default();
        if ["moved", "kept", "crashed"].contains(&state) {
            return Ok(Some(state.to_owned()));
        }
        if Instant::now() >= until {
            return Ok(None);
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// The guest is where the record says, whole; or gone for good.
fn judge(
    host: &mut Host,
    outcome: &str,
    predecessor: u32,
    record: &serde_json::Value,
    from: &str,
    to: &str,
) -> anyhow::Result<()> {
    let successor = record["successor"]["pid"].as_u64().unwrap_or(0);
    let (runs, pid) = match outcome.split(' ').next().unwrap_or_default() {
        "moved" => (to, u32::try_from(successor)?),
        "kept" => (from, predecessor),
        "crashed" => {
            for pid in [predecessor, u32::try_from(successor)?] {
                wait_for("both processes to be gone", PATIENCE, || {
                    Ok(state(pid).is_none().then_some(()))
                })?;
            }
            return host.is_gone();
        }
        other => bail!("`{other}` is no outcome"),
    };
    host.runs = runs.to_owned();
    wait_for("the guest to be said to run", PATIENCE, || {
        Ok((host.shown()?["state"] == "running").then_some(()))
    })?;
    let found = host.daemon.vmm_pid(GUEST)?;
    ensure!(found == pid, "process {found} has it, not {pid}");
    if let Some(error) = record["report"]["clock"]["kvmclock_error_ns"].as_i64() {
        ensure!(
            error.unsigned_abs() <= crate::swap::CLOCK_BOUND_NS,
            "kvmclock is off by {error} ns"
        );
    }
    host.is_whole()
}
