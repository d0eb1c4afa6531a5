//! Rollouts of what takes a whole host: KVM, exchanged by programs of a release under toys, which let go of it.
//! Real modules are exchanged in the rig (`tests/tests/modules`), real guests rebuilt in `tests/tests/kvm_swap.rs`.

mod daemon;
mod etcd;

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use daemon::{Daemon, Said, until};
use etcd::{Cluster, needs_etcd, skip};
use serde_json::Value;

/// What makes a rollout quick here. Somebody who has KVM open for a moment is waited for.
const QUICK: [&str; 20] = [
    "--component",
    "kvm",
    "--budget",
    "10s",
    "--bake",
    "0s",
    "--well-for",
    "50ms",
    "--deadline",
    "60s",
    "--retry-after",
    "50ms",
    "--notice",
    "0s",
    "--set-budget",
    "50%",
    "--tries",
    "200",
    "--canary",
    "1",
];

/// Why it can't be tried here: KVM is exchanged only while nobody else has it open.
fn somebody_has_kvm() -> Option<String> {
    let holders = orchestrator::agent::modules::holders(&[]);
    let first = holders.first()?;
    Some(format!("{first} has KVM open, which is not ours to end"))
}

macro_rules! needs_kvm_for_itself {
    () => {
        if let Some(why) = somebody_has_kvm() {
            return skip(&why);
        }
    };
}

fn put(path: &Path, text: &str, mode: u32) {
    std::fs::write(path, text).expect("write");
    std::fs::set_permissions(path, PermissionsExt::from_mode(mode)).expect("chmod");
}

fn folder(path: &Path) {
    std::fs::create_dir(path).expect("a folder");
    std::fs::set_permissions(path, PermissionsExt::from_mode(0o755)).expect("chmod");
}

/// Puts a release of KVM on a host, whose programs note that they ran, in `exchanges`.
fn release(daemon: &Daemon, version: &str, exchange: &str) {
    let dir = daemon.path().join("kvm").join(version);
    folder(&dir);
    let log = log(daemon);
    for (name, script) in [("exchange", exchange), ("undo", "true")] {
        let script = format!(
            "#!/bin/sh\necho {name} {version} >>{}\n{script}\n",
            log.display()
        );
        put(&dir.join(name), &script, 0o755);
    }
}

fn log(daemon: &Daemon) -> PathBuf {
    daemon.path().join("exchanges")
}

/// What ran on a host, in its order.
fn ran(daemon: &Daemon) -> Vec<String> {
    let text = std::fs::read_to_string(log(daemon)).unwrap_or_default();
    text.lines().map(str::to_owned).collect()
}

/// A daemon with a folder for releases of KVM, and these arguments.
fn host(more: &[&str]) -> Daemon {
    let mut daemon = Daemon::prepare();
    let dir = daemon.path().join("kvm");
    folder(&dir);
    let dir = dir.to_str().expect("UTF-8").to_owned();
    daemon.more(&[&["--kvm-dir", &dir], more].concat());
    daemon.spawn();
    daemon.add("good", None);
    daemon.add("next", None);
    daemon
}

/// Two guests in one update domain of two sets.
fn guests(daemon: &Daemon, of: &str, domain: &str) {
    for set in ["web", "db"] {
        let seat = [
            "--set",
            set,
            "--update-domains",
            "3",
            "--update-domain",
            domain,
        ];
        daemon
            .run_with(&format!("{set}-{of}"), "good", &seat)
            .good();
    }
}

/// One host with two guests, and releases of KVM: a good one, one that fails, one that takes its time.
fn alone() -> Daemon {
    let daemon = host(&[]);
    guests(&daemon, "0", "0");
    release(&daemon, "1.1", "true");
    release(&daemon, "broken", "exit 3");
    release(&daemon, "slow", "sleep 30");
    daemon
}

fn rollout(daemon: &Daemon, verb: &str, to: &str, more: &[&str]) -> Said {
    let mut args = vec!["rollout", verb, "--to", to];
    args.extend(QUICK);
    args.extend(more);
    daemon.ask(&args)
}

/// The shown rollout, of a `watch` that ended well or not.
fn ended(said: Said) -> Value {
    assert!(said.error.is_null(), "{}", said.error);
    said.out["rollout"].clone()
}

fn runs(daemon: &Daemon) -> String {
    let hosts = daemon.ask(&["host", "ls"]).good();
    let all = hosts.as_array().cloned().unwrap_or_default();
    let this = all.into_iter().find(|host| host["is_this"] == true);
    this.expect("this host")["kvm"]["runs"]
        .as_str()
        .unwrap_or_default()
        .to_owned()
}

/// Changes of a host that were not refused, as they are recorded.
fn changes(daemon: &Daemon) -> Vec<Value> {
    let changes = daemon.ask(&["host", "changes"]).good();
    let all = changes.as_array().cloned().unwrap_or_default();
    all.into_iter()
        .filter(|swap| swap["state"] != "refused")
        .collect()
}

