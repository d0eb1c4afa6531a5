//! Stock Linux guests under a real daemon: booted from Debian's kernels, asked through the agent.
//!
//! | module | what it holds |
//! |---|---|
//! | [`images`] | the kernels and initramfs that `make images` made |
//! | [`network`] | a daemon in a network namespace of its own, with taps |
//! | [`loads`] | all that a guest does at once while it is swapped |
//! | [`workload`] | one load that runs in the guest while it is swapped, and how it is judged |
//! | [`dmesg`] | what a guest's kernel may log, and what it must not |

pub mod dmesg;
pub mod images;
pub mod loads;
pub mod network;
pub mod workload;

use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, ensure};
use serde_json::Value;
use stillpoint_agent::client::{Client, dial};
use stillpoint_agent::protocol::{Ended, Health, KernelLine, PORT, Program};
use stillpoint_control::report::SwapReport;

use crate::daemon::Daemon;
use crate::patience::wait_for;
use images::{Files, Form, Kernel};

/// How long a guest may take to boot: in an emulated host, with others on its cores.
const BOOT_PATIENCE: Duration = Duration::from_secs(600);
/// How long an answer of the agent may take.
const ANSWER_PATIENCE: Duration = Duration::from_secs(120);

/// A guest to boot.
#[derive(Clone, Debug)]
pub struct Recipe {
    /// Its kernel.
    pub kernel: Kernel,
    /// In which form.
    pub form: Form,
    /// vCPUs.
    pub cpus: u8,
    /// RAM, MiB.
    pub memory_mib: u64,
    /// Further words of the kernel's command line.
    pub cmdline: String,
    /// Further arguments of `stillpoint run`: disks, network interfaces.
    pub devices: Vec<String>,
    /// Archives of `make images` behind its initramfs.
    pub archives: Vec<&'static str>,
}

impl Recipe {
    /// A guest with vsock and entropy.
    pub fn new(kernel: Kernel, form: Form, cpus: u8) -> Self {
        Self {
            kernel,
            form,
            cpus,
            memory_mib: 256,
            cmdline: String::new(),
            devices: Vec::new(),
            archives: Vec::new(),
        }
    }

    /// With an archive of `make images` behind its initramfs.
    pub fn archive(mut self, name: &'static str) -> Self {
        self.archives.push(name);
        self
    }

    /// With a disk.
    pub fn disk(mut self, image: &Path) -> Self {
        self.devices
            .extend(["--disk".into(), image.display().to_string()]);
        self
    }

    /// With a network interface, whose address in the guest is `address` (with its prefix length).
    pub fn net(mut self, tap: &str, address: &str) -> Self {
        self.devices.extend(["--net".into(), format!("tap={tap}")]);
        self.cmdline += &format!(" agent.ip={address}");
        self
    }

    /// Run by this release [the newest].
    pub fn release(mut self, release: &str) -> Self {
        self.devices.extend(["--release".into(), release.into()]);
        self
    }

    /// Free to reach all of its host, where the tests' servers are.
    pub fn open(mut self) -> Self {
        self.devices.extend(["--reach".into(), "all".into()]);
        self
    }

    /// With a default route.
    pub fn gateway(mut self, address: &str) -> Self {
        self.cmdline += &format!(" agent.gw={address}");
        self
    }
}

/// A running Linux guest.
#[derive(Debug)]
pub struct Linux<'d> {
    daemon: &'d Daemon,
    /// Its name.
    pub name: String,
}

impl<'d> Linux<'d> {
    /// Boots it, and waits until its agent answers.
    pub fn boot(daemon: &'d Daemon, name: &str, recipe: &Recipe) -> anyhow::Result<Self> {
        let guest = Self::start(daemon, name, recipe)?;
        guest.wait_up()?;
        Ok(guest)
    }

    /// One of that name, which runs already.
    pub fn of(daemon: &'d Daemon, name: &str) -> Self {
        let name = name.to_owned();
        Self { daemon, name }
    }

    /// Starts it; it is not up yet.
    pub fn start(daemon: &'d Daemon, name: &str, recipe: &Recipe) -> anyhow::Result<Self> {
        let files = Files::of(recipe.kernel)?;
        let kernel = files.kernel(recipe.form).display().to_string();
        let initrd = match recipe.archives.as_slice() {
            [] => files.initramfs(),
            archives => {
                let path = daemon.dir().join(format!("{name}.initramfs"));
                std::fs::write(&path, files.with_archives(archives)?)?;
                path
            }
        };
        let initrd = initrd.display().to_string();
        // The console costs an exit for each character, so the kernel keeps its log to itself.
        let cmdline = format!(
            "console=ttyS0 quiet loglevel=4 panic=-1 {}",
            recipe.cmdline.trim()
        );
        let (cpus, memory) = (recipe.cpus.to_string(), format!("{}M", recipe.memory_mib));
        let mut args = vec!["run", name, "--kernel", &kernel, "--initrd", &initrd];
        args.extend(["--cpus", &cpus, "--memory", &memory, "--cmdline", &cmdline]);
        args.extend(["--vsock", "--rng"]);
        args.extend(recipe.devices.iter().map(String::as_str));
        daemon.must(&args)?;
        Ok(Self::of(daemon, name))
    }

    /// The guest's directory on the host.
    pub fn dir(&self) -> PathBuf {
        self.daemon.guest_dir(&self.name)
    }

