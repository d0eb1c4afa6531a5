//! KVM's modules exchanged under guests at work: really unloaded, and loaded again.
//!
//! Only on a host that is there for it, an emulated one: whoever else uses KVM on a host of somebody's would
//! stand in the way, or be stood in the way of.

use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use anyhow::{Context, ensure};
use serde_json::Value;
use stillpoint_agent::protocol::Shutdown;
use stillpoint_control::report::SwapReport;
use stillpoint_tests::daemon::{Daemon, SOON};
use stillpoint_tests::ground::{is_emulated_host, no_fast_kvm};
use stillpoint_tests::guest::Pulse;
use stillpoint_tests::linux::images::{Form, Kernel};
use stillpoint_tests::linux::loads::Loads;
use stillpoint_tests::linux::network::{no_network_namespace, tap};
use stillpoint_tests::linux::workload::verify_disk;
use stillpoint_tests::linux::{Linux, Recipe};
use stillpoint_tests::{needs, releases};

use super::{DISK_MIB, HOST, TAP, host, image};

/// Where a daemon looks for releases of KVM that is told nothing else.
const KVM_DIR: &str = "/etc/stillpoint/kvm";
const PARAMETER: &str = "/sys/module/kvm_amd/parameters/nested";

fn not_ours() -> Option<String> {
    (!is_emulated_host()).then(|| "KVM's modules on this host are not ours to exchange".into())
}

/// Lays the modules out as a distribution does, and a folder with one that the kernel refuses.
fn lay_out(broken: &Path) -> anyhow::Result<()> {
    let running = rustix::system::uname();
    let running = running.release().to_str()?;
    let folder = Path::new("/lib/modules").join(running);
    for folder in [folder.as_path(), broken] {
        std::fs::create_dir_all(folder)?;
        for name in ["kvm.ko", "kvm_amd.ko"] {
            let from = Path::new("/lib/modules").join(name);
            std::fs::copy(&from, folder.join(name)).context(from.display().to_string())?;
        }
    }
    // Made for this kernel by what it says of itself, and cut off.
    let path = broken.join("kvm_amd.ko");
    let text = format!("\x7fELF, not\0vermagic={running} SMP\0");
    Ok(std::fs::write(path, text)?)
}

fn pulse(daemon: &Daemon) -> anyhow::Result<Pulse> {
    let kernel = releases::pulse()?.display().to_string();
    let machine = ["--cpus", "2", "--memory", "64M", "--kernel", &kernel];
    let cmdline = ["--cmdline", "pulse ram=16M duty=20"];
    daemon.must(&[&["run", "bare"], &machine[..], &cmdline[..]].concat())?;
    let pulse = daemon.pulse("bare")?;
    pulse.wait_online(2)?;
    Ok(pulse)
}

/// A swap that must have exchanged them; each guest's part of it.
fn exchanged(daemon: &Daemon, args: &[&str]) -> anyhow::Result<()> {
    let terms = ["swap", "kvm", "--budget", "30s"];
    let swap = daemon.must(&[&terms[..], args].concat())?;
    ensure!(swap["state"] == "done", "{swap:#}");
    println!(
        "{}{}",
        swap["output"].as_str().unwrap_or_default(),
        swap["pause_ns"]
    );
    for name in ["deb", "bare"] {
        let part: Value = daemon.must(&["report", name])?;
        ensure!(part["part_of"] == swap["id"], "{part:#}");
        let report: SwapReport = serde_json::from_value(part["report"].clone())?;
        let clock = report.clock.as_ref().context("a receipt")?;
        ensure!(
            clock.masterclock_before && clock.masterclock_after,
            "{clock:#?}"
        );
        let error = clock.kvmclock_error_ns.context("a clock's error")?;
        println!("{name}: {:?}, kvmclock {error} ns", report.blackout.host);
        ensure!(error.abs() <= 50, "{report:#?}");
    }
    Ok(())
}

