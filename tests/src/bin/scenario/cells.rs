//! What can go wrong on the way to another kernel, cell by cell, on an emulated host: who dies, what is refused,
//! what is cut off, what is damaged; and each time what became of every guest, and of its memory.
//!
//! 1. Without a jump: a kernel that can't be loaded; a jump that the kernel refuses; the daemon's death, and a VMM's
//!    before and after its guest was stored. Then a cut in the middle: the host comes up under another kernel, by no
//!    jump of ours, with one guest stored and one not.
//! 2. Nobody is run from what was stored; then a swap as it should be, back to the first kernel.
//! 3. It arrives, and the directory is damaged: nobody is run; it is mended, and the guests go on.

use std::path::{Path, PathBuf};

use anyhow::{Context, bail, ensure};
use rustix::process::Signal;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use stillpoint_carveout::area::Place;
use stillpoint_carveout::layout::Extent;
use stillpoint_carveout::map::Device;
use stillpoint_carveout::mark::Mark;
use stillpoint_tests::daemon::Daemon;
use stillpoint_tests::ground;
use stillpoint_tests::patience::{PATIENCE, wait_for};
use stillpoint_tests::rig::crash;
use stillpoint_tests::rig::order::CARVE_OUT;

use crate::held::{Held, signal};
use crate::stages;

const STATE: &str = "/scratch/cells.json";
const GUESTS: [&str; 2] = ["pulse-1", "pulse-2"];
/// How often a kernel is loaded in the hope that a guest is still stored then.
const TRIES: usize = 3;

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The kernel to jump into, by its name below /jump; later stages know it.
    #[arg(long, value_name = "NAME", default_value = "bookworm")]
    into: String,
    /// The kernel under which the host comes up when it is cut off.
    #[arg(long, value_name = "NAME", default_value = "backports")]
    cut_into: String,
}

#[derive(Debug, Serialize, Deserialize)]
struct State {
    into: String,
    told: Vec<String>,
    /// The counters of a guest that is to go on.
    counters: Vec<Vec<u64>>,
    is_swap: bool,
}

pub(crate) fn tell(args: &Args) -> anyhow::Result<Value> {
    if let Some(reason) = ground::no_kvm() {
        bail!("{reason}");
    }
    let told = match stages::kept::<State>(STATE)? {
        None => stay(args),
        Some(state) if !state.is_swap => cut_off(state),
        Some(state) => damaged(state),
    };
    told.with_context(|| {
        let logs = GUESTS.map(|name| format!("run/vms/{name}/vmm.log"));
        let logs = logs.iter().map(String::as_str).chain(["stillpointd.log"]);
        let texts = logs.map(|log| std::fs::read_to_string(Path::new(stages::HOST).join(log)));
        let texts: Vec<_> = texts.map(Result::unwrap_or_default).collect();
        format!("what was logged:\n{}", texts.join("\n"))
    })
}

/// A host on which things go wrong.
struct Cells {
    daemon: Daemon,
    into: String,
    told: Vec<String>,
}

impl Cells {
    fn say(&mut self, cell: &str) {
        println!("scenario: {cell}");
        self.told.push(cell.to_owned());
    }

    /// Where a guest's record lies.
    fn place(&self, name: &str) -> anyhow::Result<Place> {
        let shown = self.daemon.must(&["show", name])?;
        let at = &shown["spec"]["memory"]["carve_out"];
        let number = |field: &str| at[field].as_u64().with_context(|| format!("{shown:#}"));
        let extent = Extent {
            start: number("record")?,
            len: number("record_len")?,
        };
        Ok(Place::of(&Device::open(Path::new(CARVE_OUT))?, extent)?)
    }

    fn counters(&self) -> anyhow::Result<Vec<Vec<u64>>> {
        let seen = GUESTS.map(|name| counters(&self.daemon, name));
        seen.into_iter().collect()
    }

    /// Begins a swap, with the second guest's VMM stopped: the first is stored when this returns, and the swap waits
    /// for the second.
    fn held(&self) -> anyhow::Result<Held> {
        let place = self.place(GUESTS[0])?;
        let is_stored = || Ok(place.mark() == Mark::Stored);
        // From the beginning: nothing else is asked of it.
        Held::begin(&self.daemon, &self.into, GUESTS[1], || Ok(true), is_stored)
    }

