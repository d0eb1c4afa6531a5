//! Guests whose VMMs let go of KVM, so that its modules can be exchanged, and come back.
//!
//! Here KVM stays what it is, unless it is hidden for a while; modules are really exchanged in the rig
//! (`tests/rig.rs`).

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, ensure};
use serde_json::Value;
use stillpoint_control::report::{Outcome, SwapReport};
use stillpoint_tests::daemon::Daemon;
use stillpoint_tests::furnished::Furnished;
use stillpoint_tests::ground::no_mount_namespace;
use stillpoint_tests::guest::Pulse;
use stillpoint_tests::pair::{self, GUESTS, are_well};
use stillpoint_tests::patience::{PATIENCE, wait_for};
use stillpoint_tests::releases::Release;
use stillpoint_tests::vm::{Recipe, Vm};
use stillpoint_tests::{needs, needs_kvm, wire};

/// What kvmclock may be off the line that it was on, ns.
const CLOCK_NS: i64 = 50;
/// The longest pause there is.
const LONG: Duration = Duration::from_secs(30);
/// How often a guest with all devices lets go.
const ROUNDS: usize = 10;

/// What a process has open of KVM.
fn open_of_kvm(pid: u32) -> anyhow::Result<Vec<PathBuf>> {
    let fds = std::fs::read_dir(format!("/proc/{pid}/fd"))?.flatten();
    let targets = fds.filter_map(|fd| std::fs::read_link(fd.path()).ok());
    let of_kvm = |target: &PathBuf| target.to_string_lossy().contains("kvm");
    Ok(targets.filter(of_kvm).collect())
}

/// Neither file descriptors nor mappings (`kvm_run`) of KVM are left.
fn has_let_go(pid: u32) -> anyhow::Result<()> {
    let open = open_of_kvm(pid)?;
    ensure!(open.is_empty(), "{open:?}");
    let maps = std::fs::read_to_string(format!("/proc/{pid}/maps"))?;
    let mapped: Vec<_> = maps.lines().filter(|line| line.contains("kvm")).collect();
    ensure!(mapped.is_empty(), "{mapped:#?}");
    Ok(())
}

fn is_true(report: &SwapReport, vcpus: usize) -> anyhow::Result<()> {
    ensure!(report.outcome == Outcome::Resumed, "{report:#?}");
    ensure!(report.component == "kvm", "{report:#?}");
    for name in ["park", "save", "let go", "stand", "build", "load", "enter"] {
        let has = report.phases.iter().any(|phase| phase.name == name);
        ensure!(has, "no phase `{name}`: {report:#?}");
    }
    let clock = report.clock.as_ref().context("a receipt")?;
    if clock.masterclock_before {
        let error = clock.kvmclock_error_ns.context("its kvmclock's error")?;
        ensure!(
            error.abs() <= CLOCK_NS && clock.masterclock_after,
            "{clock:#?}"
        );
    }
    ensure!(clock.told_of_pause == vec![true; vcpus], "{clock:#?}");
    Ok(())
}

#[test]
fn a_guest_with_all_devices_lets_go_and_comes_back() -> anyhow::Result<()> {
    needs_kvm!();
    let name = "a_guest_with_all_devices_lets_go_and_comes_back";
    if !wire::is_beside(name)? {
        return Ok(());
    }
    let mut guest = Furnished::boot(Release::Current, true)?;
    for round in 0..ROUNDS {
        guest.send()?;
        let client = guest.vm.client()?;
        let swap = round.to_string();
        client.detach(&swap, LONG)?;
        has_let_go(guest.vm.pid())?;
        let before = guest.vm.pulse.look()?;
        if round % 2 == 1 {
            // Rebuilt it has not run, and can be taken apart again.
            client.rebuild(&swap)?;
            ensure!(!open_of_kvm(guest.vm.pid())?.is_empty(), "no machine");
            client.detach(&swap, LONG)?;
            has_let_go(guest.vm.pid())?;
            client.rebuild(&swap)?;
        }
        let after = guest.vm.pulse.look()?;
        let counts = |seen: &stillpoint_tests::guest::Snapshot| -> Vec<u64> {
            seen.vcpus.iter().map(|vcpu| vcpu.counter).collect()
        };
        ensure!(counts(&before) == counts(&after), "it ran meanwhile");
        let report = client.resume(&swap)?;
        is_true(&report, guest.vm.vcpus().len())?;
        guest
            .came_through()
            .with_context(|| format!("round {round}"))?;
    }
    // And as any other guest it moves to another process.
    guest.send()?;
    guest.vm.must_move(Release::Current)?;
    guest.came_through()?;
    guest.end()
}

