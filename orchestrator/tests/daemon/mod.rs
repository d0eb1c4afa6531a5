//! A real stillpointd in directories of its own, with the toy VMM as its releases.
#![allow(dead_code)] // Each test file uses its own part.

use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

const PATIENCE: Duration = Duration::from_secs(30);

/// A daemon and its directories; guests are ended when it is dropped.
pub(crate) struct Daemon {
    dir: tempfile::TempDir,
    child: Option<Child>,
    /// Keys that it is told to trust.
    trust: Vec<String>,
    /// Further arguments.
    more: Vec<String>,
    /// Further variables of its environment.
    env: Vec<(String, String)>,
}

/// What a `stillpoint --json` said.
#[derive(Debug)]
pub(crate) struct Said {
    pub(crate) ok: bool,
    pub(crate) out: Value,
    pub(crate) error: Value,
}

impl Said {
    /// What it printed; panics with its error if it failed.
    pub(crate) fn good(self) -> Value {
        assert!(self.ok, "{}", self.error);
        self.out
    }

    /// The error's code and message; panics if there is none.
    pub(crate) fn bad(self) -> (String, String) {
        assert!(!self.ok, "it went well: {}", self.out);
        let field = |key: &str| self.error[key].as_str().unwrap_or_default().to_owned();
        (field("code"), field("message"))
    }
}

impl Daemon {
    /// Starts one.
    pub(crate) fn start() -> Self {
        let dir = tempfile::tempdir().expect("temp dir");
        let mut daemon = Self {
            dir,
            child: None,
            trust: Vec::new(),
            more: Vec::new(),
            env: Vec::new(),
        };
        daemon.spawn();
        daemon
    }

    /// Starts one with further arguments.
    pub(crate) fn start_with(more: &[&str]) -> Self {
        let mut daemon = Self::prepare();
        daemon.more = more.iter().map(|&arg| arg.to_owned()).collect();
        daemon.spawn();
        daemon
    }

    /// Directories for one that is not started yet.
    pub(crate) fn prepare() -> Self {
        let dir = tempfile::tempdir().expect("temp dir");
        Self {
            dir,
            child: None,
            trust: Vec::new(),
            more: Vec::new(),
            env: Vec::new(),
        }
    }

    /// Keys that it is told to trust from its next start on.
    pub(crate) fn trust(&mut self, keys: &[String]) {
        self.trust = keys.to_vec();
    }

    /// Further arguments from its next start on.
    pub(crate) fn more(&mut self, more: &[&str]) {
        self.more = more.iter().map(|&arg| arg.to_owned()).collect();
    }

    /// A variable of its environment from its next start on.
    pub(crate) fn env(&mut self, name: &str, value: &str) {
        self.env.push((name.to_owned(), value.to_owned()));
    }

    /// The directory of everything.
    pub(crate) fn path(&self) -> &Path {
        self.dir.path()
    }

