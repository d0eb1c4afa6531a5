//! What runs in a guest while it is swapped, and how it is judged.
//!
//! Each load runs in the guest under its agent, followed over a vsock connection of its own, which
//! must outlive the swaps too. What needs a peer has it on the host. Every load knows by itself what it must
//! find again (`guest-images/load`); a report that is not well fails the test.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use serde_json::Value;
use stillpoint_agent::protocol::Program;

use super::Linux;
use super::network::beside;
use crate::daemon::{Daemon, programs};
use crate::patience::{PATIENCE, wait_for};

const SIGTERM: i32 = 15;

/// The program with all the loads, as it runs on the host.
pub fn load_program() -> PathBuf {
    programs().join("load")
}

/// A load in the guest.
#[derive(Debug)]
pub struct InGuest {
    name: &'static str,
    job: u64,
    thread: JoinHandle<anyhow::Result<Value>>,
}

impl InGuest {
    /// Starts `load ARGS` in the guest. All that it prints is kept in `output`, as it comes.
    pub fn start(
        guest: &Linux<'_>,
        name: &'static str,
        args: &[&str],
        output: &Path,
    ) -> anyhow::Result<Self> {
        let mut agent = guest.agent()?;
        let program = Program {
            program: "/bin/load".into(),
            args: args.iter().map(|&arg| arg.into()).collect(),
            ..Program::default()
        };
        let job = agent.start(program)?.job;
        let mut kept = File::create(output)?;
        let output = output.to_owned();
        let thread = std::thread::spawn(move || {
            let mut errors = String::new();
            let mut failed = None;
            let exit = agent.follow(job, |part| {
                errors += &part.stderr;
                failed = failed
                    .take()
                    .or(kept.write_all(part.stdout.as_bytes()).err());
            })?;
            if let Some(error) = failed {
                return Err(error).context("keeping its output");
            }
            let report = last_report(&std::fs::read_to_string(&output)?);
            ensure!(
                exit.is_success(),
                "it ended with {exit:?}: {errors}{report:?}"
            );
            report
        });
        Ok(Self { name, job, thread })
    }

    /// What it was called at its start.
    pub fn name(&self) -> &'static str {
        self.name
    }

    /// Whether it has ended.
    pub fn has_ended(&self) -> bool {
        self.thread.is_finished()
    }

    /// Asks it to come to its end now. It ends well, with all that it checks checked.
    pub fn wind_up(&self, guest: &Linux<'_>) -> anyhow::Result<()> {
        guest.agent()?.kill(self.job, SIGTERM)?;
        Ok(())
    }

    /// Waits for its end, which must be a good one; gives its report.
    pub fn finish(self) -> anyhow::Result<Value> {
        let Ok(report) = self.thread.join() else {
            bail!("{}: its follower panicked", self.name);
        };
        report.with_context(|| format!("the guest's load `{}`", self.name))
    }
}

/// The report among the lines that a load has printed.
fn last_report(printed: &str) -> anyhow::Result<Value> {
    let last = printed.lines().last().context("it printed nothing")?;
    let line: Value = serde_json::from_str(last).with_context(|| last.to_owned())?;
    let report = line["report"].clone();
    ensure!(report["ok"] == true, "{report:#}");
    Ok(report)
}

/// A load on the host, in the daemon's network. Killed when dropped.
#[derive(Debug)]
pub struct OnHost {
    child: Child,
    output: PathBuf,
}

impl OnHost {
    /// Starts `load ARGS`.
    pub fn start(daemon: &Daemon, args: &[&str], output: &Path) -> anyhow::Result<Self> {
        let program = load_program();
        let mut command = beside(daemon, &program.display().to_string(), args);
        Self::spawn(&mut command, output)
    }

    fn spawn(command: &mut Command, output: &Path) -> anyhow::Result<Self> {
        let errors = File::create(output.with_extension("err"))?;
        command.stdout(File::create(output)?).stderr(errors);
        let child = command
            .spawn()
            .with_context(|| format!("starting {command:?}"))?;
        let output = output.to_owned();
        Ok(Self { child, output })
    }

    /// Starts `load ARGS`, which listens, and waits until it says where.
    pub fn listen(daemon: &Daemon, args: &[&str], output: &Path) -> anyhow::Result<(Self, String)> {
        let mut load = Self::start(daemon, args, output)?;
        let place = wait_for("a load to listen on the host", PATIENCE, || {
            if let Some(status) = load.child.try_wait()? {
                let errors = std::fs::read_to_string(output.with_extension("err"))?;
                bail!("a load on the host ended with {status}: {errors}");
            }
            let printed = load.printed()?;
            let line = printed.lines().next().map(serde_json::from_str::<Value>);
            let place = line.and_then(Result::ok);
            Ok(place.and_then(|line| line["listening"].as_str().map(str::to_owned)))
        })?;
        Ok((load, place))
    }

    /// Asks it to come to its end now.
    pub fn wind_up(&self) -> anyhow::Result<()> {
        let pid = rustix::process::Pid::from_child(&self.child);
        Ok(rustix::process::kill_process(
            pid,
            rustix::process::Signal::TERM,
        )?)
    }

    /// What it has printed so far.
    pub fn printed(&self) -> anyhow::Result<String> {
        Ok(std::fs::read_to_string(&self.output)?)
    }

    /// Waits for its end, which must be a good one; gives its report.
    pub fn finish(mut self) -> anyhow::Result<Value> {
        let status = self.child.wait()?;
        let errors = std::fs::read_to_string(self.output.with_extension("err"))?;
        let printed = self.printed()?;
        ensure!(
            status.success(),
            "a load on the host: {status}: {errors}{printed}"
        );
        last_report(&printed)
    }
}

impl Drop for OnHost {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Checks a disk image block by block against what the guest was told is durable.
pub fn verify_disk(image: &Path, journal: &Path) -> anyhow::Result<Value> {
    let mut command = Command::new(load_program());
    command.arg("verify").arg("--image").arg(image);
    command.arg("--journal").arg(journal).stdin(Stdio::null());
    let output = command
        .output()
        .with_context(|| format!("starting {command:?}"))?;
    let printed = String::from_utf8_lossy(&output.stdout).into_owned();
    let errors = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(
        output.status.success(),
        "the disk is not as the guest was told: {printed}{errors}"
    );
    last_report(&printed)
}

/// Bytes a second of a stream, from its sender's report: of the first `window` of `measured`, which began
/// when it had just begun, and of the last.
pub fn rates(report: &Value, window: Duration, measured: Duration) -> anyhow::Result<(f64, f64)> {
    let series = &report["received"]["pace"]["bytes_per_100_ms"];
    let series: Vec<u64> =
        serde_json::from_value(series.clone()).context("a stream's bytes by time")?;
    let tenths = |time: Duration| usize::try_from(time.as_millis() / 100);
    let (window, measured) = (tenths(window)?, tenths(measured)?.min(series.len()));
    ensure!(measured >= window, "too short: {series:?}");
    let rate = |part: &[u64]| part.iter().sum::<u64>() as f64 * 10.0 / window as f64;
    Ok((
        rate(&series[..window]),
        rate(&series[measured - window..measured]),
    ))
}