/// What a VMM makes of it past any daemon.
#[test]
fn a_vmm_alone_comes_back_at_its_ceiling() -> anyhow::Result<()> {
    needs_kvm!();
    let vm = Vm::up(&Recipe::pulse(2, "ram=8M duty=50"))?;
    let client = vm.client()?;
    for (swap, rebuilt) in [("a", false), ("b", true)] {
        let ceiling = Duration::from_millis(400);
        client.detach(swap, ceiling)?;
        if rebuilt {
            client.rebuild(swap)?;
        }
        vm.is_well().context("it runs on by itself")?;
        let report = client.resume(swap)?;
        let reason = report.reason.clone().unwrap_or_default();
        ensure!(reason.contains("by itself"), "{report:#?}");
        ensure!(report.blackout.host >= ceiling, "{report:#?}");
    }
    client.detach("c", LONG)?;
    let other = vm.onlooker()?;
    for refused in [other.resume("b").err(), other.detach("d", LONG).err()] {
        let error = refused.context("it stands still for c")?.to_string();
        ensure!(error.contains("stands still for c"), "{error}");
    }
    client.resume("c")?;
    vm.is_well()?;
    let error = client
        .rebuild("c")
        .expect_err("it has a machine")
        .to_string();
    ensure!(error.contains("nothing to rebuild"), "{error}");
    let error = client
        .detach("e", LONG + Duration::from_secs(1))
        .expect_err("too long");
    ensure!(error.to_string().contains("30 s"), "{error}");
    client.detach("f", LONG)?;
    vm.power_off().context("one without a machine can be ended")
}

/// A daemon with two guests, in a mount namespace of its own: KVM can be hidden there.
fn host(dir: &Path) -> anyhow::Result<(Daemon, Vec<Pulse>)> {
    let daemon = Daemon::start_among_own_mounts(dir)?;
    let pulses = pair::boot(&daemon)?;
    Ok((daemon, pulses))
}

fn parts_are_true(daemon: &Daemon) -> anyhow::Result<Vec<SwapReport>> {
    let mut reports = Vec::new();
    for name in GUESTS {
        let swap = daemon.must(&["report", name])?;
        ensure!(
            swap["component"] == "kvm" && swap["state"] == "resumed",
            "{swap:#}"
        );
        let report: SwapReport = serde_json::from_value(swap["report"].clone())?;
        is_true(&report, 2)?;
        reports.push(report);
    }
    Ok(reports)
}

#[test]
fn a_command_exchanges_kvm_while_nobody_holds_it() -> anyhow::Result<()> {
    needs_kvm!();
    let dir = tempfile::tempdir()?;
    let (daemon, pulses) = host(dir.path())?;
    let pids = GUESTS.map(|name| daemon.vmm_pid(name));
    let [one, two] = pids;
    let script = format!(
        "ls -l /proc/{}/fd /proc/{}/fd | grep -c kvm; exit 0",
        one?, two?
    );
    let swap = daemon.must(&["swap", "kvm", "--budget", "20s", "--", "sh", "-c", &script])?;
    ensure!(swap["state"] == "done", "{swap:#}");
    let output = swap["output"].as_str().unwrap_or_default();
    ensure!(output.starts_with("0\n"), "somebody holds KVM: {swap:#}");
    ensure!(output.contains("rebuild the guests"), "{swap:#}");
    parts_are_true(&daemon)?;
    are_well(&pulses)?;
    // The guests heard of it as of any pause.
    let pauses = daemon.must(&["events", "ls", "--all"])?;
    let of_it = |pause: &&Value| pause["swap"] == swap["id"];
    let pause = pauses.as_array().and_then(|all| all.iter().find(of_it));
    ensure!(
        pause.context("its announcement")?["state"] == "over",
        "{pauses:#}"
    );
    Ok(())
}

