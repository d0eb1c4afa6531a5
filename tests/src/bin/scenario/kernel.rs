//! The host's kernel swapped under its guests, told in stages: each kernel that is jumped into runs the
//! next one. Only for an emulated host: it jumps.
//!
//! 1. *leave*: guests are started, one of them with a disk that is then put away; a rehearsal finds that out, and without
//!    one the host jumps.
//! 2. *arrive*: every guest goes on, but the one whose disk is missing: it is kept, told of by name, and
//!    goes on when the disk is back and it is tried again. Then the host crashes, by a jump that nothing
//!    prepared, on a command line that still names the first.
//! 3. *crashed*: nobody is run from a record of before.

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, bail, ensure};
use serde_json::{Value, json};
use stillpoint_tests::daemon::{Answer, Daemon};
use stillpoint_tests::ground;
use stillpoint_tests::guest::Snapshot;
use stillpoint_tests::patience::{PATIENCE, wait_for};
use stillpoint_tests::rig::crash;
use stillpoint_tests::rig::order::JUMPS;

use crate::debian;
use crate::stages;
use crate::stages::{HOST, add_release, daemon, faults, run_pulse};

/// What the stage before saw.
const SEEN: &str = "/scratch/seen.json";
/// Where all that was seen is written, for the last stage to bring out.
const TOLD: &str = "/scratch/told.json";
const GUEST: &str = "pulse-1";
/// The guest whose disk is missing.
const ASTRAY: &str = "pulse-2";
const DISK: &str = "/scratch/disk.img";
const AWAY: &str = "/scratch/disk.away";

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The kernel to jump into, by its name below /jump; in later stages it is known.
    #[arg(long, value_name = "NAME")]
    into: Option<String>,
    /// With a Debian guest at work beside the others, and without the crash.
    #[arg(long)]
    debian: bool,
}

pub(crate) fn tell(args: &Args) -> anyhow::Result<Value> {
    if let Some(reason) = ground::no_kvm() {
        bail!("{reason}");
    }
    let told = match (&args.into, Path::new(TOLD).exists()) {
        (Some(kernel), _) => leave(kernel, args.debian),
        (None, false) => arrive(args.debian),
        (None, true) => crashed(),
    };
    told.with_context(|| {
        let host = Path::new(HOST);
        let vmm = |name: &str| host.join("run/vms").join(name).join("vmm.log");
        let logs = [
            vmm(GUEST),
            vmm(ASTRAY),
            vmm(debian::GUEST),
            host.join("stillpointd.log"),
        ];
        let texts = logs.map(|log| std::fs::read_to_string(log).unwrap_or_default());
        format!("what was logged:\n{}", texts.join("\n"))
    })
}

fn leave(kernel: &str, with_debian: bool) -> anyhow::Result<Value> {
    let daemon = daemon()?;
    add_release(&daemon)?;
    let first = run_pulse(&daemon, GUEST, &["--vsock"])?;
    let heard = hears(&daemon)?;
    ensure!(heard.contains("\"Events\":[]"), "{heard}");
    std::fs::File::create(DISK)?.set_len(1 << 20)?;
    let second = run_pulse(&daemon, ASTRAY, &["--disk", DISK])?;
    println!("scenario: two pulse guests run in the carve-out");
    let deb = match with_debian {
        true => debian::begin(&daemon)?,
        false => Value::Null,
    };
    if !with_debian {
        // What the next kernel's host lacks.
        std::fs::rename(DISK, AWAY)?;
    }
    let seen = json!({GUEST: told(&first), ASTRAY: told(&second), "debian": deb, "kernel": kernel});
    std::fs::write(SEEN, serde_json::to_vec(&seen)?)?;
    if !with_debian {
        found_out(&daemon, kernel)?;
    }
    println!("scenario: the host jumps into another kernel");
    // What is missing is to be missed after the jump.
    let more: &[&str] = match with_debian {
        true => &[],
        false => &["--no-rehearsal"],
    };
    let answer = swap(
        &daemon,
        kernel,
        &[&["--no-notice", "a scenario"], more].concat(),
    )?;
    bail!("the host is still here: {}{}", answer.error, answer.json)
}

fn swap(daemon: &Daemon, kernel: &str, more: &[&str]) -> anyhow::Result<Answer> {
    let folder = Path::new(JUMPS).join(kernel);
    let path = |name: &str| folder.join(name).display().to_string();
    let (image, initrd) = (path("bzImage"), path("initramfs"));
    let swap = ["swap", "kernel", "--kernel", &image, "--initrd", &initrd];
    daemon.stillpoint(&[&swap[..], more].concat())
}

