//! What guests hear of their swaps, and what they say to it. The guests ask by their vsock, as the
//! daemon serves it.

mod daemon;

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::process::{Child, Stdio};

use daemon::{Daemon, until};
use serde_json::{Value, json};

const EVENTS: &str = "/metadata/scheduledevents?api-version=2020-07-01";

fn with_guests(guests: &[(&str, &[&str])]) -> Daemon {
    let daemon = Daemon::start();
    daemon.add("good", None);
    daemon.add("next", None);
    for (name, more) in guests {
        let more: Vec<&str> = more.iter().copied().chain(["--vsock"]).collect();
        daemon.run_with(name, "good", &more).good();
    }
    daemon
}

/// What a guest is answered: status, ETag, body.
fn request(daemon: &Daemon, guest: &str, method: &str, path: &str, body: &str) -> (u16, Value) {
    let socket = daemon.path().join(format!("run/vms/{guest}/vsock.sock_80"));
    let mut answer = String::new();
    // More than five in a second, or a daemon that just starts: asked again.
    until("an answer to the guest", || {
        answer.clear();
        let Ok(mut stream) = UnixStream::connect(&socket) else {
            return false;
        };
        let length = body.len();
        let request = format!(
            "{method} {path} HTTP/1.1\r\nMetadata: true\r\nConnection: close\r\nContent-Length: \
             {length}\r\n\r\n{body}"
        );
        let said = stream.write_all(request.as_bytes());
        let heard = stream.read_to_string(&mut answer);
        said.is_ok() && heard.is_ok() && !answer.is_empty() && !answer.contains(" 429 ")
    });
    let (head, body) = answer.split_once("\r\n\r\n").expect("an answer");
    let status = head.split(' ').nth(1).expect("a status");
    let body = serde_json::from_str(body).unwrap_or(Value::Null);
    (status.parse().expect("a number"), body)
}

fn events(daemon: &Daemon, guest: &str) -> Value {
    let (status, body) = request(daemon, guest, "GET", EVENTS, "");
    assert_eq!(status, 200, "{body}");
    body
}

fn approve(daemon: &Daemon, guest: &str, event: &Value) -> u16 {
    let body = json!({ "StartRequests": [{ "EventId": event }] });
    request(daemon, guest, "POST", EVENTS, &body.to_string()).0
}

fn swap(daemon: &Daemon, guest: &str, more: &[&str]) -> Child {
    let mut command = daemon.cli(&["swap", "vmm", guest, "--to", "next"]);
    command.args(more);
    command.stdout(Stdio::piped()).stderr(Stdio::null());
    command.spawn().expect("stillpoint")
}

fn ended(child: Child) -> Value {
    let output = child.wait_with_output().expect("stillpoint");
    serde_json::from_slice(&output.stdout).expect("a swap")
}

/// Waits for a document with one event of this status.
fn until_event(daemon: &Daemon, guest: &str, status: &str) -> Value {
    let mut document = Value::Null;
    until(&format!("{guest} sees {status}"), || {
        document = events(daemon, guest);
        document["Events"][0]["EventStatus"] == status
    });
    document
}

fn until_gone(daemon: &Daemon, guest: &str) -> Value {
    let mut document = Value::Null;
    until(&format!("{guest} sees nothing"), || {
        document = events(daemon, guest);
        document["Events"] == json!([])
    });
    document
}