/// The new KVM is none: the way back is the old one, and the guests are rebuilt on it.
#[test]
fn where_the_new_kvm_fails_they_come_back_on_the_old_one() -> anyhow::Result<()> {
    needs_kvm!();
    needs!(no_mount_namespace);
    let dir = tempfile::tempdir()?;
    let (daemon, pulses) = host(dir.path())?;
    let hide = "mount --bind /dev/null /dev/kvm";
    let terms = ["swap", "kvm", "--budget", "1s", "--undo", "umount /dev/kvm"];
    let answer = daemon.stillpoint(&[&terms[..], &["--", "sh", "-c", hide]].concat())?;
    let swap = answer.json;
    ensure!(!answer.success && swap["state"] == "failed", "{swap:#}");
    ensure!(swap["undone"]["exit"] == 0, "{swap:#}");
    let reason = swap["reason"].as_str().unwrap_or_default();
    ensure!(reason.contains("did not come back"), "{swap:#}");
    ensure!(!reason.contains("way back"), "{swap:#}");
    are_well(&pulses)?;
    parts_are_true(&daemon)?;
    let again = daemon.must(&["swap", "kvm", "--budget", "20s", "--", "true"])?;
    ensure!(again["state"] == "done", "{again:#}");
    are_well(&pulses)
}

/// Nobody is there, and neither is KVM: guests wait for it beyond their ceilings, and are not lost.
#[test]
fn guests_wait_for_kvm_though_the_daemon_died() -> anyhow::Result<()> {
    needs_kvm!();
    needs!(no_mount_namespace);
    let dir = tempfile::tempdir()?;
    let (mut daemon, pulses) = host(dir.path())?;
    let mark = dir.path().join("hidden");
    let script = format!(
        "mount --bind /dev/null /dev/kvm; touch {0}; while [ -e {0} ]; do sleep 0.05; done; umount /dev/kvm",
        mark.display()
    );
    let terms = ["swap", "kvm", "--budget", "1s", "--json", "--"];
    let mut asking = daemon
        .command(&[&terms[..], &["setsid", "sh", "-c", &script]].concat())
        .stdout(Stdio::piped())
        .spawn()?;
    wait_for("the command", PATIENCE, || Ok(mark.exists().then_some(())))?;
    let before: Vec<_> = pulses.iter().map(Pulse::look).collect::<Result<_, _>>()?;
    daemon.kill()?;
    std::thread::sleep(Duration::from_secs(2));
    for (pulse, before) in pulses.iter().zip(&before) {
        let after = pulse.look()?;
        ensure!(
            after.vcpus[0].counter == before.vcpus[0].counter,
            "it ran without KVM"
        );
    }
    std::fs::remove_file(&mark)?;
    are_well(&pulses).context("they came back by themselves")?;
    daemon.restart()?;
    let swap: Value = serde_json::from_reader(asking.stdout.take().context("its output")?)?;
    ensure!(
        !asking.wait()?.success() && swap["state"] == "failed",
        "{swap:#}"
    );
    for report in parts_are_true(&daemon)? {
        let reason = report.reason.unwrap_or_default();
        ensure!(reason.contains("by itself"), "{reason}");
    }
    are_well(&pulses)
}

/// A release of KVM for rollouts, whose programs note what guests' processes have open of KVM while they run.
fn lay_out_release(dir: &Path, version: &str) -> anyhow::Result<()> {
    use std::os::unix::fs::PermissionsExt;
    let closed = || std::fs::Permissions::from_mode(0o755);
    let (kvm, notes) = (dir.join("kvm"), dir.join("notes"));
    let folder = kvm.join(version);
    std::fs::create_dir_all(&folder)?;
    for name in ["exchange", "undo"] {
        let script = format!(
            "#!/bin/sh\nfor pid in $(cat {0}/pids); do ls -l /proc/$pid/fd; done >{0}/open\n\
             echo {name} {version} $(grep -c kvm {0}/open) >>{1}\n",
            dir.display(),
            notes.display()
        );
        std::fs::write(folder.join(name), script)?;
        std::fs::set_permissions(folder.join(name), closed())?;
    }
    std::fs::set_permissions(&folder, closed())?;
    Ok(std::fs::set_permissions(&kvm, closed())?)
}

