//! Stock Debian guests, booted and swapped under load by the real daemon.
//!
//! A host whose KVM is hardware runs these directly. Elsewhere they run in the emulated host (`tests/rig.rs`
//! starts this very program there, linked statically), where they are not skipped: `STILLPOINT_LINUX=1`.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, ensure};
use stillpoint_agent::protocol::Shutdown;
use stillpoint_tests::daemon::Daemon;
use stillpoint_tests::ground::no_fast_kvm;
use stillpoint_tests::linux::images::{Form, Kernel};
use stillpoint_tests::linux::network::{no_network_namespace, tap};
use stillpoint_tests::linux::workload::{InGuest, OnHost, verify_disk};
use stillpoint_tests::linux::{Linux, Recipe};
use stillpoint_tests::needs;
use stillpoint_tests::patience::{PATIENCE, wait_for};

/// Swaps under load.
const SWAPS: usize = 20;
/// MiB of the guest's disk.
const DISK_MIB: u64 = 64;
/// How long a reboot may take.
const BOOT: Duration = Duration::from_secs(240);
const TAP: &str = "sp-tap0";
const HOST: &str = "10.77.0.1";

fn host() -> anyhow::Result<(tempfile::TempDir, Daemon)> {
    let dir = tempfile::tempdir()?;
    let daemon = Daemon::start_in_own_network(dir.path())?;
    Ok((dir, daemon))
}

fn image(dir: &Path, mib: u64) -> anyhow::Result<std::path::PathBuf> {
    let path = dir.join("disk.img");
    std::fs::File::create(&path)?.set_len(mib << 20)?;
    Ok(path)
}

/// Boots to the agent, is as it was asked to be, and switches itself off when told.
fn boots(kernel: Kernel, form: Form, cpus: u8) -> anyhow::Result<()> {
    needs!(no_fast_kvm, no_network_namespace);
    let (_dir, daemon) = host()?;
    let guest = Linux::boot(&daemon, "deb", &Recipe::new(kernel, form, cpus))?;
    let health = guest.health()?;
    ensure!(health.cpus == u32::from(cpus), "{} CPUs", health.cpus);
    ensure!(
        ["kvm-clock", "tsc"].contains(&health.clocksource.current.as_str()),
        "{:?}",
        health.clocksource
    );
    guest.dmesg_is_clean()?;
    guest.agent()?.shutdown(Shutdown::Poweroff)?;
    guest.wait_off()
}

#[test]
fn bookworm_boots_as_a_bzimage_with_1_vcpu() -> anyhow::Result<()> {
    boots(Kernel::Bookworm, Form::BzImage, 1)
}

#[test]
fn bookworm_boots_as_a_vmlinux_with_2_vcpus() -> anyhow::Result<()> {
    boots(Kernel::Bookworm, Form::Vmlinux, 2)
}

#[test]
fn bookworm_boots_with_4_vcpus() -> anyhow::Result<()> {
    boots(Kernel::Bookworm, Form::BzImage, 4)
}

#[test]
fn backports_boots_as_a_bzimage_with_1_vcpu() -> anyhow::Result<()> {
    boots(Kernel::Backports, Form::BzImage, 1)
}

#[test]
fn backports_boots_as_a_vmlinux_with_2_vcpus() -> anyhow::Result<()> {
    boots(Kernel::Backports, Form::Vmlinux, 2)
}

#[test]
fn backports_boots_with_4_vcpus() -> anyhow::Result<()> {
    boots(Kernel::Backports, Form::BzImage, 4)
}

/// How hard a guest works while it is swapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Weight {
    /// A disk, a connection of each kind, all of them paced.
    Paced,
    /// The same without a pause, a stream each way, and every CPU.
    Full,
}

/// What a guest does while it is swapped: a disk, a TCP connection, sockets each way.
struct Loads {
    in_guest: Vec<InGuest>,
    /// The host's caller of the guest, whose report counts; then servers, the last of which sends.
    on_host: Vec<OnHost>,
}

