//! Guests whose memory live update keeps, under one kexec of their host after another: each kernel that is
//! jumped into has this scenario look at them and jump again, until it was as often as asked. Only for an
//! emulated host whose kernel has `/dev/liveupdate`. Under the last a guest goes along that does not come back
//! by itself ([`astray`]); before the first, and when it arrived, the daemon dies ([`cells`]).

mod astray;
mod cells;

use std::path::Path;

use anyhow::{Context, bail, ensure};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use stillpoint_tests::daemon::Daemon;
use stillpoint_tests::ground;

use crate::kernel::{goes_on, rehearsal_of, told};
use crate::{debian, stages};

const STATE: &str = "/scratch/live-update.json";
const PULSES: [&str; 2] = ["pulse-1", "pulse-2"];
const NO_NOTICE: [&str; 2] = ["--no-notice", "a scenario"];

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The kernel to jump into, by its name below /jump; later stages know it.
    #[arg(long, value_name = "NAME", default_value = "luo")]
    into: String,
    /// How often.
    #[arg(long, default_value_t = 10)]
    jumps: usize,
    /// With a Debian guest at work beside two of bare metal.
    #[arg(long)]
    debian: bool,
}

/// Where it stands.
#[derive(Debug, Serialize, Deserialize)]
struct State {
    into: String,
    jumps: usize,
    /// What the guests showed before the last jump.
    pulses: Vec<Value>,
    debian: Value,
    /// Of the guest that goes along in the last jump.
    #[serde(default)]
    astray: Value,
    told: Vec<Value>,
}

impl State {
    /// Whether the next jump is the last.
    fn is_last(&self) -> bool {
        self.told.len() + 1 == self.jumps
    }
}

pub(crate) fn tell(args: &Args) -> anyhow::Result<Value> {
    if let Some(reason) = ground::no_kvm() {
        bail!("{reason}");
    }
    let state = stages::kept::<State>(STATE)?;
    let done = match state {
        None => begin(args),
        Some(state) => arrive(state),
    };
    done.with_context(|| {
        let host = Path::new(stages::HOST);
        let vmm = |name: &str| host.join("run/vms").join(name).join("vmm.log");
        let logs = [
            vmm(PULSES[0]),
            vmm(debian::GUEST),
            host.join("stillpointd.log"),
        ];
        let texts = logs.map(|log| std::fs::read_to_string(log).unwrap_or_default());
        format!("what was logged:\n{}", texts.join("\n"))
    })
}

fn begin(args: &Args) -> anyhow::Result<Value> {
    stages::lay_out()?;
    let daemon = stages::daemon_without_carve_out()?;
    stages::add_release(&daemon)?;
    let mut pulses = Vec::new();
    for name in PULSES {
        pulses.push(told(&stages::run_pulse(&daemon, name, &[])?));
        let shown = daemon.must(&["show", name])?;
        let rungs = shown["rungs"].as_array().into_iter().flatten();
        let mut kernel = rungs.filter(|rung| rung["check"] == "kernel");
        ensure!(
            kernel
                .next()
                .is_some_and(|rung| rung["status"] == "ok"
                    && rung["found"].to_string().contains("live update")),
            "{shown:#}"
        );
    }
    println!("scenario: two pulse guests run in memfds that live update can keep");
    let debian = match args.debian {
        true => debian::begin(&daemon)?,
        false => Value::Null,
    };
    refuses(&daemon, &args.into)?;
    let mut daemon = daemon;
    cells::daemon_dies(&mut daemon, &args.into, &mut pulses)?;
    jump(
        &daemon,
        State {
            into: args.into.clone(),
            jumps: args.jumps,
            pulses,
            debian,
            astray: Value::Null,
            told: Vec::new(),
        },
    )
}

