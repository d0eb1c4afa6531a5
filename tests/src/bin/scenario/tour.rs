//! Every change of the host that there is, one after the other, under the same guests at work: KVM's modules
//! loaded anew, and the host's kernel swapped in each direction. Three Debian guests and two of bare metal, under
//! disk, network and memory load at once; who they talk to is outside the host.

mod clock;
mod guests;
mod wires;

use std::path::Path;

use anyhow::{Context, bail, ensure};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use stillpoint_tests::daemon::Daemon;
use stillpoint_tests::ground;

use crate::stages;
use clock::Line;
use guests::{Debian, Pulse};

const STATE: &str = "/scratch/tour.json";
/// How long guests are told before, unless all of them approve.
const NOTICE: &str = "20s";

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// What is done, in this order: `modules`, or a kernel to jump into by its name below /jump. Later stages know it.
    #[arg(long = "leg", value_name = "LEG")]
    legs: Vec<String>,
    /// How many Debian guests, the first of them with two vCPUs.
    #[arg(long, default_value_t = 3)]
    debian: usize,
}

/// Where it stands.
#[derive(Debug, Serialize, Deserialize)]
struct State {
    legs: Vec<String>,
    /// How many of them are over.
    over: usize,
    debian: Vec<Debian>,
    pulse: Vec<Pulse>,
    /// The host's clock against the one outside, since the kernel that runs was first asked.
    off: Line,
    told: Vec<Value>,
}

pub(crate) fn tell(args: &Args) -> anyhow::Result<Value> {
    if let Some(reason) = ground::no_kvm() {
        bail!("{reason}");
    }
    let told = match stages::kept::<State>(STATE)? {
        None => begin(args),
        Some(state) => arrive(state),
    };
    told.with_context(|| {
        let vms = std::fs::read_dir(Path::new(stages::HOST).join("run/vms"));
        let logs = vms.into_iter().flatten().flatten();
        let logs = logs.map(|vm| vm.path().join("vmm.log"));
        let logs = logs.chain([Path::new(stages::HOST).join("stillpointd.log")]);
        let texts = logs.map(|log| std::fs::read_to_string(log).unwrap_or_default());
        format!("what was logged:\n{}", texts.collect::<Vec<_>>().join("\n"))
    })
}

fn begin(args: &Args) -> anyhow::Result<Value> {
    ensure!(
        !args.legs.is_empty(),
        "there is nothing to do: give `--leg`"
    );
    stages::lay_out()?;
    let mut state = State {
        legs: args.legs.clone(),
        over: 0,
        debian: (1..=args.debian).map(Debian::new).collect(),
        pulse: (1..=2).map(Pulse::new).collect(),
        off: Line::default(),
        told: Vec::new(),
    };
    wires::connect(&state.debian)?;
    state.off.first = clock::outside()?;
    let daemon = stages::daemon()?;
    stages::add_release(&daemon)?;
    for guest in &mut state.pulse {
        guest.begin(&daemon)?;
    }
    for guest in &mut state.debian {
        guest.begin(&daemon)?;
    }
    println!(
        "scenario: {} Debian guests and {} of bare metal are at work",
        state.debian.len(),
        state.pulse.len()
    );
    go_on(&daemon, state)
}

/// Does what comes next; whatever is no jump is looked at at once.
fn go_on(daemon: &Daemon, mut state: State) -> anyhow::Result<Value> {
    while let Some(leg) = state.legs.get(state.over).cloned() {
        for guest in &mut state.pulse {
            guest.look(daemon)?;
        }
        for guest in &mut state.debian {
            guest.look(daemon)?;
        }
        state.off.last = clock::outside()?;
        println!("scenario: {leg}, under all of them");
        if leg != "modules" {
            stages::keep(STATE, &state)?;
            let answer = stages::swap_kernel(daemon, &leg, &["--notice", NOTICE])?;
            bail!("the host is still here: {}{}", answer.error, answer.json);
        }
        wires::lay_out_modules()?;
        let swap = daemon.must(&["swap", "kvm", "--budget", "30s", "--notice", NOTICE])?;
        ensure!(swap["state"] == "done", "{swap:#}");
        is_over(daemon, &mut state, &swap)?;
    }
    end(daemon, state)
}

fn arrive(mut state: State) -> anyhow::Result<Value> {
    wires::connect(&state.debian)?;
    let daemon = stages::daemon()?;
    let swap = stages::last_swap(&daemon)?;
    let id = swap["id"].as_str().unwrap_or_default();
    crate::kernel::show(daemon.command(&["host", "show", id]))?;
    ensure!(
        swap["state"] == "done" || swap["reason"] == "the pause was longer than its budget",
        "{swap:#}"
    );
    let clock = &swap["kernel"]["clock"];
    ensure!(
        clock["problem"].is_null() && clock["left_ns"].is_i64(),
        "{swap:#}"
    );
    is_over(&daemon, &mut state, &swap)?;
    go_on(&daemon, state)
}

/// Every guest went on from where it was, and what it was told of it is what it should be.
fn is_over(daemon: &Daemon, state: &mut State, swap: &Value) -> anyhow::Result<()> {
    let mut pauses = Vec::new();
    let leg = state.legs[state.over].clone();
    // At once: this kernel's clock runs at another rate.
    let off = clock::outside()?;
    let moved = off.since(&state.off.led_to(&off))?;
    state.off.first = off;
    for guest in &mut state.pulse {
        guest.went_on(daemon)?;
        pauses.push(guest.pause(daemon)?);
    }
    for guest in &mut state.debian {
        guest
            .went_on(daemon)
            .with_context(|| format!("after {leg}"))?;
        pauses.push(guest.pause(daemon)?);
    }
    println!(
        "scenario: after {leg} every guest went on; the host's clock is {moved} off the line it was on against the one outside"
    );
    state.told.push(json!({
        "leg": leg, "swap": swap, "guests": pauses,
        "clock_moved_us": moved.us, "uncertain_us": moved.uncertain_us,
        "kernel": rustix::system::uname().release().to_string_lossy(),
    }));
    state.over += 1;
    Ok(())
}

/// Ends the guests' work, and judges all of it.
fn end(daemon: &Daemon, state: State) -> anyhow::Result<Value> {
    let mut ended = Vec::new();
    for guest in &state.debian {
        ended.push(guest.end(daemon)?);
    }
    stages::bring_out_log()?;
    println!("scenario: nothing was lost, and no kernel complains");
    Ok(json!({"legs": state.told, "guests": ended}))
}
