//! Swaps of the toy: who ends up with the guest, and what the record says.

mod daemon;

use daemon::{Daemon, until};

fn with_guest(release: &str, fault: Option<&str>) -> Daemon {
    let daemon = Daemon::start();
    daemon.add("good", None);
    if fault.is_some() {
        daemon.add(release, fault);
    }
    daemon.run("web", release).good();
    daemon
}

#[test]
fn a_guest_moves_back_and_forth() {
    let daemon = with_guest("good", None);
    daemon.add("next", None);
    for (count, to) in ["next", "good", "next"].iter().enumerate() {
        let before = daemon.vmm_pid("web");
        let swap = daemon.swap("web", to);
        assert_eq!(swap["state"], "moved", "{swap}");
        assert_eq!(swap["report"]["blackout"]["host_ns"], 10_000);
        let vm = daemon.show("web");
        assert_eq!(
            (&vm["release"], &vm["state"]),
            (&(*to).into(), &"running".into())
        );
        assert_eq!(vm["swaps"].as_u64(), Some(count as u64 + 1));
        assert_ne!(daemon.vmm_pid("web"), before);
        let gone = format!("/proc/{before}");
        until("the predecessor retires", || {
            !std::path::Path::new(&gone).exists()
        });
    }
    assert_eq!(
        daemon.ask(&["report"]).good().as_array().map(Vec::len),
        Some(3)
    );
}

#[test]
fn a_successor_that_fails_leaves_the_guest_where_it_was() {
    let daemon = with_guest("good", None);
    let pid = daemon.vmm_pid("web");
    for (fault, why) in [
        ("crash-before-ready", "crashing as told"),
        ("crash-on-offer", "closed the connection"),
        ("hang", "no answer in time"),
    ] {
        daemon.add(fault, Some(fault));
        let swap = daemon.swap("web", fault);
        assert_eq!(swap["state"], "kept", "{fault}: {swap}");
        let reason = swap["reason"].as_str().unwrap_or_default();
        assert!(reason.contains(why), "{fault}: {reason}");
        assert_eq!(daemon.vmm_pid("web"), pid);
        assert_eq!(daemon.show("web")["release"], "good");
        let successor = format!("/proc/{}", swap["successor"]["pid"]);
        until("the successor is gone", || {
            !std::path::Path::new(&successor).exists()
        });
    }
    assert_eq!(
        daemon.swap("web", "good")["state"],
        "moved",
        "and it can still be swapped"
    );
}

#[test]
fn whatever_dies_in_swaps_nobody_stays_a_zombie() {
    let daemon = with_guest("good", None);
    for fault in ["crash-before-ready", "hang", "die-after-take"] {
        daemon.add(fault, Some(fault));
        daemon.swap("web", fault);
    }
    assert_eq!(daemon.show("web")["state"], "crashed");
    let pid = daemon.pid();
    let zombies = || {
        let all = std::fs::read_dir("/proc").expect("/proc").flatten();
        let stats = all.flat_map(|entry| std::fs::read_to_string(entry.path().join("stat")));
        let of_ours = format!(") Z {pid} ");
        stats.filter(|stat| stat.contains(&of_ours)).count()
    };
    until("all that died are reaped", || zombies() == 0);
}

#[test]
fn a_predecessor_that_dies_sealed_has_given_up() {
    let daemon = with_guest("dies", Some("die-sealed"));
    let swap = daemon.swap("web", "good");
    assert_eq!(swap["state"], "moved", "{swap}");
    assert_eq!(daemon.show("web")["state"], "running");
    assert_eq!(daemon.show("web")["release"], "good");
}

#[test]
fn a_predecessor_that_hangs_sealed_is_relieved_of_its_guest() {
    for fault in ["hang-sealed", "hang-given-up"] {
        let daemon = with_guest("hangs", Some(fault));
        let pid = daemon.vmm_pid("web");
        let swap = daemon.swap("web", "good");
        assert_eq!(swap["state"], "moved", "{fault}: {swap}");
        assert_eq!(daemon.show("web")["state"], "running");
        assert_eq!(daemon.show("web")["release"], "good");
        assert!(!std::path::Path::new(&format!("/proc/{pid}")).exists());
        assert_eq!(daemon.swap("web", "good")["state"], "moved");
    }
}

#[test]
fn a_successor_that_hangs_with_the_guest_is_not_said_to_run_it() {
    let daemon = with_guest("good", None);
    daemon.add("hangs", Some("hang-after-take"));
    let mut asked = daemon
        .cli(&["swap", "vmm", "web", "--to", "hangs"])
        .stdout(std::process::Stdio::null())
        .spawn()
        .expect("stillpoint");
    let swap = || daemon.ask(&["report"]).good()[0].clone();
    until("the swap is in doubt", || swap()["state"] == "in_doubt");
    assert_ne!(daemon.show("web")["state"], "running");
    // Whoever ends it decides it.
    let pid = i32::try_from(swap()["successor"]["pid"].as_u64().expect("pid")).expect("pid");
    let pid = rustix::process::Pid::from_raw(pid).expect("pid");
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).expect("kill");
    until("it is settled", || swap()["state"] == "crashed");
    daemon.until_state("web", "crashed");
    let _ = asked.wait();
}