/// A next kernel without live update would lose the guests: nothing is begun.
fn refuses(daemon: &Daemon, into: &str) -> anyhow::Result<()> {
    let line = ["--command-line", "console=ttyS0 quiet kho=on", "--check"];
    let answer = stages::swap_kernel(daemon, into, &line)?;
    let said = format!("{}{}", answer.error, answer.json);
    ensure!(!answer.success && said.contains("liveupdate=on"), "{said}");
    // All of it is told at once: the guests' records could be loaded.
    for name in PULSES {
        let rehearsed = rehearsal_of(&answer.json, name)?;
        ensure!(rehearsed["status"] == "ok", "{rehearsed:#}");
    }
    println!("scenario: a next kernel that would look for nothing is refused");
    Ok(())
}

fn jump(daemon: &Daemon, mut state: State) -> anyhow::Result<Value> {
    let mut more = NO_NOTICE.to_vec();
    if state.is_last() {
        state.astray = astray::begin(daemon)?;
        astray::is_found_out(daemon, &state.into)?;
        more.push("--no-rehearsal");
    }
    stages::keep(STATE, &state)?;
    let number = state.told.len() + 1;
    println!("scenario: jump {number} of {}", state.jumps);
    let answer = stages::swap_kernel(daemon, &state.into, &more)?;
    bail!("the host is still here: {}{}", answer.error, answer.json)
}

fn arrive(mut state: State) -> anyhow::Result<Value> {
    let with_debian = !state.debian.is_null();
    if with_debian {
        debian::tap()?;
    }
    // Of the first jump the daemon dies while it adopts.
    let mut daemon = match state.told.is_empty() {
        true => stages::daemon_after_one_that_died_adopting(&PULSES, &[], true)?,
        false => stages::daemon_without_carve_out()?,
    };
    let swap = stages::last_swap(&daemon)?;
    // Slow as an emulated host is, a pause beyond its budget is told of, and no failure.
    ensure!(state.is_last() || swap["state"] == "done", "{swap:#}");
    ensure!(swap["kernel"]["to"].is_string(), "{swap:#}");
    let clock = &swap["kernel"]["clock"];
    let left = clock["left_ns"]
        .as_i64()
        .context("the wall clock's error")?;
    ensure!(
        clock["problem"].is_null() && left.abs() < 50_000,
        "{clock:#}"
    );
    for (name, before) in PULSES.iter().zip(&mut state.pulses) {
        *before = goes_on(&daemon, name, before)?;
    }
    let mut names = PULSES.to_vec();
    if with_debian {
        debian::is_up(&daemon)?;
        names.push(debian::GUEST);
    }
    if state.is_last() {
        let came_by = (&swap, state.into.as_str());
        astray::comes_back(&mut daemon, came_by, &state.astray)?;
        names.push(astray::GUEST);
    }
    // Each once, and by its own VMM: nothing is left that could be run again.
    let kept = daemon.must(&["adopt"])?;
    for guest in kept["guests"].as_array().into_iter().flatten() {
        ensure!(guest["record"] == "consumed", "{kept:#}");
    }
    ensure!(
        kept["guests"].as_array().map(Vec::len) == Some(names.len()),
        "{kept:#}"
    );
    // Of who came back by another try no swap tells.
    let reports = names
        .iter()
        .filter(|name| **name != astray::GUEST)
        .map(|name| Ok(daemon.must(&["report", name])?["report"].clone()))
        .collect::<anyhow::Result<Vec<_>>>()?;
    let number = state.told.len() + 1;
    println!(
        "scenario: jump {number} arrived, pause {} ns",
        swap["pause_ns"]
    );
    state.told.push(json!({
        "pause_ns": swap["pause_ns"], "phases": swap["kernel"]["phases"], "clock": clock, "reports": reports,
    }));
    if state.told.len() < state.jumps {
        return jump(&daemon, state);
    }
    let debian = match with_debian {
        true => debian::end(&daemon, &state.debian)?,
        false => Value::Null,
    };
    stages::bring_out_log()?;
    Ok(json!({"jumps": state.told, "debian": debian}))
}