#[test]
fn a_guest_hears_of_its_swap_and_says_when() {
    let daemon = with_guests(&[("web", &[])]);
    assert_eq!(
        events(&daemon, "web"),
        json!({ "DocumentIncarnation": 1, "Events": [] })
    );
    let pid = daemon.vmm_pid("web");
    let swap = swap(&daemon, "web", &[]);
    let scheduled = until_event(&daemon, "web", "Scheduled");
    assert_eq!(scheduled["DocumentIncarnation"], 2);
    let event = &scheduled["Events"][0];
    assert_eq!(event["Resources"], json!(["web"]));
    assert_eq!(event["DurationInSeconds"], 1);
    assert_ne!(event["NotBefore"], "");
    assert_eq!(daemon.vmm_pid("web"), pid, "nothing happens meanwhile");
    assert_eq!(approve(&daemon, "web", &event["EventId"]), 200);
    let started = until_event(&daemon, "web", "Started");
    assert_eq!(started["DocumentIncarnation"], 3);
    assert_eq!(started["Events"][0]["EventId"], event["EventId"]);
    let swap = ended(swap);
    assert_eq!(swap["state"], "moved");
    assert_ne!(daemon.vmm_pid("web"), pid);
    assert_eq!(until_gone(&daemon, "web")["DocumentIncarnation"], 4);
    // It stayed for a moment after the pause, for those who look once a second.
    let pause = &daemon.ask(&["events", "ls", "--all"]).good()[0];
    let at = |of: &Value| of["ended_at_unix_ns"].as_u64().expect("its end");
    assert!(at(pause) >= at(&swap) + 2_000_000_000, "{pause} {swap}");
    let (_, receipt) = request(&daemon, "web", "GET", "/stillpoint/v1/pauses", "");
    let pause = &receipt["pauses"][0];
    assert_eq!(
        (&pause["state"], &pause["outcome"]),
        (&json!("over"), &json!("moved"))
    );
    assert_eq!(
        (&pause["pause_ns"], &pause["approved"]),
        (&json!(10_000), &json!(true))
    );
    // Approved once more when all is over: no error, and nothing happens.
    assert_eq!(approve(&daemon, "web", &event["EventId"]), 200);
}

/// Who looks every few seconds sees it too: it stays until it was seen after the pause.
#[test]
fn an_event_stays_until_it_was_seen() {
    let daemon = with_guests(&[("web", &[])]);
    events(&daemon, "web");
    let child = swap(&daemon, "web", &[]);
    let scheduled = until_event(&daemon, "web", "Scheduled");
    let event = scheduled["Events"][0]["EventId"].as_str().expect("an id");
    daemon.ask(&["events", "approve", event]).good();
    assert_eq!(ended(child)["state"], "moved");
    // Longer than for those who look each second.
    std::thread::sleep(std::time::Duration::from_secs(4));
    let (_, started) = request(&daemon, "web", "GET", EVENTS, "");
    assert_eq!(started["Events"][0]["EventStatus"], "Started", "{started}");
    until_gone(&daemon, "web");
}

#[test]
fn whom_nobody_would_hear_is_not_waited_for() {
    let daemon = with_guests(&[("web", &[])]);
    assert_eq!(daemon.swap("web", "next")["state"], "moved");
    let pauses = daemon.ask(&["events", "ls", "--all"]).good();
    assert_eq!(
        pauses[0]["state"], "over",
        "its event was there all the same: {pauses}"
    );
    assert_eq!(pauses[0]["measured"]["pause_ns"], 10_000);
}

#[test]
fn a_notice_ends_by_itself() {
    let daemon = with_guests(&[("web", &[])]);
    let asked = std::time::Instant::now();
    // Asked for: given also where nobody listens.
    let swap = ended(swap(&daemon, "web", &["--notice", "2s"]));
    assert_eq!(swap["state"], "moved", "{swap}");
    assert!(asked.elapsed().as_secs_f64() >= 2.0);
    let pause = &daemon.ask(&["events", "ls", "--all"]).good()[0];
    let started = pause["started_at_unix_ns"].as_u64().expect("started");
    let not_before = pause["not_before_unix_s"].as_u64().expect("a time");
    assert!(started >= not_before * 1_000_000_000, "{pause}");
    assert!(pause["notices"][0]["approval"].is_null(), "{pause}");
}

#[test]
fn a_daemon_that_starts_anew_goes_on_where_the_last_one_was() {
    let mut daemon = with_guests(&[("web", &[])]);
    events(&daemon, "web");
    let child = swap(&daemon, "web", &["--notice", "1h"]);
    let scheduled = until_event(&daemon, "web", "Scheduled");
    daemon.kill();
    daemon.spawn();
    assert_eq!(
        events(&daemon, "web"),
        scheduled,
        "same id, state, time and incarnation"
    );
    assert_eq!(
        approve(&daemon, "web", &scheduled["Events"][0]["EventId"]),
        200
    );
    assert_eq!(ended(child)["state"], "moved");
    until_gone(&daemon, "web");
}

