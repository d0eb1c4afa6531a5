//! Every guest of a host swapped by one command.

mod daemon;

use std::process::{Child, Stdio};

use daemon::{Daemon, until};
use serde_json::Value;

/// More vCPUs than any host that this runs on has cores: such guests go one after another.
const WIDE: &str = "64";

/// Guests whose old VMM takes its time to hand over.
fn with_guests(names: &[&str]) -> Daemon {
    let daemon = Daemon::start();
    daemon.add("old", Some("slow"));
    daemon.add("new", None);
    for name in names {
        daemon.run_with(name, "old", &["--cpus", WIDE]).good();
    }
    daemon
}

fn swap_all(daemon: &Daemon) -> Child {
    let mut command = daemon.cli(&["swap", "vmm", "--all", "--to", "new", "--budget", "5s"]);
    let command = command.stdout(Stdio::piped()).stderr(Stdio::piped());
    command.spawn().expect("stillpoint")
}

fn ended(child: Child) -> (bool, Value) {
    let output = child.wait_with_output().expect("output");
    let said = serde_json::from_slice(&output.stdout);
    let said = said.unwrap_or_else(|e| panic!("{e}: {}", String::from_utf8_lossy(&output.stderr)));
    (output.status.success(), said)
}

/// How many swaps are in that state, and how many of those say that they are at that step.
fn count(daemon: &Daemon, state: &str, step: Option<&str>) -> usize {
    let swaps = daemon.ask(&["report"]).good();
    let swaps = swaps.as_array().into_iter().flatten();
    let of = |swap: &&Value| swap["state"] == state && step.is_none_or(|step| swap["step"] == step);
    swaps.filter(of).count()
}

#[test]
fn all_move_and_no_more_at_once_than_there_are_cores_for() {
    let names = ["a", "b", "c", "d"];
    let daemon = with_guests(&names);
    let child = swap_all(&daemon);
    until("one goes, and the others wait for their turn", || {
        count(&daemon, "in_progress", None) == 1
            && count(&daemon, "wanted", Some("wait for its turn")) == 3
    });
    let mut most = 0;
    until("all are over", || {
        most = most.max(count(&daemon, "in_progress", None));
        count(&daemon, "moved", None) == names.len()
    });
    assert_eq!(most, 1);
    let (good, told) = ended(child);
    assert!(good, "{told}");
    let swaps = told["swaps"].as_array().expect("swaps");
    assert_eq!(swaps.len(), names.len());
    for (swap, name) in swaps.iter().zip(names) {
        assert_eq!(
            (&swap["vm"], &swap["state"]),
            (&name.into(), &"moved".into())
        );
        assert!(swap["report"].is_object(), "{swap}");
        assert_eq!(daemon.show(name)["release"], "new");
    }
    // And once more: there is nothing to do.
    let (good, told) = ended(swap_all(&daemon));
    assert!(good, "{told}");
    assert_eq!(told["swaps"], Value::Array(Vec::new()));
    assert_eq!(told["already"].as_array().map(Vec::len), Some(names.len()));
    assert_eq!(count(&daemon, "moved", None), names.len());
}

#[test]
fn a_guest_that_can_not_be_swapped_is_left_out_by_name_and_keeps_nobody() {
    let daemon = with_guests(&["a", "b"]);
    let other = daemon.toy("9.0.0", &[9], &[9]);
    let other = other.to_str().expect("UTF-8");
    daemon.ask(&["release", "add", other, "--unsigned"]).good();
    daemon.run("odd", "9.0.0").good();
    daemon.run("gone", "old").good();
    daemon.ask(&["stop", "gone"]).good();
    daemon.until_state("gone", "stopped");
    let (good, told) = ended(swap_all(&daemon));
    assert!(!good, "one is not where it was wanted");
    assert_eq!(told["swaps"].as_array().map(Vec::len), Some(2), "{told}");
    let [out] = told["left_out"].as_array().expect("left out").as_slice() else {
        panic!("one is left out: {told}");
    };
    assert_eq!(out["vm"], "odd");
    assert_eq!(out["problem"]["code"], "no_common_format", "{out}");
    assert_eq!(daemon.show("odd")["release"], "9.0.0");
    assert_eq!(daemon.show("gone")["state"], "stopped");
}

#[test]
fn what_is_wrong_with_the_release_refuses_all() {
    let daemon = with_guests(&["a", "b"]);
    let ask = |args: &[&str]| {
        let all = ["swap", "vmm", "--all", "--to"];
        daemon.ask(&[&all, args].concat()).bad()
    };
    assert_eq!(ask(&["nothing"]).0, "not_found");
    assert_eq!(ask(&["new", "--no-notice", " "]).0, "bad_request");
    assert_eq!(daemon.ask(&["report"]).good(), Value::Array(Vec::new()));
}

#[test]
fn one_that_waits_for_its_turn_can_still_be_cancelled() {
    let daemon = with_guests(&["a", "b", "c"]);
    let child = swap_all(&daemon);
    until("two wait", || {
        count(&daemon, "wanted", Some("wait for its turn")) == 2
    });
    let pauses = daemon.ask(&["events", "ls"]).good();
    let pauses = pauses.as_array().expect("pauses");
    let waiting = pauses.iter().find(|pause| pause["state"] == "scheduled");
    let event = waiting.and_then(|pause| pause["notices"][0]["event"].as_str());
    let event = event.unwrap_or_else(|| panic!("an event that has not started: {pauses:?}"));
    daemon
        .ask(&["events", "cancel", event, "--reason", "market day"])
        .good();
    until("it is refused, before the others are done", || {
        count(&daemon, "kept", None) == 1 && count(&daemon, "moved", None) < 2
    });
    let (good, told) = ended(child);
    assert!(!good, "{told}");
    let kept = told["swaps"].as_array().expect("swaps").iter();
    let kept: Vec<_> = kept.filter(|swap| swap["state"] == "kept").collect();
    assert_eq!(kept.len(), 1, "{told}");
    let why = kept[0]["reason"].as_str().expect("why");
    assert!(why.contains("market day"), "{why}");
}

#[test]
fn a_name_or_all_and_not_both() {
    let daemon = Daemon::start();
    for args in [
        &["swap", "vmm", "--to", "x"][..],
        &["swap", "vmm", "a", "--all", "--to", "x"],
    ] {
        let output = daemon.cli(args).output().expect("stillpoint");
        assert_eq!(output.status.code(), Some(2), "{output:?}");
    }
}

#[test]
fn a_look_at_all_changes_nothing() {
    let daemon = with_guests(&["a", "b"]);
    let said = daemon.ask(&[
        "swap",
        "vmm",
        "--all",
        "--to",
        "new",
        "--check",
        "--no-peek",
    ]);
    let checks = said.out["checks"].as_array().expect("checks");
    assert_eq!(checks.len(), 2, "{:?}", said.out);
    assert_eq!(daemon.ask(&["report"]).good(), Value::Array(Vec::new()));
    assert_eq!(daemon.show("a")["release"], "old");
}
