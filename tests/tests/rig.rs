//! The rig itself: emulated hosts with either kernel, KVM in them, and our real daemon on it.

use std::time::Duration;

use anyhow::{Context, ensure};
use serde_json::Value;
use stillpoint_images::packages::Kernel;
use stillpoint_tests::needs;
use stillpoint_tests::releases;
use stillpoint_tests::rig::{self, Rig, order};

const LIMIT: Duration = Duration::from_secs(300);

/// Boots a host, runs the pulse scenario on it, and reads what came out.
/// On a host with this kernel; `fills_page_tables`: whether its KVM fills a machine's page tables when it is asked to.
fn pulse_on(kernel: Kernel, release: &str, fills_page_tables: bool) -> anyhow::Result<()> {
    let outcome = Rig::new(&format!("pulse-on-{}", kernel.name()), kernel)
        .programs()?
        .command(&["scenario", "pulse"])
        .time_limit(LIMIT)
        .run()?;
    let report: Value = outcome.report()?;
    let dmesg = std::fs::read_to_string(outcome.results.join("dmesg.txt"))?;
    ensure!(
        dmesg.contains(&format!("Linux version {release}")),
        "another kernel:\n{dmesg}"
    );
    let kvm = |check: &&Value| {
        check["check"]
            .as_str()
            .is_some_and(|name| name.contains("kvm"))
    };
    let checks = report["doctor"]
        .as_array()
        .map(Vec::as_slice)
        .unwrap_or_default();
    let found = checks
        .iter()
        .find(kvm)
        .with_context(|| format!("no check of KVM: {report:#}"))?;
    ensure!(found["status"] == "ok", "{found:#}");
    let swaps = report["swaps"].as_array().context("swaps")?;
    ensure!(swaps.len() == 2, "{report:#}");
    let fills = checks
        .iter()
        .find(|check| check["check"] == "page tables filled beforehand")
        .context("no check of KVM's page tables")?;
    ensure!((fills["status"] == "ok") == fills_page_tables, "{fills:#}");
    for swap in swaps {
        let phases = swap["report"]["phases"].as_array().context("phases")?;
        let filled = phases.iter().any(|phase| phase["name"] == "pre-fault");
        ensure!(filled == fills_page_tables, "{phases:#?}");
    }
    Ok(())
}

#[test]
fn pulse_is_swapped_on_a_host_with_6_1() -> anyhow::Result<()> {
    needs!(rig::missing);
    pulse_on(Kernel::Bookworm, "6.1.", false)
}

#[test]
fn pulse_is_swapped_on_a_host_with_the_newest_backport() -> anyhow::Result<()> {
    needs!(rig::missing);
    pulse_on(Kernel::Backports, "7.", true)
}

#[test]
fn a_command_that_fails_gives_its_status_and_its_results() -> anyhow::Result<()> {
    needs!(rig::missing);
    let script = "echo hello >/results/said; mkdir /results/deep; echo x >/results/deep/x; exit 7";
    let outcome = Rig::new("fails", Kernel::Bookworm)
        .memory_mib(512)
        .command(&["sh", "-c", script])
        .time_limit(LIMIT)
        .run()?;
    ensure!(outcome.status == 7, "status {}", outcome.status);
    ensure!(std::fs::read_to_string(outcome.results.join("said"))? == "hello\n");
    ensure!(outcome.results.join("deep/x").is_file());
    Ok(())
}

#[test]
fn a_host_that_takes_too_long_is_ended_and_says_what_it_was_doing() -> anyhow::Result<()> {
    needs!(rig::missing);
    let error = Rig::new("too-long", Kernel::Bookworm)
        .memory_mib(512)
        .command(&["sh", "-c", "echo about to sleep; sleep 1000"])
        .time_limit(Duration::from_secs(60))
        .run()
        .expect_err("it sleeps longer than it may")
        .to_string();
    for part in ["60 s", "running sh -c", "about to sleep", "console.log"] {
        ensure!(error.contains(part), "{part:?} is not in:\n{error}");
    }
    Ok(())
}

#[test]
fn a_host_whose_kernel_panics_is_an_error_with_its_last_words() -> anyhow::Result<()> {
    needs!(rig::missing);
    let error = Rig::new("panics", Kernel::Bookworm)
        .memory_mib(512)
        .command(&["sh", "-c", "echo c >/proc/sysrq-trigger; sleep 1000"])
        .time_limit(LIMIT)
        .run()
        .expect_err("it panics")
        .to_string();
    ensure!(error.contains("ended without an answer"), "{error}");
    ensure!(error.contains("sysrq triggered crash"), "{error}");
    Ok(())
}

