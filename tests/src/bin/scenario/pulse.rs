//! The bare-metal guest under a real daemon, its VMM swapped there and back.

use anyhow::{Context, ensure};
use serde_json::{Value, json};
use stillpoint_tests::daemon::Daemon;
use stillpoint_tests::ground;
use stillpoint_tests::releases::{self, Release};

const GUEST: &str = "pulse-1";

/// Tells what is done; returns what was seen.
pub(crate) fn tell() -> anyhow::Result<Value> {
    if let Some(reason) = ground::no_kvm() {
        anyhow::bail!("{reason}");
    }
    let dir = tempfile::tempdir()?;
    let told = with_daemon(&Daemon::start(dir.path())?);
    told.with_context(|| {
        let logs = ["run/vms/pulse-1/vmm.log", "stillpointd.log"].map(|log| dir.path().join(log));
        let texts = logs.map(|log| std::fs::read_to_string(log).unwrap_or_default());
        format!("what was logged:\n{}", texts.join("\n"))
    })
}

fn with_daemon(daemon: &Daemon) -> anyhow::Result<Value> {
    let doctor = daemon.stillpoint(&["doctor"])?.json;
    let checks = doctor.as_array().map_or(0, Vec::len);
    println!("scenario: `stillpoint doctor` made {checks} checks");
    for release in [Release::Compat, Release::Current] {
        daemon.must(&[
            "release",
            "add",
            "--unsigned",
            &release.binary()?.display().to_string(),
        ])?;
    }
    let kernel = releases::pulse()?.display().to_string();
    let machine = [
        "--cpus", "2", "--memory", "64M", "--budget", "10s", "--kernel", &kernel,
    ];
    let run = [
        "run",
        GUEST,
        "--release",
        "0.1.0",
        "--cmdline",
        "pulse ram=16M duty=50",
    ];
    daemon.must(&[&run[..], &machine].concat())?;
    let pulse = daemon.pulse(GUEST)?;
    pulse.wait_online(2)?;
    println!("scenario: pulse runs on two vCPUs");
    let mut swaps = Vec::new();
    for to in ["0.2.0", "0.1.0"] {
        pulse.wait_progress(&[0, 1], 20)?;
        let swap = daemon.must(&["swap", "vmm", GUEST, "--to", to])?;
        ensure!(swap["state"] == "moved", "the swap to {to}: {swap:#}");
        println!(
            "scenario: moved to {to}, blackout {} ns",
            swap["report"]["blackout"]["host_ns"]
        );
        swaps.push(swap);
    }
    let seen = pulse.wait_progress(&[0, 1], 20)?;
    ensure!(seen.faults().is_empty(), "{:#?}", seen.faults());
    daemon.must(&["stop", GUEST])?;
    Ok(json!({"doctor": doctor, "swaps": swaps}))
}
