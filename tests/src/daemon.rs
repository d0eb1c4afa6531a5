//! A real stillpointd with directories of its own, and the `stillpoint` command against it.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use serde_json::Value;
use stillpoint_control::client::Client;

use crate::fd_store::FdStore;
use crate::guest::Pulse;
use crate::patience::{PATIENCE, wait_end, wait_for};
use crate::releases::root;

/// A daemon under test. Dropping it ends it, and every guest it still knows.
#[derive(Debug)]
pub struct Daemon {
    child: Child,
    dir: PathBuf,
    bin: PathBuf,
    network: Network,
    more: Vec<String>,
    /// What holds its descriptors while there is none.
    store: Option<FdStore>,
}

/// Where a daemon lives.
#[derive(Debug)]
enum Network {
    /// In this process's namespace.
    Ours,
    /// In this process's, with a mount namespace of its own.
    OwnMounts,
    /// In a new one.
    New,
    /// In this one, which an earlier one had to itself.
    Kept(File),
}

/// Terms of a rollout that nobody has to wait for.
pub const SOON: [&str; 8] = [
    "--bake",
    "0s",
    "--well-for",
    "100ms",
    "--notice",
    "0s",
    "--retry-after",
    "1s",
];

/// What a command printed, and whether it succeeded.
#[derive(Debug)]
pub struct Answer {
    /// Exit status 0.
    pub success: bool,
    /// Standard output as JSON, or null.
    pub json: Value,
    /// Standard error.
    pub error: String,
}

/// Where the built programs are; `STILLPOINT_PROGRAMS` names another place.
pub fn programs() -> PathBuf {
    std::env::var_os("STILLPOINT_PROGRAMS")
        .map_or_else(|| root().join("target/release"), PathBuf::from)
}

impl Daemon {
    /// Starts one with its directories under `dir`, and waits until it answers.
    pub fn start(dir: &Path) -> anyhow::Result<Self> {
        Self::start_from(dir, &programs())
    }

    /// As [`Daemon::start`], with the programs in `bin`.
    pub fn start_from(dir: &Path, bin: &Path) -> anyhow::Result<Self> {
        Self::start_as(dir, bin, Network::Ours, &[])
    }

    /// As [`Daemon::start`], in a network namespace of its own.
    pub fn start_in_own_network(dir: &Path) -> anyhow::Result<Self> {
        Self::start_as(dir, &programs(), Network::New, &[])
    }

    /// As [`Daemon::start`], in a mount namespace of its own: what it and its children mount is seen by
    /// nobody else. One that is started again is in ours.
    pub fn start_among_own_mounts(dir: &Path) -> anyhow::Result<Self> {
        let mut daemon = Self::start_as(dir, &programs(), Network::OwnMounts, &[])?;
        daemon.network = Network::Ours;
        Ok(daemon)
    }

    /// As [`Daemon::start`], with further arguments.
    pub fn start_with(dir: &Path, more: &[&str]) -> anyhow::Result<Self> {
        Self::start_as(dir, &programs(), Network::Ours, more)
    }

    /// As [`Daemon::start`], with somebody who holds its descriptors when it dies, as systemd does.
    pub fn start_with_fd_store(dir: &Path) -> anyhow::Result<Self> {
        let store = Some(FdStore::open(dir)?);
        Self::start_all(dir, &programs(), Network::Ours, &[], store)
    }

    /// As [`Daemon::start_with`], after one that is killed as soon as `seen` tells of the moment; an error if it ends by itself
    /// before. `held`: with somebody who holds its descriptors, as systemd does.
    pub fn start_after_one_that_died(
        dir: &Path,
        more: &[&str],
        held: bool,
        mut seen: impl FnMut() -> bool,
    ) -> anyhow::Result<Self> {
        let store = held.then(|| FdStore::open(dir)).transpose()?;
        let arguments: Vec<String> = more.iter().map(|&arg| arg.to_owned()).collect();
        let place = (&Network::Ours, store.as_ref());
        let mut first = spawn(dir, &programs(), place, &arguments)?;
        let moment = wait_for("the moment for a daemon to die", PATIENCE, || {
            if let Some(status) = first.try_wait()? {
                bail!("the daemon ended by itself, with {status}");
            }
            Ok(seen().then_some(()))
        });
        first.kill()?;
        first.wait()?;
        moment?;
        Self::start_all(dir, &programs(), Network::Ours, more, store)
    }

