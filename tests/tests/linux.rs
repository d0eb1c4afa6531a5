//! Stock Debian guests, booted and swapped under load by the real daemon.
//!
//! A host whose KVM is hardware runs these directly. Elsewhere they run in the emulated host (`tests/rig.rs`
//! starts this very program there, linked statically), where they are not skipped: `STILLPOINT_LINUX=1`.

mod announced;
mod faulted;
mod modules;

use std::ffi::CString;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use rustix::mount::{MountFlags, UnmountFlags, mount, mount_remount, unmount};
use stillpoint_agent::protocol::{KernelLine, Shutdown};
use stillpoint_tests::daemon::Daemon;
use stillpoint_tests::ground::no_fast_kvm;
use stillpoint_tests::linux::images::{Form, Kernel};
use stillpoint_tests::linux::loads::Loads;
use stillpoint_tests::linux::network::{no_network_namespace, tap};
use stillpoint_tests::linux::workload::{InGuest, rates, verify_disk};
use stillpoint_tests::linux::{Linux, Recipe};
use stillpoint_tests::needs;
use stillpoint_tests::patience::wait_for;

/// Swaps under load.
const SWAPS: usize = 20;
/// MiB of the guest's disk.
const DISK_MIB: u64 = 64;
/// How long a reboot may take.
const BOOT: Duration = Duration::from_secs(240);
/// How long a stream's rate is measured, before the first swap and after the last.
const RATE_WINDOW: Duration = Duration::from_secs(3);
const TAP: &str = "sp-tap0";
const HOST: &str = "10.77.0.1";

fn host() -> anyhow::Result<(tempfile::TempDir, Daemon)> {
    let dir = tempfile::tempdir()?;
    let daemon = Daemon::start_in_own_network(dir.path())?;
    Ok((dir, daemon))
}

fn image(dir: &Path, mib: u64) -> anyhow::Result<PathBuf> {
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

/// A guest with disk, network and sockets, at work; and all that must still be so after `SWAPS`
/// swaps of its VMM.
fn swapped_at_full_load(kernel: Kernel, form: Form, cpus: u8) -> anyhow::Result<()> {
    needs!(no_fast_kvm, no_network_namespace);
    let (dir, daemon) = host()?;
    tap(&daemon, TAP, &format!("{HOST}/24"))?;
    let image = image(dir.path(), DISK_MIB)?;
    let recipe = Recipe::new(kernel, form, cpus)
        .disk(&image)
        .net(TAP, "10.77.0.2/24")
        .open();
    let guest = Linux::boot(&daemon, "deb", &recipe)?;
    let booted = guest.health()?;
    let loads = Loads::start(&guest, &daemon, HOST, dir.path())?;
    let began = Instant::now();
    std::thread::sleep(RATE_WINDOW);
    let mut pauses = Vec::new();
    for swap in 0..SWAPS {
        let report = guest
            .must_move()
            .with_context(|| format!("swap {swap}\n{}", guest.logs()))?;
        pauses.push(report.blackout.host);
        loads.go_on()?;
    }
    std::thread::sleep(RATE_WINDOW);
    let measured = began.elapsed();
    let reports = loads.finish(&guest).with_context(|| guest.logs())?;
    println!("host blackouts: {pauses:?}");
    for stream in reports.iter().filter(|report| report["load"] == "tcp") {
        // Told, not judged: on an emulated host a rate says little.
        let (before, after) = rates(stream, RATE_WINDOW, measured)?;
        let stall = &stream["received"]["pace"]["longest_stall_ms"];
        println!(
            "a stream's bytes a second: {before:.0} before, {after:.0} after the swaps; it stood \
             still for {stall} ms at most"
        );
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
    let guarded = guest.must_move_guarded();
    guarded.context("a swap after the reboot, rehearsed")?;
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
fn bookworm_swapped_at_full_load() -> anyhow::Result<()> {
    swapped_at_full_load(Kernel::Bookworm, Form::Vmlinux, 2)
}

#[test]
fn backports_swapped_at_full_load() -> anyhow::Result<()> {
    swapped_at_full_load(Kernel::Backports, Form::Vmlinux, 2)
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
    reboots(&guest, &guest.health()?.boot_id)?;
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

/// The host's file system fills up under an image and has room again; the image is removed, then cut off:
/// the guest gets I/O errors, and only where the disk fails; it is swapped meanwhile.
#[test]
fn a_disk_that_goes_bad_is_the_guests_io_error() -> anyhow::Result<()> {
    needs!(no_fast_kvm, no_network_namespace);
    let (dir, daemon) = host()?;
    let small = SmallFileSystem::mount(dir.path().join("small"), 16)?;
    let image = image(&small.path, DISK_MIB)?;
    let recipe = Recipe::new(Kernel::Bookworm, Form::Vmlinux, 1).disk(&image);
    let guest = Linux::boot(&daemon, "deb", &recipe)?;
    let output = dir.path().join("disk.out");
    let endless = ["disk", "--device", "/dev/vda", "--duration", "3600"];
    let load = InGuest::start(
        &guest,
        "disk",
        &[&endless[..], &["--keep-going"]].concat(),
        &output,
    )?;
    let errors = || -> anyhow::Result<usize> {
        let is_error = |line: &KernelLine| line.text.contains("I/O error, dev vda");
        Ok(guest.dmesg()?.iter().filter(|line| is_error(line)).count())
    };
    wait_for("the host's disk to be full", BOOT, || {
        Ok((errors()? > 0).then_some(()))
    })
    .with_context(|| guest.logs())?;
    guest.must_move().context("on a full disk")?;
    small.resize(2 * DISK_MIB)?;
    let told = || Ok::<_, anyhow::Error>(std::fs::metadata(&output)?.len());
    let before = told()?;
    // What was on its way when there was room again is less than this.
    let more = before + 4096;
    wait_for("writes to be durable again", BOOT, || {
        Ok((told()? > more).then_some(()))
    })
    .with_context(|| guest.logs())?;
    load.wind_up(&guest)?;
    ensure!(load.finish().is_err(), "it was told of no error");
    let read = ["if=/dev/vda", "of=/dev/null", "bs=1M", "iflag=direct"];
    let removed = std::fs::File::options().write(true).open(&image)?;
    std::fs::remove_file(&image)?;
    guest.must_move().context("with a removed image")?;
    guest
        .must_run("dd", &read)
        .context("its file lives as long as somebody holds it")?;
    removed.set_len(0)?;
    ensure!(guest.must_run("dd", &read).is_err(), "read what is gone");
    let kept = guest.must_move().expect_err("a disk that is not whole");
    ensure!(format!("{kept:#}").contains("cut it off"), "{kept:#}");
    guest.health()?;
    guest.agent()?.shutdown(Shutdown::Poweroff)?;
    guest.wait_off()
}

/// A file system of the host that is soon full. Unmounted when dropped.
struct SmallFileSystem {
    path: PathBuf,
}

impl SmallFileSystem {
    fn mount(path: PathBuf, mib: u64) -> anyhow::Result<Self> {
        std::fs::create_dir(&path)?;
        let size = CString::new(format!("size={mib}m"))?;
        mount("tmpfs", &path, "tmpfs", MountFlags::empty(), Some(&*size))?;
        Ok(Self { path })
    }

    fn resize(&self, mib: u64) -> anyhow::Result<()> {
        let size = CString::new(format!("size={mib}m"))?;
        Ok(mount_remount(&self.path, MountFlags::empty(), &*size)?)
    }
}

impl Drop for SmallFileSystem {
    fn drop(&mut self) {
        let _ = unmount(&self.path, UnmountFlags::DETACH);
    }
}
