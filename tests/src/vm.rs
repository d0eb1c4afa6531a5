//! A VMM process with its guest, and its swap, driven as the daemon does it.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use rustix::fs::MemfdFlags;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use stillpoint_control::client::Client;
use stillpoint_control::message::{Handover, Ready, Request};
use stillpoint_control::ownership::Ownership;
use stillpoint_control::report::{Outcome, ReleaseName, SwapReport};
use stillpoint_control::spec::{KernelSpec, MachineSpec, MemorySpec};

use crate::guest::Pulse;
use crate::releases::{self, Release};

/// How long anything that should be quick may take on a busy machine.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// A guest to boot.
#[derive(Clone, Debug)]
pub struct Recipe {
    /// vCPUs.
    pub cpus: u8,
    /// RAM, MiB.
    pub memory_mib: u64,
    /// pulse's command line.
    pub cmdline: String,
    /// The release that boots it.
    pub release: Release,
}

impl Recipe {
    /// Pulse with this many vCPUs and this command line.
    pub fn pulse(cpus: u8, cmdline: &str) -> Self {
        let cmdline = format!("pulse {cmdline}");
        Self {
            cpus,
            memory_mib: 128,
            cmdline,
            release: Release::Current,
        }
    }
}

/// A running VMM.
#[derive(Debug)]
pub struct Vm {
    child: Child,
    dir: tempfile::TempDir,
    spec: MachineSpec,
    release: Release,
    swaps: u64,
    /// The guest's own notes.
    pub pulse: Pulse,
    /// The ownership page, as the daemon holds it.
    pub ownership: Ownership,
}

/// Takes what a child says on its ready fd.
fn wait_ready(from: std::io::PipeReader, who: &str, log: &Path) -> anyhow::Result<()> {
    let line = std::io::read_to_string(from)?;
    match serde_json::from_str::<Ready>(&line) {
        Ok(Ready::Yes) => Ok(()),
        Ok(Ready::No { error }) => anyhow::bail!("{who}: {error}"),
        Err(_) => {
            let log = std::fs::read_to_string(log).unwrap_or_default();
            anyhow::bail!("{who} died without a word; its log:\n{log}")
        }
    }
}

/// A command for a VMM, which will inherit the given fds under the same numbers.
fn command(release: Release, log: &Path, inherit: &[&OwnedFd]) -> anyhow::Result<Command> {
    let log = std::fs::OpenOptions::new()
        .create(true)
        .append(true)
        .open(log)?;
    let mut command = Command::new(release.binary()?);
    command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(log)
        .process_group(0);
    for fd in inherit {
        // Cleared here, in the only thread that starts processes from these fds.
        rustix::io::fcntl_setfd(fd, rustix::io::FdFlags::empty())?;
    }
    Ok(command)
}

impl Vm {
    /// Boots pulse and waits until its vCPUs are in ring 3.
    pub fn boot(recipe: &Recipe) -> anyhow::Result<Self> {
        let dir = tempfile::tempdir()?;
        let spec = MachineSpec {
            name: "pulse".into(),
            cpus: recipe.cpus,
            memory: MemorySpec {
                size: recipe.memory_mib << 20,
                ..MemorySpec::default()
            },
            kernel: KernelSpec {
                path: releases::pulse()?,
                initrd: None,
                cmdline: recipe.cmdline.clone(),
            },
            blackout_budget: Duration::from_secs(5),
        };
        let spec_file = dir.path().join("spec.json");
        std::fs::write(&spec_file, serde_json::to_vec(&spec)?)?;
        let (reader, writer) = std::io::pipe()?;
        let writer = OwnedFd::from(writer);
        let log = dir.path().join("vmm.log");
        let mut command = command(recipe.release, &log, &[&writer])?;
        command.arg("run").arg("--spec").arg(&spec_file);
        command.arg("--dir").arg(dir.path().join("vm"));
        command
            .arg("--ready-fd")
            .arg(writer.as_raw_fd().to_string());
        let child = command.spawn()?;
        drop(writer);
        wait_ready(reader, "the VMM", &log)?;
        let (ram, ownership) = connect(&control(dir.path()))?.lend_guest()?;
        let pulse = Pulse::find(ram, PATIENCE)?;
        let ownership = Ownership::map(ownership)?;
        let release = recipe.release;
        Ok(Self {
            child,
            dir,
            spec,
            release,
            swaps: 0,
            pulse,
            ownership,
        })
    }

