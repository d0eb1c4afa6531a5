//! Guests that stand still in their places while something of their host is changed.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use serde_json::Value;
use stillpoint_control::report::{Outcome, SwapReport};
use stillpoint_tests::daemon::Daemon;
use stillpoint_tests::guest::Pulse;
use stillpoint_tests::needs_kvm;
use stillpoint_tests::pair::{self, GUESTS, are_well};
use stillpoint_tests::patience::{PATIENCE, wait_for};
use stillpoint_tests::vm::{Recipe, Vm};

/// What kvmclock may be off the line that it was on, ns.
const CLOCK_NS: i64 = 50;

/// A daemon with two guests.
fn host(dir: &Path) -> anyhow::Result<(Daemon, Vec<Pulse>)> {
    let daemon = Daemon::start(dir)?;
    let pulses = pair::boot(&daemon)?;
    Ok((daemon, pulses))
}

/// Waits until a guest stands still; its counters say so, between two looks.
fn wait_still(daemon: &Daemon, name: &str) -> anyhow::Result<()> {
    wait_for("a guest to stand still", PATIENCE, || {
        let description = daemon.vmm(name)?.describe()?;
        let frozen = serde_json::to_value(description.state)? == "frozen";
        Ok(frozen.then_some(()))
    })
}

fn counters(pulses: &[Pulse]) -> anyhow::Result<Vec<u64>> {
    let mut all = Vec::new();
    for pulse in pulses {
        all.extend(pulse.look()?.vcpus.iter().map(|vcpu| vcpu.counter));
    }
    Ok(all)
}

/// The guest's part in the last swap of its host.
fn part(daemon: &Daemon, name: &str) -> anyhow::Result<SwapReport> {
    let swap = daemon.must(&["report", name])?;
    ensure!(swap["component"] == "host", "{swap:#}");
    ensure!(swap["state"] == "resumed", "{swap:#}");
    serde_json::from_value(swap["report"].clone()).context("its report")
}

fn has_a_true_report(daemon: &Daemon, name: &str, least: Duration) -> anyhow::Result<()> {
    let report = part(daemon, name)?;
    ensure!(report.outcome == Outcome::Resumed, "{report:#?}");
    ensure!(report.blackout.host >= least, "{report:#?}");
    // What the guest's own vCPUs saw of it agrees.
    let gaps: Vec<_> = report.blackout.guest_ns.iter().flatten().collect();
    ensure!(gaps.len() == 2, "both vCPUs saw it: {report:#?}");
    for &&gap in &gaps {
        ensure!(Duration::from_nanos(gap) >= least, "{report:#?}");
    }
    let clock = report.clock.as_ref().context("a receipt")?;
    if clock.masterclock_before {
        let error = clock.kvmclock_error_ns.context("its kvmclock's error")?;
        ensure!(
            error.abs() <= CLOCK_NS && clock.masterclock_after,
            "{clock:#?}"
        );
    }
    ensure!(clock.told_of_pause == [true, true], "{clock:#?}");
    Ok(())
}

