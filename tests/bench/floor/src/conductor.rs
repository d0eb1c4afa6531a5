//! Starts workers one after the other, has each swap with the next, and writes down what the
//! guest saw.
#![allow(unsafe_code)] // descriptors for a child: between fork and exec

use std::fmt::Write as _;
use std::fs::File;
use std::io::Write as _;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::io::{FdFlags, fcntl_setfd};

use crate::probe::Probe;
use crate::worker::{QUIT, READY, RUNNING, SWAP, TABLE, TYPE};
use crate::{Bench, memory, wire};

const PATIENCE: Duration = Duration::from_secs(60);
/// The time between swaps varies, or it might march in step with the guest's timers.
const BETWEEN_MS: u64 = 30;
const SPREAD_MS: u64 = 21;
/// After a swap the guest is left alone, so that its log has what there was.
const SETTLE: Duration = Duration::from_millis(10);
/// For an answer to a command on the serial port.
const ANSWER: Duration = Duration::from_millis(500);

/// One swap.
struct Sample {
    host_ns: u64,
    guest_ns: Vec<u64>,
}

/// A worker, and where its successor's state will go.
struct Worker {
    child: Child,
    control: OwnedFd,
    next: OwnedFd,
}

/// Boots, swaps, writes.
pub(crate) fn run(bench: &Bench) -> Result<()> {
    let memfd = memory::create(bench.ram_mib << 20)?;
    let ram = memory::map(&memfd)?;
    let mut worker = Worker::spawn(bench, &memfd, None)?;
    let tsc_khz = worker.expect(READY)?;
    let table = worker.expect(TABLE)?;
    let probe = Probe::new(&ram, table, bench.vcpus, tsc_khz)?;

    probe.wait_touched()?;
    let mut samples = Vec::new();
    for number in 0..bench.swaps {
        let next = Worker::spawn(bench, &memfd, Some(&worker.next))
            .with_context(|| format!("swap {number}"))?;
        next.expect(READY)?;
        sleep(Duration::from_millis(
            BETWEEN_MS + number as u64 * 7 % SPREAD_MS,
        ));
        samples.push(swap(&worker, &next, &probe).with_context(|| format!("swap {number}"))?);
        worker.end()?;
        worker = next;
    }
    for line in &bench.command {
        wire::put(&worker.control, &[&[TYPE], line.as_bytes()].concat())?;
        sleep(ANSWER);
    }
    worker.end()?;
    write(bench, &samples)
}

fn swap(worker: &Worker, next: &Worker, probe: &Probe<'_>) -> Result<Sample> {
    let before = probe.heartbeats()?;
    wire::put(&worker.control, &[SWAP])?;
    let host_ns = next.expect(RUNNING)?;
    // Once for the gap to end, and once more so that its entry is there to be read.
    let after = probe.wait_past(&probe.heartbeats()?)?;
    sleep(SETTLE);
    probe.wait_past(&after)?;
    Ok(Sample {
        host_ns,
        guest_ns: probe.longest_between(&before, &after)?,
    })
}

impl Worker {
    fn spawn(bench: &Bench, memfd: &File, before: Option<&OwnedFd>) -> Result<Self> {
        let (control, theirs) = wire::pair()?;
        let (after, next) = wire::pair()?;
        let program = std::env::current_exe().context("find our own program")?;
        let mut command = Command::new(program);
        let mut fds = vec![memfd.as_fd(), theirs.as_fd(), after.as_fd()];
        command
            .arg("worker")
            .args(["--vcpus", &bench.vcpus.to_string()])
            .args(["--memory", &memfd.as_raw_fd().to_string()])
            .args(["--control", &theirs.as_raw_fd().to_string()])
            .args(["--after", &after.as_raw_fd().to_string()])
            .args([
                "--entry",
                if bench.entry == crate::Entry::Pvh {
                    "pvh"
                } else {
                    "linux"
                },
            ])
            .arg("--kernel")
            .arg(&bench.kernel)
            .arg(format!(
                "--cmdline=pulse ram={}M {}",
                bench.touch_mib, bench.append
            ));
        if let Some(before) = before {
            command.args(["--before", &before.as_raw_fd().to_string()]);
            fds.push(before.as_fd());
        }
        if bench.serial || !bench.command.is_empty() {
            command.arg("--show");
        }
        let child = spawn_with(&mut command, &fds).context("start a worker")?;
        Ok(Self {
            child,
            control,
            next,
        })
    }

    /// Waits for a message of this kind; returns the value in it.
    fn expect(&self, kind: u8) -> Result<u64> {
        let begin = Instant::now();
        while begin.elapsed() < PATIENCE {
            if !wire::wait(&self.control, Duration::from_secs(1))? {
                continue;
            }
            let message = wire::get(&self.control).context("a worker failed")?;
            if let (Some((first, value)), true) = (message.split_first(), message.len() == 9)
                && *first == kind
            {
                let bytes = <[u8; 8]>::try_from(value).context("a worker's message")?;
                return Ok(u64::from_le_bytes(bytes));
            }
        }
        bail!("no {:?} from a worker", char::from(kind))
    }

    fn end(mut self) -> Result<()> {
        wire::put(&self.control, &[QUIT])?;
        let status = self.child.wait().context("wait for a worker")?;
        if status.success() {
            Ok(())
        } else {
            bail!("a worker ended with {status}")
        }
    }
}

/// Starts a child that keeps these descriptors, and no others of ours.
fn spawn_with(command: &mut Command, fds: &[BorrowedFd<'_>]) -> std::io::Result<Child> {
    let numbers: Vec<_> = fds.iter().map(AsRawFd::as_raw_fd).collect();
    let keep = move || {
        for number in &numbers {
            // SAFETY: open in the parent until spawn returns, and so in the child.
            let fd = unsafe { BorrowedFd::borrow_raw(*number) };
            fcntl_setfd(fd, FdFlags::empty())?;
        }
        Ok(())
    };
    // SAFETY: the closure makes only system calls.
    unsafe { command.pre_exec(keep) };
    command.spawn()
}

fn write(bench: &Bench, samples: &[Sample]) -> Result<()> {
    let mut json = format!(
        "{{\"vcpus\":{},\"ram_mib\":{},\"samples\":[",
        bench.vcpus, bench.ram_mib
    );
    for (number, sample) in samples.iter().enumerate() {
        let comma = if number == 0 { "" } else { "," };
        let (host, guest) = (sample.host_ns, &sample.guest_ns);
        write!(
            json,
            "{comma}\n{{\"host_ns\":{host},\"guest_ns\":{guest:?}}}"
        )?;
    }
    json.push_str("\n]}\n");
    match &bench.out {
        Some(path) => {
            std::fs::write(path, json).with_context(|| format!("write {}", path.display()))
        }
        None => std::io::stdout()
            .write_all(json.as_bytes())
            .context("write the samples"),
    }
}
