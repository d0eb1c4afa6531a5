//! A host for the matrix: a daemon, releases that stop or fail at each point, and a guest at work, booted
//! anew after each crash.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};

use anyhow::{Context, ensure};
use rustix::process::Signal;
use serde_json::Value;
use stillpoint_control::ownership::Ownership;

use super::acts::{is_stopped, signal};
use super::bare;
use super::resident::{Boot, Resident};
use crate::daemon::Daemon;
use crate::patience::{PATIENCE, wait_for};
use crate::releases::Release;

/// The guest's name.
pub const GUEST: &str = "web-1";
/// A budget that no busy machine breaks.
pub(super) const AMPLE: &str = "20s";
/// One that who hangs breaks soon.
pub(super) const SHORT: &str = "1s";

/// The host.
#[derive(Debug)]
pub struct Host {
    /// Where all of it lies.
    pub(super) dir: PathBuf,
    /// The daemon.
    pub(super) daemon: Daemon,
    guest: Option<Box<dyn Resident>>,
    word: Option<Ownership>,
    resident: Boot,
    /// The release that runs the guest.
    pub(super) runs: String,
    /// Releases that were added.
    added: BTreeSet<String>,
    /// Guests booted so far.
    pub boots: usize,
}

const STOPS: &str = "stops-";
const FAILS: &str = "fails-";

/// A release that stops at this point.
pub(super) fn stops_at(point: &str) -> String {
    format!("{STOPS}{point}")
}

/// A release that has an error at this point.
pub(super) fn fails_at(point: &str) -> String {
    format!("{FAILS}{point}")
}

impl Host {
    /// Below this directory, with a bare-metal guest.
    pub fn start(dir: &Path) -> anyhow::Result<Self> {
        Ok(Self::with(Daemon::start(dir)?, bare::boot))
    }

    /// With this daemon, and guests that are booted so.
    pub fn with(daemon: Daemon, resident: Boot) -> Self {
        Self {
            dir: daemon.dir().to_owned(),
            daemon,
            guest: None,
            word: None,
            resident,
            runs: String::new(),
            added: BTreeSet::new(),
            boots: 0,
        }
    }

    /// There is a release of this name: `good`, or one that stops or fails at a point.
    pub(super) fn has(&mut self, name: &str) -> anyhow::Result<()> {
        if self.added.contains(name) {
            return Ok(());
        }
        let act = |prefix, act| {
            let point = name.strip_prefix(prefix)?;
            Some(format!("--arg={point}={act}"))
        };
        let fault = act(STOPS, "stop").or_else(|| act(FAILS, "fail"));
        let release = match fault {
            Some(_) => Release::Faulty(""),
            None => Release::Current,
        };
        let binary = release.binary()?.display().to_string();
        let mut add = vec!["release", "add", "--unsigned", &binary, "--as", name];
        if let Some(fault) = &fault {
            add.extend(["--arg=--fault", fault]);
        }
        self.daemon.must(&add)?;
        self.added.insert(name.to_owned());
        Ok(())
    }

    /// There is a guest, and this release runs it. Gives its process.
    pub(super) fn ready(&mut self, release: &str) -> anyhow::Result<u32> {
        self.has(release)?;
        // One that fails whenever it is to give its guest away keeps it for good.
        if self.runs != release && self.runs.starts_with(FAILS) {
            self.forget();
        }
        if self.guest.is_none() {
            self.boot(release)?;
        }
        if self.runs != release {
            let predecessor = self.daemon.vmm_pid(GUEST)?;
            let mut swap = self.swap(release, AMPLE)?;
            // One that stops at its point does so in this swap too.
            let ended = wait_for("a swap to another release", PATIENCE, || {
                if is_stopped(predecessor) {
                    signal(predecessor, Signal::CONT)?;
                }
                Ok(swap.try_wait()?)
            })?;
            ensure!(ended.success(), "to {release}: {:#}", self.record()?);
            self.runs = release.into();
        }
        self.daemon.vmm_pid(GUEST)
    }