#[test]
fn a_host_that_stood_still_is_tried_once_more_and_that_is_said() -> anyhow::Result<()> {
    needs!(rig::missing);
    // What a starved kernel says, and then its end, twice.
    let script = "echo 'rcu: rcu_sched kthread starved for 5252 jiffies!'; poweroff -f; sleep 1000";
    let rig = Rig::new("stood-still", Kernel::Bookworm)
        .memory_mib(512)
        .command(&["sh", "-c", script])
        .time_limit(LIMIT);
    let error = rig.run().expect_err("neither gives an answer").to_string();
    ensure!(
        error.contains("the second try: the first stood still"),
        "{error}"
    );
    ensure!(
        rig.dir().join("first/console.log").is_file(),
        "the first console is kept"
    );
    Ok(())
}

/// The host's kernel is swapped under two guests: one goes on, one whose disk is missing is kept and goes
/// on when it is back; then the host crashes, and nobody is run from what was stored before.
#[test]
fn the_hosts_kernel_is_swapped_under_pulse() -> anyhow::Result<()> {
    needs!(rig::missing);
    let outcome = Rig::new("kernel-swap", Kernel::Bookworm)
        .memory_mib(2560)
        .scratch_mib(256)
        .carve_out_mib(384)
        .scenario()?
        .jump("newer", Kernel::Backports, &["scenario", "kernel"])
        .then_jump("again", Kernel::Bookworm, &["scenario", "kernel"])
        .command(&["scenario", "kernel", "--into", "newer"])
        .time_limit(LIMIT * 2)
        .again_if_it_dies()
        .run()?;
    let told: Value = outcome.report()?;
    ensure!(told["after_the_crash"].is_object(), "{told:#}");
    let kernel = &told["swap"]["kernel"];
    let (from, to) = (kernel["from"].as_str(), kernel["to"].as_str());
    ensure!(
        from.is_some_and(|from| from.starts_with("6.1.")),
        "{kernel:#}"
    );
    ensure!(to.is_some_and(|to| to.starts_with("7.")), "{kernel:#}");
    // The host's wall clock was carried over; what is left of its error is no more than can be told.
    let clock = &kernel["clock"];
    ensure!(clock["problem"].is_null(), "{clock:#}");
    let left = clock["left_ns"].as_i64().context("what is left")?;
    ensure!(left.abs() < 50_000, "{clock:#}");
    Ok(())
}

/// A rollout brings the kernel: daemon and driver are gone with the jump, and the next ones settle its order by what
/// was adopted.
#[test]
fn a_rollout_brings_the_hosts_kernel_by_one_jump() -> anyhow::Result<()> {
    needs!(rig::missing);
    let outcome = Rig::new("kernel-rollout", Kernel::Bookworm)
        .memory_mib(2560)
        .scratch_mib(256)
        .carve_out_mib(384)
        .scenario()?
        .jump("newer", Kernel::Backports, &["scenario", "kernel-rollout"])
        .command(&["scenario", "kernel-rollout", "--into", "newer"])
        .time_limit(LIMIT)
        .again_if_it_dies()
        .run()?;
    let told: Value = outcome.report()?;
    ensure!(told["rollout"]["state"] == "finished", "{told:#}");
    Ok(())
}

/// The crash matrix of a jump (SPECIFICATION.md, section 17), and the way back from the newer kernel to the older.
#[test]
fn what_goes_wrong_on_the_way_to_another_kernel() -> anyhow::Result<()> {
    needs!(rig::missing);
    let outcome = Rig::new("kernel-cells", Kernel::Bookworm)
        .memory_mib(2560)
        .scratch_mib(384)
        .carve_out_mib(384)
        .scenario()?
        .jump(
            Kernel::Bookworm.name(),
            Kernel::Bookworm,
            &["scenario", "cells"],
        )
        .jump(
            Kernel::Backports.name(),
            Kernel::Backports,
            &["scenario", "cells"],
        )
        .command(&["scenario", "cells"])
        .time_limit(LIMIT * 2)
        .again_if_it_dies()
        .run()?;
    let told: Value = outcome.report()?;
    // As many as the scenario has: none of them was left out.
    let cells = told["cells"].as_array().map_or(0, Vec::len);
    ensure!(cells == 8, "{told:#}");
    Ok(())
}

