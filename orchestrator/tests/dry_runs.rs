//! `--dry-run`: what would be done is said, and nothing is.

mod daemon;

use daemon::{Daemon, until};
use serde_json::Value;

/// All that a command could have changed.
fn all(daemon: &Daemon) -> Vec<Value> {
    let of = |args: &[&str]| daemon.ask(args).good();
    let mut hosts = of(&["host", "ls"]);
    // What it is heard since may be told anew.
    hosts[0]["since_unix_ns"] = Value::Null;
    vec![
        of(&["ls"]),
        of(&["report"]),
        of(&["release", "ls"]),
        of(&["release", "pin"]),
        of(&["events", "ls", "--all"]),
        of(&["host", "changes"]),
        of(&["rollout", "ls"]),
        hosts,
    ]
}

#[test]
fn whatever_is_run_dry_says_what_it_would_do_and_changes_nothing() {
    let daemon = Daemon::start();
    daemon.add("1", None);
    daemon.add("2", None);
    daemon.add("3", None);
    for name in ["web", "db", "old"] {
        daemon.run(name, "1").good();
    }
    daemon.ask(&["stop", "old", "--now"]).good();
    daemon.ask(&["host", "cordon", "--reason", "a disk"]).good();
    let mut asked = daemon.cli(&["swap", "vmm", "db", "--to", "2", "--notice", "10min"]);
    let mut asked = asked
        .stdout(std::process::Stdio::null())
        .spawn()
        .expect("stillpoint");
    let mut event = String::new();
    until("a pause is announced", || {
        let pauses = daemon.ask(&["events", "ls"]).good();
        event = pauses[0]["notices"][0]["event"]
            .as_str()
            .unwrap_or_default()
            .to_owned();
        !event.is_empty()
    });
    let before = all(&daemon);
    for (args, says) in [
        (vec!["stop", "web"], "power button"),
        (
            vec!["rm", "old"],
            "old, which is stopped, would be forgotten",
        ),
        (
            vec!["events", "approve", &event],
            "the pause of db would be approved",
        ),
        (vec!["events", "cancel", &event], "would be cancelled"),
        (vec!["release", "rm", "3"], "release 3 would be removed"),
        (vec!["release", "pin", "2"], "nothing below 2 would be run"),
        (vec!["host", "uncordon"], "would be so no more"),
        (
            vec!["host", "hold", "--budget", "5s"],
            "would stand still until they are released",
        ),
        (
            vec![
                "swap", "host", "--budget", "5s", "--vm", "web", "--", "true",
            ],
            "while `true` is run",
        ),
    ] {
        let mut dry = args.clone();
        // Before a command of its own, if there is one.
        dry.insert(2.min(dry.len()), "--dry-run");
        let said = daemon.ask(&dry).good();
        let would = said["would"].as_str().unwrap_or_default();
        assert!(would.contains(says), "{dry:?}: {said}");
        assert_eq!(all(&daemon), before, "{dry:?}");
    }
    // What would be refused is refused.
    for (args, code) in [
        (vec!["rm", "--dry-run", "web"], "still_running"),
        (vec!["rm", "--dry-run", "nobody"], "not_found"),
        (vec!["release", "rm", "--dry-run", "1"], "still_running"),
        (vec!["release", "rm", "--dry-run", "9"], "not_found"),
        (vec!["events", "cancel", "--dry-run", "9"], "not_found"),
        (
            vec!["host", "forget", "--dry-run", "elsewhere"],
            "not_found",
        ),
        (
            vec!["host", "hold", "--dry-run", "--budget", "5s", "--vm", "old"],
            "not_running",
        ),
    ] {
        assert_eq!(daemon.ask(&args).bad().0, code, "{args:?}");
        assert_eq!(all(&daemon), before, "{args:?}");
    }
    // A toy can't be rehearsed, so this says no; all that matters is that nothing is changed.
    let looked = daemon.ask(&["swap", "vmm", "web", "--to", "2", "--dry-run"]);
    assert!(
        looked.out["checks"].is_array() || !looked.error.is_null(),
        "{looked:?}"
    );
    assert_eq!(all(&daemon), before);
    daemon.ask(&["events", "cancel", &event]).good();
    asked.wait().expect("wait");
}
