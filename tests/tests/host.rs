//! A host with its daemon, its command and a real guest: what the daemon's death, restart and
//! refusals do to the guest, which is nothing.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, ensure};
use serde_json::Value;
use stillpoint_control::ownership::{Owner, Ownership};
use stillpoint_tests::daemon::Daemon;
use stillpoint_tests::guest::Pulse;
use stillpoint_tests::needs_kvm;
use stillpoint_tests::patience::{PATIENCE, wait_for};
use stillpoint_tests::releases::{self, Release, root};

const GUEST: &str = "web-1";
/// A good release that takes its time while the guest stands still.
const SLOW: &str = "0.2.9-slow";

/// A daemon with both releases, a slow one, and a running guest.
fn host(dir: &Path) -> anyhow::Result<(Daemon, Pulse)> {
    let daemon = Daemon::start(dir)?;
    for release in [Release::Current, Release::Compat] {
        daemon.must(&[
            "release",
            "add",
            "--unsigned",
            &release.binary()?.display().to_string(),
        ])?;
    }
    let faulty = Release::Faulty("").binary()?.display().to_string();
    let slow = ["--as", SLOW, "--arg=--fault", "--arg=load=slow:700"];
    daemon.must(&[&["release", "add", "--unsigned", &faulty], &slow[..]].concat())?;
    run(&daemon, GUEST)?;
    let pulse = daemon.pulse(GUEST)?;
    pulse.wait_online(2)?;
    Ok((daemon, pulse))
}

fn run(daemon: &Daemon, name: &str) -> anyhow::Result<Value> {
    let kernel = releases::pulse()?.display().to_string();
    let cmdline = "pulse ram=16M duty=50";
    let machine = [
        "--cpus",
        "2",
        "--memory",
        "64M",
        "--budget",
        "5s",
        "--kernel",
        &kernel,
        "--cmdline",
        cmdline,
    ];
    daemon.must(&[&["run", name, "--release", "0.2.0"], &machine[..]].concat())
}

/// The guest goes on, whole.
fn is_well(pulse: &Pulse) -> anyhow::Result<()> {
    let seen = pulse.wait_progress(&[0, 1], 20)?;
    ensure!(seen.faults().is_empty(), "{:#?}", seen.faults());
    Ok(())
}

fn state_of(daemon: &Daemon, name: &str) -> anyhow::Result<String> {
    let shown = daemon.must(&["show", name])?;
    Ok(shown["state"].as_str().unwrap_or_default().to_owned())
}

#[test]
fn a_guest_outlives_its_daemon() -> anyhow::Result<()> {
    needs_kvm!();
    let dir = tempfile::tempdir()?;
    let (mut daemon, pulse) = host(dir.path())?;
    let pid = daemon.vmm_pid(GUEST)?;
    for how in [Daemon::kill, Daemon::terminate, Daemon::kill] {
        how(&mut daemon)?;
        is_well(&pulse)?;
        daemon.restart()?;
        ensure!(state_of(&daemon, GUEST)? == "running", "after a restart");
        ensure!(daemon.vmm_pid(GUEST)? == pid, "the very same process");
        let moved = daemon.must(&["swap", "vmm", GUEST, "--to", "0.1.0"])?;
        ensure!(moved["state"] == "moved", "{moved:#}");
        let back = daemon.must(&["swap", "vmm", GUEST, "--to", "0.2.0"])?;
        ensure!(back["state"] == "moved", "{back:#}");
        // From here on another process is the guest's.
        if daemon.vmm_pid(GUEST)? != pid {
            break;
        }
    }
    is_well(&pulse)?;
    daemon.must(&["stop", GUEST]).map(drop)
}

#[test]
fn a_daemon_killed_in_the_middle_of_a_swap_finds_out_how_it_ended() -> anyhow::Result<()> {
    needs_kvm!();
    let dir = tempfile::tempdir()?;
    let (mut daemon, pulse) = host(dir.path())?;
    let (_ram, word) = daemon.vmm(GUEST)?.lend_guest()?;
    let word = Ownership::map(word)?;
    let mut swap = daemon
        .command(&["swap", "vmm", GUEST, "--to", SLOW, "--json"])
        .stdout(Stdio::null())
        .spawn()?;
    wait_for("the guest to stand still", PATIENCE, || {
        Ok(matches!(word.read()?, Owner::Sealed(_)).then_some(()))
    })?;
    daemon.kill()?;
    // Both processes carry the swap to its end without a daemon.
    wait_for("the successor", PATIENCE, || {
        Ok(matches!(word.read()?, Owner::Taken(_)).then_some(()))
    })?;
    daemon.restart()?;
    let moved = |swaps: Value| swaps[0]["state"] == "moved" || swaps["state"] == "moved";
    wait_for("the record of the swap", PATIENCE, || {
        Ok(moved(daemon.must(&["report", GUEST])?).then_some(()))
    })?;
    swap.wait()?;
    is_well(&pulse)?;
    let shown = daemon.must(&["show", GUEST])?;
    ensure!(
        shown["release"]["version"] == SLOW || shown["release"] == SLOW,
        "{shown:#}"
    );
    let back = daemon.must(&["swap", "vmm", GUEST, "--to", "0.2.0"])?;
    ensure!(back["state"] == "moved", "{back:#}");
    daemon.must(&["stop", GUEST]).map(drop)
}

/// A command that must be refused with these words, leaving the guest in the same process.
fn refused(daemon: &Daemon, args: &[&str], words: &[&str]) -> anyhow::Result<()> {
    let answer = daemon.stillpoint(args)?;
    ensure!(!answer.success, "{args:?} must be refused: {}", answer.json);
    let said = format!("{}{}", answer.error, answer.json);
    for word in words {
        ensure!(
            said.contains(word),
            "{args:?} must speak of {word:?}: {said}"
        );
    }
    Ok(())
}