#[test]
fn a_command_runs_while_they_stand_still() -> anyhow::Result<()> {
    needs_kvm!();
    let dir = tempfile::tempdir()?;
    let (daemon, pulses) = host(dir.path())?;
    let mark = dir.path().join("mark");
    // The command is done when we have looked twice.
    let script = format!(
        "echo begun; touch {0}; while [ -e {0} ]; do sleep 0.02; done; echo over",
        mark.display()
    );
    let mut asking = daemon
        .command(&[
            "swap", "host", "--budget", "20s", "--json", "--", "sh", "-c", &script,
        ])
        .stdout(Stdio::piped())
        .spawn()?;
    wait_for("the command", PATIENCE, || Ok(mark.exists().then_some(())))?;
    let began = Instant::now();
    let before = counters(&pulses)?;
    std::thread::sleep(Duration::from_millis(300));
    let after = counters(&pulses)?;
    let stood = began.elapsed();
    std::fs::remove_file(&mark)?;
    let swap: Value = serde_json::from_reader(asking.stdout.take().context("its output")?)?;
    ensure!(asking.wait()?.success(), "{swap:#}");
    ensure!(before == after, "a guest ran: {before:?} {after:?}");
    ensure!(swap["state"] == "done", "{swap:#}");
    ensure!(swap["output"] == "begun\nover\n", "{swap:#}");
    ensure!(swap["ended"]["exit"] == 0, "{swap:#}");
    for name in GUESTS {
        has_a_true_report(&daemon, name, stood)?;
    }
    are_well(&pulses)?;
    // The guests' own record of it, and a swap of a VMM as before.
    let pauses = daemon.must(&["events", "ls", "--all"])?;
    let of_host = |pause: &&Value| pause["swap"] == swap["id"];
    let pause = pauses.as_array().and_then(|all| all.iter().find(of_host));
    let pause = pause.context("its announcement")?;
    ensure!(pause["state"] == "over", "{pause:#}");
    ensure!(
        pause["notices"].as_array().map(Vec::len) == Some(2),
        "{pause:#}"
    );
    let current = daemon.must(&["show", GUESTS[0]])?["release"].clone();
    let current = current.as_str().context("a version")?.to_owned();
    let moved = daemon.must(&["swap", "vmm", GUESTS[0], "--to", &current])?;
    ensure!(moved["state"] == "moved", "{moved:#}");
    are_well(&pulses)
}

#[test]
fn what_fails_is_undone_while_they_run() -> anyhow::Result<()> {
    needs_kvm!();
    let dir = tempfile::tempdir()?;
    let (daemon, pulses) = host(dir.path())?;
    let undone = dir.path().join("undone");
    let undo = format!("touch {}; echo undone; exit 5", undone.display());
    let failing = ["--", "sh", "-c", "echo no such driver >&2; exit 3"];
    let terms = ["swap", "host", "--budget", "20s", "--undo", &undo];
    let answer = daemon.stillpoint(&[&terms[..], &failing[..]].concat())?;
    ensure!(!answer.success, "{:#}", answer.json);
    let swap = answer.json;
    ensure!(
        swap["state"] == "failed" && swap["ended"]["exit"] == 3,
        "{swap:#}"
    );
    ensure!(swap["undone"]["exit"] == 5 && undone.exists(), "{swap:#}");
    ensure!(swap["output"] == "no such driver\nundone\n", "{swap:#}");
    are_well(&pulses)?;
    // A person reads the same.
    let output = daemon
        .command(&["host", "show", swap["id"].as_str().unwrap_or_default()])
        .output()?;
    let said = String::from_utf8_lossy(&output.stdout);
    for words in ["failed", "exit status 3", "exit status 5", "no such driver"] {
        ensure!(said.contains(words), "{said}");
    }
    // One guest alone: the other doesn't notice.
    let one = daemon.must(&[
        "swap", "host", "--budget", "5s", "--vm", GUESTS[1], "--", "true",
    ])?;
    ensure!(one["vms"] == serde_json::json!([GUESTS[1]]), "{one:#}");
    are_well(&pulses)
}

#[test]
fn what_overruns_is_ended_and_they_run_in_time() -> anyhow::Result<()> {
    needs_kvm!();
    let dir = tempfile::tempdir()?;
    let (daemon, pulses) = host(dir.path())?;
    let pid_file = dir.path().join("pid");
    let undone = dir.path().join("undone");
    let script = format!("echo $$ > {}; exec sleep 600", pid_file.display());
    let undo = format!("touch {}", undone.display());
    let terms = ["swap", "host", "--budget", "1500ms", "--undo", &undo];
    let answer = daemon.stillpoint(&[&terms[..], &["--", "sh", "-c", &script]].concat())?;
    ensure!(
        !answer.success && answer.json["ended"] == "overran",
        "{:#}",
        answer.json
    );
    ensure!(undone.exists(), "{:#}", answer.json);
    are_well(&pulses)?;
    for name in GUESTS {
        let report = part(&daemon, name)?;
        ensure!(
            report.blackout.host >= Duration::from_secs(1),
            "{report:#?}"
        );
        // Its VMM's own ceiling would have ended it.
        ensure!(report.reason.is_none(), "{report:#?}");
    }
    let pid: i32 = std::fs::read_to_string(&pid_file)?.trim().parse()?;
    wait_for("the command's end", PATIENCE, || {
        Ok((!Path::new(&format!("/proc/{pid}")).exists()).then_some(()))
    })
}