#[test]
fn a_host_is_exchanged_with_all_its_guests_and_put_back_where_that_was_beyond_a_limit() {
    needs_kvm_for_itself!();
    let daemon = alone();
    let plan = rollout(&daemon, "plan", "1.1", &[]).good();
    let unit = &plan["rollout"]["units"][0];
    assert_eq!(
        (&unit["vm"], &unit["from"]),
        (&Value::Null, &"as booted".into())
    );
    assert_eq!(unit["guests"].as_array().map(Vec::len), Some(2), "{unit}");
    let mut table = daemon.cli(&[]);
    let table = table.args(["rollout", "plan", "--to", "1.1"]).args(QUICK);
    assert!(table.output().expect("stillpoint").status.success());
    assert_eq!(ran(&daemon), Vec::<String>::new(), "a plan begins nothing");

    // Beyond a limit: back to what was there before, by another swap.
    let over = ended(rollout(&daemon, "start", "1.1", &["--max-blackout", "1us"]));
    assert_eq!(over["state"], "rolled_back", "{over}");
    assert_eq!(ran(&daemon), ["exchange 1.1", "undo 1.1"]);
    assert_eq!(runs(&daemon), "as booted");

    let done = ended(rollout(&daemon, "start", "1.1", &[]));
    assert_eq!(done["state"], "finished", "{done}");
    assert_eq!(ran(&daemon)[2..], ["exchange 1.1"]);
    assert_eq!(runs(&daemon), "1.1");
    assert!(done["units"][0]["blackout_ns"].as_u64() > Some(0), "{done}");
    // Each guest's part is of the rollout, and its guest heard of it as of any pause.
    let swap = changes(&daemon).pop().expect("it");
    assert_eq!(swap["rollout"], done["id"]);
    for guest in ["web-0", "db-0"] {
        let part = daemon.ask(&["report", guest]).good();
        let told = (&part["part_of"], &part["rollout"], &part["component"]);
        assert_eq!(told, (&swap["id"], &done["id"], &"kvm".into()), "{part}");
    }
    let pauses = daemon.ask(&["events", "ls", "--all"]).good();
    let mut all = pauses.as_array().expect("pauses").iter();
    assert!(
        all.any(|pause| pause["swap"] == swap["id"] && pause["state"] == "over"),
        "{pauses}"
    );
    let (_, message) = rollout(&daemon, "start", "1.1", &[]).bad();
    assert!(
        message.contains("all 1 hosts that were asked for run release 1.1 already"),
        "{message}"
    );
}

#[test]
fn a_release_that_fails_stops_its_rollout_without_another_pause_for_the_way_back() {
    needs_kvm_for_itself!();
    let daemon = alone();
    let over = ended(rollout(&daemon, "start", "broken", &[]));
    assert_eq!(over["state"], "rolled_back", "{over}");
    // The swap itself went back before the guests ran; the way back found nothing to do.
    assert_eq!(ran(&daemon), ["exchange broken", "undo broken"]);
    assert_eq!(runs(&daemon), "as booted");
    let changes = changes(&daemon);
    assert_eq!(changes.len(), 1, "{changes:#?}");
    assert_eq!(changes[0]["kvm"]["came_back_on"], "old");
    let history = daemon.ask(&["rollout", "history"]).good().to_string();
    assert!(
        history.contains("exit status 3") && history.contains("did not succeed"),
        "{history}"
    );
}

/// The daemon is driver and host in one, and dies in the middle of an exchange.
#[test]
fn a_daemon_that_dies_in_the_middle_of_an_exchange_does_it_no_second_time_and_puts_back() {
    needs_kvm_for_itself!();
    let mut daemon = alone();
    rollout(&daemon, "start", "slow", &["--detach"]).good();
    until("the exchange runs", || !ran(&daemon).is_empty());
    daemon.kill();
    daemon.spawn();
    let id = daemon.ask(&["rollout", "ls"]).good()[0]["id"].clone();
    let over = ended(daemon.ask(&["rollout", "watch", id.as_str().expect("an id")]));
    assert_eq!(over["state"], "rolled_back", "{over}");
    assert_eq!(ran(&daemon), ["exchange slow", "undo slow"]);
    assert_eq!(runs(&daemon), "as booted");
    assert!(
        changes(&daemon)
            .iter()
            .any(|swap| swap["ended"] == "unknown")
    );
}

#[test]
fn a_guest_goes_with_its_host_or_by_itself_and_never_both() {
    needs_kvm_for_itself!();
    let daemon = alone();
    daemon.ask(&["host", "cordon", "--reason", "wait"]).good();
    let id = rollout(&daemon, "start", "1.1", &["--detach"]).good()["rollout"]["id"].clone();
    let id = id.as_str().expect("an id");
    let of_guests = [
        "rollout", "start", "--to", "next", "--detach", "--notice", "0s",
    ];
    let (code, message) = daemon.ask(&of_guests).bad();
    assert_eq!(code, "rollout_in_progress");
    assert!(message.contains("with all its guests"), "{message}");
    let why = daemon.ask(&["rollout", "explain", "db-0"]).good()["why"].to_string();
    for said in [
        "VM db-0 stands still with all guests of its host for its kvm",
        "is cordoned",
    ] {
        assert!(why.contains(said), "{why}");
    }
    daemon.ask(&["rollout", "abort", id]).good();
    until("it is ended", || {
        daemon.ask(&["rollout", "show", id]).good()["rollout"]["state"] == "aborted"
    });
    daemon.ask(&of_guests).good();
    let (code, message) = rollout(&daemon, "start", "1.1", &[]).bad();
    assert_eq!(code, "rollout_in_progress", "{message}");
    assert_eq!(ran(&daemon), Vec::<String>::new());
}