/// The same by rollouts: a release with another parameter; one that the kernel refuses, after which the former is
/// there as it was; and one that is put back for being beyond a limit.
fn a_rollout_brings_modules(daemon: &Daemon, broken: &Path) -> anyhow::Result<()> {
    let running = rustix::system::uname();
    let ours = Path::new("/lib/modules").join(running.release().to_str()?);
    let dir = Path::new(KVM_DIR);
    for (version, from, parameters) in [
        ("nested-off", ours.as_path(), "kvm_amd.nested=0\n"),
        ("nested-on", &ours, "kvm_amd.nested=1\n"),
        ("broken", broken, ""),
    ] {
        let folder = dir.join(version);
        std::fs::create_dir_all(&folder)?;
        for name in ["kvm.ko", "kvm_amd.ko"] {
            std::fs::copy(from.join(name), folder.join(name))?;
            std::fs::set_permissions(folder.join(name), Permissions::from_mode(0o644))?;
        }
        std::fs::write(folder.join("parameters"), parameters)?;
    }
    let of_kvm = ["rollout", "start", "--component", "kvm", "--budget", "30s"];
    for (version, more, state, nested) in [
        ("nested-off", &[][..], "finished", "0"),
        ("broken", &[], "rolled_back", "0"),
        ("nested-on", &["--max-blackout", "1us"], "rolled_back", "0"),
        ("nested-on", &[], "finished", "1"),
    ] {
        let args = [&of_kvm[..], &["--to", version], &SOON[..], more].concat();
        let over = daemon.stillpoint(&args)?;
        ensure!(
            over.json["rollout"]["state"] == state,
            "{version}: {} {:#}",
            over.error,
            over.json
        );
        println!(
            "rollout to {version}: {state}, {}",
            over.json["rollout"]["units"][0]["blackout_ns"]
        );
        let now = std::fs::read_to_string(PARAMETER)?;
        ensure!(now.trim() == nested, "after {version} nested is {now}");
    }
    Ok(())
}

#[test]
fn kvm_modules_are_exchanged_under_guests_at_work() -> anyhow::Result<()> {
    needs!(no_fast_kvm, no_network_namespace, not_ours);
    let (dir, daemon) = host()?;
    let broken = dir.path().join("broken");
    lay_out(&broken)?;
    tap(&daemon, TAP, &format!("{HOST}/24"))?;
    let image = image(dir.path(), DISK_MIB)?;
    let recipe = Recipe::new(Kernel::Bookworm, Form::Vmlinux, 2)
        .disk(&image)
        .net(TAP, "10.77.0.2/24")
        .open();
    let guest = Linux::boot(&daemon, "deb", &recipe)?;
    let bare = pulse(&daemon)?;
    let booted = guest.health()?;
    let loads = Loads::start(&guest, &daemon, HOST, dir.path())?;
    let before = std::fs::read_to_string(PARAMETER)?;
    for (value, shown) in [("0", "0"), ("1", "1")] {
        let parameter = format!("kvm_amd.nested={value}");
        exchanged(&daemon, &["--parameter", &parameter])?;
        let now = std::fs::read_to_string(PARAMETER)?;
        ensure!(now.trim() == shown, "nested is {now}");
        loads.go_on()?;
    }
    ensure!(
        std::fs::read_to_string(PARAMETER)? == before,
        "another default"
    );
    // The new ones are refused by the kernel: the old ones are back before the guests are.
    let folder = broken.display().to_string();
    let failed = daemon.stillpoint(&["swap", "kvm", "--budget", "30s", "--to", &folder])?;
    ensure!(
        !failed.success && failed.json["state"] == "failed",
        "{:#}",
        failed.json
    );
    let reason = failed.json["reason"].as_str().unwrap_or_default();
    ensure!(reason.contains("refused to load"), "{reason}");
    ensure!(!reason.contains("way back"), "{reason}");
    loads.go_on()?;
    a_rollout_brings_modules(&daemon, &broken)?;
    loads.go_on()?;
    let seen = bare.wait_progress(&[0, 1], 20)?;
    ensure!(seen.faults().is_empty(), "{:#?}", seen.faults());
    loads.finish(&guest).with_context(|| guest.logs())?;
    verify_disk(&image, &dir.path().join("disk.out"))?;
    let after = guest.health()?;
    ensure!(after.boot_id == booted.boot_id, "it is another guest");
    ensure!(
        after.clocksource.current == booted.clocksource.current,
        "another clocksource"
    );
    guest.dmesg_is_clean()?;
    guest.must_move().context("a swap of its VMM afterwards")?;
    guest.agent()?.shutdown(Shutdown::Poweroff)?;
    guest.wait_off()
}
