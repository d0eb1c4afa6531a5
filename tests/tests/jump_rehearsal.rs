//! Rehearsals of a jump of the host, and of guests whose RAM outlives the kernel: who would not be revived is found out
//! while it runs. The jump itself is in `rig.rs`; here the carve-out is a file.

use std::os::unix::fs::FileExt;

use anyhow::{Context, ensure};
use serde_json::Value;
use stillpoint_control::rehearsal::{Rehearsal, Stage, Verdict};
use stillpoint_tests::daemon::{Answer, Daemon};
use stillpoint_tests::needs_kvm;
use stillpoint_tests::releases::{self, Release};
use stillpoint_tests::vm::{Ram, Recipe, Vm};

fn guest_in(ram: Ram) -> anyhow::Result<Vm> {
    Vm::up(&Recipe {
        ram,
        memory_mib: 64,
        ..Recipe::pulse(2, "ram=16M duty=50")
    })
}

/// What of the guest's own memory a rehearsal must leave alone: all of it is compared but RAM, in which it runs.
fn record_bytes(vm: &Vm) -> anyhow::Result<Vec<u8>> {
    let at = vm.spec().memory.carve_out.clone().context("a place")?;
    let file = match at.is_memfd() {
        true => std::fs::File::from(vm.client()?.lend_guest()?.0),
        false => std::fs::File::open(&at.path)?,
    };
    let mut bytes = vec![0; usize::try_from(at.record_len)?];
    file.read_exact_at(&mut bytes, at.record)?;
    Ok(bytes)
}

fn fails_at(told: &Rehearsal, stage: Stage, why: &str) -> anyhow::Result<()> {
    ensure!(
        told.verdict == Verdict::Failed && told.stage == stage,
        "{told:#?}"
    );
    let reason = told.reason.as_deref().unwrap_or_default();
    ensure!(reason.contains(why), "{told:#?}");
    Ok(())
}

#[test]
fn a_jump_is_rehearsed_with_a_record_that_nobody_can_run_the_guest_from() -> anyhow::Result<()> {
    needs_kvm!();
    for ram in [Ram::Carved, Ram::Kept] {
        let mut vm = guest_in(ram)?;
        let before = record_bytes(&vm)?;
        let by = ("rehearsal", "rehearsal");
        let told = vm.rehearse_jump(Release::Current, by)?;
        ensure!(
            told.verdict == Verdict::Passed && told.stage == Stage::Done,
            "{told:#?}"
        );
        ensure!(told.state_bytes > 0 && !told.peek.is_zero(), "{told:#?}");
        vm.is_well()?;
        // It is looked at as at a revival: by its nonce, its state, and what becomes of its mark.
        let told = vm.rehearse_jump(Release::Current, ("rehearsal", "another"))?;
        fails_at(&told, Stage::Load, "another jump")?;
        let told = vm.rehearse_jump(Release::Faulty("spoil=load"), by)?;
        fails_at(&told, Stage::Load, "section vcpu")?;
        let told = vm.rehearse_jump(Release::Faulty("spoil=state"), by)?;
        fails_at(&told, Stage::Compare, "not the same state")?;
        let told = vm.rehearse_jump(Release::Faulty("spoil=mark"), by)?;
        fails_at(&told, Stage::Compare, "could be run twice")?;
        ensure!(
            record_bytes(&vm)? == before,
            "something was written where a record would lie"
        );
        vm.is_well()?;
        let error = vm.revive("rehearsal").expect_err("nothing is stored");
        ensure!(error.to_string().contains("not as stored"), "{error}");
    }
    Ok(())
}

#[test]
fn a_guest_in_a_carve_out_has_its_swaps_rehearsed() -> anyhow::Result<()> {
    needs_kvm!();
    let mut vm = guest_in(Ram::Carved)?;
    let told = vm.rehearse(Release::Current, true)?;
    ensure!(told.verdict == Verdict::Passed, "{told:#?}");
    let told = vm.rehearse(Release::Faulty("spoil=load"), true)?;
    fails_at(&told, Stage::Load, "section vcpu")?;
    vm.must_move(Release::Current)?;
    vm.is_well()
}