impl Loads {
    fn start(
        guest: &Linux<'_>,
        daemon: &Daemon,
        dir: &Path,
        weight: Weight,
    ) -> anyhow::Result<Self> {
        let out = |name: &str| dir.join(format!("{name}.out"));
        let guest_load = |name, args: &[&str]| InGuest::start(guest, name, args, &out(name));
        let pace: &[&str] = match weight {
            Weight::Paced => &["--seconds", "3600", "--interval-ms", "10"],
            Weight::Full => &["--seconds", "3600"],
        };
        let socket = guest.vsock().display().to_string();
        let door = format!("{socket}_7004");
        let unix = ["echo-serve", "--unix", &door];
        let (unix, _) = OnHost::listen(daemon, &unix, &out("unix"))?;
        let tcp = ["echo-serve", "--addr", &format!("{HOST}:0")];
        let (tcp, address) = OnHost::listen(daemon, &tcp, &out("tcp"))?;
        let disk: &[&str] = match weight {
            Weight::Paced => &["--threads", "1", "--fsync-every", "4"],
            Weight::Full => &["--threads", "4"],
        };
        let on_vda = ["disk", "--device", "/dev/vda", "--duration", "3600"];
        let mut in_guest = vec![
            guest_load("disk", &[&on_vda, disk].concat())?,
            guest_load("echoes", &[&["echo", "--vsock", "2:7004"], pace].concat())?,
            guest_load("asks", &[&["echo", "--addr", &address], pace].concat())?,
            guest_load("serves", &["echo-serve", "--vsock-port", "7003"])?,
        ];
        let served = out("serves");
        wait_for("the guest to listen", PATIENCE, || {
            let printed = std::fs::read_to_string(&served)?;
            Ok(printed.contains("listening").then_some(()))
        })?;
        let call = ["echo", "--unix", &socket, "--connect-line", "CONNECT 7003"];
        let calls = OnHost::start(daemon, &[&call, pace].concat(), &out("calls"))?;
        let mut on_host = vec![calls, unix, tcp];
        if weight == Weight::Full {
            let streams = ["tcp", "serve", "--addr", &format!("{HOST}:0")];
            let (streams, address) = OnHost::listen(daemon, &streams, &out("streams"))?;
            let send = ["tcp", "send", "--addr", &address, "--seconds", "3600"];
            in_guest.push(guest_load("sends", &send)?);
            in_guest.push(guest_load(
                "receives",
                &[&send[..], &["--reverse"]].concat(),
            )?);
            in_guest.push(guest_load("cpu", &["cpu", "--seconds", "3600"])?);
            on_host.push(streams);
        }
        Ok(Self { in_guest, on_host })
    }

    /// None has come to an end that nobody asked for.
    fn go_on(&self) -> anyhow::Result<()> {
        let ended: Vec<_> = self
            .in_guest
            .iter()
            .filter(|load| load.has_ended())
            .collect();
        ensure!(ended.is_empty(), "ended too early: {ended:?}");
        Ok(())
    }

    /// Has them come to their ends; each report must be good.
    fn finish(self, guest: &Linux<'_>) -> anyhow::Result<Vec<serde_json::Value>> {
        let Self {
            in_guest,
            mut on_host,
        } = self;
        // Before their peers in the guest: of a stream its sender ends, which is the host's server
        // for one of them; other servers have no end of their own, and what they saw is in their
        // clients' reports.
        for load in on_host.iter().take(1).chain(on_host.get(3)) {
            load.wind_up()?;
        }
        let mut reports = vec![on_host.remove(0).finish()?];
        for load in in_guest.iter().filter(|load| load.name() != "receives") {
            load.wind_up(guest)?;
        }
        let judged = in_guest.into_iter().filter(|load| load.name() != "serves");
        for load in judged {
            reports.push(load.finish()?);
        }
        Ok(reports)
    }
}

