//! Rollouts on one host, by a real daemon over toys: what is begun, in which order, and what never is.

mod daemon;

use std::process::Stdio;

use daemon::{Daemon, Said, until};
use serde_json::Value;

/// What makes a rollout quick here; the rules are the same.
const QUICK: [&str; 12] = [
    "--bake",
    "0s",
    "--well-for",
    "50ms",
    "--deadline",
    "20s",
    "--retry-after",
    "50ms",
    "--notice",
    "0s",
    "--at-once",
    "2",
];

/// A daemon with guests `web-0`, `web-1` and so on in a set of two update domains, on release `good`, and
/// with a release `next`.
fn with_set(guests: usize) -> Daemon {
    let daemon = Daemon::start();
    daemon.add("good", None);
    daemon.add("next", None);
    for number in 0..guests {
        let set = ["--set", "web", "--update-domains", "2"];
        daemon
            .run_with(&format!("web-{number}"), "good", &set)
            .good();
    }
    daemon
}

fn rollout(daemon: &Daemon, verb: &str, to: &str, more: &[&str]) -> Said {
    let mut args = vec!["rollout", verb, "--to", to];
    args.extend(QUICK);
    args.extend(["--per-host", "2", "--set-budget", "50%"]);
    args.extend(more);
    daemon.ask(&args)
}

fn swaps(daemon: &Daemon) -> Vec<Value> {
    let swaps = daemon.ask(&["report"]).good();
    swaps.as_array().cloned().unwrap_or_default()
}

fn releases(daemon: &Daemon) -> Vec<String> {
    let vms = daemon.ask(&["ls"]).good();
    let vms = vms.as_array().cloned().unwrap_or_default();
    let release = |vm: &Value| vm["release"].as_str().unwrap_or_default().to_owned();
    vms.iter().map(release).collect()
}

/// The shown rollout, of a `watch` that ended well or not.
fn ended(said: Said) -> Value {
    assert!(said.error.is_null(), "{}", said.error);
    said.out["rollout"].clone()
}

#[test]
fn a_rollout_goes_canary_first_and_one_update_domain_at_a_time() {
    let daemon = with_set(5);
    let planned = rollout(&daemon, "plan", "next", &[]).good();
    let units = planned["rollout"]["units"]
        .as_array()
        .expect("units")
        .clone();
    assert_eq!(units.len(), 5);
    assert_eq!(swaps(&daemon), Vec::<Value>::new(), "a plan begins nothing");

    let done = ended(rollout(&daemon, "start", "next", &[]));
    assert_eq!(done["state"], "finished", "{done}");
    assert_eq!(releases(&daemon), ["next"; 5]);
    // Each guest once, the canary alone, and two domains never at the same time.
    let swaps = swaps(&daemon);
    assert_eq!(swaps.len(), 5, "{swaps:#?}");
    let span = |swap: &Value| {
        let at = |key: &str| swap[key].as_u64().expect("a time");
        (at("asked_at_unix_ns"), at("ended_at_unix_ns"))
    };
    let domain = |swap: &Value| {
        let units = done["units"].as_array().expect("units").iter();
        let mut units = units.filter(|unit| unit["vm"] == swap["vm"]);
        units.next().map(|unit| unit["domain"].clone())
    };
    assert_eq!(swaps[0]["vm"], units[0]["vm"], "the canary is first");
    for (number, first) in swaps.iter().enumerate() {
        for second in &swaps[number + 1..] {
            let together = span(second).0 < span(first).1;
            assert!(
                !together || (number > 0 && domain(first) == domain(second)),
                "{first} and {second} at once"
            );
        }
    }
    let history = daemon.ask(&["rollout", "history"]).good().to_string();
    assert!(history.contains("it is a canary"), "{history}");
}

#[test]
fn hosts_have_labels_and_a_rollout_takes_those_that_have_all_it_asks_for() {
    let mut daemon = Daemon::prepare();
    daemon.more(&["--label", "class=big", "--label", "example.com/gpu="]);
    daemon.spawn();
    daemon.add("good", None);
    daemon.add("next", None);
    daemon.run("web", "good").good();
    let hosts = daemon.ask(&["host", "ls"]).good();
    let labels = serde_json::json!({ "class": "big", "example.com/gpu": "" });
    assert_eq!(hosts[0]["labels"], labels);
    let plan = |labels: &[&str]| rollout(&daemon, "plan", "next", labels);
    let planned = plan(&["--label", "class=big", "--label", "example.com/gpu="]).good();
    let units = planned["rollout"]["units"].as_array().map(Vec::len);
    assert_eq!(units, Some(1), "{planned}");
    let (code, message) = plan(&["--label", "class=big", "--label", "zone=x"]).bad();
    assert_eq!(code, "not_found");
    assert!(message.contains("class=big, zone=x"), "{message}");
    let mut wrong = Daemon::prepare();
    wrong.more(&["--label", "class=a", "--label", "class=b"]);
    assert!(wrong.refused().contains("the label `class` is given twice"));
}

