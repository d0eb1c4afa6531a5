//! After give-up: a guest that isn't well after its swap is swapped back by itself, from state that is
//! saved anew; once, and with its event; and a guest that is well is left alone.

use anyhow::{Context, ensure};
use serde_json::Value;
use stillpoint_tests::daemon::Answer;
use stillpoint_tests::guarded::Host;
use stillpoint_tests::needs_kvm;

fn health(swap: &Value) -> &Value {
    &swap["safeguards"]["health"]
}

/// The swap moved, what is wrong was said, and it was put back by one more swap, whole.
fn put_back(host: &Host, answer: &Answer, problem: &str) -> anyhow::Result<()> {
    let swap = &answer.json;
    ensure!(!answer.success, "said to be good: {swap:#}");
    ensure!(swap["state"] == "moved", "{swap:#}");
    ensure!(health(swap)["state"] == "unwell", "{swap:#}");
    let said = health(swap)["problems"].to_string();
    ensure!(said.contains(problem), "{said}");
    let back = &swap["put_back"];
    ensure!(back["state"] == "moved", "{back:#}");
    ensure!(back["safeguards"]["way_back_of"] == swap["id"], "{back:#}");
    ensure!(back["to"]["version"] == "good", "{back:#}");
    // One state, saved anew: for nothing but this swap, and once.
    ensure!(back["safeguards"]["rehearsal"].is_null(), "{back:#}");
    let phases = back["report"]["phases"].as_array().context("phases")?;
    let saves = phases
        .iter()
        .filter(|phase| phase["name"] == "save")
        .count();
    ensure!(saves == 1, "{phases:#?}");
    ensure!(host.runs()? == "good");
    host.is_whole()?;
    no_pause_without_its_event(host, swap, problem)
}

/// Both pauses have their events; the second says why it gave no notice.
fn no_pause_without_its_event(host: &Host, swap: &Value, problem: &str) -> anyhow::Result<()> {
    let events = host.daemon.must(&["events", "ls", "--all"])?;
    let events = events.as_array().context("events")?;
    let of = |id: &Value| events.iter().find(|event| event["swap"] == *id);
    let first = of(&swap["id"]).context("the swap's event")?;
    let second = of(&swap["put_back"]["id"]).context("the way back's event")?;
    ensure!(first["no_notice"].is_null(), "{first:#}");
    let reason = second["no_notice"].as_str().context("a reason")?;
    ensure!(
        reason.contains("the way back of swap") && reason.contains(problem),
        "{reason}"
    );
    for event in [first, second] {
        ensure!(event["started_at_unix_ns"].is_u64(), "{event:#}");
        ensure!(event["measured"]["pause_ns"].is_u64(), "{event:#}");
    }
    Ok(())
}

#[test]
fn a_guest_that_stands_still_is_put_back() -> anyhow::Result<()> {
    needs_kvm!();
    let host = Host::start(&[("frozen", "spoil=vcpu")])?;
    let answer = host.swap("frozen", &[])?;
    put_back(&host, &answer, "makes no progress")?;
    let said = health(&answer.json)["problems"].to_string();
    ensure!(said.contains("lost its heartbeat"), "{said}");
    ensure!(host.swaps()?.len() == 2);
    host.end()
}

#[test]
fn a_guest_whose_queue_stands_still_is_put_back() -> anyhow::Result<()> {
    needs_kvm!();
    let host = Host::start(&[("deaf", "spoil=queue")])?;
    let answer = host.swap("deaf", &[])?;
    put_back(&host, &answer, "queue 0 of disk0 stands still")?;
    ensure!(host.swaps()?.len() == 2);
    host.end()
}

#[test]
fn a_guest_whose_clock_is_spoilt_is_put_back() -> anyhow::Result<()> {
    needs_kvm!();
    let host = Host::start(&[("late", "spoil=clock")])?;
    let answer = host.swap("late", &[])?;
    put_back(&host, &answer, "clock is off by")?;
    ensure!(host.swaps()?.len() == 2);
    host.end()
}

/// The control: the same guest, the same watch, a release that is good.
#[test]
fn a_guest_that_is_well_is_left_alone() -> anyhow::Result<()> {
    needs_kvm!();
    let host = Host::start(&[])?;
    let answer = host.swap("next", &["--watch", "7s"])?;
    ensure!(answer.success, "{:#}{}", answer.json, answer.error);
    let state = &health(&answer.json)["state"];
    ensure!(state == "well_so_far" || state == "well", "{state}");
    let id = &answer.json["id"];
    // Longer than anything may stand still.
    let swap = host.wait_record("the watch's end", id, |swap| {
        health(swap)["state"] != "well_so_far"
    })?;
    ensure!(health(&swap)["state"] == "well", "{swap:#}");
    ensure!(swap["safeguards"]["before"]["beats"] == true, "{swap:#}");
    how_soon_it_was_as_fast_is_on_record(&swap)?;
    ensure!(host.swaps()?.len() == 1 && host.runs()? == "next");
    host.is_whole()?;
    host.end()
}

