//! `make demo-events`: a guest's pause from both sides, live. The host's side is what
//! `stillpoint events watch` prints; the guest's is the guest agent with a hook that takes two
//! seconds.
//!
//! The guest is pulse, which speaks no HTTP: the agent runs beside it and asks on the guest's own
//! wire, where the daemon knows it as that guest. Exits non-zero if a line of it is untrue.

mod sides;

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use serde_json::Value;
use stillpoint_tests::daemon::Daemon;
use stillpoint_tests::releases::{self, Release};
use stillpoint_tests::{ground, patience};

use sides::Sides;

const GUEST: &str = "web-1";

fn main() -> ExitCode {
    match tell() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("demo-events: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn tell() -> anyhow::Result<()> {
    if let Some(reason) = ground::no_kvm() {
        anyhow::bail!("{reason}; `stillpoint doctor` shows what this host lacks");
    }
    let began = Instant::now();
    let dir = tempfile::Builder::new()
        .prefix("stillpoint-demo-")
        .tempdir()?;
    let daemon = Daemon::start(dir.path())?;
    let current = Release::Current.binary()?.display().to_string();
    daemon.must(&["release", "add", "--unsigned", &current, "--as", "0.2.0"])?;
    daemon.must(&["release", "add", "--unsigned", &current, "--as", "0.2.1"])?;
    let kernel = releases::pulse()?.display().to_string();
    let run = [
        "run",
        GUEST,
        "--release",
        "0.2.0",
        "--kernel",
        &kernel,
        "--cmdline",
        "pulse",
    ];
    daemon.must(&[&run[..], &["--vsock", "--notice", "15min"]].concat())?;
    daemon.pulse(GUEST)?.wait_online(1)?;
    println!("A guest whose agent needs 2 s to drain its connections before a pause\n");
    let sides = Sides::open(&daemon, dir.path())?;

    println!("── 1: a swap with 15 minutes' notice, and a guest that says when it is ready ──");
    let asked = Instant::now();
    swap(&daemon, &["--to", "0.2.1"])?;
    let took = asked.elapsed();
    sides.wait_guest("over")?;
    ensure!(
        took > Duration::from_secs(2) && took < Duration::from_secs(60),
        "it took {took:?}"
    );

    println!("\n── 2: a swap that its operator withdraws; nothing happens to the guest ──");
    sides.set_ready(false)?;
    let pid = daemon.vmm_pid(GUEST)?;
    let mut swapping = daemon
        .command(&["swap", "vmm", GUEST, "--to", "0.2.0"])
        .spawn()?;
    let event = scheduled(&daemon)?;
    say(&["events", "cancel", &event, "--reason", "market day"]);
    daemon.must(&["events", "cancel", &event, "--reason", "market day"])?;
    ensure!(
        !swapping.wait()?.success() && daemon.vmm_pid(GUEST)? == pid,
        "it was swapped"
    );
    sides.wait_guest("over")?;

    println!("\n── 3: an urgent one, without notice, and the reason on record ──");
    swap(
        &daemon,
        &["--to", "0.2.0", "--no-notice", "a hole in the VMM"],
    )?;
    sides.wait_guest("over")?;

    println!("\n── what the record says, and the guest's own receipt is the same ──");
    let pauses = daemon.must(&["events", "ls", "--all"])?;
    table(&pauses)?;
    same_receipt(&daemon, &pauses)?;
    daemon.must(&["stop", GUEST, "--now"])?;
    println!(
        "\nAll of it true, in {:.0} s. More: docs/guide.md",
        began.elapsed().as_secs_f64()
    );
    Ok(())
}

fn say(args: &[&str]) {
    println!("$ stillpoint {}", args.join(" "));
}

/// Swaps the guest, which must move.
fn swap(daemon: &Daemon, more: &[&str]) -> anyhow::Result<()> {
    let args = [&["swap", "vmm", GUEST], more].concat();
    say(&args);
    let swap = daemon.must(&args)?;
    ensure!(swap["state"] == "moved", "{swap:#}");
    Ok(())
}

/// The id of the event that is announced.
fn scheduled(daemon: &Daemon) -> anyhow::Result<String> {
    patience::wait_for("an event", patience::PATIENCE, || {
        let pauses = daemon.must(&["events", "ls"])?;
        let open = pauses
            .as_array()
            .into_iter()
            .flatten()
            .find(|p| p["state"] == "scheduled");
        let id = open.and_then(|pause| pause["notices"][0]["event"].as_str());
        Ok(id.map(str::to_owned))
    })
}

/// The guest reads the same of its pauses as the host has on record.
fn same_receipt(daemon: &Daemon, pauses: &Value) -> anyhow::Result<()> {
    let mut wire = UnixStream::connect(daemon.guest_dir(GUEST).join("vsock.sock_80"))?;
    let request =
        "GET /stillpoint/v1/pauses HTTP/1.1\r\nMetadata: true\r\nConnection: close\r\n\r\n";
    wire.write_all(request.as_bytes())?;
    let mut answer = String::new();
    wire.read_to_string(&mut answer)?;
    let body = answer.split_once("\r\n\r\n").context("an answer")?.1;
    let receipt: Value = serde_json::from_str(body).with_context(|| answer.clone())?;
    let of_guest = receipt["pauses"].as_array().context("a list of pauses")?;
    let of_host = pauses.as_array().context("a list of pauses")?;
    ensure!(of_guest.len() == of_host.len(), "{receipt:#}");
    for (guest, host) in of_guest.iter().zip(of_host) {
        let same = guest["event_id"] == host["notices"][0]["event"]
            && guest["state"] == host["state"]
            && guest["pause_ns"] == host["measured"]["pause_ns"];
        ensure!(same, "{guest:#} {host:#}");
    }
    Ok(())
}

fn table(pauses: &Value) -> anyhow::Result<()> {
    let pauses = pauses.as_array().context("a list of pauses")?;
    let ends: Vec<_> = pauses
        .iter()
        .map(|pause| pause["state"].as_str().unwrap_or("?"))
        .collect();
    ensure!(ends == ["over", "cancelled", "over"], "{ends:?}");
    for (number, pause) in pauses.iter().enumerate() {
        let ms = |ns: &Value| {
            ns.as_f64()
                .map_or("-".into(), |ns| format!("{:.2} ms", ns / 1e6))
        };
        let between = |a: &str, b: &str| {
            let at = |key: &str| pause[key].as_f64();
            at(b)
                .zip(at(a))
                .map_or("-".into(), |(b, a)| format!("{:.1} s", (b - a) / 1e9))
        };
        let by = match &pause["notices"][0]["approval"]["by"] {
            Value::Null => "nobody".to_owned(),
            Value::String(word) => word.clone(),
            by => format!("{} itself", by["vm"].as_str().unwrap_or("?")),
        };
        let why = pause["no_notice"]
            .as_str()
            .or(pause["measured"]["reason"].as_str());
        println!(
            " ✓ {}: {}; approved by {by}; waited {}; stood still {}{}",
            number + 1,
            pause["state"].as_str().unwrap_or("?"),
            between("announced_at_unix_ns", "started_at_unix_ns"),
            ms(&pause["measured"]["pause_ns"]),
            why.map_or(String::new(), |why| format!("; {why}")),
        );
    }
    Ok(())
}
