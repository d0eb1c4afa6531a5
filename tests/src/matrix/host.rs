//! A host for the matrix: a daemon, releases that stop or fail at each point, and a guest with a disk,
//! sockets and entropy at work, booted anew after each crash.

use std::collections::BTreeSet;
use std::io::{BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};

use anyhow::{Context, ensure};
use serde_json::Value;
use stillpoint_control::ownership::Ownership;
use stillpoint_guest_abi::pulse::Report;
use tempfile::NamedTempFile;

use rustix::process::Signal;

use super::acts::{is_stopped, signal, stand_still};
use crate::daemon::Daemon;
use crate::devices::check_disk;
use crate::furnished::{HOST_PORT, call, echo};
use crate::guest::Pulse;
use crate::patience::{PATIENCE, wait_for};
use crate::releases::{Release, pulse};

/// The guest's name.
pub(super) const GUEST: &str = "web-1";
/// The vCPU that drives the disk.
const DISK: usize = 1;
/// The vCPU that speaks with the host.
const SOCKETS: usize = 2;
const VCPUS: usize = 3;
const UNDER_WAY: usize = 1000;
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
    guest: Option<Guest>,
    /// The release that runs the guest.
    pub(super) runs: String,
    /// Releases that were added.
    added: BTreeSet<String>,
    /// Guests booted so far.
    pub boots: usize,
}

#[derive(Debug)]
struct Guest {
    pulse: Pulse,
    image: NamedTempFile,
    call: BufReader<UnixStream>,
    number: u8,
    word: Ownership,
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
    /// Below this directory.
    pub fn start(dir: &Path) -> anyhow::Result<Self> {
        let daemon = Daemon::start(dir)?;
        Ok(Self {
            dir: dir.to_owned(),
            daemon,
            guest: None,
            runs: String::new(),
            added: BTreeSet::new(),
            boots: 0,
        })
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
        let image = NamedTempFile::new()?;
        image.as_file().set_len(16 << 20)?;
        let kernel = pulse()?.display().to_string();
        let cmdline = format!("pulse ram=2M gap_us=500 mode1=blk mode2=vsock port={HOST_PORT}");
        let disk = image.path().display().to_string();
        let cpus = VCPUS.to_string();
        let _ = self.daemon.stillpoint(&["rm", GUEST]);
        let run = [
            "run",
            GUEST,
            "--release",
            release,
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
            "--budget",
            "1s",
        ];
        self.daemon.must(&run)?;
        let dir = self.daemon.guest_dir(GUEST);
        let _ = std::fs::remove_file(dir.join(format!("vsock.sock_{HOST_PORT}")));
        echo(&dir)?;
        let (ram, word) = self.daemon.vmm(GUEST)?.lend_guest()?;
        let pulse = Pulse::find(ram, PATIENCE)?;
        pulse.wait_online(u32::try_from(VCPUS)?)?;
        self.guest = Some(Guest {
            pulse,
            image,
            call: call(&dir)?,
            number: 0,
            word: Ownership::map(word)?,
        });
        self.runs = release.into();
        self.boots += 1;
        self.send()?;
        self.is_whole()
    }

    fn guest(&self) -> anyhow::Result<&Guest> {
        self.guest.as_ref().context("a guest")
    }

    /// The ownership word.
    pub(super) fn word(&self) -> anyhow::Result<&Ownership> {
        Ok(&self.guest()?.word)
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

    /// Puts bytes on their way to the guest and back.
    fn send(&mut self) -> anyhow::Result<()> {
        let guest = self.guest.as_mut().context("a guest")?;
        guest.number = guest.number.wrapping_add(1);
        Ok(guest.call.get_mut().write_all(&[guest.number; UNDER_WAY])?)
    }

    /// Somebody runs the guest, whoever it is.
    pub(super) fn goes_on(&self) -> anyhow::Result<()> {
        let vcpus: Vec<usize> = (0..VCPUS).collect();
        self.guest()?.pulse.wait_progress(&vcpus, 20).map(drop)
    }

    /// Every vCPU goes on, both devices work, what was under way came as it was sent, and nothing
    /// about the guest is wrong: counters, clocks, timers, RAM, and that it ran once. Its disk, looked at
    /// from outside while all of the VMM stands still, holds what the guest was told it holds.
    pub(super) fn is_whole(&mut self) -> anyhow::Result<()> {
        let vcpus: Vec<usize> = (0..VCPUS).collect();
        let guest = self.guest.as_mut().context("a guest")?;
        let from = guest.pulse.look()?;
        guest.pulse.wait_progress(&vcpus, 20)?;
        let done = |r: &Report| (r.blk.reads + r.blk.writes + r.blk.flushes, r.vsock.rounds);
        let seen = guest.pulse.wait("all devices at work", PATIENCE, |s| {
            done(&s.vcpus[DISK]).0 >= done(&from.vcpus[DISK]).0 + 20
                && done(&s.vcpus[SOCKETS]).1 > done(&from.vcpus[SOCKETS]).1
                || !s.faults().is_empty()
        })?;
        ensure!(seen.faults().is_empty(), "{:#?}", seen.faults());
        guest.pulse.ran_once()?;
        let mut back = [0; UNDER_WAY];
        guest
            .call
            .read_exact(&mut back)
            .context("the socket's bytes")?;
        ensure!(
            back == [guest.number; UNDER_WAY],
            "what was under way changed"
        );
        let vmm = self.daemon.vmm_pid(GUEST)?;
        let still = stand_still(vmm)?;
        check_disk(&guest.pulse, DISK, guest.image.path())?;
        drop(still);
        self.send()
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
        let total = |pulse: &Pulse| anyhow::Ok(pulse.look()?.globals.total);
        let before = total(&guest.pulse)?;
        std::thread::sleep(std::time::Duration::from_millis(20));
        ensure!(total(&guest.pulse)? == before, "somebody runs it");
        check_disk(&guest.pulse, DISK, guest.image.path())?;
        Ok(())
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