/// A host that `stillpoint host prepare` has written the boot configuration of, booted by it.
#[test]
fn a_host_boots_by_what_was_prepared() -> anyhow::Result<()> {
    needs!(rig::missing);
    let kernel = Kernel::Bookworm;
    let outcome = Rig::new("prepared", kernel)
        // Some of it above 4 GiB, where a carve-out may lie.
        .memory_mib(5120)
        .scratch_mib(256)
        .carve_out_later()
        .scenario()?
        .jump(kernel.name(), kernel, &["scenario", "prepared"])
        .command(&["scenario", "prepared"])
        .time_limit(LIMIT)
        .again_if_it_dies()
        .run()?;
    let told: Value = outcome.report()?;
    ensure!(
        told["words"]
            .as_str()
            .is_some_and(|words| words.starts_with("memmap=256M!")),
        "{told:#}"
    );
    Ok(())
}

/// Ten jumps in a row under guests whose memory live update keeps: `make luo`.
fn live_update_keeps(name: &str, more: &[&str]) -> anyhow::Result<()> {
    const JUMPS: usize = 10;
    let jumps = JUMPS.to_string();
    let kernel = Kernel::Luo.name();
    let scenario = [
        "scenario",
        "live-update",
        "--into",
        kernel,
        "--jumps",
        &jumps,
    ];
    let at = "target/releases/faulty";
    let faulty = releases::root().join(at);
    let outcome = Rig::new(name, Kernel::Luo)
        .memory_mib(2560)
        .scratch_mib(512)
        .scenario()?
        // Before the jump, whose kernel has it too.
        .file(faulty, format!("{}/{at}", order::ROOT))
        .jump(kernel, Kernel::Luo, &["scenario", "live-update"])
        .images(Kernel::Backports, &["vmlinux", "initramfs"])
        .command(&[&scenario[..], more].concat())
        .time_limit(Duration::from_secs(1200))
        .run()?;
    let told: Value = outcome.report()?;
    let jumps = told["jumps"].as_array().context("the jumps")?;
    ensure!(jumps.len() == JUMPS, "{told:#}");
    for jump in jumps {
        let phases = jump["phases"].as_array().context("its phases")?;
        let preserve = phases.iter().find(|phase| phase["name"] == "preserve");
        let preserve = preserve.context("guests were preserved")?;
        ensure!(preserve["in_blackout"] == false, "{preserve:#}");
    }
    Ok(())
}

#[test]
#[ignore = "needs a kernel that is built for it, and minutes; `make luo` does both"]
fn live_update_keeps_pulse_over_ten_kernels() -> anyhow::Result<()> {
    needs!(rig::missing_luo);
    live_update_keeps("luo-pulse", &[])
}

#[test]
#[ignore = "needs a kernel that is built for it, and minutes; `make luo` does both"]
fn live_update_keeps_debian_over_ten_kernels() -> anyhow::Result<()> {
    needs!(rig::missing_luo);
    live_update_keeps("luo-debian", &["--debian"])
}

/// Scenarios of `linux.rs` on a host with this kernel: those whose names hold one of these words, or all of
/// them. A host with hardware KVM runs them directly.
fn debian_guests_on(kernel: Kernel, named: &[&str], count: usize) -> anyhow::Result<()> {
    let linux = ["linux", "--test-threads=1"];
    let outcome = Rig::new(&format!("linux-on-{}", kernel.name()), kernel)
        .memory_mib(3072)
        .programs()?
        .images(Kernel::Bookworm, &["bzImage", "vmlinux", "initramfs"])
        .images(Kernel::Backports, &["bzImage", "vmlinux", "initramfs"])
        .archive("curl")
        .command(&[&linux[..], named].concat())
        .time_limit(Duration::from_secs(1500))
        .run()?;
    let console = outcome.succeeded()?;
    ensure!(
        console.contains(&format!("{count} passed; 0 failed; 0 ignored")),
        "not all of them:\n{console}"
    );
    Ok(())
}

/// Each guest on a host with its own kernel, and every scenario on one of both.
#[test]
fn debian_guests_on_a_host_with_6_1() -> anyhow::Result<()> {
    needs!(rig::missing);
    let named = ["bookworm", "power_button", "goes_bad", "modules"];
    debian_guests_on(Kernel::Bookworm, &named, 7)
}

#[test]
fn debian_guests_on_a_host_with_the_newest_backport() -> anyhow::Result<()> {
    needs!(rig::missing);
    debian_guests_on(Kernel::Backports, &["backports", "announced"], 5)
}

/// All of them: `make linux`.
#[test]
#[ignore = "10 minutes; `make linux` runs it"]
fn every_scenario_on_a_host_with_6_1() -> anyhow::Result<()> {
    needs!(rig::missing);
    debian_guests_on(Kernel::Bookworm, &[], 13)
}

#[test]
#[ignore = "10 minutes; `make linux` runs it"]
fn every_scenario_on_a_host_with_the_newest_backport() -> anyhow::Result<()> {
    needs!(rig::missing);
    debian_guests_on(Kernel::Backports, &[], 13)
}