#[test]
fn a_predecessor_that_dies_before_the_seal_takes_the_guest_with_it() {
    let daemon = with_guest("dies", Some("die-before-seal"));
    let swap = daemon.swap("web", "good");
    assert_eq!(swap["state"], "crashed", "{swap}");
    daemon.until_state("web", "crashed");
    daemon.run("web", "good").good();
}

#[test]
fn a_successor_that_dies_with_the_guest_is_a_crash() {
    let daemon = with_guest("good", None);
    daemon.add("dies", Some("die-after-take"));
    let swap = daemon.swap("web", "dies");
    assert_eq!(swap["state"], "crashed", "{swap}");
    daemon.until_state("web", "crashed");
}

#[test]
fn one_swap_at_a_time() {
    let daemon = with_guest("slow", Some("slow"));
    let mut first = daemon
        .cli(&["swap", "vmm", "web", "--to", "good"])
        .stdout(std::process::Stdio::null())
        .spawn()
        .expect("stillpoint");
    until("the swap is on its way", || {
        daemon.show("web")["state"] == "swapping"
    });
    let (code, message) = daemon.ask(&["swap", "vmm", "web", "--to", "good"]).bad();
    assert_eq!(code, "swap_in_progress", "{message}");
    assert!(first.wait().expect("wait").success());
}

#[test]
fn a_daemon_killed_in_a_swap_finds_out_how_it_ended() {
    for (fault, state) in [("slow", "moved"), ("die-before-seal", "crashed")] {
        // Slow on both accounts: the daemon must be dead before it ends.
        let mut daemon = Daemon::start();
        daemon.add("good", None);
        daemon.add("slow", Some("slow"));
        daemon.add("hang", Some("hang"));
        daemon.run("web", "slow").good();
        let pid = daemon.vmm_pid("web");
        let mut asked = daemon
            .cli(&["swap", "vmm", "web", "--to", "good"])
            .stdout(std::process::Stdio::null())
            .stderr(std::process::Stdio::null())
            .spawn()
            .expect("stillpoint");
        until("the handover is on its way", || {
            daemon.log().contains("phase=\"adopt\"")
        });
        daemon.kill();
        if fault == "die-before-seal" {
            let pid = rustix::process::Pid::from_raw(i32::try_from(pid).expect("pid"));
            rustix::process::kill_process(pid.expect("pid"), rustix::process::Signal::KILL)
                .expect("kill");
        }
        daemon.spawn();
        until("it is settled", || {
            let swaps = daemon.ask(&["report"]).good();
            swaps[0]["state"] == state
        });
        let vm_state = if state == "moved" {
            "running"
        } else {
            "crashed"
        };
        daemon.until_state("web", vm_state);
        if state == "moved" {
            assert_eq!(daemon.show("web")["release"], "good");
            assert_ne!(daemon.vmm_pid("web"), pid);
            let report = daemon.ask(&["report", "web"]).good();
            assert_eq!(report["report"]["outcome"], "moved");
            assert_eq!(daemon.swap("web", "good")["state"], "moved");
        }
        let _ = asked.wait();
    }
}

#[test]
fn guests_outlive_the_daemon_and_are_found_again() {
    let mut daemon = with_guest("good", None);
    let pid = daemon.vmm_pid("web");
    daemon.kill();
    daemon.spawn();
    assert_eq!(daemon.vmm_pid("web"), pid);
    daemon.until_state("web", "running");
    assert!(daemon.terminate().success());
    daemon.spawn();
    daemon.until_state("web", "running");
    assert_eq!(daemon.vmm_pid("web"), pid);
    // One that dies while nobody watches is found dead.
    daemon.kill();
    let raw = rustix::process::Pid::from_raw(i32::try_from(pid).expect("pid")).expect("pid");
    rustix::process::kill_process(raw, rustix::process::Signal::KILL).expect("kill");
    daemon.spawn();
    daemon.until_state("web", "crashed");
}

#[test]
fn a_guest_that_dies_is_a_crash_with_the_last_it_said() {
    let daemon = with_guest("good", None);
    let pid = i32::try_from(daemon.vmm_pid("web")).expect("pid");
    let pid = rustix::process::Pid::from_raw(pid).expect("pid");
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).expect("kill");
    daemon.until_state("web", "crashed");
    let reason = daemon.show("web")["reason"].to_string();
    assert!(
        reason.contains("signal 9") && reason.contains("toy: run"),
        "{reason}"
    );
}

#[test]
fn an_impostor_is_not_taken_for_the_guest() {
    let mut daemon = with_guest("good", None);
    let other = with_guest("good", None);
    let pid = i32::try_from(daemon.vmm_pid("web")).expect("pid");
    daemon.kill();
    let pid = rustix::process::Pid::from_raw(pid).expect("pid");
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).expect("kill");
    // Another VMM, which really speaks the protocol, at the dead one's path.
    let at = |daemon: &Daemon| daemon.path().join("run/vms/web/control.sock");
    std::fs::remove_file(at(&daemon)).expect("remove");
    std::fs::rename(at(&other), at(&daemon)).expect("rename");
    daemon.spawn();
    daemon.until_state("web", "crashed");
    let reason = daemon.show("web")["reason"].to_string();
    assert!(reason.contains("not the VMM that was started"), "{reason}");
    std::fs::rename(at(&daemon), at(&other)).expect("back");
}
