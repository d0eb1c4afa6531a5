//! A host whose daemon guards swaps: a guest with a disk, sockets and entropy at work, and releases
//! that are good, or bad in one way each.

use std::path::Path;

use anyhow::{Context, ensure};
use serde_json::Value;
use stillpoint_guest_abi::pulse::Report;
use tempfile::{NamedTempFile, TempDir};

use crate::daemon::{Answer, Daemon};
use crate::devices::check_disk;
use crate::furnished::{HOST_PORT, echo};
use crate::guest::Pulse;
use crate::patience::{PATIENCE, wait_for};
use crate::releases::{Release, pulse};

/// The guest's name.
pub const GUEST: &str = "web-1";
/// The vCPU that drives the disk.
const DISK: usize = 1;
/// The vCPU that speaks with the host.
const SOCKETS: usize = 2;
const VCPUS: usize = 3;

/// The host.
#[derive(Debug)]
pub struct Host {
    /// Its daemon.
    pub daemon: Daemon,
    /// The guest's own notes.
    pub pulse: Pulse,
    image: NamedTempFile,
    _dir: TempDir,
}

/// Adds a release that has this fault, under this name.
fn add(daemon: &Daemon, name: &str, fault: Option<&str>) -> anyhow::Result<()> {
    let release = match fault {
        Some(_) => Release::Faulty(""),
        None => Release::Current,
    };
    let binary = release.binary()?.display().to_string();
    let mut line = vec!["release", "add", "--unsigned", &binary, "--as", name];
    let arg = fault.map(|fault| format!("--arg={fault}"));
    if let Some(arg) = &arg {
        line.extend(["--arg=--fault", arg]);
    }
    daemon.must(&line).map(drop)
}

impl Host {
    /// With these releases beside `good` and `next`, each with its fault; `good` runs the guest.
    pub fn start(faults: &[(&str, &str)]) -> anyhow::Result<Self> {
        let dir = tempfile::tempdir()?;
        let daemon = Daemon::start(dir.path())?;
        add(&daemon, "good", None)?;
        add(&daemon, "next", None)?;
        for (name, fault) in faults {
            add(&daemon, name, Some(fault))?;
        }
        let image = NamedTempFile::new()?;
        image.as_file().set_len(16 << 20)?;
        let pulse = boot(&daemon, image.path())?;
        let host = Self {
            daemon,
            pulse,
            image,
            _dir: dir,
        };
        host.is_whole()?;
        Ok(host)
    }

    /// Asks for a swap, and waits until all is known of it that the command waits for.
    pub fn swap(&self, to: &str, more: &[&str]) -> anyhow::Result<Answer> {
        let mut line = vec!["swap", "vmm", GUEST, "--to", to];
        // No busy machine breaks it.
        if !more.contains(&"--budget") {
            line.extend(["--budget", "20s"]);
        }
        line.extend(more);
        self.daemon.stillpoint(&line)
    }

    /// All swaps of the guest so far, without their reports.
    pub fn swaps(&self) -> anyhow::Result<Vec<Value>> {
        let all = self.daemon.must(&["report"])?;
        Ok(all.as_array().cloned().unwrap_or_default())
    }

    /// The release that runs the guest.
    pub fn runs(&self) -> anyhow::Result<String> {
        let shown = self.daemon.must(&["show", GUEST])?;
        Ok(shown["release"].as_str().context("a release")?.to_owned())
    }

    /// Waits until the record of a swap says something.
    pub fn wait_record(
        &self,
        what: &str,
        id: &Value,
        good: impl Fn(&Value) -> bool,
    ) -> anyhow::Result<Value> {
        let id = id.as_str().context("an id")?;
        wait_for(what, PATIENCE, || {
            Ok(Some(self.daemon.must(&["report", id])?).filter(&good))
        })
        .with_context(|| self.daemon.log())
    }

    /// Every vCPU goes on, both devices work, and nothing about the guest is wrong: counters, clocks,
    /// timers, RAM, and that it ran once.
    pub fn is_whole(&self) -> anyhow::Result<()> {
        let vcpus: Vec<usize> = (0..VCPUS).collect();
        let from = self.pulse.look()?;
        self.pulse.wait_progress(&vcpus, 20)?;
        let done = |r: &Report| (r.blk.reads + r.blk.writes + r.blk.flushes, r.vsock.rounds);
        let seen = self.pulse.wait("all devices at work", PATIENCE, |s| {
            done(&s.vcpus[DISK]).0 >= done(&from.vcpus[DISK]).0 + 20
                && done(&s.vcpus[SOCKETS]).1 > done(&from.vcpus[SOCKETS]).1
                || !s.faults().is_empty()
        })?;
        ensure!(seen.faults().is_empty(), "{:#?}", seen.faults());
        let passed = seen.vcpus[0].ram_passes;
        let seen = self.pulse.wait("another pass over RAM", PATIENCE, |s| {
            s.vcpus[0].ram_passes > passed
        })?;
        ensure!(seen.faults().is_empty(), "{:#?}", seen.faults());
        self.pulse.ran_once()
    }

    /// Ends the guest, and compares its disk with what it was told.
    pub fn end(self) -> anyhow::Result<()> {
        self.daemon.must(&["stop", "--now", GUEST])?;
        check_disk(&self.pulse, DISK, self.image.path())?;
        Ok(())
    }
}

fn boot(daemon: &Daemon, image: &Path) -> anyhow::Result<Pulse> {
    let kernel = pulse()?.display().to_string();
    let cmdline = format!("pulse ram=2M gap_us=500 mode1=blk mode2=vsock port={HOST_PORT}");
    let (disk, cpus) = (image.display().to_string(), VCPUS.to_string());
    let run = [
        "run",
        GUEST,
        "--release",
        "good",
        "--cpus",
        &cpus,
        "--memory",
        "64M",
        "--kernel",
        &kernel,
        "--cmdline",
        &cmdline,
        "--disk",
        &disk,
        "--vsock",
        "--rng",
    ];
    let started = daemon.must(&run)?;
    let found = started["updatable"].as_array().context("a judgement")?;
    ensure!(!found.is_empty(), "{started:#}");
    echo(&daemon.guest_dir(GUEST))?;
    let (ram, _) = daemon.vmm(GUEST)?.lend_guest()?;
    let pulse = Pulse::find(ram, PATIENCE)?;
    pulse.wait_online(u32::try_from(VCPUS)?)?;
    Ok(pulse)
}
