//! What is said of a swap before it is begun: by `swap --check`, by each swap before its freeze, and
//! of a guest when it starts.

use anyhow::{Context, ensure};
use serde_json::Value;
use stillpoint_tests::daemon::Answer;
use stillpoint_tests::guarded::{GUEST, Host};
use stillpoint_tests::needs_kvm;

fn check<'v>(answer: &'v Answer, name: &str) -> anyhow::Result<&'v Value> {
    let checks = answer.json["checks"].as_array().context("checks")?;
    let found = checks.iter().find(|check| check["check"] == name);
    found.with_context(|| format!("no check `{name}` in {:#}{}", answer.json, answer.error))
}

#[test]
fn a_check_says_what_it_found_and_changes_nothing() -> anyhow::Result<()> {
    needs_kvm!();
    let host = Host::start(&[])?;
    let pid = host.daemon.vmm_pid(GUEST)?;
    let answer = host.swap("next", &["--check"])?;
    ensure!(
        answer.success && answer.json["would_work"] == true,
        "{:#}{}",
        answer.json,
        answer.error
    );
    for name in [
        "release",
        "memory",
        "descriptors",
        "tasks",
        "signs of life",
        "machine",
        "state",
        "likeness",
        "blackout",
    ] {
        let found = check(&answer, name)?;
        ensure!(found["status"] != "fail", "{found:#}");
        ensure!(
            !found["found"].as_str().unwrap_or_default().is_empty(),
            "{found:#}"
        );
    }
    let peek = answer.json["peek_ns"].as_u64().context("a peek")?;
    ensure!(peek > 0, "{:#}", answer.json);
    // The pause has its event, and its length.
    let events = host.daemon.must(&["events", "ls", "--all"])?;
    let events = events.as_array().context("events")?;
    let event = events
        .iter()
        .find(|event| event["swap"] == answer.json["id"]);
    let event = event.context("the peek's event")?;
    ensure!(event["state"] == "over", "{event:#}");
    ensure!(event["measured"]["pause_ns"] == peek, "{event:#}");
    ensure!(host.swaps()?.is_empty() && host.daemon.vmm_pid(GUEST)? == pid);
    host.is_whole()?;
    host.end()
}

#[test]
fn without_a_peek_the_guest_runs_on() -> anyhow::Result<()> {
    needs_kvm!();
    let host = Host::start(&[])?;
    let answer = host.swap("next", &["--check", "--no-peek"])?;
    ensure!(
        answer.success && answer.json["peek_ns"] == 0,
        "{:#}",
        answer.json
    );
    ensure!(check(&answer, "machine")?["status"] == "ok");
    ensure!(check(&answer, "state")?["status"] == "warn");
    let events = host.daemon.must(&["events", "ls", "--all"])?;
    ensure!(events.as_array().is_some_and(Vec::is_empty), "{events:#}");
    host.end()
}

/// A release that would fail after the freeze is refused before it, with what is wrong by name; and
/// without the rehearsal it is not.
#[test]
fn a_release_that_would_fail_after_the_freeze_is_refused_before_it() -> anyhow::Result<()> {
    needs_kvm!();
    let host = Host::start(&[("refuses", "spoil=load"), ("changes", "spoil=state")])?;
    let answer = host.swap("refuses", &["--check"])?;
    ensure!(
        !answer.success && answer.json["would_work"] == false,
        "{:#}",
        answer.json
    );
    let state = check(&answer, "state")?;
    ensure!(state["status"] == "fail", "{state:#}");
    ensure!(
        state["found"].to_string().contains("section vcpu"),
        "{state:#}"
    );
    ensure!(
        !state["remedy"].as_str().unwrap_or_default().is_empty(),
        "{state:#}"
    );
    let answer = host.swap("changes", &["--check"])?;
    let likeness = check(&answer, "likeness")?;
    ensure!(
        !answer.success && likeness["status"] == "fail",
        "{likeness:#}"
    );
    ensure!(
        likeness["found"].to_string().contains("probe: scratch"),
        "{likeness:#}"
    );

    let pid = host.daemon.vmm_pid(GUEST)?;
    for bad in ["refuses", "changes"] {
        let answer = host.swap(bad, &[])?;
        let swap = &answer.json;
        ensure!(!answer.success && swap["state"] == "kept", "{swap:#}");
        let reason = swap["reason"].to_string();
        ensure!(reason.contains("rehearsal"), "{reason}");
        // No freeze but the peek, which is told of.
        ensure!(swap["report"]["blackout"]["host_ns"] == 0, "{swap:#}");
        ensure!(swap["successor"].is_null(), "{swap:#}");
        let told = &swap["safeguards"]["rehearsal"]["told"];
        ensure!(
            told["peek_ns"].as_u64().is_some_and(|ns| ns > 0),
            "{swap:#}"
        );
        host.is_whole()?;
    }
    let answer = host.swap("refuses", &["--no-rehearsal"])?;
    ensure!(answer.json["state"] == "kept", "{:#}", answer.json);
    let blackout = answer.json["report"]["blackout"]["host_ns"].as_u64();
    ensure!(
        blackout.is_some_and(|ns| ns > 0),
        "the guest was frozen: {:#}",
        answer.json
    );
    ensure!(host.daemon.vmm_pid(GUEST)? == pid && host.runs()? == "good");
    let answer = host.swap("next", &[])?;
    ensure!(answer.success, "{:#}{}", answer.json, answer.error);
    let told = &answer.json["safeguards"]["rehearsal"]["told"];
    ensure!(told["verdict"] == "passed", "{:#}", answer.json);
    host.is_whole()?;
    host.end()
}

#[test]
fn what_limits_a_guests_swaps_is_said_when_it_starts() -> anyhow::Result<()> {
    needs_kvm!();
    let host = Host::start(&[])?;
    let bad = |of: &Value| -> Vec<String> {
        let found = of["updatable"].as_array().cloned().unwrap_or_default();
        let bad = found.into_iter().filter(|check| check["status"] != "ok");
        bad.map(|check| check["check"].as_str().unwrap_or_default().to_owned())
            .collect()
    };
    let shown = host.daemon.must(&["show", GUEST])?;
    ensure!(!bad(&shown).contains(&"budget".to_owned()), "{shown:#}");
    let kernel = stillpoint_tests::releases::pulse()?.display().to_string();
    let run = [
        "run", "tight", "--kernel", &kernel, "--memory", "64M", "--budget", "1ms", "--watch", "0s",
    ];
    let started = host.daemon.must(&run)?;
    for limit in ["budget", "watch"] {
        ensure!(bad(&started).contains(&limit.to_owned()), "{started:#}");
    }
    let shown = host.daemon.must(&["show", "tight"])?;
    ensure!(bad(&shown) == bad(&started), "{shown:#}");
    let said = host.daemon.command(&["show", "tight"]).output()?;
    let said = String::from_utf8_lossy(&said.stdout).into_owned();
    ensure!(said.contains("its swaps are limited: budget"), "{said}");
    host.daemon.must(&["stop", "--now", "tight"])?;
    host.end()
}