#[test]
fn what_cannot_be_rolled_out_is_refused_and_nothing_moves() {
    let daemon = with_set(2);
    let bad = |to: &str, more: &[&str], why: &str| {
        let (_, message) = rollout(&daemon, "start", to, more).bad();
        assert!(message.contains(why), "{message}");
    };
    bad("nowhere", &[], "is not on");
    bad("good", &[], "run release good already");
    bad("next", &["--set", "db"], "set `db`");
    bad("next", &["--vm", "web-9"], "`web-9`");
    bad("next", &["--host", "elsewhere"], "no host `elsewhere`");
    bad(
        "next",
        &["--label", "class=big"],
        "no host has the labels class=big",
    );
    bad("next", &["--label", "a=1", "--label", "a=2"], "given twice");
    bad("next", &["--tries", "0"], "tries is 0");
    bad(
        "next",
        &["--window", "Sat 02:00 5s UTC"],
        "shorter than a swap may take",
    );
    bad("next", &["--window", "Someday 02:00 5h UTC"], "Someday");
    assert_eq!(
        daemon.ask(&["rollout", "ls"]).good(),
        serde_json::json!([]),
        "nothing is on record"
    );
    assert_eq!(swaps(&daemon), Vec::<Value>::new());
}

#[test]
fn two_rollouts_over_one_vm_a_cordon_and_a_pause_hold_what_they_say() {
    let daemon = with_set(2);
    let host = daemon.ask(&["host", "ls"]).good()[0].clone();
    assert_eq!((&host["alive"], &host["guests"]), (&true.into(), &2.into()));
    daemon
        .ask(&["host", "cordon", "--reason", "a new disk"])
        .good();
    let (code, message) = daemon.run("late", "good").bad();
    assert_eq!(code, "cordoned", "{message}");

    rollout(&daemon, "start", "next", &["--detach"]).good();
    let explained = || {
        let said = daemon.ask(&["rollout", "explain", "web-0"]).good();
        said["why"].as_str().unwrap_or_default().to_owned()
    };
    until("the cordon is the reason", || {
        explained().contains("is cordoned")
    });
    let (code, message) = rollout(&daemon, "start", "next", &[]).bad();
    assert_eq!(code, "rollout_in_progress", "{message}");

    daemon.ask(&["rollout", "pause"]).good();
    daemon.ask(&["host", "uncordon"]).good();
    until("the pause is the reason", || {
        let why = daemon.ask(&["rollout", "show"]).good()["whys"].to_string();
        why.matches("the rollout is paused").count() == 2
    });
    assert_eq!(
        swaps(&daemon),
        Vec::<Value>::new(),
        "held, so nothing began"
    );
    daemon.ask(&["rollout", "resume"]).good();
    let id = daemon.ask(&["rollout", "ls"]).good()[0]["id"].clone();
    let id = id.as_str().expect("an id");
    assert_eq!(
        ended(daemon.ask(&["rollout", "watch", id]))["state"],
        "finished"
    );
    assert_eq!(releases(&daemon), ["next"; 2]);
}

#[test]
fn a_release_beyond_a_limit_stops_within_its_canary_and_is_put_back() {
    let daemon = with_set(4);
    // The toy's blackout is 10 µs.
    let over = ended(rollout(
        &daemon,
        "start",
        "next",
        &["--max-blackout", "9us"],
    ));
    assert_eq!(over["state"], "rolled_back", "{over}");
    assert_eq!(releases(&daemon), ["good"; 4]);
    let touched: Vec<Value> = swaps(&daemon)
        .iter()
        .map(|swap| swap["vm"].clone())
        .collect();
    assert_eq!(
        touched.len(),
        2,
        "there and back, of one guest: {touched:?}"
    );
    assert_eq!(touched[0], touched[1]);
    let history = daemon.ask(&["rollout", "history"]).good().to_string();
    assert!(history.contains("beyond the limit"), "{history}");
}