    /// Every guest runs on, from where it was, and can be run from no record.
    fn run_on(&self, before: &[Vec<u64>], names: &[&str]) -> anyhow::Result<()> {
        for (name, before) in names.iter().zip(before) {
            let now = counters(&self.daemon, name)?;
            ensure!(
                now.iter().zip(before).all(|(now, was)| now >= was),
                "{name}: {now:?} after {before:?}"
            );
            let seen = self.daemon.pulse(name)?.wait_progress(&[0, 1], 10)?;
            ensure!(
                stages::faults(&seen).is_empty(),
                "{name}: {:#?}",
                stages::faults(&seen)
            );
            let mark = self.place(name)?.mark();
            ensure!(
                mark != Mark::Stored,
                "{name} runs, and its record is {mark}"
            );
        }
        Ok(())
    }

    fn state(&self, name: &str, state: &str) -> anyhow::Result<Value> {
        wait_for(&format!("{name} to be {state}"), PATIENCE, || {
            let shown = self.daemon.must(&["show", name])?;
            Ok((shown["state"] == state).then_some(shown))
        })
    }

    fn last(&self, state: &str, why: &str) -> anyhow::Result<()> {
        let swap = wait_for("the swap to be over", PATIENCE, || {
            let swap = stages::last_swap(&self.daemon)?;
            let over =
                ["done", "failed", "refused"].contains(&swap["state"].as_str().unwrap_or_default());
            Ok(over.then_some(swap))
        })?;
        ensure!(
            swap["state"] == state && swap["reason"].to_string().contains(why),
            "{swap:#}"
        );
        Ok(())
    }

    /// What a command that must be refused says.
    fn refused(&self, args: &[&str], why: &str) -> anyhow::Result<()> {
        let answer = self.daemon.stillpoint(args)?;
        ensure!(
            !answer.success && answer.error.contains(why),
            "{args:?}: {}{}",
            answer.error,
            answer.json
        );
        Ok(())
    }

    /// A guest that is stored and whose VMM is gone: its memory is nobody's, until it is given up.
    fn is_kept_until_forgotten(&self, name: &str) -> anyhow::Result<()> {
        ensure!(
            self.place(name)?.mark() == Mark::Stored,
            "{}",
            self.place(name)?.mark()
        );
        let free = |view: Value| view["free"].as_u64().unwrap_or_default();
        let before = free(self.daemon.must(&["adopt"])?);
        self.refused(&["rm", name], "may yet be run")?;
        self.refused(&["adopt", "--retry", name], "did not come by")?;
        let image = stillpoint_tests::releases::pulse()?.display().to_string();
        self.refused(
            &[
                "run",
                name,
                "--cpus",
                "2",
                "--memory",
                "64M",
                "--survive",
                "kernel",
                "--kernel",
                &image,
            ],
            name,
        )?;
        ensure!(
            free(self.daemon.must(&["adopt"])?) == before,
            "memory was given out"
        );
        ensure!(
            self.place(name)?.mark() == Mark::Stored,
            "something was done to it"
        );
        ensure!(
            free(self.daemon.must(&["adopt", "--forget", name])?) > before,
            "nothing came back"
        );
        self.daemon.must(&["rm", name])?;
        Ok(())
    }
}

fn counters(daemon: &Daemon, name: &str) -> anyhow::Result<Vec<u64>> {
    let seen = daemon.pulse(name)?.look()?;
    Ok(seen.vcpus.iter().map(|vcpu| vcpu.counter).collect())
}

fn stay(args: &Args) -> anyhow::Result<Value> {
    stages::lay_out()?;
    let daemon = stages::daemon()?;
    stages::add_release(&daemon)?;
    for name in GUESTS {
        stages::run_pulse(&daemon, name, &[])?;
    }
    let mut cells = Cells {
        daemon,
        into: args.into.clone(),
        told: Vec::new(),
    };
    cells.no_kernel()?;
    cells.jump_is_refused()?;
    cells.daemon_dies()?;
    cells.vmm_dies_stored()?;
    cells.vmm_dies_before()?;
    cells.cut(&args.cut_into)
}