/// What the next kernel's host will lack is found out on this one, by a look and by the swap, and no guest stands still
/// for more than its peek.
fn found_out(daemon: &Daemon, kernel: &str) -> anyhow::Result<()> {
    let look = ["--check", "--no-notice", "a scenario"];
    let looked = swap(daemon, kernel, &look)?;
    let of = |name: &str| rehearsal_of(&looked.json, name);
    ensure!(of(GUEST)?["status"] == "ok", "{:#}", looked.json);
    let missing = of(ASTRAY)?;
    ensure!(
        !looked.success
            && missing["status"] == "fail"
            && missing["found"].to_string().contains("no such file"),
        "{:#}",
        looked.json
    );
    // Nothing but that stands in the way.
    let failed = looked.json.as_array().into_iter().flatten();
    let failed = failed.filter(|check| check["status"] == "fail").count();
    ensure!(failed == 1, "{:#}", looked.json);
    let answer = swap(daemon, kernel, &["--no-notice", "a scenario"])?;
    let over = stages::last_swap(daemon)?;
    let why = over["reason"].as_str().unwrap_or_default();
    ensure!(
        !answer.success
            && over["state"] == "refused"
            && why.contains(ASTRAY)
            && why.contains("no such file"),
        "{over:#}"
    );
    let report = daemon.must(&["report", GUEST])?;
    let told = &report["safeguards"]["rehearsal"]["told"];
    ensure!(told["verdict"] == "passed", "{report:#}");
    // The peeks are all the pause that there was.
    ensure!(told["peek_ns"].as_u64() > Some(0), "{report:#}");
    ensure!(
        over["pause_ns"].as_u64() >= told["peek_ns"].as_u64(),
        "{over:#}"
    );
    println!("scenario: the rehearsal finds out what is missing, and the host does not jump");
    Ok(())
}

/// What the first guest is told is going to happen to it, by its vsock; it listens from then on.
fn hears(daemon: &Daemon) -> anyhow::Result<String> {
    let socket = Path::new(HOST)
        .join("run/vms")
        .join(GUEST)
        .join("vsock.sock_80");
    let mut stream = wait_for("its way to the metadata", PATIENCE, || {
        daemon.must(&["ls"])?;
        Ok(UnixStream::connect(&socket).ok())
    })?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let request = "GET /metadata/scheduledevents?api-version=2020-07-01 HTTP/1.1\r\nHost: metadata\r\nMetadata: true\r\n\
                   Connection: close\r\n\r\n";
    stream.write_all(request.as_bytes())?;
    Ok(std::io::read_to_string(stream)?)
}

/// What a look at a swap says of the rehearsal of this guest.
pub(crate) fn rehearsal_of<'v>(checks: &'v Value, guest: &str) -> anyhow::Result<&'v Value> {
    let name = format!("rehearsal {guest}");
    let mut checks_of = checks.as_array().into_iter().flatten();
    let found = checks_of.find(|check| check["check"] == name.as_str());
    found.with_context(|| format!("no `{name}` in {checks:#}"))
}

pub(crate) fn told(seen: &Snapshot) -> Value {
    let counters: Vec<_> = seen.vcpus.iter().map(|vcpu| vcpu.counter).collect();
    json!({"counters": counters, "tsc": seen.last_tsc})
}

/// The guest goes on from where it was; gives what it shows.
pub(crate) fn goes_on(daemon: &Daemon, name: &str, before: &Value) -> anyhow::Result<Value> {
    let pulse = daemon.pulse(name)?;
    let found = pulse.look()?;
    for vcpu in 0..2 {
        let counted = before["counters"][vcpu].as_u64().context("a counter")?;
        let now = found.vcpus[vcpu].counter;
        ensure!(
            now >= counted,
            "{name}: vCPU {vcpu} counts {now}, and counted {counted} before"
        );
    }
    let seen = pulse.wait_progress(&[0, 1], 20)?;
    ensure!(faults(&seen).is_empty(), "{name}: {:#?}", faults(&seen));
    pulse.ran_once()?;
    println!("scenario: {name} went on");
    Ok(told(&seen))
}

