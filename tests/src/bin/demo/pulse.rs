//! A guest that watches itself lives through ten swaps, and through two releases that fail.

mod verdict;

use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use serde_json::Value;
use stillpoint_tests::daemon::Daemon;
use stillpoint_tests::guest::{Pulse, Snapshot};
use stillpoint_tests::releases::{self, Release};

use crate::table::{self, Moved};
use verdict::{Kept, Verdict};

const GUEST: &str = "web-1";
const CRASHES: &str = "0.2.1-crashes";
const HANGS: &str = "0.2.2-hangs";
/// The budget given to the release that hangs.
const BUDGET: Duration = Duration::from_millis(300);

/// Says what is done, as a person would type it.
fn say(args: &[&str]) {
    println!("$ stillpoint {}", args.join(" "));
}

fn told(daemon: &Daemon, args: &[&str]) -> anyhow::Result<Value> {
    say(args);
    daemon.must(args)
}

/// Tells the whole story.
pub(crate) fn tell() -> anyhow::Result<bool> {
    let began = Instant::now();
    let dir = tempfile::Builder::new()
        .prefix("stillpoint-demo-")
        .tempdir()?;
    println!("A daemon of its own, in {}", dir.path().display());
    let daemon = Daemon::start(dir.path())?;
    add_releases(&daemon)?;
    let pulse = start_guest(&daemon)?;
    let moved = (0..10)
        .map(|n| one_swap(&daemon, &pulse, n))
        .collect::<anyhow::Result<_>>()?;
    let kept = vec![
        refused(&daemon, &pulse, CRASHES, "crashes before give-up", &[])?,
        refused(
            &daemon,
            &pulse,
            HANGS,
            "hangs past its budget",
            &["--budget", "300ms"],
        )?,
    ];
    let end = settled(&pulse)?;
    told(&daemon, &["stop", GUEST])?;
    let verdict = Verdict { moved, kept, end };
    Ok(table::print(&verdict.lines(), began.elapsed()))
}

fn add_releases(daemon: &Daemon) -> anyhow::Result<()> {
    let path = |release: Release| Ok::<_, anyhow::Error>(release.binary()?.display().to_string());
    let faulty = path(Release::Faulty(""))?;
    println!(
        "\nTwo builds that really differ: 0.1.0 knows saved-state format 1 alone, 0.2.0 prefers newer ones"
    );
    told(
        daemon,
        &["release", "add", "--unsigned", &path(Release::Compat)?],
    )?;
    told(
        daemon,
        &["release", "add", "--unsigned", &path(Release::Current)?],
    )?;
    println!("\nAnd two that don't");
    let add = ["release", "add", "--unsigned", &faulty, "--as"];
    told(
        daemon,
        &[&add[..], &[CRASHES, "--arg=--fault", "--arg=load=crash"]].concat(),
    )?;
    told(
        daemon,
        &[&add[..], &[HANGS, "--arg=--fault", "--arg=load=hang"]].concat(),
    )?;
    Ok(())
}

fn start_guest(daemon: &Daemon) -> anyhow::Result<Pulse> {
    println!("\nA guest with 2 vCPUs that watches its clocks, timers and memory");
    let kernel = releases::pulse()?.display().to_string();
    let mut args = vec![
        "run",
        GUEST,
        "--cpus",
        "2",
        "--memory",
        "256M",
        "--release",
        "0.1.0",
    ];
    args.extend(["--kernel", &kernel, "--cmdline", "pulse ram=64M"]);
    told(daemon, &args)?;
    let pulse = daemon.pulse(GUEST)?;
    pulse.wait_online(2)?;
    pulse.wait(
        "a whole pass over its RAM",
        Duration::from_secs(20),
        |seen| seen.vcpus.iter().all(|vcpu| vcpu.ram_passes > 0),
    )?;
    println!();
    Ok(pulse)
}

fn one_swap(daemon: &Daemon, pulse: &Pulse, n: usize) -> anyhow::Result<Moved> {
    pulse.wait_progress(&[0, 1], 200)?;
    let to = if n.is_multiple_of(2) {
        "0.2.0"
    } else {
        "0.1.0"
    };
    let args = ["swap", "vmm", GUEST, "--to", to];
    let answer = daemon.must(&args)?;
    let moved = Moved::read(to, &answer).with_context(|| format!("{answer:#}"))?;
    println!("$ stillpoint {:<32} {moved}", args.join(" "));
    Ok(moved)
}

fn refused(
    daemon: &Daemon,
    pulse: &Pulse,
    to: &'static str,
    what: &'static str,
    more: &[&str],
) -> anyhow::Result<Kept> {
    let before = daemon.vmm_pid(GUEST)?;
    let args = [&["swap", "vmm", GUEST, "--to", to][..], more].concat();
    println!();
    say(&args);
    let answer = daemon.stillpoint(&args)?;
    let reason = answer.json["reason"]
        .as_str()
        .unwrap_or_default()
        .to_owned();
    let same_process = daemon.vmm_pid(GUEST)? == before;
    pulse
        .wait_progress(&[0, 1], 200)
        .context("the guest did not go on")?;
    let frozen = answer.json["report"]["blackout"]["host_ns"]
        .as_u64()
        .unwrap_or_default();
    let frozen = Duration::from_nanos(frozen);
    let kept = !answer.success && answer.json["state"] == "kept" && same_process;
    println!("  kept by the old release, in the same process: {reason}");
    // A hang is ended by the predecessor's own timer, a crash as soon as it is seen.
    let in_time = frozen < BUDGET + Duration::from_millis(200);
    Ok(Kept {
        what,
        kept,
        in_time,
        frozen,
    })
}

/// The guest's last word: everything it counted, once every timer it armed has had its time.
fn settled(pulse: &Pulse) -> anyhow::Result<Snapshot> {
    let from = pulse.look()?;
    let seen = pulse.wait("timers to go on firing", Duration::from_secs(20), |seen| {
        seen.vcpus.iter().zip(&from.vcpus).all(|(now, then)| {
            now.oneshot.fired > then.oneshot.fired + 3
                && now.deadline.fired > then.deadline.fired + 3
        })
    })?;
    ensure!(seen.vcpus.len() == 2, "pulse lost a vCPU");
    Ok(seen)
}