    fn start_as(dir: &Path, bin: &Path, network: Network, more: &[&str]) -> anyhow::Result<Self> {
        Self::start_all(dir, bin, network, more, None)
    }

    fn start_all(
        dir: &Path,
        bin: &Path,
        network: Network,
        more: &[&str],
        store: Option<FdStore>,
    ) -> anyhow::Result<Self> {
        let more: Vec<String> = more.iter().map(|&arg| arg.to_owned()).collect();
        let child = spawn(dir, bin, (&network, store.as_ref()), &more)?;
        let mut daemon = Self {
            child,
            dir: dir.to_owned(),
            bin: bin.to_owned(),
            network,
            more,
            store,
        };
        daemon.wait_answers()?;
        if let Network::New = daemon.network {
            // It is the next one's too: guests' taps are in it.
            let namespace = format!("/proc/{}/ns/net", daemon.pid());
            daemon.network = Network::Kept(File::open(namespace)?);
        }
        Ok(daemon)
    }

    fn wait_answers(&self) -> anyhow::Result<()> {
        let answers = || Ok(self.stillpoint(&["ls"])?.success.then_some(()));
        wait_for("the daemon's first answer", PATIENCE, answers).with_context(|| self.log())
    }

    /// Where everything of it is.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The names of what is held for the next one, if anybody does.
    pub fn held(&self) -> Vec<String> {
        self.store.as_ref().map(FdStore::names).unwrap_or_default()
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What it logged.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.dir.join("stillpointd.log")).unwrap_or_default()
    }

    /// Kills it with SIGKILL; guests must not notice.
    pub fn kill(&mut self) -> anyhow::Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }

    /// Asks it to end, as `systemctl stop` does.
    pub fn terminate(&mut self) -> anyhow::Result<()> {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM)?;
        let status = wait_end(&mut self.child, "the daemon's end")?;
        ensure!(
            status.success(),
            "the daemon ended with {status}:\n{}",
            self.log()
        );
        Ok(())
    }

    /// Starts it again after its end.
    pub fn restart(&mut self) -> anyhow::Result<()> {
        let place = (&self.network, self.store.as_ref());
        self.child = spawn(&self.dir, &self.bin, place, &self.more)?;
        self.wait_answers()
    }

    /// A `stillpoint` command against it.
    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(self.bin.join("stillpoint"));
        command
            .arg("--run-dir")
            .arg(self.dir.join("run"))
            .args(args);
        command.env_remove("STILLPOINT_SOCKET").stdin(Stdio::null());
        command
    }

    /// Runs one with `--json`.
    pub fn stillpoint(&self, args: &[&str]) -> anyhow::Result<Answer> {
        let Output {
            status,
            stdout,
            stderr,
        } = self
            .command(&[&["--json"], args].concat())
            .output()
            .context("running stillpoint")?;
        let json = serde_json::from_slice(&stdout).unwrap_or(Value::Null);
        let error = String::from_utf8_lossy(&stderr).into_owned();
        Ok(Answer {
            success: status.success(),
            json,
            error,
        })
    }

    /// What the API answers at this path; null if nobody does, or it is a problem. For who looks again and
    /// again, and has no time for a command.
    pub fn get(&self, path: &str) -> Value {
        let asked = || -> std::io::Result<Vec<u8>> {
            let mut stream = UnixStream::connect(self.dir.join("run/api.sock"))?;
            stream.set_read_timeout(Some(PATIENCE))?;
            let request =
                format!("GET {path} HTTP/1.1\r\nHost: stillpointd\r\nConnection: close\r\n\r\n");
            stream.write_all(request.as_bytes())?;
            let mut answer = Vec::new();
            stream.read_to_end(&mut answer)?;
            Ok(answer)
        };
        let answer = asked().unwrap_or_default();
        let answer = String::from_utf8_lossy(&answer);
        match answer.split_once("\r\n\r\n") {
            Some((head, body)) if head.starts_with("HTTP/1.1 200") => {
                serde_json::from_str(body).unwrap_or_default()
            }
            _ => Value::Null,
        }
    }

    /// Runs one that must succeed.
    pub fn must(&self, args: &[&str]) -> anyhow::Result<Value> {
        let answer = self.stillpoint(args)?;
        if !answer.success {
            bail!(
                "stillpoint {}: {}{}",
                args.join(" "),
                answer.error,
                answer.json
            );
        }
        Ok(answer.json)
    }

    /// The directory of this guest.
    pub fn guest_dir(&self, name: &str) -> PathBuf {
        self.dir.join("run/vms").join(name)
    }

    /// A client of the VMM of this guest, past the daemon.
    pub fn vmm(&self, name: &str) -> anyhow::Result<Client> {
        let socket = self.guest_dir(name).join("control.sock");
        Ok(Client::connect(&socket, PATIENCE)?)
    }

    /// The notes of a pulse guest.
    pub fn pulse(&self, name: &str) -> anyhow::Result<Pulse> {
        let vmm = self.vmm(name)?;
        let spec = vmm.describe()?.spec;
        let (ram, _ownership) = vmm.lend_guest()?;
        Pulse::find_of(ram, &spec, PATIENCE)
    }

    /// Process id of the VMM that runs this guest.
    pub fn vmm_pid(&self, name: &str) -> anyhow::Result<u32> {
        Ok(self.vmm(name)?.hello(None)?.1.pid)
    }
}