/// The daemon has it from the watch; of the devices, too, that were busy enough then to be judged.
fn how_soon_it_was_as_fast_is_on_record(swap: &Value) -> anyhow::Result<()> {
    let recovery = swap["report"]["recovery"].as_array().context("recovery")?;
    let guest = recovery.iter().find(|one| one["of"] == "guest");
    let guest = guest.with_context(|| format!("of the guest itself: {recovery:#?}"))?;
    ensure!(guest["before_per_s"].as_u64() > Some(0), "{guest:#}");
    for one in recovery {
        let known = ["guest", "disk0", "net0", "vsock", "rng"];
        ensure!(known.iter().any(|name| one["of"] == *name), "{one:#}");
        ensure!(one["watched_ns"].as_u64() > Some(0), "{one:#}");
    }
    Ok(())
}

#[test]
fn an_operator_can_switch_the_way_back_off() -> anyhow::Result<()> {
    needs_kvm!();
    let host = Host::start(&[("late", "spoil=clock")])?;
    let answer = host.swap("late", &["--no-way-back"])?;
    ensure!(!answer.success && health(&answer.json)["state"] == "unwell");
    let remedy = health(&answer.json)["remedy"]
        .as_str()
        .context("a remedy")?;
    ensure!(
        remedy.contains("stillpoint swap vmm web-1 --to good"),
        "{remedy}"
    );
    ensure!(host.swaps()?.len() == 1 && host.runs()? == "late");
    let answer = host.swap("good", &[])?;
    ensure!(answer.success, "{:#}", answer.json);
    host.is_whole()?;
    // Not watched is not judged.
    let answer = host.swap("late", &["--watch", "0s"])?;
    ensure!(
        answer.success && health(&answer.json).is_null(),
        "{:#}",
        answer.json
    );
    host.end()
}

#[test]
fn a_way_back_that_fails_leaves_the_guest_where_it_is() -> anyhow::Result<()> {
    needs_kvm!();
    let host = Host::start(&[("keeps", "spoil=clock,frozen=fail")])?;
    let answer = host.swap("keeps", &[])?;
    ensure!(!answer.success, "{:#}", answer.json);
    let back = &answer.json["put_back"];
    ensure!(back["state"] == "kept", "{back:#}");
    let swap = host.wait_record("what to do", &answer.json["id"], |swap| {
        health(swap)["remedy"]
            .to_string()
            .contains("came to nothing")
    })?;
    let remedy = health(&swap)["remedy"].as_str().context("a remedy")?;
    ensure!(
        remedy.contains("stillpoint swap vmm web-1 --to good"),
        "{remedy}"
    );
    ensure!(host.swaps()?.len() == 2, "tried once: {:#?}", host.swaps()?);
    ensure!(host.runs()? == "keeps");
    host.is_whole()?;
    host.end()
}

/// The watch, and what comes of it, outlive the daemon.
#[test]
fn a_daemon_that_dies_in_the_watch_goes_on_with_it() -> anyhow::Result<()> {
    needs_kvm!();
    let mut host = Host::start(&[("frozen", "spoil=vcpu")])?;
    let mut asked = host
        .daemon
        .command(&["swap", "vmm", "web-1", "--to", "frozen", "--budget", "20s"])
        .stdout(std::process::Stdio::null())
        .stderr(std::process::Stdio::null())
        .spawn()?;
    let watched = stillpoint_tests::patience::wait_for(
        "the watch",
        stillpoint_tests::patience::PATIENCE,
        || {
            let swaps = host.swaps()?;
            let first = swaps.into_iter().next();
            Ok(first.filter(|swap| health(swap)["state"] == "watching"))
        },
    )?;
    host.daemon.kill()?;
    host.daemon.restart()?;
    let swap = host.wait_record("the way back", &watched["id"], |swap| {
        swap["put_back"]["state"] == "moved"
    })?;
    ensure!(health(&swap)["state"] == "unwell", "{swap:#}");
    ensure!(host.swaps()?.len() == 2 && host.runs()? == "good");
    host.is_whole()?;
    let _ = asked.wait();
    host.end()
}