/// A guest with disk, network and sockets, at work; and all that must still be so after `SWAPS`
/// swaps of its VMM.
fn swapped_at_work(kernel: Kernel, form: Form, cpus: u8, weight: Weight) -> anyhow::Result<()> {
    needs!(no_fast_kvm, no_network_namespace);
    let (dir, daemon) = host()?;
    tap(&daemon, TAP, &format!("{HOST}/24"))?;
    let image = image(dir.path(), DISK_MIB)?;
    let recipe = Recipe::new(kernel, form, cpus)
        .disk(&image)
        .net(TAP, "10.77.0.2/24");
    let guest = Linux::boot(&daemon, "deb", &recipe)?;
    let booted = guest.health()?;
    let loads = Loads::start(&guest, &daemon, dir.path(), weight)?;
    let mut pauses = Vec::new();
    for swap in 0..SWAPS {
        let report = guest
            .must_move()
            .with_context(|| format!("swap {swap}\n{}", guest.logs()))?;
        pauses.push(report.blackout.host);
        loads.go_on()?;
    }
    let reports = loads.finish(&guest).with_context(|| guest.logs())?;
    println!("host blackouts: {pauses:?}");
    for report in &reports {
        println!("{report}");
    }
    verify_disk(&image, &dir.path().join("disk.out"))?;
    let after = guest.health()?;
    ensure!(after.boot_id == booted.boot_id, "it is another guest");
    ensure!(
        after.clocksource.current == booted.clocksource.current,
        "another clocksource"
    );
    ensure!(after.cpus == u32::from(cpus), "{} CPUs", after.cpus);
    guest.dmesg_is_clean()?;
    reboots(&guest, &after.boot_id)?;
    guest.must_move().context("a swap after the reboot")?;
    guest.agent()?.shutdown(Shutdown::Poweroff)?;
    guest.wait_off()
}

/// A reboot by the guest does what it says, in the process that is there.
fn reboots(guest: &Linux<'_>, boot_id: &str) -> anyhow::Result<()> {
    guest.agent()?.shutdown(Shutdown::Reboot)?;
    wait_for("another boot of the guest", BOOT, || {
        let health = guest.agent().ok().and_then(|mut agent| agent.health().ok());
        Ok(health.filter(|health| health.boot_id != boot_id).map(drop))
    })
    .with_context(|| guest.console_tail())?;
    guest.dmesg_is_clean()
}

#[test]
fn bookworm_swapped_at_work() -> anyhow::Result<()> {
    swapped_at_work(Kernel::Bookworm, Form::Vmlinux, 2, Weight::Paced)
}

#[test]
fn backports_swapped_at_work() -> anyhow::Result<()> {
    swapped_at_work(Kernel::Backports, Form::Vmlinux, 2, Weight::Paced)
}

#[test]
fn bookworm_swapped_at_full_load() -> anyhow::Result<()> {
    swapped_at_work(Kernel::Bookworm, Form::Vmlinux, 2, Weight::Full)
}

#[test]
fn backports_swapped_at_full_load() -> anyhow::Result<()> {
    swapped_at_work(Kernel::Backports, Form::Vmlinux, 2, Weight::Full)
}

/// The power button, pressed by `stillpoint stop`, ends a guest in order; a swap before it or not.
#[test]
fn the_power_button_ends_a_guest_in_order() -> anyhow::Result<()> {
    needs!(no_fast_kvm, no_network_namespace);
    let (_dir, daemon) = host()?;
    let guest = Linux::boot(
        &daemon,
        "deb",
        &Recipe::new(Kernel::Bookworm, Form::Vmlinux, 1),
    )?;
    guest.must_move()?;
    daemon.must(&["stop", "deb", "--grace", "60s"])?;
    let shown = guest.show()?;
    ensure!(shown["state"] == "stopped", "{shown:#}");
    let said = guest.console_tail();
    ensure!(
        said.contains("power button"),
        "it did not hear of it:\n{said}"
    );
    Ok(())
}