#[test]
fn what_is_no_release_or_can_not_be_driven_is_refused_and_nothing_moves() {
    let daemon = alone();
    let empty = daemon.path().join("kvm/empty");
    folder(&empty);
    for (to, more, why) in [
        ("nowhere", &[][..], "`stillpointd --kvm-dir`"),
        ("empty", &[], "is not on"),
        (
            "1.1",
            &["--vm", "web-0"],
            "takes all guests of a host together",
        ),
        ("1.1", &["--host", "elsewhere"], "no host `elsewhere`"),
    ] {
        let (_, message) = rollout(&daemon, "start", to, more).bad();
        assert!(message.contains(why), "{message}");
    }
    for (component, why) in [
        ("kernel", "how long the guests of a host may stand still"),
        ("backend", "devices run inside the VMM"),
        ("kvm", "how long the guests of a host may stand still"),
    ] {
        let (_, message) = daemon
            .ask(&["rollout", "start", "--to", "1.1", "--component", component])
            .bad();
        assert!(message.contains(why), "{message}");
    }
    assert_eq!(daemon.ask(&["rollout", "ls"]).good(), serde_json::json!([]));
    assert_eq!(ran(&daemon), Vec::<String>::new());
}

/// Three hosts, each with one domain of each set; the driver is killed while another host is exchanged.
#[test]
fn hosts_of_a_fleet_go_one_domain_at_a_time_though_their_driver_dies() {
    needs_kvm_for_itself!();
    let server = needs_etcd!();
    let cluster = Cluster::start(&server, 1);
    let url = cluster.url();
    let start = |number: usize| {
        let (name, domain) = (format!("h{number}"), number.to_string());
        let daemon = host(&["--store", &url, "--host-name", &name]);
        guests(&daemon, &domain, &domain);
        release(&daemon, "1.1", "sleep 0.5");
        daemon
    };
    let mut daemons: Vec<Daemon> = (0..3).map(start).collect();
    let hosts = |daemon: &Daemon| {
        let hosts = daemon.ask(&["host", "ls"]).good();
        hosts.as_array().cloned().unwrap_or_default()
    };
    until("all hosts are heard, and have the release", || {
        let hosts = hosts(&daemons[0]);
        let has = |host: &Value| {
            host["alive"] == true && host["kvm"]["releases"] == serde_json::json!(["1.1"])
        };
        hosts.len() == 3 && hosts.iter().all(has)
    });
    let id = rollout(&daemons[0], "start", "1.1", &["--detach", "--at-once", "3"]).good();
    let id = id["rollout"]["id"].as_str().expect("an id").to_owned();
    let mut dead = None;
    until("a host is exchanged that does not drive", || {
        let driver = hosts(&daemons[0])
            .iter()
            .position(|host| host["drives"] == true);
        let begun = (0..3).find(|&at| !ran(&daemons[at]).is_empty() && Some(at) != driver);
        dead = driver.filter(|_| begun.is_some());
        dead.is_some()
    });
    let dead = dead.expect("a driver");
    daemons[dead].kill();
    daemons[dead].spawn();
    until("it is over", || {
        let said = daemons[(dead + 1) % 3].ask(&["rollout", "show", &id]);
        let state = said.out["rollout"]["state"]
            .as_str()
            .unwrap_or_default()
            .to_owned();
        said.ok && ["finished", "rolled_back", "stopped", "stuck"].contains(&state.as_str())
    });
    let shown = daemons[0].ask(&["rollout", "show", &id]).good();
    // By the time that it was killed its own host may have had its turn: then nobody knows how that ended.
    let was_hit = changes(&daemons[dead])
        .iter()
        .any(|swap| swap["ended"] == "unknown");
    if !was_hit {
        assert_eq!(shown["rollout"]["state"], "finished", "{shown}");
    }
    let mut spans: Vec<(u64, u64)> = Vec::new();
    for daemon in &daemons {
        let exchanged = ran(daemon)
            .iter()
            .filter(|line| line.starts_with("exchange"))
            .count();
        assert!(exchanged <= 1, "{:?}", ran(daemon));
        assert!(was_hit || exchanged == 1, "{:?}", ran(daemon));
        for swap in changes(daemon) {
            let at = |key: &str| swap[key].as_u64().expect("a time");
            spans.push((at("asked_at_unix_ns"), at("ended_at_unix_ns")));
        }
    }
    // All of one clock here: each host has another domain of both sets.
    spans.sort_unstable();
    assert!(
        spans.windows(2).all(|two| two[0].1 <= two[1].0),
        "two at once: {spans:?}"
    );
}