    /// The host's end of its vsock device.
    pub fn vsock(&self) -> PathBuf {
        self.dir().join("vsock.sock")
    }

    /// A new connection to its agent.
    pub fn agent(&self) -> anyhow::Result<Client<UnixStream>> {
        let stream = dial(&self.vsock(), PORT, Duration::from_secs(10))?;
        stream.set_read_timeout(Some(ANSWER_PATIENCE))?;
        Ok(Client::new(stream))
    }

    /// Waits until its agent answers; gives what it says of the guest.
    pub fn wait_up(&self) -> anyhow::Result<Health> {
        let up = wait_for("the guest's agent", BOOT_PATIENCE, || {
            if let Some(end) = self.ended()? {
                anyhow::bail!("the guest ended while it booted: {end}");
            }
            Ok(self.agent().ok().and_then(|mut agent| agent.health().ok()))
        });
        up.with_context(|| format!("{}'s console says:\n{}", self.name, self.console_tail()))
    }

    /// What the daemon says of it.
    pub fn show(&self) -> anyhow::Result<Value> {
        self.daemon.must(&["show", &self.name])
    }

    /// How it ended; `None` while it has not.
    pub fn ended(&self) -> anyhow::Result<Option<String>> {
        let shown = self.show()?;
        let state = shown["state"].as_str().unwrap_or_default().to_owned();
        let over = ["stopped", "crashed", "failed"].contains(&state.as_str());
        Ok(over.then(|| format!("{state}: {}", shown["reason"])))
    }

    /// Waits until it has switched itself off, as it was to.
    pub fn wait_off(&self) -> anyhow::Result<()> {
        let how = wait_for("the guest to switch itself off", BOOT_PATIENCE, || {
            self.ended()
        })?;
        ensure!(how.starts_with("stopped"), "it ended as {how}");
        Ok(())
    }

    /// How it is.
    pub fn health(&self) -> anyhow::Result<Health> {
        Ok(self.agent()?.health()?)
    }

    /// Runs a program in it, which must succeed; gives what it printed.
    pub fn must_run(&self, program: &str, args: &[&str]) -> anyhow::Result<String> {
        let Ended { exit, output } = self.agent()?.exec(Program {
            program: program.into(),
            args: args.iter().map(|&arg| arg.into()).collect(),
            ..Program::default()
        })?;
        let shown = format!("{program} {}", args.join(" "));
        ensure!(
            exit.is_success(),
            "`{shown}` in the guest: {exit:?}\n{}{}",
            output.stdout,
            output.stderr
        );
        Ok(output.stdout)
    }

    /// Its kernel's whole log.
    pub fn dmesg(&self) -> anyhow::Result<Vec<KernelLine>> {
        Ok(self.agent()?.dmesg(7)?.lines)
    }

    /// Its kernel has logged nothing that it should not.
    pub fn dmesg_is_clean(&self) -> anyhow::Result<()> {
        let lines = self.dmesg()?;
        let bad = dmesg::complaints(&lines);
        ensure!(
            bad.is_empty(),
            "{}'s kernel complains:\n{}",
            self.name,
            bad.join("\n")
        );
        Ok(())
    }

    /// Swaps its VMM for the same release, which must move it; gives the report.
    pub fn must_move(&self) -> anyhow::Result<SwapReport> {
        // On an emulated host a rehearsal takes longer than all the rest.
        self.moved(&["--no-rehearsal", "--watch", "0s"])
    }

    /// The same, rehearsed before it and watched afterwards, as swaps are if nothing else is said.
    pub fn must_move_guarded(&self) -> anyhow::Result<SwapReport> {
        self.moved(&[])
    }

    fn moved(&self, how: &[&str]) -> anyhow::Result<SwapReport> {
        let to = self.show()?["release"]
            .as_str()
            .unwrap_or_default()
            .to_owned();
        let args = ["swap", "vmm", &self.name, "--to", &to, "--budget", "20s"];
        let answer = self.daemon.stillpoint(&[&args[..], how].concat())?;
        let report = answer.json["report"].clone();
        ensure!(
            answer.success && answer.json["state"] == "moved",
            "the guest was not moved: {:#}\n{}",
            answer.json,
            answer.error
        );
        serde_json::from_value(report).context("the swap's report")
    }

    /// The last of what it and its VMMs said, for an error.
    pub fn logs(&self) -> String {
        let log = std::fs::read_to_string(self.dir().join("vmm.log")).unwrap_or_default();
        let lines: Vec<_> = log.lines().collect();
        let vmm = lines[lines.len().saturating_sub(60)..].join("\n");
        let state = self.ended();
        let daemon = self.daemon.log();
        let daemon: Vec<_> = daemon.lines().collect();
        let daemon = daemon[daemon.len().saturating_sub(20)..].join("\n");
        format!(
            "whether it ended: {state:?}\nits console:\n{}\nits VMMs:\n{vmm}\nthe daemon:\n{daemon}",
            self.console_tail()
        )
    }

    /// The last of what its console showed.
    pub fn console_tail(&self) -> String {
        let log = std::fs::read_to_string(self.dir().join("console.log")).unwrap_or_default();
        let lines: Vec<_> = log.lines().collect();
        lines[lines.len().saturating_sub(30)..].join("\n")
    }
}