#[test]
fn a_rollout_exchanges_kvm_under_guests_and_puts_it_back() -> anyhow::Result<()> {
    needs_kvm!();
    let dir = tempfile::tempdir()?;
    for version in ["1.1", "1.2"] {
        lay_out_release(dir.path(), version)?;
    }
    let releases = dir.path().join("kvm").display().to_string();
    let daemon = Daemon::start_with(dir.path(), &["--kvm-dir", &releases])?;
    let pulses = pair::boot(&daemon)?;
    let pids = [daemon.vmm_pid(GUESTS[0])?, daemon.vmm_pid(GUESTS[1])?];
    std::fs::write(
        dir.path().join("pids"),
        format!("{} {}\n", pids[0], pids[1]),
    )?;
    let of_kvm = ["rollout", "start", "--component", "kvm", "--budget", "20s"];
    let quick = [
        "--bake",
        "0s",
        "--well-for",
        "50ms",
        "--notice",
        "0s",
        "--retry-after",
        "100ms",
    ];
    let args = |to: &'static str| [&of_kvm[..], &["--to", to], &quick[..]].concat();
    let done = daemon.must(&args("1.1"))?;
    ensure!(done["rollout"]["state"] == "finished", "{done:#}");
    let unit = &done["rollout"]["units"][0];
    let mut longest = Duration::ZERO;
    for report in parts_are_true(&daemon)? {
        longest = longest.max(report.blackout.host);
    }
    ensure!(
        unit["blackout_ns"].as_u64().map(Duration::from_nanos) == Some(longest),
        "{unit:#}"
    );
    are_well(&pulses)?;
    // Beyond a limit that no pause is within: back to what was there, by another pause.
    let over = daemon.stillpoint(&[&args("1.2")[..], &["--max-blackout", "1us"]].concat())?;
    ensure!(
        over.json["rollout"]["state"] == "rolled_back",
        "{:#}",
        over.json
    );
    parts_are_true(&daemon)?;
    are_well(&pulses)?;
    let notes = std::fs::read_to_string(dir.path().join("notes"))?;
    ensure!(
        notes == "exchange 1.1 0\nexchange 1.2 0\nundo 1.2 0\n",
        "{notes}"
    );
    ensure!(daemon.must(&["host", "ls"])?[0]["kvm"]["runs"] == "1.1");
    Ok(())
}

#[test]
fn what_can_not_be_is_refused_and_nothing_stands_still() -> anyhow::Result<()> {
    needs_kvm!();
    let dir = tempfile::tempdir()?;
    let (daemon, _pulses) = host(dir.path())?;
    let refused = |args: &[&str], words: &str| -> anyhow::Result<()> {
        let answer = daemon.stillpoint(args)?;
        ensure!(!answer.success, "{args:?}: {:#}", answer.json);
        ensure!(answer.error.contains(words), "{args:?}: {}", answer.error);
        Ok(())
    };
    let budget = ["--budget", "5s"];
    // Another VMM on this host, that we know nothing of.
    let stranger = Vm::up(&Recipe::pulse(1, "ram=2M"))?;
    let pid = format!("(pid {})", stranger.pid());
    let command: &[&str] = &["--", "true"];
    refused(&[&["swap", "kvm"], &budget[..], command].concat(), &pid)?;
    let check = daemon.stillpoint(&[&["swap", "kvm", "--check"], &budget[..]].concat())?;
    let problems = check.json["problems"].to_string();
    ensure!(
        !check.success && problems.contains(&pid),
        "{:#}",
        check.json
    );
    stranger.power_off()?;
    refused(
        &["swap", "kvm", "--budget", "31s", "--", "true"],
        "budget_ns",
    )?;
    refused(
        &[&["swap", "kvm"], &budget[..], &["--", "/no/such"]].concat(),
        "no program",
    )?;
    let nonsense = ["--parameter", "nonsense"];
    if Path::new("/sys/module/kvm/holders").exists() {
        refused(
            &[&["swap", "kvm"], &budget[..], &nonsense[..]].concat(),
            "MODULE.NAME=VALUE",
        )?;
        let nowhere = ["--to", "/nonesuch"];
        refused(
            &[&["swap", "kvm"], &budget[..], &nowhere[..]].concat(),
            "/nonesuch",
        )?;
    } else {
        refused(&[&["swap", "kvm"], &budget[..]].concat(), "built into")?;
    }
    ensure!(
        daemon.must(&["host", "changes"])? == serde_json::json!([]),
        "nothing is on record"
    );
    Ok(())
}
