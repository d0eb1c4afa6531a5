//! What of a swap of the host's kernel is ours: kexecs in turn into the same kernel, with the same command line,
//! initramfs and modules. Every other one is empty: no daemon, no guests, and it is over when `/dev/kvm` can be
//! opened. Those between are swaps under guests at work; what one takes longer than the two empty ones around it,
//! by their mean, is our share. Both, because each kexec of an emulated host takes somewhat longer than the one before.

use std::time::Duration;

use anyhow::{Context, bail, ensure};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use stillpoint_carveout::wall;
use stillpoint_tests::daemon::Daemon;
use stillpoint_tests::ground;

use crate::debian;
use crate::stages::{self, Line};

const STATE: &str = "/scratch/kexecs.json";
const PULSES: [&str; 2] = ["pulse-1", "pulse-2"];

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The kernel to jump into, by its name below /jump; later stages know it.
    #[arg(long, value_name = "NAME", default_value = "bookworm")]
    into: String,
    /// How many pairs.
    #[arg(long, default_value_t = 5)]
    pairs: usize,
    /// With a Debian guest of two vCPUs beside two of bare metal.
    #[arg(long)]
    debian: bool,
}

/// Where it stands.
#[derive(Debug, Serialize, Deserialize)]
struct State {
    into: String,
    pairs: usize,
    debian: bool,
    told: Vec<Value>,
    empty: Vec<Value>,
    under: Under,
}

/// What the last jump was.
#[derive(Debug, Serialize, Deserialize)]
enum Under {
    /// An empty one, from this moment.
    Empty(Line),
    /// A swap under guests.
    Swap(Line),
}

pub(crate) fn tell(args: &Args) -> anyhow::Result<Value> {
    if let Some(reason) = ground::no_kvm() {
        bail!("{reason}");
    }
    let Some(state) = stages::kept::<State>(STATE)? else {
        stages::lay_out()?;
        // The carve-out gets its directory: a kernel that was jumped into makes none.
        let mut daemon = stages::daemon()?;
        stages::add_release(&daemon)?;
        daemon.terminate()?;
        let state = State {
            into: args.into.clone(),
            pairs: args.pairs,
            debian: args.debian,
            told: Vec::new(),
            empty: Vec::new(),
            under: Under::Empty(Line::from(wall::now())),
        };
        return jump_empty(state);
    };
    match state.under {
        Under::Empty(line) => after_empty(state, &line),
        Under::Swap(line) => {
            let told = arrived(&line, state.debian)?;
            let number = state.told.len() + 1;
            println!(
                "scenario: swap {number} of {}: {}",
                state.pairs, told["total_ns"]
            );
            let told = [state.told, vec![told]].concat();
            jump_empty(State { told, ..state })
        }
    }
}

fn after_empty(mut state: State, line: &Line) -> anyhow::Result<Value> {
    let stamps = stages::stamps()?;
    let kvm = stamps.kvm.context("there is no /dev/kvm")?;
    let empty = json!({
        "to_init_ns": nanos(line.since(stamps.init)?),
        "total_ns": nanos(line.since(kvm)?),
    });
    println!("scenario: an empty kexec took {} ns", empty["total_ns"]);
    state.empty.push(empty);
    if state.told.len() < state.pairs {
        return swap(state);
    }
    end(&state)
}

fn nanos(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

fn end(state: &State) -> anyhow::Result<Value> {
    stages::bring_out_log()?;
    let release = rustix::system::uname()
        .release()
        .to_string_lossy()
        .into_owned();
    let mut guests = PULSES
        .map(|name| json!({"name": name, "vcpus": 2, "memory_mib": 64}))
        .to_vec();
    if state.debian {
        guests.push(json!({"name": debian::GUEST, "vcpus": 2, "memory_mib": 256}));
    }
    Ok(json!({"kernel": release, "guests": guests, "empty": state.empty, "swaps": state.told}))
}

/// Jumps with nobody on the host. The command line is as long as that of a swap.
fn jump_empty(mut state: State) -> anyhow::Result<Value> {
    let line = std::fs::read_to_string("/proc/cmdline")?;
    let plain: Vec<_> = line
        .split_ascii_whitespace()
        .filter(|word| !word.starts_with("stillpoint.jump="))
        .collect();
    let line = format!("{} stillpoint.jump={}", plain.join(" "), "0".repeat(32));
    let into = state.into.clone();
    stages::jump_empty(&into, &line, |line| {
        state.under = Under::Empty(line);
        stages::keep(STATE, &state)
    })
}

/// Starts guests, and swaps the kernel under them.
fn swap(mut state: State) -> anyhow::Result<Value> {
    stages::find_images()?;
    let early = wall::now();
    let daemon = stages::daemon()?;
    for name in PULSES {
        stages::run_pulse(&daemon, name, &[])?;
    }
    if state.debian {
        debian::begin(&daemon)?;
    }
    state.under = Under::Swap(Line::from(early));
    stages::keep(STATE, &state)?;
    let answer = stages::swap_kernel(&daemon, &state.into, &["--no-notice", "measured"])?;
    bail!("the host is still here: {}{}", answer.error, answer.json)
}

/// What the swap took; ends its guests.
fn arrived(line: &Line, with_debian: bool) -> anyhow::Result<Value> {
    if with_debian {
        debian::tap()?;
    }
    let daemon = stages::daemon()?;
    // When the kernel began, by its own account, and how long after that KVM was there.
    let (up, now) = (stages::uptime()?, wall::tsc());
    let stamps = stages::stamps()?;
    let kvm = stamps.kvm.context("there is no /dev/kvm")?;
    let kvm_up = up.saturating_sub(line.between(kvm, now)?);
    let command_up = up.saturating_sub(line.between(stamps.command, now)?);
    let swap = stages::last_swap(&daemon)?;
    ensure!(
        swap["state"] == "done" || swap["pause_ns"].is_u64(),
        "{swap:#}"
    );
    let total = swap["pause_ns"].as_u64().context("its pause")?;
    for name in PULSES {
        let pulse = daemon.pulse(name)?;
        let seen = pulse.wait_progress(&[0, 1], 10)?;
        ensure!(
            stages::faults(&seen).is_empty(),
            "{name}: {:#?}",
            stages::faults(&seen)
        );
    }
    let mut names = PULSES.to_vec();
    if with_debian {
        debian::is_up(&daemon)?;
        names.push(debian::GUEST);
    }
    let reports = names
        .iter()
        .map(|name| Ok((*name, daemon.must(&["report", name])?["report"].clone())))
        .collect::<anyhow::Result<Vec<_>>>()?;
    let guests: Vec<_> = reports
        .iter()
        .map(|(name, report)| json!({"name": name, "blackout_ns": report["blackout"]["host_ns"], "phases": report["phases"]}))
        .collect();
    end_guests(daemon, &names)?;
    Ok(json!({
        "total_ns": total,
        "phases": swap["kernel"]["phases"],
        "kvm_up_ns": nanos(kvm_up),
        "command_up_ns": nanos(command_up),
        "guests": guests,
    }))
}

fn end_guests(mut daemon: Daemon, names: &[&str]) -> anyhow::Result<()> {
    for name in names {
        daemon.must(&["stop", name, "--now"])?;
        daemon.must(&["rm", name])?;
    }
    daemon.terminate()
}