    fn boot(&mut self, release: &str) -> anyhow::Result<()> {
        let _ = self.daemon.stillpoint(&["rm", GUEST]);
        self.guest = Some((self.resident)(&self.daemon, release)?);
        let (_ram, word) = self.daemon.vmm(GUEST)?.lend_guest()?;
        self.word = Some(Ownership::map(word)?);
        self.runs = release.into();
        self.boots += 1;
        Ok(())
    }

    /// The ownership word.
    pub(super) fn word(&self) -> anyhow::Result<&Ownership> {
        self.word.as_ref().context("a guest")
    }

    /// Begins a swap with this budget.
    pub(super) fn swap(&self, to: &str, budget: &str) -> anyhow::Result<Child> {
        let args = [
            "swap",
            "vmm",
            GUEST,
            "--to",
            to,
            "--budget",
            budget,
            "--json",
            // The handover alone, whatever the release is like before it and after it.
            "--no-rehearsal",
            "--watch",
            "0s",
        ];
        let mut command = self.daemon.command(&args);
        Ok(command
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()?)
    }

    /// The record of the last swap, if the daemon tells.
    pub(super) fn record(&self) -> anyhow::Result<Value> {
        // By the journal's end: a list of all swaps is long after a thousand of them.
        let lines = self.daemon.get(&format!("/v1/journal?vm={GUEST}&last=20"));
        let mut lines = lines.as_array().into_iter().flatten().rev();
        let id = lines.find_map(|line| line["swap"].as_str());
        Ok(id.map_or(Value::Null, |id| {
            self.daemon.get(&format!("/v1/swaps/{id}"))
        }))
    }

    /// What the daemon says of the guest.
    pub(super) fn shown(&self) -> anyhow::Result<Value> {
        Ok(self.daemon.get(&format!("/v1/vms/{GUEST}")))
    }

    /// Somebody runs the guest, whoever it is.
    pub(super) fn goes_on(&self) -> anyhow::Result<()> {
        self.guest
            .as_ref()
            .context("a guest")?
            .goes_on(&self.daemon)
    }

    /// The guest goes on, and nothing about it is wrong.
    pub(super) fn is_whole(&mut self) -> anyhow::Result<()> {
        let guest = self.guest.as_mut().context("a guest")?;
        guest.is_whole(&self.daemon)
    }

    /// What could not be judged is not used again: the next cell has a guest of its own.
    pub fn forget(&mut self) {
        self.guest = None;
        // Whoever of the two has it.
        let of = |said: anyhow::Result<Value>, who: &str| said.ok()?[who]["pid"].as_u64();
        let processes = [of(self.shown(), "process"), of(self.record(), "successor")];
        for pid in processes.into_iter().flatten() {
            let _ = u32::try_from(pid).map(|pid| signal(pid, Signal::KILL));
        }
        let _ = wait_for("its end", PATIENCE, || {
            Ok((self.shown()?["state"] == "crashed").then_some(()))
        });
    }

    /// Nobody runs the guest any more, and its disk is as after a power cut: what was said to be
    /// durable is there.
    pub(super) fn is_gone(&mut self) -> anyhow::Result<()> {
        let guest = self.guest.take().context("a guest")?;
        wait_for("the guest to be said to have crashed", PATIENCE, || {
            Ok((self.shown()?["state"] == "crashed").then_some(()))
        })?;
        guest.is_gone()
    }

    /// What the log says last, for who looks into a failure.
    pub(super) fn log(&self) -> String {
        let vmm = std::fs::read_to_string(self.daemon.guest_dir(GUEST).join("vmm.log"));
        let tail = |text: String| {
            let lines: Vec<&str> = text.lines().collect();
            lines[lines.len().saturating_sub(12)..].join("\n")
        };
        format!(
            "{}\n---\n{}",
            tail(self.daemon.log()),
            tail(vmm.unwrap_or_default())
        )
    }
}