#[test]
fn a_daemon_killed_in_the_pause_still_shows_that_it_started() {
    let mut daemon = with_guests(&[]);
    daemon.add("slow", Some("slow"));
    daemon.run_with("web", "slow", &["--vsock"]).good();
    events(&daemon, "web");
    let child = swap(&daemon, "web", &["--notice", "1h"]);
    let scheduled = until_event(&daemon, "web", "Scheduled");
    let event = &scheduled["Events"][0]["EventId"];
    assert_eq!(approve(&daemon, "web", event), 200);
    until("the handover is on its way", || {
        daemon.log().contains("phase=\"adopt\"")
    });
    daemon.kill();
    daemon.spawn();
    let started = events(&daemon, "web");
    assert_eq!(started["DocumentIncarnation"], 3, "{started}");
    assert_eq!(started["Events"][0]["EventStatus"], "Started");
    assert_eq!(&started["Events"][0]["EventId"], event);
    assert_eq!(ended(child)["state"], "moved");
    assert_eq!(until_gone(&daemon, "web")["DocumentIncarnation"], 4);
    let pause = &daemon.ask(&["events", "ls", "--all"]).good()[0];
    assert!(
        pause["notices"][0]["approval"]["by"]["vm"] == "web",
        "{pause}"
    );
}

#[test]
fn an_operator_cancels_and_nothing_happens() {
    let daemon = with_guests(&[("web", &[])]);
    events(&daemon, "web");
    let pid = daemon.vmm_pid("web");
    let child = swap(&daemon, "web", &[]);
    let scheduled = until_event(&daemon, "web", "Scheduled");
    let event = scheduled["Events"][0]["EventId"].as_str().expect("an id");
    daemon
        .ask(&["events", "cancel", event, "--reason", "market day"])
        .good();
    assert_eq!(
        events(&daemon, "web"),
        json!({ "DocumentIncarnation": 3, "Events": [] })
    );
    let swap = ended(child);
    assert_eq!(swap["state"], "kept", "{swap}");
    assert!(
        swap["reason"].as_str().expect("why").contains("market day"),
        "{swap}"
    );
    assert_eq!(daemon.vmm_pid("web"), pid);
    let (code, _) = daemon.ask(&["events", "cancel", event]).bad();
    assert_eq!(code, "too_late");
    let (code, message) = daemon.ask(&["events", "approve", "nothing"]).bad();
    assert_eq!(code, "not_found", "{message}");
    let again = [
        "swap",
        "vmm",
        "web",
        "--to",
        "next",
        "--no-notice",
        "a test",
    ];
    assert_eq!(daemon.ask(&again).good()["state"], "moved");
}

#[test]
fn an_operator_says_go_or_gives_no_notice_with_a_reason() {
    let daemon = with_guests(&[("web", &[])]);
    events(&daemon, "web");
    let child = swap(&daemon, "web", &[]);
    let scheduled = until_event(&daemon, "web", "Scheduled");
    let event = scheduled["Events"][0]["EventId"].as_str().expect("an id");
    daemon.ask(&["events", "approve", event]).good();
    assert_eq!(ended(child)["state"], "moved");
    let without = [
        "swap",
        "vmm",
        "web",
        "--to",
        "good",
        "--no-notice",
        "a hole in the VMM",
    ];
    let swap = daemon.ask(&without).good();
    assert_eq!(
        (&swap["state"], &swap["no_notice"]),
        (&json!("moved"), &json!("a hole in the VMM"))
    );
    let pauses = daemon.ask(&["events", "ls", "--all"]).good();
    assert_eq!(pauses[1]["no_notice"], "a hole in the VMM");
    assert_eq!(pauses[0]["notices"][0]["approval"]["by"], "operator");
    for bad in [
        ["--notice", "0s"],
        ["--no-notice", " "],
        ["--notice", "9999h"],
    ] {
        let mut args = vec!["swap", "vmm", "web", "--to", "next"];
        args.extend(bad);
        let (code, message) = daemon.ask(&args).bad();
        assert_eq!(code, "bad_request", "{bad:?}: {message}");
    }
}