/// What a look at a swap says of one thing.
fn check_of<'v>(answer: &'v Answer, name: &str) -> anyhow::Result<&'v Value> {
    let mut checks = answer.json.as_array().into_iter().flatten();
    let found = checks.find(|check| check["check"] == name);
    found.with_context(|| format!("no `{name}` in {:#}{}", answer.json, answer.error))
}

/// The carve-out is a file here, so no look can end well; each guest's line is what it is all the same.
#[test]
fn a_look_rehearses_the_revival_of_every_guest_by_its_release() -> anyhow::Result<()> {
    needs_kvm!();
    let dir = tempfile::tempdir()?;
    let file = dir.path().join("carve-out");
    std::fs::File::create(&file)?.set_len(256 << 20)?;
    let path = file.display().to_string();
    let daemon = Daemon::start_with(dir.path(), &["--carve-out", &path])?;
    let faulty = Release::Faulty("").binary()?.display().to_string();
    let add = ["release", "add", "--unsigned", &faulty, "--as", "refuses"];
    let fault = ["--arg=--fault", "--arg=spoil=load"];
    daemon.must(&[&add[..], &fault].concat())?;
    let kernel = releases::pulse()?.display().to_string();
    let disk = dir.path().join("disk.img");
    std::fs::File::create(&disk)?.set_len(1 << 20)?;
    let (image, away) = (disk.display().to_string(), dir.path().join("away.img"));
    for (name, more) in [
        (
            "good",
            &["--release", Release::Current.version(), "--disk", &image][..],
        ),
        ("bad", &["--release", "refuses"]),
    ] {
        let run = ["run", name, "--survive", "kernel", "--memory", "64M"];
        let boot = ["--kernel", &kernel, "--cmdline", "pulse ram=16M duty=10"];
        daemon.must(&[&run[..], &boot, more].concat())?;
        daemon.pulse(name)?.wait_progress(&[0], 20)?;
    }
    let look = ["swap", "kernel", "--kernel", &kernel, "--budget", "20s"];
    let looked = |more: &[&str]| daemon.stillpoint(&[&look[..], more].concat());
    let events = || daemon.must(&["events", "ls", "--all"]);
    let peeks = |events: &Value| events.as_array().map_or(0, Vec::len);

    let answer = looked(&["--dry-run"])?;
    for name in ["good", "bad"] {
        let found = check_of(&answer, &format!("rehearsal {name}"))?;
        ensure!(found["status"] == "warn", "{found:#}");
    }
    ensure!(peeks(&events()?) == 0, "{:#}", events()?);

    let answer = looked(&["--check"])?;
    let good = check_of(&answer, "rehearsal good")?;
    ensure!(good["status"] == "ok", "{good:#}");
    let bad = check_of(&answer, "rehearsal bad")?;
    let said = bad["found"].to_string();
    ensure!(
        bad["status"] == "fail"
            && said.contains("release refuses")
            && said.contains("section vcpu"),
        "{bad:#}"
    );
    ensure!(bad["remedy"].to_string().contains("swap vmm"), "{bad:#}");
    // Each pause has its event, and its length.
    let told = events()?;
    ensure!(peeks(&told) == 2, "{told:#}");
    for event in told.as_array().into_iter().flatten() {
        let pause = event["measured"]["pause_ns"].as_u64();
        ensure!(
            event["state"] == "over" && pause.is_some_and(|ns| ns > 0),
            "{event:#}"
        );
    }

    std::fs::rename(&disk, &away)?;
    let answer = looked(&["--check"])?;
    let gone = check_of(&answer, "rehearsal good")?;
    ensure!(
        gone["status"] == "fail" && gone["found"].to_string().contains("no such file"),
        "{gone:#}"
    );
    std::fs::rename(&away, &disk)?;
    let answer = looked(&["--check"])?;
    ensure!(check_of(&answer, "rehearsal good")?["status"] == "ok");
    for name in ["good", "bad"] {
        let seen = daemon.pulse(name)?.wait_progress(&[0], 20)?;
        ensure!(seen.faults().is_empty(), "{:#?}", seen.faults());
    }
    Ok(())
}