#[test]
fn by_hand_and_past_the_ceiling() -> anyhow::Result<()> {
    needs_kvm!();
    let dir = tempfile::tempdir()?;
    let (daemon, pulses) = host(dir.path())?;
    let held = daemon.must(&["host", "hold", "--budget", "20s"])?;
    ensure!(held["state"] == "in_progress", "{held:#}");
    wait_still(&daemon, GUESTS[0])?;
    wait_still(&daemon, GUESTS[1])?;
    let before = counters(&pulses)?;
    // What would change a guest meanwhile is refused by name.
    let vmm = daemon.must(&["show", GUESTS[0]])?["release"].clone();
    let to = vmm.as_str().context("a version")?.to_owned();
    let swap = daemon.stillpoint(&["swap", "vmm", GUESTS[0], "--to", &to])?;
    ensure!(
        !swap.success && swap.error.contains("is going on"),
        "{}",
        swap.error
    );
    let second = daemon.stillpoint(&["host", "hold", "--budget", "1s"])?;
    ensure!(!second.success, "{:#}", second.json);
    ensure!(counters(&pulses)? == before, "a guest ran");
    let released = daemon.must(&["host", "release"])?;
    ensure!(released["state"] == "done", "{released:#}");
    are_well(&pulses)?;
    // Nobody releases this one.
    let left = daemon.must(&["host", "hold", "--budget", "700ms"])?;
    let id = left["id"].as_str().context("an id")?.to_owned();
    let ended = wait_for("its end", PATIENCE, || {
        let swap = daemon.stillpoint(&["host", "show", &id])?.json;
        Ok((swap["state"] == "failed").then_some(swap))
    })?;
    let reason = ended["reason"].as_str().unwrap_or_default();
    ensure!(reason.contains("nobody released it"), "{ended:#}");
    are_well(&pulses)?;
    let late = daemon.stillpoint(&["host", "release", &id])?;
    ensure!(
        !late.success && late.error.contains("failed"),
        "{}",
        late.error
    );
    Ok(())
}

/// Guests run on at their ceiling though nobody is there; the next daemon says what became of it.
#[test]
fn a_daemon_that_dies_leaves_nobody_frozen() -> anyhow::Result<()> {
    needs_kvm!();
    let dir = tempfile::tempdir()?;
    let (mut daemon, pulses) = host(dir.path())?;
    let undone = dir.path().join("undone");
    let undo = format!("touch {}", undone.display());
    let script = ["--", "sleep", "600"];
    let terms = ["swap", "host", "--budget", "2s", "--undo", &undo, "--json"];
    let mut asking: std::process::Child = daemon
        .command(&[&terms[..], &script[..]].concat())
        .stdout(Stdio::piped())
        .spawn()?;
    wait_still(&daemon, GUESTS[0])?;
    wait_still(&daemon, GUESTS[1])?;
    daemon.kill()?;
    are_well(&pulses).context("nobody let them go but their own VMMs")?;
    daemon.restart()?;
    let swap: Value = serde_json::from_reader(asking.stdout.take().context("its output")?)?;
    ensure!(!asking.wait()?.success(), "{swap:#}");
    ensure!(
        swap["state"] == "failed" && swap["ended"] == "unknown",
        "{swap:#}"
    );
    ensure!(undone.exists(), "{swap:#}");
    for name in GUESTS {
        let report = part(&daemon, name)?;
        let reason = report.reason.clone().unwrap_or_default();
        ensure!(reason.contains("by itself"), "{report:#?}");
    }
    // And the host is as before: another one goes well.
    daemon.must(&["swap", "host", "--budget", "20s", "--", "true"])?;
    are_well(&pulses)
}