impl Cells {
    fn no_kernel(&mut self) -> anyhow::Result<()> {
        let before = self.counters()?;
        let image = stillpoint_tests::releases::pulse()?.display().to_string();
        self.refused(
            &[
                "swap",
                "kernel",
                "--kernel",
                &image,
                "--no-notice",
                "a cell",
            ],
            "is it a bzImage?",
        )?;
        ensure!(
            self.daemon
                .must(&["host", "changes"])?
                .as_array()
                .is_none_or(Vec::is_empty)
        );
        self.run_on(&before, &GUESTS)?;
        self.say("a kernel that can't be loaded: refused, nobody stood still");
        Ok(())
    }

    fn jump_is_refused(&mut self) -> anyhow::Result<()> {
        let before = self.counters()?;
        let held = self.held()?;
        // Somebody else takes the loaded kernel away.
        crash::unload()?;
        held.go_on()?;
        held.end()?;
        self.last("failed", "the jump failed")?;
        self.run_on(&before, &GUESTS)?;
        self.say(
            "a jump that the kernel refuses: every guest runs on, and its record is of the past",
        );
        Ok(())
    }

    fn daemon_dies(&mut self) -> anyhow::Result<()> {
        let before = self.counters()?;
        let held = self.held()?;
        self.daemon.kill()?;
        held.go_on()?;
        ensure!(
            self.place_by_vmm(GUESTS[0])?.mark() == Mark::Stored,
            "it did not wait for the next daemon"
        );
        self.daemon.restart()?;
        held.end()?;
        self.last("failed", "the daemon ended in the middle of it")?;
        self.run_on(&before, &GUESTS)?;
        self.say("the daemon dies while guests are stored: the next one has them run on");
        Ok(())
    }

    /// As [`Cells::place`], without a daemon.
    fn place_by_vmm(&self, name: &str) -> anyhow::Result<Place> {
        let spec = self.daemon.vmm(name)?.describe()?.spec;
        let at = spec.memory.carve_out.context("its place")?;
        let extent = Extent {
            start: at.record,
            len: at.record_len,
        };
        Ok(Place::of(&Device::open(Path::new(CARVE_OUT))?, extent)?)
    }

    fn vmm_dies_stored(&mut self) -> anyhow::Result<()> {
        let before = self.counters()?;
        let held = self.held()?;
        signal(self.daemon.vmm_pid(GUESTS[0])?, Signal::KILL)?;
        held.go_on()?;
        held.end()?;
        self.last("failed", GUESTS[0])?;
        self.run_on(&before[1..], &GUESTS[1..])?;
        self.state(GUESTS[0], "crashed")?;
        self.is_kept_until_forgotten(GUESTS[0])?;
        stages::run_pulse(&self.daemon, GUESTS[0], &[])?;
        self.say("a VMM dies whose guest is stored: no jump, that guest crashed, the others run on; its memory is kept until it is given up");
        Ok(())
    }

    fn vmm_dies_before(&mut self) -> anyhow::Result<()> {
        let before = self.counters()?;
        let held = self.held()?;
        signal(held.stopped, Signal::KILL)?;
        held.end()?;
        self.last("failed", GUESTS[1])?;
        self.run_on(&before[..1], &GUESTS[..1])?;
        self.state(GUESTS[1], "crashed")?;
        ensure!(self.place(GUESTS[1])?.mark() != Mark::Stored);
        self.daemon.must(&["rm", GUESTS[1]])?;
        stages::run_pulse(&self.daemon, GUESTS[1], &[])?;
        self.say(
            "a VMM dies before its guest is stored: no jump, that guest crashed, the others run on",
        );
        Ok(())
    }