    /// A client of the VMM that runs the guest now.
    pub fn client(&self) -> anyhow::Result<Client> {
        connect(&control(self.dir.path()))
    }

    /// What the guest has written to its console so far.
    pub fn console(&self) -> anyhow::Result<String> {
        Ok(std::fs::read_to_string(
            self.dir.path().join("vm/console.log"),
        )?)
    }

    /// Connects to the console.
    pub fn open_console(&self) -> anyhow::Result<std::os::unix::net::UnixStream> {
        let socket = self.dir.path().join("vm/console.sock");
        Ok(std::os::unix::net::UnixStream::connect(socket)?)
    }

    /// The machine.
    pub fn spec(&self) -> &MachineSpec {
        &self.spec
    }

    /// Process id of the VMM that runs the guest.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What the VMMs of this guest wrote to their logs.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.dir.path().join("vmm.log")).unwrap_or_default()
    }

    /// Swaps the VMM. `Ok` is the report, moved or kept.
    pub fn swap(&mut self, to: Release, budget: Duration) -> anyhow::Result<SwapReport> {
        self.swaps += 1;
        let swap = format!("swap-{}", self.swaps);
        let flags = SocketFlags::CLOEXEC;
        let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
        let (reader, writer) = std::io::pipe()?;
        let writer = OwnedFd::from(writer);
        let log = self.dir.path().join("vmm.log");
        let mut command = command(to, &log, &[&theirs, &writer])?;
        command.args(to.arguments()).arg("adopt");
        command
            .arg("--handover-fd")
            .arg(theirs.as_raw_fd().to_string());
        command
            .arg("--ready-fd")
            .arg(writer.as_raw_fd().to_string());
        let mut successor = command.spawn()?;
        drop((theirs, writer));
        wait_ready(reader, "the successor", &log)?;
        let state = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let state = rustix::fs::memfd_create("stillpoint-state", state)?;
        let request = Request::HandOver {
            swap: swap.clone(),
            to: ReleaseName {
                version: to.version().into(),
                sha256: String::new(),
            },
            successor_pid: successor.id(),
            budget_ns: Some(u64::try_from(budget.as_nanos())?),
            brownout: PATIENCE,
        };
        let client = self.client()?;
        let handover = client.hand_over(&request, ours, state.as_fd(), |_| {})?;
        if let Handover::Kept { report } = handover {
            let _ = successor.kill();
            let _ = successor.wait();
            return Ok(*report);
        }
        let mut predecessor = std::mem::replace(&mut self.child, successor);
        ensure!(
            predecessor.wait()?.success(),
            "the predecessor did not retire:\n{}",
            self.log()
        );
        self.release = to;
        self.report(&swap)
    }

    /// The report of a swap that was just made.
    fn report(&self, swap: &str) -> anyhow::Result<SwapReport> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(report) = self.client()?.last_report()?.filter(|r| r.swap == swap) {
                return Ok(report);
            }
            ensure!(
                Instant::now() < deadline,
                "no report of {swap}:\n{}",
                self.log()
            );
            rustix::thread::nanosleep(&rustix::time::Timespec {
                tv_sec: 0,
                tv_nsec: 2_000_000,
            });
        }
    }

    /// Swaps, and insists that it moved.
    pub fn must_move(&mut self, to: Release) -> anyhow::Result<SwapReport> {
        let report = self.swap(to, Duration::from_secs(10))?;
        ensure!(
            report.outcome == Outcome::Moved,
            "kept: {:?}\n{}",
            report.reason,
            self.log()
        );
        Ok(report)
    }

    /// Switches the guest off and waits for the process.
    pub fn power_off(mut self) -> anyhow::Result<()> {
        self.client()?.power_off()?;
        ensure!(
            self.child.wait()?.success(),
            "the VMM failed at its end:\n{}",
            self.log()
        );
        Ok(())
    }

    /// Whether the VMM has ended, and how.
    pub fn ended(&mut self) -> anyhow::Result<Option<std::process::ExitStatus>> {
        Ok(self.child.try_wait()?)
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn control(dir: &Path) -> PathBuf {
    dir.join("vm/control.sock")
}

fn connect(path: &Path) -> anyhow::Result<Client> {
    Client::connect(path, PATIENCE).context("the VMM's control socket")
}
