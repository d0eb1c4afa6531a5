//! Many guests on one host: all swapped by one command, beside one of them swapped alone.
//!
//! The guests halt, but for a timer: what is compared is the host's time from the kick of a guest's vCPUs to the
//! entry of the last, which a guest that is asleep can't see.

use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use serde::Serialize;
use serde_json::Value;
use stillpoint_control::report::Blackout;
use stillpoint_tests::daemon::Daemon;
use stillpoint_tests::releases::{self, Release};

use crate::environment;
use crate::ours::{nanos, pause};
use crate::run::progress;

/// Guests of a whole run.
const GUESTS: u32 = 50;
/// And of a quick one.
const FEW: u32 = 8;
/// Swaps of one guest alone, among the others.
const LONE: u32 = 20;
/// Swaps of all.
const ROUNDS: u32 = 2;
/// RAM of each guest, MiB.
const MEMORY_MIB: u64 = 64;
/// A guest starts on this, and goes to the other and back: the same build under two names.
const NAMES: [&str; 2] = ["one", "two"];

/// What came of it.
#[derive(Debug, Default, Serialize)]
pub(crate) struct Many {
    /// Guests on the host.
    pub(crate) guests: u32,
    /// Of one guest that was swapped alone.
    pub(crate) lone: Figures,
    /// Of all guests, swapped by one command.
    pub(crate) all: Figures,
    /// How long each such command took, ns.
    pub(crate) took_ns: Vec<u64>,
    /// Guests that did not move.
    pub(crate) stayed: usize,
    /// What a guest's VMM has of the host's memory, its RAM's touched pages among it, on average, KiB: before the swaps,
    /// and when all are over. What several share counts in parts (Pss of `/proc/PID/smaps_rollup`).
    pub(crate) each_kib: [u64; 2],
    /// The most that was taken of the host's memory at any time while all were swapped, beyond what was before, KiB.
    pub(crate) most_kib: u64,
}

/// Blackouts, ns.
#[derive(Debug, Default, Serialize)]
pub(crate) struct Figures {
    /// The host's, waits for a core included.
    pub(crate) host: Vec<u64>,
    /// What the worst vCPU was out of its guest, less its waits for a core.
    pub(crate) unqueued: Vec<u64>,
}

impl Figures {
    fn take(&mut self, swap: &Value) -> anyhow::Result<()> {
        let blackout: Blackout = serde_json::from_value(swap["report"]["blackout"].clone())
            .with_context(|| format!("a report in {swap}"))?;
        let unqueued = blackout
            .unqueued_worst()
            .context("what each vCPU was out")?;
        self.host.push(nanos(blackout.host));
        self.unqueued.push(nanos(unqueued));
        Ok(())
    }
}

impl Many {
    /// Boots them, and swaps.
    pub(crate) fn measure(quick: bool) -> anyhow::Result<Self> {
        let guests = if quick { FEW } else { GUESTS };
        let dir = tempfile::Builder::new()
            .prefix("stillpoint-bench-")
            .tempdir()?;
        let daemon = Daemon::start(dir.path()).context("run `make programs`")?;
        let mut many = Self {
            guests,
            ..Self::default()
        };
        many.boot(&daemon)?;
        many.each_kib[0] = many.each(&daemon)?;
        let mut release = Turns::default();
        for number in 0..if quick { 4 } else { LONE } {
            progress("one guest among many", number, LONE);
            pause(100);
            many.lone(&daemon, release.next())?;
        }
        progress("one guest among many", LONE, LONE);
        // So that none of them is there already.
        if release.0 % 2 == 1 {
            many.lone(&daemon, release.next())?;
        }
        for round in 0..ROUNDS {
            progress("all guests at once", round, ROUNDS);
            many.all(&daemon, release.next())?;
        }
        progress("all guests at once", ROUNDS, ROUNDS);
        pause(1000);
        many.each_kib[1] = many.each(&daemon)?;
        Ok(many)
    }

    fn boot(&self, daemon: &Daemon) -> anyhow::Result<()> {
        let binary = Release::Current.binary()?;
        let binary = binary.to_str().context("a path in UTF-8")?;
        for name in NAMES {
            daemon.must(&["release", "add", binary, "--unsigned", "--as", name])?;
        }
        let pulse = releases::pulse()?;
        let pulse = pulse.to_str().context("a path in UTF-8")?;
        let memory = format!("{MEMORY_MIB}M");
        for number in 0..self.guests {
            progress("booting guests", number, self.guests);
            let name = format!("guest-{number}");
            let run = [
                "run",
                &name,
                "--kernel",
                pulse,
                "--release",
                NAMES[0],
                "--memory",
                &memory,
                "--cmdline",
                "pulse ram=1M mode=halt",
            ];
            daemon.must(&run)?;
        }
        progress("booting guests", self.guests, self.guests);
        Ok(())
    }

    fn each(&self, daemon: &Daemon) -> anyhow::Result<u64> {
        let all = daemon.must(&["ls"])?;
        let pids = all.as_array().into_iter().flatten();
        let pids = pids.filter_map(|vm| vm["process"]["pid"].as_u64());
        let sum = pids.map(pss_kib).sum::<anyhow::Result<u64>>()?;
        Ok(sum / u64::from(self.guests.max(1)))
    }

    /// Swaps the first guest, and no other.
    fn lone(&mut self, daemon: &Daemon, to: &str) -> anyhow::Result<()> {
        let swap = daemon.must(&["swap", "vmm", "guest-0", "--to", to])?;
        self.lone.take(&swap)
    }

    /// Swaps all of them.
    fn all(&mut self, daemon: &Daemon, to: &str) -> anyhow::Result<()> {
        let before = environment::available_kib();
        let began = Instant::now();
        let mut least = before;
        let mut command = daemon.command(&["--json", "swap", "vmm", "--all", "--to", to]);
        let mut child = command
            .stdout(std::process::Stdio::piped())
            .stderr(std::process::Stdio::piped())
            .spawn()
            .context("stillpoint")?;
        let output = std::thread::scope(|scope| {
            let mut out = child.stdout.take();
            let read = scope.spawn(move || out.as_mut().map(std::io::read_to_string));
            while child.try_wait()?.is_none() {
                least = least.min(environment::available_kib());
                std::thread::sleep(Duration::from_millis(20));
            }
            let output = read.join().ok().flatten().context("its output")?;
            anyhow::Ok(output?)
        })?;
        self.took_ns
            .push(u64::try_from(began.elapsed().as_nanos())?);
        self.most_kib = self.most_kib.max(before.saturating_sub(least));
        let told: Value = serde_json::from_str(&output).context("what `swap vmm --all` said")?;
        let swaps = told["swaps"].as_array().context("swaps")?;
        ensure!(
            swaps.len() == self.guests as usize,
            "not all were asked for: {told}"
        );
        for swap in swaps {
            match swap["state"] == "moved" {
                true => self.all.take(swap)?,
                false => self.stayed += 1,
            }
        }
        Ok(())
    }
}

/// The releases, in turns.
#[derive(Default)]
struct Turns(usize);

impl Turns {
    fn next(&mut self) -> &'static str {
        self.0 += 1;
        NAMES[self.0 % 2]
    }
}

fn pss_kib(pid: u64) -> anyhow::Result<u64> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup"))?;
    let line = text.lines().find_map(|line| line.strip_prefix("Pss:"));
    let kib = line.context("no Pss")?.trim().trim_end_matches(" kB");
    Ok(kib.parse()?)
}