    /// The host comes up anew in the middle of it, with its memory as it was, by no jump of ours.
    fn cut(self, cut_into: &str) -> anyhow::Result<Value> {
        let line = std::fs::read_to_string("/proc/cmdline")?;
        let [image, initrd] = stages::kernel(cut_into)?;
        let next = State {
            into: self.into.clone(),
            told: self.told.clone(),
            counters: Vec::new(),
            is_swap: false,
        };
        stages::keep(STATE, &next)?;
        for _ in 0..TRIES {
            let held = self.held()?;
            signal(self.daemon.pid(), Signal::STOP)?;
            crash::load(&image, &initrd, line.trim())?;
            if self.place_by_vmm(GUESTS[0])?.mark() == Mark::Stored {
                crash::jump()?;
            }
            // Loading took so long that the guest ran on at its ceiling.
            signal(self.daemon.pid(), Signal::CONT)?;
            held.go_on()?;
            held.end()?;
            self.last("failed", "")?;
        }
        bail!("no kernel was loaded within a guest's ceiling, in {TRIES} tries")
    }
}

fn cut_off(state: State) -> anyhow::Result<Value> {
    let mut cells = Cells {
        daemon: stages::daemon()?,
        into: state.into,
        told: state.told,
    };
    for name in GUESTS {
        cells.state(name, "crashed")?;
    }
    cells.last("failed", "came by no jump")?;
    cells.is_kept_until_forgotten(GUESTS[0])?;
    ensure!(cells.place(GUESTS[1])?.mark() != Mark::Stored);
    cells.daemon.must(&["rm", GUESTS[1]])?;
    cells.say("a cut with one guest stored and one not: nobody is run; the memory of the one that was is kept until it is given up");
    for name in GUESTS {
        stages::run_pulse(&cells.daemon, name, &[])?;
    }
    let next = State {
        into: cells.into.clone(),
        told: cells.told.clone(),
        counters: cells.counters()?,
        is_swap: true,
    };
    stages::keep(STATE, &next)?;
    let answer = stages::swap_kernel(&cells.daemon, &cells.into, &["--no-notice", "a cell"])?;
    bail!("the host is still here: {}{}", answer.error, answer.json)
}

/// Of each copy of the directory one byte is another than before.
fn spoil() -> anyhow::Result<()> {
    let device = Device::open(Path::new(CARVE_OUT))?;
    let directory = device.map(Extent {
        start: 0,
        len: stillpoint_carveout::layout::DIRECTORY,
    })?;
    for copy in [0, stillpoint_carveout::directory::COPY as u64] {
        let mut byte = [0];
        directory.read(copy + 100, &mut byte);
        directory.write(copy + 100, &[byte[0] ^ 1]);
    }
    Ok(())
}

fn damaged(state: State) -> anyhow::Result<Value> {
    spoil()?;
    let mut cells = Cells {
        daemon: stages::daemon()?,
        into: state.into,
        told: state.told,
    };
    let view = cells.daemon.stillpoint(&["adopt"])?;
    ensure!(
        !view.success
            && view.json["problem"]
                .to_string()
                .contains("damaged in both copies"),
        "{:#}",
        view.json
    );
    for name in GUESTS {
        let shown = cells.daemon.must(&["show", name])?;
        ensure!(
            shown["state"] != "running" && shown["process"].is_null(),
            "{shown:#}"
        );
        ensure!(
            cells.place(name)?.mark() == Mark::Stored,
            "something was done to {name}"
        );
        cells.refused(&["rm", name], "damaged")?;
        cells.refused(&["adopt", "--retry", name], "damaged")?;
    }
    let image: PathBuf = stillpoint_tests::releases::pulse()?;
    let image = image.display().to_string();
    cells.refused(
        &[
            "run",
            "another",
            "--memory",
            "64M",
            "--survive",
            "kernel",
            "--kernel",
            &image,
        ],
        "damaged",
    )?;
    cells.say("a directory that is damaged after the jump: nobody is run, nothing is given out, and it is said");
    // As if the damage had been in the reading: what lies there is as it was.
    cells.daemon.kill()?;
    spoil()?;
    cells.daemon.restart()?;
    for name in GUESTS {
        let shown = cells.daemon.must(&["show", name])?;
        if shown["state"] != "running" {
            cells.daemon.must(&["adopt", "--retry", name])?;
        }
    }
    cells.run_on(&state.counters, &GUESTS)?;
    for name in GUESTS {
        ensure!(cells.place(name)?.mark() == Mark::Consumed);
        cells.daemon.pulse(name)?.ran_once()?;
    }
    cells.say("and when it is whole again, they go on from where they were");
    stages::bring_out_log()?;
    Ok(json!({"cells": cells.told}))
}