/// A guest that is stopped while it stands still, and one that crashes.
#[test]
fn one_that_ends_meanwhile_holds_up_nobody() -> anyhow::Result<()> {
    needs_kvm!();
    let dir = tempfile::tempdir()?;
    let (daemon, pulses) = host(dir.path())?;
    daemon.must(&["host", "hold", "--budget", "20s"])?;
    wait_still(&daemon, GUESTS[0])?;
    let pid = daemon.vmm_pid(GUESTS[0])?;
    let killed = Command::new("kill")
        .args(["-9", &pid.to_string()])
        .status()?;
    ensure!(killed.success(), "kill");
    let released = daemon.stillpoint(&["host", "release"])?.json;
    ensure!(released["state"] == "failed", "{released:#}");
    let reason = released["reason"].as_str().unwrap_or_default();
    ensure!(reason.starts_with(GUESTS[0]), "{released:#}");
    are_well(&pulses[1..])?;
    let crashed = wait_for("the record of its end", PATIENCE, || {
        let shown = daemon.must(&["show", GUESTS[0]])?;
        Ok((shown["state"] == "crashed").then_some(shown))
    })?;
    ensure!(crashed["reason"].is_string(), "{crashed:#}");
    daemon.must(&["host", "hold", "--budget", "20s"])?;
    wait_still(&daemon, GUESTS[1])?;
    daemon.must(&["stop", GUESTS[1], "--now"])?;
    let released = daemon.stillpoint(&["host", "release"])?.json;
    ensure!(released["state"] == "failed", "{released:#}");
    Ok(())
}

#[test]
fn what_can_not_be_is_refused_and_nothing_stands_still() -> anyhow::Result<()> {
    needs_kvm!();
    let dir = tempfile::tempdir()?;
    let daemon = Daemon::start(dir.path())?;
    let refused = |args: &[&str], words: &str| -> anyhow::Result<()> {
        let answer = daemon.stillpoint(args)?;
        ensure!(!answer.success, "{args:?}: {:#}", answer.json);
        ensure!(answer.error.contains(words), "{args:?}: {}", answer.error);
        Ok(())
    };
    refused(
        &["swap", "host", "--budget", "1s", "--", "true"],
        "no guest runs",
    )?;
    refused(
        &["swap", "host", "--budget", "31s", "--", "true"],
        "budget_ns",
    )?;
    refused(
        &["swap", "host", "--budget", "1s", "--", "/no/such"],
        "no program",
    )?;
    refused(
        &["swap", "host", "--budget", "1s", "--vm", "x", "--", "true"],
        "`x`",
    )?;
    refused(&["swap", "host", "--budget", "1s"], "COMMAND")?;
    refused(&["host", "release"], "no guests are held")?;
    refused(&["host", "release", "1.2"], "no swap")?;
    refused(&["host", "show", "1.2"], "no swap")?;
    ensure!(
        daemon.must(&["host", "changes"])? == serde_json::json!([]),
        "nothing is on record"
    );
    Ok(())
}

/// What a VMM makes of it past any daemon.
#[test]
fn a_vmm_alone_holds_its_ceiling() -> anyhow::Result<()> {
    needs_kvm!();
    let vm = Vm::up(&Recipe::pulse(2, "ram=8M duty=50"))?;
    let client = vm.client()?;
    let mut spans = Vec::new();
    for (swap, ceiling) in [("a", 200), ("b", 400)] {
        client.freeze(swap, Duration::from_millis(ceiling))?;
        vm.is_well().context("it runs on by itself")?;
        let report = client.resume(swap)?;
        let reason = report.reason.clone().unwrap_or_default();
        ensure!(reason.contains("by itself"), "{report:#?}");
        ensure!(
            report.blackout.host >= Duration::from_millis(ceiling),
            "{report:#?}"
        );
        spans.push(report.blackout.host);
    }
    // Only the one it stands still for lets it go.
    client.freeze("c", Duration::from_secs(20))?;
    let other = vm.onlooker()?;
    let error = other
        .resume("b")
        .expect_err("it stands still for c")
        .to_string();
    ensure!(error.contains("for c"), "{error}");
    let error = other
        .freeze("d", Duration::from_secs(1))
        .expect_err("it stands still");
    ensure!(error.to_string().contains("stands still"), "{error}");
    client.resume("c")?;
    vm.is_well()?;
    let error = client
        .resume("never")
        .expect_err("no such pause")
        .to_string();
    ensure!(error.contains("has not stood still"), "{error}");
    let error = client
        .freeze("e", Duration::from_secs(31))
        .expect_err("too long");
    ensure!(error.to_string().contains("30 s"), "{error}");
    vm.power_off()
}