#[test]
fn a_set_hears_and_decides_together_and_others_hear_nothing() {
    let set: &[&str] = &["--set", "web", "--notice", "2h"];
    let daemon = with_guests(&[("web-1", set), ("web-2", set), ("db", &[])]);
    events(&daemon, "web-2");
    events(&daemon, "db");
    // web-1 itself never asked: another of its set listens.
    let child = swap(&daemon, "web-1", &[]);
    let scheduled = until_event(&daemon, "web-2", "Scheduled");
    let event = &scheduled["Events"][0];
    assert_eq!(event["Resources"], json!(["web-1"]));
    assert_eq!(events(&daemon, "db")["Events"], json!([]));
    assert_eq!(approve(&daemon, "db", &event["EventId"]), 400);
    assert_eq!(
        daemon.ask(&["events", "ls"]).good()[0]["state"],
        "scheduled"
    );
    let lower = event["EventId"].as_str().expect("an id").to_lowercase();
    assert_eq!(approve(&daemon, "web-2", &lower.into()), 200);
    assert_eq!(ended(child)["state"], "moved");
    let (_, receipt) = request(&daemon, "db", "GET", "/stillpoint/v1/pauses", "");
    assert_eq!(receipt, json!({ "pauses": [] }));
    let path = "/metadata/instance/compute?api-version=2021-12-13";
    let (_, compute) = request(&daemon, "web-1", "GET", path, "");
    assert_eq!(compute["placementGroupId"], "web");
}

#[test]
fn a_guest_that_ends_takes_its_event_and_its_way_with_it() {
    let daemon = with_guests(&[("web", &[])]);
    events(&daemon, "web");
    let child = swap(&daemon, "web", &[]);
    until_event(&daemon, "web", "Scheduled");
    daemon.ask(&["stop", "web", "--now"]).good();
    assert_eq!(ended(child)["state"], "kept");
    let pauses = daemon.ask(&["events", "ls", "--all"]).good();
    assert_eq!(pauses[0]["state"], "cancelled", "{pauses}");
    let socket = daemon.path().join("run/vms/web/vsock.sock_80");
    until("its way is gone", || !socket.exists());
}

#[test]
fn a_guest_that_listens_is_not_peeked_at_without_a_word() {
    let daemon = with_guests(&[("web", &[]), ("deaf", &[])]);
    let pauses = || daemon.ask(&["events", "ls", "--all"]).good();
    let check = |guest, more: &[&str]| {
        let line = ["swap", "vmm", guest, "--to", "next", "--check"];
        let line: Vec<&str> = line.iter().chain(more).copied().collect();
        daemon.ask(&line).good()
    };
    // Nobody listens: it starts at once, and is on record.
    let look = check("deaf", &[]);
    assert_eq!(pauses()[0]["swap"], look["id"]);
    assert_eq!(pauses()[0]["state"], "over");
    check("deaf", &["--no-peek"]);
    assert_eq!(
        pauses().as_array().map(Vec::len),
        Some(1),
        "no pause, no event"
    );
    let before = events(&daemon, "web")["DocumentIncarnation"].clone();
    check("web", &[]);
    assert_eq!(pauses().as_array().map(Vec::len), Some(1), "left alone");
    assert_eq!(events(&daemon, "web")["DocumentIncarnation"], before);
    let look = check("web", &["--no-notice", "patch night"]);
    let all = pauses();
    let all = all.as_array().expect("pauses");
    let pause = all.iter().find(|pause| pause["swap"] == look["id"]);
    let pause = pause.expect("the peek's event");
    assert_eq!(pause["no_notice"], "patch night");
    assert_eq!(pause["state"], "over");
    until_gone(&daemon, "web");
}