#[test]
fn what_is_refused_changes_nothing() -> anyhow::Result<()> {
    needs_kvm!();
    let dir = tempfile::tempdir()?;
    let (daemon, pulse) = host(dir.path())?;
    let pid = daemon.vmm_pid(GUEST)?;
    let kernel = releases::pulse()?.display().to_string();
    let swap = ["swap", "vmm", GUEST, "--to"];
    refused(&daemon, &["run", GUEST, "--kernel", &kernel], &[GUEST])?;
    refused(
        &daemon,
        &["run", "web-2", "--kernel", "/no/such/kernel"],
        &["/no/such/kernel"],
    )?;
    refused(
        &daemon,
        &["run", "web-2", "--kernel", &kernel, "--memory", "1000G"],
        &["memory.size"],
    )?;
    refused(&daemon, &["run", "../web", "--kernel", &kernel], &["name"])?;
    refused(&daemon, &[&swap[..], &["9.9.9"]].concat(), &["9.9.9"])?;
    refused(
        &daemon,
        &["swap", "vmm", "nobody", "--to", "0.1.0"],
        &["nobody"],
    )?;
    refused(
        &daemon,
        &[&swap[..], &["0.1.0", "--budget", "31s"]].concat(),
        &["30"],
    )?;
    refused(
        &daemon,
        &["release", "add", "--unsigned", "/bin/true"],
        &["no release"],
    )?;
    tampered(&daemon, dir.path())?;
    second_swap(&daemon)?;
    ensure!(daemon.vmm_pid(GUEST)? != pid, "the slow swap itself moved");
    is_well(&pulse)?;
    daemon.must(&["stop", GUEST])?;
    refused(&daemon, &[&swap[..], &["0.2.0"]].concat(), &["stopped"])
}

/// A binary in the store that is not what was added.
fn tampered(daemon: &Daemon, dir: &Path) -> anyhow::Result<()> {
    let stored = dir.join("state/releases/0.1.0/stillpoint-vmm");
    let good = fs::read(&stored)?;
    let mode = fs::metadata(&stored)?.permissions();
    fs::set_permissions(&stored, fs::Permissions::from_mode(0o700))?;
    fs::write(&stored, [&good[..], b"x"].concat())?;
    refused(
        daemon,
        &["swap", "vmm", GUEST, "--to", "0.1.0"],
        &["sha256"],
    )?;
    fs::write(&stored, good)?;
    fs::set_permissions(&stored, mode)?;
    Ok(())
}

/// A second swap while one runs.
fn second_swap(daemon: &Daemon) -> anyhow::Result<()> {
    let mut first = daemon
        .command(&["swap", "vmm", GUEST, "--to", SLOW, "--json"])
        .stdout(Stdio::null())
        .spawn()?;
    wait_for("the first swap", PATIENCE, || {
        let report = daemon.stillpoint(&["report", GUEST])?;
        Ok(report.success.then_some(()))
    })?;
    refused(daemon, &["swap", "vmm", GUEST, "--to", "0.1.0"], &["swap"])?;
    ensure!(
        first.wait()?.success(),
        "the first swap goes on undisturbed"
    );
    Ok(())
}

/// Gives another uid a `/dev/kvm` of its own in a mount namespace of its own, and runs the demo.
const AS_USER: &str = "set -e; cd /; mount -t tmpfs -o mode=755 none /mnt; \
    mknod -m 666 /mnt/kvm c 10 232; mount --bind /mnt/kvm /dev/kvm; \
    exec setpriv --reuid 65533 --regid 65533 --clear-groups --no-new-privs \"$@\"";

#[test]
fn the_demo_needs_no_root() -> anyhow::Result<()> {
    needs_kvm!();
    if !Command::new("unshare")
        .args(["-m", "true"])
        .status()
        .is_ok_and(|s| s.success())
    {
        eprintln!("SKIPPED host::the_demo_needs_no_root: no mount namespace to be had");
        return Ok(());
    }
    // Somewhere that uid may read, wherever the work tree lies.
    let place = tempfile::tempdir()?;
    fs::set_permissions(place.path(), fs::Permissions::from_mode(0o755))?;
    let target = place.path().join("target");
    fs::create_dir_all(&target)?;
    for part in [
        "release/stillpoint",
        "release/stillpointd",
        "release/demo",
        "releases",
    ] {
        let to = target.join(part);
        fs::create_dir_all(to.parent().context("a parent")?)?;
        let mut copy = Command::new("cp");
        copy.arg("-r")
            .arg(root().join("target").join(part))
            .arg(&to);
        ensure!(
            copy.status()?.success(),
            "copying {part}; run `make programs` first"
        );
    }
    let scratch = place.path().join("tmp");
    fs::create_dir(&scratch)?;
    fs::set_permissions(&scratch, fs::Permissions::from_mode(0o1777))?;
    let output = Command::new("unshare")
        .args(["-m", "sh", "-c", AS_USER, "sh"])
        .arg(target.join("release/demo"))
        .env("STILLPOINT_ROOT", place.path())
        .env("TMPDIR", &scratch)
        .env_remove("XDG_RUNTIME_DIR")
        .env("HOME", &scratch)
        .output()?;
    let said = String::from_utf8_lossy(&output.stdout);
    let error = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{said}\n{error}");
    ensure!(said.contains("All of it true"), "{said}\n{error}");
    ensure!(
        fs::read_dir(&scratch)?.next().is_none(),
        "it leaves nothing behind"
    );
    Ok(())
}