fn arrive(with_debian: bool) -> anyhow::Result<Value> {
    let before: Value = serde_json::from_slice(&std::fs::read(SEEN)?)?;
    if with_debian {
        debian::tap()?;
    }
    let daemon = daemon()?;
    // Nobody asked since before the jump: until somebody has, it is told that the pause came.
    let heard = hears(&daemon)?;
    ensure!(heard.contains("\"EventStatus\":\"Started\""), "{heard}");
    // Before it there was one that was refused.
    let swap = stages::last_swap(&daemon)?;
    let shown = daemon.command(&["host", "show", swap["id"].as_str().unwrap_or_default()]);
    show(shown)?;
    let first = goes_on(&daemon, GUEST, &before[GUEST])?;
    let report = daemon.must(&["report", GUEST])?;
    if with_debian {
        ensure!(swap["state"] == "done", "{swap:#}");
        let second = goes_on(&daemon, ASTRAY, &before[ASTRAY])?;
        let deb = debian::end(&daemon, &before["debian"])?;
        return Ok(json!({
            "swap": swap, "report": report, "before": before, "after": [first, second], "debian": deb,
        }));
    }
    let astray = astray(&daemon, &swap, &before)?;
    let all = json!({"swap": swap, "report": report, "before": before, "after": [first, astray]});
    std::fs::write(TOLD, serde_json::to_vec(&all)?)?;
    rustix::fs::sync();
    println!("scenario: the host crashes");
    let folder = PathBuf::from(JUMPS).join("again");
    let line = std::fs::read_to_string("/proc/cmdline")?;
    crash::into(
        &folder.join("bzImage"),
        &folder.join("initramfs"),
        line.trim(),
    )?;
    bail!("the host is still here")
}

/// The guest whose disk is missing: kept, told of, and brought back.
fn astray(daemon: &Daemon, swap: &Value, before: &Value) -> anyhow::Result<Value> {
    ensure!(swap["state"] == "failed", "{swap:#}");
    ensure!(
        swap["reason"]
            .as_str()
            .is_some_and(|why| why.contains(ASTRAY)),
        "{swap:#}"
    );
    let shown = daemon.must(&["show", ASTRAY])?;
    ensure!(shown["state"] == "failed", "{shown:#}");
    ensure!(
        shown["reason"].to_string().contains("no such file"),
        "{shown:#}"
    );
    let refused = daemon.stillpoint(&["rm", ASTRAY])?;
    ensure!(!refused.success, "its memory may yet be wanted");
    let record = |view: &Value| {
        let mut guests = view["guests"].as_array().into_iter().flatten();
        let found = guests.find(|guest| guest["vm"] == ASTRAY);
        found
            .map(|guest| guest["record"].clone())
            .unwrap_or_default()
    };
    ensure!(record(&daemon.must(&["adopt"])?) == "stored");
    let again = daemon.stillpoint(&["adopt", "--retry", ASTRAY])?;
    ensure!(
        !again.success && again.error.contains("no such file"),
        "{}",
        again.error
    );
    std::fs::rename(AWAY, DISK)?;
    ensure!(record(&daemon.must(&["adopt", "--retry", ASTRAY])?) == "consumed");
    goes_on(daemon, ASTRAY, &before[ASTRAY])
}

/// After the crash: the command line names the jump, the directory does, and the records are whole; and
/// nobody is run from them.
fn crashed() -> anyhow::Result<Value> {
    let mut all: Value = serde_json::from_slice(&std::fs::read(TOLD)?)?;
    let line = std::fs::read_to_string("/proc/cmdline")?;
    ensure!(line.contains("stillpoint.jump="), "{line}");
    let daemon = daemon()?;
    for name in [GUEST, ASTRAY] {
        let shown = daemon.must(&["show", name])?;
        ensure!(shown["state"] == "crashed", "{shown:#}");
        let again = daemon.stillpoint(&["adopt", "--retry", name])?;
        ensure!(
            !again.success && again.error.contains("consumed"),
            "{}",
            again.error
        );
    }
    println!("scenario: after the crash nobody is run from a record of before");
    let view = daemon.must(&["adopt", "--forget", GUEST])?;
    ensure!(
        view["guests"].as_array().map(Vec::len) == Some(1),
        "{view:#}"
    );
    all["after_the_crash"] = view;
    Ok(all)
}

/// A command's words, for people.
pub(crate) fn show(mut command: Command) -> anyhow::Result<()> {
    let output = command.output()?;
    print!("{}", String::from_utf8_lossy(&output.stdout));
    Ok(())
}