    /// The daemon's command line.
    pub(crate) fn command(&self) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_stillpointd"));
        command
            .arg("--run-dir")
            .arg(self.path().join("run"))
            .arg("--state-dir")
            .arg(self.path().join("state"))
            .args(self.trust.iter().flat_map(|key| ["--trust", key]))
            .args(&self.more)
            .env_remove("NOTIFY_SOCKET")
            .env_remove("STILLPOINT_STORE")
            .env_remove("OTEL_EXPORTER_OTLP_ENDPOINT")
            .envs(self.env.clone())
            .stdin(Stdio::null());
        command
    }

    /// Starts it (again) and waits until it answers.
    pub(crate) fn spawn(&mut self) {
        let log = std::fs::File::options()
            .create(true)
            .append(true)
            .open(self.path().join("log"))
            .expect("log");
        let child = self.command().stderr(log).spawn().expect("stillpointd");
        self.adopt(child);
    }

    /// Takes one that was started elsewhere.
    pub(crate) fn adopt(&mut self, child: Child) {
        self.child = Some(child);
        let socket = self.path().join("run/api.sock");
        until("the daemon answers", || {
            UnixStream::connect(&socket).is_ok()
        });
    }

    /// Takes one that may die before it answers; whether it did not.
    pub(crate) fn try_adopt(&mut self, child: Child) -> bool {
        self.child = Some(child);
        let socket = self.path().join("run/api.sock");
        until("the daemon answers, or has died", || {
            UnixStream::connect(&socket).is_ok() || self.has_died()
        });
        !self.has_died()
    }

    /// Whether it has ended, by whatever.
    pub(crate) fn has_died(&self) -> bool {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.pid()));
        let stat = stat.unwrap_or_default();
        stat.rsplit_once(") ")
            .is_none_or(|(_, rest)| rest.starts_with(['Z', 'X']))
    }

    /// It has ended; another may be started.
    pub(crate) fn bury(&mut self) {
        let mut child = self.child.take().expect("a daemon");
        child.wait().expect("wait");
    }

    /// Asks for a swap, and does not wait for a daemon that dies of it; whether it was told that the
    /// guest moved.
    pub(crate) fn swap_or_die(&self, name: &str, to: &str) -> bool {
        let mut asked = self
            .cli(&["swap", "vmm", name, "--to", to, "--budget", "500ms"])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("stillpoint");
        let mut told = None;
        until("the swap's end, or the daemon's", || {
            told = asked.try_wait().expect("wait");
            told.is_some() || self.has_died()
        });
        let _ = asked.kill();
        let _ = asked.wait();
        told.is_some_and(|status| status.success())
    }

    /// What it logged.
    pub(crate) fn log(&self) -> String {
        std::fs::read_to_string(self.path().join("log")).unwrap_or_default()
    }

    /// Its pid.
    pub(crate) fn pid(&self) -> u32 {
        self.child.as_ref().expect("a running daemon").id()
    }

    /// Kills it, as `kill -9` does.
    pub(crate) fn kill(&mut self) {
        let mut child = self.child.take().expect("a running daemon");
        child.kill().expect("kill");
        child.wait().expect("wait");
    }

    /// Ends it, as systemd does.
    pub(crate) fn terminate(&mut self) -> std::process::ExitStatus {
        let mut child = self.child.take().expect("a running daemon");
        let pid = rustix::process::Pid::from_child(&child);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).expect("SIGTERM");
        child.wait().expect("wait")
    }

    /// Starts a daemon that must refuse to; what it says.
    pub(crate) fn refused(&self) -> String {
        let mut command = self.command();
        let mut child = command.stderr(Stdio::piped()).spawn().expect("stillpointd");
        let deadline = Instant::now() + PATIENCE;
        while child.try_wait().expect("wait").is_none() {
            if Instant::now() >= deadline {
                let _ = child.kill();
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        let Output { status, stderr, .. } = child.wait_with_output().expect("output");
        assert_eq!(status.code(), Some(1), "it started: {status}");
        String::from_utf8_lossy(&stderr).into_owned()
    }

    /// `stillpoint --json ARGS`.
    pub(crate) fn ask(&self, args: &[&str]) -> Said {
        let output = self.cli(args).output().expect("stillpoint");
        let read = |bytes: &[u8]| serde_json::from_slice(bytes).unwrap_or(Value::Null);
        let Output {
            status,
            stdout,
            stderr,
        } = output;
        Said {
            ok: status.success(),
            out: read(&stdout),
            error: read(&stderr),
        }
    }

    /// `stillpoint --json ARGS`, not started yet.
    pub(crate) fn cli(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_stillpoint"));
        command
            .arg("--json")
            .arg("--run-dir")
            .arg(self.path().join("run"))
            .args(args)
            .stdin(Stdio::null());
        command
    }

    /// A toy that says it is this version and knows these formats.
    pub(crate) fn toy(&self, version: &str, reads: &[u32], writes: &[u32]) -> PathBuf {
        let path = self.path().join(format!("toy-{version}"));
        let mut bytes = std::fs::read(env!("CARGO_BIN_EXE_toy-vmm")).expect("the toy");
        let said = serde_json::json!({
            "component": "vmm", "version": version, "reads": reads, "writes": writes
        });
        bytes.extend(format!("\nTOY:{said}").bytes());
        std::fs::write(&path, bytes).expect("write a toy");
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).expect("chmod");
        path
    }

    /// Adds the toy as `name`, with a fault if there is one.
    pub(crate) fn add(&self, name: &str, fault: Option<&str>) {
        let toy = self.path().join("toy-0.2.0");
        if !toy.exists() {
            self.toy("0.2.0", &[1, 2], &[2, 1]);
        }
        let toy = toy.to_str().expect("UTF-8");
        let fault = fault.map(|fault| format!("--arg=--toy={fault}"));
        let mut args = vec!["release", "add", toy, "--unsigned", "--as", name];
        args.extend(fault.as_deref());
        self.ask(&args).good();
    }

    /// Runs a guest called `name`.
    pub(crate) fn run(&self, name: &str, release: &str) -> Said {
        self.run_with(name, release, &[])
    }

    /// Runs a guest called `name` with further arguments.
    pub(crate) fn run_with(&self, name: &str, release: &str, more: &[&str]) -> Said {
        let kernel = self.path().join("kernel");
        std::fs::write(&kernel, "a kernel").expect("kernel");
        let kernel = kernel.to_str().expect("UTF-8");
        let mut args = vec!["run", name, "--kernel", kernel, "--release", release];
        args.extend(more);
        self.ask(&args)
    }

    /// Swaps it; the record of the swap, however it ended.
    pub(crate) fn swap(&self, name: &str, to: &str) -> Value {
        let said = self.ask(&["swap", "vmm", name, "--to", to, "--budget", "500ms"]);
        assert!(said.error.is_null(), "{}", said.error);
        said.out
    }

    /// Shows it.
    pub(crate) fn show(&self, name: &str) -> Value {
        self.ask(&["show", name]).good()
    }

    /// Pid of its process.
    pub(crate) fn vmm_pid(&self, name: &str) -> u64 {
        self.show(name)["process"]["pid"].as_u64().expect("a pid")
    }

    /// Waits until its state is that.
    pub(crate) fn until_state(&self, name: &str, state: &str) {
        until(&format!("{name} is {state}"), || {
            self.show(name)["state"] == state
        });
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("the daemon's log:\n{}", self.log());
        }
        let Some(mut child) = self.child.take() else {
            return;
        };
        for vm in self.ask(&["ls"]).out.as_array().unwrap_or(&vec![]) {
            self.ask(&["stop", vm["name"].as_str().unwrap_or_default()]);
        }
        let _ = child.kill();
        let _ = child.wait();
    }
}

/// Waits until it is so.
pub(crate) fn until(what: &str, mut so: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !so() {
        assert!(Instant::now() < deadline, "not in time: {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}