fn spawn(
    dir: &Path,
    bin: &Path,
    (network, store): (&Network, Option<&FdStore>),
    more: &[String],
) -> anyhow::Result<Child> {
    let log = std::fs::OpenOptions::new()
        .create(true)
        .append(true)
        .open(dir.join("stillpointd.log"))?;
    // All of these become the daemon by exec, so the child's pid is its pid.
    let mut command = match (network, store) {
        (Network::Ours, Some(store)) => store.command()?,
        (Network::Ours, None) => Command::new("env"),
        (Network::New | Network::OwnMounts, _) => Command::new("unshare"),
        (Network::Kept(_), _) => Command::new("nsenter"),
    };
    if store.is_none() {
        command.env_remove("NOTIFY_SOCKET");
    }
    match network {
        Network::Ours => {}
        Network::OwnMounts => drop(command.arg("-m")),
        Network::New => drop(command.arg("-n")),
        Network::Kept(namespace) => {
            let (pid, fd) = (std::process::id(), namespace.as_raw_fd());
            command.arg(format!("--net=/proc/{pid}/fd/{fd}"));
        }
    }
    command
        .arg(bin.join("stillpointd"))
        .arg("--run-dir")
        .arg(dir.join("run"))
        .arg("--state-dir")
        .arg(dir.join("state"))
        .args(more);
    command
        .env_remove("STILLPOINT_STORE")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(log);
    command
        .spawn()
        .with_context(|| format!("starting {}", bin.join("stillpointd").display()))
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let names = std::fs::read_dir(self.dir.join("run/vms"));
        let names = names
            .into_iter()
            .flatten()
            .flatten()
            .map(|entry| entry.file_name());
        for name in names {
            // Past the daemon, which may be the very thing that failed.
            if let Some(vmm) = name.to_str().and_then(|name| self.vmm(name).ok()) {
                let _ = vmm.set_patience(Duration::from_secs(5));
                let _ = vmm.power_off();
            }
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