#[test]
fn a_release_that_never_comes_up_is_tried_as_often_as_it_may_be_and_no_more() {
    let daemon = with_set(3);
    daemon.add("broken", Some("crash-on-offer"));
    let over = ended(rollout(&daemon, "start", "broken", &["--tries", "2"]));
    assert_eq!(over["state"], "rolled_back", "{over}");
    let swaps = swaps(&daemon);
    assert_eq!(swaps.len(), 2, "two tries of one guest: {swaps:#?}");
    assert!(swaps.iter().all(|swap| swap["state"] == "kept"));
    assert_eq!(releases(&daemon), ["good"; 3]);
}

/// The driver and its host die again and again, at moments that a seed says.
#[test]
fn a_daemon_that_dies_in_the_middle_does_no_step_twice() {
    let seed = std::env::var("STILLPOINT_SEED").ok();
    let seed = seed.map_or(7, |seed| seed.parse().expect("a number"));
    let mut random = fastrand::Rng::with_seed(seed);
    let mut daemon = with_set(6);
    rollout(&daemon, "start", "next", &["--detach"]).good();
    for _ in 0..5 {
        std::thread::sleep(std::time::Duration::from_millis(random.u64(20..300)));
        daemon.kill();
        daemon.spawn();
    }
    let id = daemon.ask(&["rollout", "ls"]).good()[0]["id"].clone();
    let mut watch = daemon.cli(&["rollout", "watch", id.as_str().expect("an id")]);
    let output = watch.stderr(Stdio::inherit()).output().expect("watch");
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "seed {seed}: {text}");
    let mut vms: Vec<String> = swaps(&daemon)
        .iter()
        .filter(|swap| swap["state"] == "moved")
        .map(|swap| swap["vm"].as_str().unwrap_or_default().to_owned())
        .collect();
    vms.sort();
    let each: Vec<String> = (0..6).map(|number| format!("web-{number}")).collect();
    assert_eq!(vms, each, "seed {seed}: each guest moved once");
}

#[test]
fn pages_of_the_fleet_and_figures_are_served_by_tcp() {
    let daemon = Daemon::start_with(&["--web", "127.0.0.1:0"]);
    daemon.add("good", None);
    daemon.add("next", None);
    daemon.run("web", "good").good();
    assert_eq!(daemon.swap("web", "next")["state"], "moved");
    let said = daemon.ask(&["page"]).good();
    let url = said["url"].as_str().expect("an address").to_owned();
    let (site, key) = url.split_once("/?key=").expect("a key");
    let at = site.strip_prefix("http://").expect("http");
    let get = |path: &str| {
        use std::io::{Read, Write};
        let mut stream = std::net::TcpStream::connect(at).expect("connect");
        write!(
            stream,
            "GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nCookie: stillpoint={key}\r\n\r\n"
        )
        .expect("ask");
        let mut text = String::new();
        stream.read_to_string(&mut text).expect("an answer");
        text
    };
    let told = get("/metrics");
    for line in [
        "stillpoint_swaps_total{component=\"vmm\",outcome=\"moved\"} 1",
        "stillpoint_blackout_seconds_count 1",
        // The toy's blackout is 10 µs.
        "stillpoint_blackout_seconds_bucket{le=\"0.0005\"} 1",
        "stillpoint_guests{state=\"running\"} 1",
        "stillpoint_fleet_store_up 1",
        "stillpoint_drives 1",
    ] {
        assert!(told.lines().any(|found| found == line), "{line} in\n{told}");
    }
    for path in ["/v1/vms", "/openapi.json", "/v1/rollouts", "/rollouts/none"] {
        assert!(get(path).starts_with("HTTP/1.1 404"), "{path}");
    }
    // Without a script the page has the facts all the same.
    rollout(&daemon, "start", "good", &[]).good();
    let page = get("/fleet");
    for fact in [
        "<strong>web</strong>",
        "release good",
        "heard",
        "finished",
        "1 of 1",
    ] {
        assert!(page.contains(fact), "{fact} in\n{page}");
    }
    let id = daemon.ask(&["rollout", "ls"]).good()[0]["id"].clone();
    let page = get(&format!("/rollouts/{}", id.as_str().expect("an id")));
    for fact in [
        "1 blackouts, the longest 10 µs",
        "it is a canary",
        "is done",
    ] {
        assert!(page.contains(fact), "{fact} in\n{page}");
    }
}
