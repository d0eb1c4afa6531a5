//! Swaps of guests whose virtio devices are at work, by drivers that count what they are owed; and
//! devices under attack.

use std::io::{BufReader, Read, Write};
use std::os::unix::net::UnixStream;

use anyhow::{Context, ensure};
use stillpoint_control::spec::{DiskSpec, NetSpec, VsockSpec};
use stillpoint_guest_abi::attack;
use stillpoint_guest_abi::pulse::Report;
use stillpoint_guest_abi::virtio::Driver;
use stillpoint_tests::console::Console;
use stillpoint_tests::devices::{Devices, check_disk};
use stillpoint_tests::furnished::{HOST_PORT, call, echo};
use stillpoint_tests::guest::Snapshot;
use stillpoint_tests::needs_kvm;
use stillpoint_tests::patience::PATIENCE;
use stillpoint_tests::releases::Release;
use stillpoint_tests::vm::{Recipe, Vm};
use stillpoint_tests::wire;
use tempfile::NamedTempFile;

/// The vCPU that drives the device; vCPU 0 has the console.
const DRIVER: usize = 1;

fn with(cmdline: &str, devices: Devices) -> anyhow::Result<Vm> {
    let recipe = Recipe::pulse(2, &format!("ram=2M gap_us=500 {cmdline}"));
    Vm::up(&Recipe { devices, ..recipe })
}

/// An empty image of 64 MiB.
fn image() -> anyhow::Result<NamedTempFile> {
    let image = NamedTempFile::new()?;
    image.as_file().set_len(64 << 20)?;
    Ok(image)
}

fn disks(images: &[&NamedTempFile]) -> Devices {
    let disk = |image: &&NamedTempFile| DiskSpec {
        path: image.path().to_owned(),
        read_only: false,
    };
    Devices {
        disks: images.iter().map(disk).collect(),
        ..Devices::default()
    }
}

/// Ends the driver's mode in order, and waits until it has let go of its device.
fn put_down(vm: &Vm) -> anyhow::Result<()> {
    let command = format!("mode {DRIVER} spin");
    Console::open(vm)?.ask(&command, &command)?;
    let let_go = |s: &Snapshot| s.vcpus[DRIVER].driver.slot == 0;
    vm.pulse
        .wait("the device let go", PATIENCE, let_go)
        .map(drop)
}

fn rng() -> Devices {
    Devices {
        rng: true,
        ..Devices::default()
    }
}

/// Waits until the driver has done `more` of what `count` counts.
fn goes_on(vm: &Vm, what: &str, more: u64, count: fn(&Report) -> u64) -> anyhow::Result<Report> {
    let from = count(&vm.pulse.look()?.vcpus[DRIVER]);
    let seen = vm.pulse.wait(what, PATIENCE, |s| {
        count(&s.vcpus[DRIVER]) >= from + more || !s.faults().is_empty()
    })?;
    ensure!(
        seen.faults().is_empty(),
        "{:#?}\n{}",
        seen.faults(),
        vm.log()
    );
    Ok(seen.vcpus[DRIVER])
}

/// Swaps; before each and after the last the device works.
fn works_over_swaps(
    vm: &mut Vm,
    times: usize,
    count: fn(&Report) -> u64,
) -> anyhow::Result<Driver> {
    for _ in 0..times {
        goes_on(vm, "the device at work", 20, count)?;
        vm.must_move(Release::Current)?;
        vm.is_well().with_context(|| vm.log())?;
    }
    Ok(goes_on(vm, "the device at work", 20, count)?.driver)
}

#[test]
fn entropy_by_interrupts() -> anyhow::Result<()> {
    needs_kvm!();
    let mut vm = with("mode1=rng", rng())?;
    let driver = works_over_swaps(&mut vm, 12, |r| r.rng.bytes)?;
    ensure!(driver.interrupts > 0 && driver.waits == 1, "{driver:?}");
    vm.power_off()
}

#[test]
fn entropy_while_halted() -> anyhow::Result<()> {
    needs_kvm!();
    let mut vm = with("mode1=rng wait=halt", rng())?;
    let driver = works_over_swaps(&mut vm, 12, |r| r.rng.bytes)?;
    ensure!(driver.interrupts > 0 && driver.waits == 2, "{driver:?}");
    vm.power_off()
}

#[test]
fn entropy_polled() -> anyhow::Result<()> {
    needs_kvm!();
    let mut vm = with("mode1=rng wait=poll", rng())?;
    let driver = works_over_swaps(&mut vm, 6, |r| r.rng.bytes)?;
    ensure!(driver.interrupts == 0 && driver.waits == 0, "{driver:?}");
    vm.power_off()
}

#[test]
fn attacks_on_entropy() -> anyhow::Result<()> {
    needs_kvm!();
    let mut vm = with("mode1=hostile hostile=rng", rng())?;
    withstands(&mut vm, "rng")?;
    vm.power_off()
}

/// Every attack that fits the device is made, with swaps in between.
fn withstands(vm: &mut Vm, kind: &str) -> anyhow::Result<()> {
    let made = |r: &Report| r.hostile.each.iter().map(|t| u64::from(t.made)).sum();
    for _ in 0..4 {
        goes_on(vm, "attacks", 60, made)?;
        vm.must_move(Release::Current)?;
    }
    let seen = goes_on(vm, "attacks", 1, made)?.hostile;
    ensure!(seen.worked > 0 && seen.needs_reset > 0, "{seen:?}");
    // Those for one kind of device have its name in front.
    let fits = |name: &str| match name.split_once('-') {
        Some((first, _)) if ["blk", "net", "vsock"].contains(&first) => first == kind,
        _ => true,
    };
    let attacks = attack::NAMES.iter().zip(&seen.each);
    let left_out = attacks.filter(|(name, tally)| fits(name) && tally.made == 0);
    let left_out: Vec<_> = left_out.map(|(name, _)| name).collect();
    ensure!(left_out.is_empty(), "never made: {left_out:?}");
    vm.is_well().with_context(|| vm.log())
}

fn requests(report: &Report) -> u64 {
    report.blk.reads + report.blk.writes + report.blk.flushes
}

/// Swaps under verified I/O, then the image is what the guest was told.
fn disk(cmdline: &str, times: usize) -> anyhow::Result<Driver> {
    let image = image()?;
    let mut vm = with(cmdline, disks(&[&image]))?;
    let driver = works_over_swaps(&mut vm, times, requests)?;
    put_down(&vm)?;
    vm.is_well()?;
    let seen = vm.pulse.look()?.vcpus[DRIVER];
    ensure!(
        seen.driver.submitted == seen.driver.completed,
        "{:?}",
        seen.driver
    );
    let found = check_disk(&vm.pulse, DRIVER, image.path())?;
    ensure!(found.durable_blocks > 0 && found.written > 0, "{found:?}");
    vm.power_off()?;
    Ok(driver)
}

#[test]
fn a_disk_by_interrupts() -> anyhow::Result<()> {
    needs_kvm!();
    let driver = disk("mode1=blk", 20)?;
    ensure!(driver.interrupts > 0, "{driver:?}");
    Ok(())
}

#[test]
fn a_disk_while_halted() -> anyhow::Result<()> {
    needs_kvm!();
    disk("mode1=blk wait=halt", 12).map(drop)
}

#[test]
fn a_disk_polled_with_a_short_ring() -> anyhow::Result<()> {
    needs_kvm!();
    disk("mode1=blk wait=poll queue=8", 8).map(drop)
}

/// A VMM that is killed takes the guest with it, but nothing that the guest was told is durable.
#[test]
fn a_disk_after_a_crash() -> anyhow::Result<()> {
    needs_kvm!();
    for swaps in 0..3 {
        let image = image()?;
        let mut vm = with("mode1=blk blocks=200", disks(&[&image]))?;
        works_over_swaps(&mut vm, swaps, requests)?;
        goes_on(&vm, "flushes", 3, |r| r.blk.flushes)?;
        vm.kill()?;
        let found = check_disk(&vm.pulse, DRIVER, image.path())?;
        ensure!(found.durable_blocks > 0, "{found:?}");
    }
    Ok(())
}

#[test]
fn attacks_on_a_disk() -> anyhow::Result<()> {
    needs_kvm!();
    let image = image()?;
    let mut vm = with("mode1=hostile hostile=blk", disks(&[&image]))?;
    withstands(&mut vm, "blk")?;
    // None of them is a write that a disk could do.
    let allocated = std::os::unix::fs::MetadataExt::blocks(&image.as_file().metadata()?);
    ensure!(
        allocated == 0,
        "{allocated} blocks of the image were written"
    );
    vm.power_off()
}

/// Once a reset has ended the device writes nothing any more, however much it was at.
#[test]
fn resets_of_a_disk_with_requests_in_flight() -> anyhow::Result<()> {
    needs_kvm!();
    let image = image()?;
    let cmdline = "mode1=hostile hostile=blk attack=reset-in-flight";
    let vm = with(cmdline, disks(&[&image]))?;
    goes_on(&vm, "resets", 1500, |r| r.hostile.worked)?;
    vm.power_off()
}

/// One device is attacked while another, of the same kind, works.
#[test]
fn attacks_beside_a_disk_at_work() -> anyhow::Result<()> {
    needs_kvm!();
    let (at_work, victim) = (image()?, image()?);
    let recipe = Recipe::pulse(
        3,
        "ram=2M gap_us=500 mode1=blk dev1=0 mode2=hostile dev2=1 seed=7",
    );
    let devices = disks(&[&at_work, &victim]);
    let mut vm = Vm::up(&Recipe { devices, ..recipe })?;
    for _ in 0..3 {
        let made = vm.pulse.look()?.vcpus[2].hostile.worked;
        vm.pulse.wait("attacks", PATIENCE, |s| {
            s.vcpus[2].hostile.worked >= made + 20 || !s.faults().is_empty()
        })?;
        goes_on(&vm, "the disk at work", 100, requests)?;
        vm.must_move(Release::Current)?;
    }
    vm.is_well().with_context(|| vm.log())?;
    put_down(&vm)?;
    check_disk(&vm.pulse, DRIVER, at_work.path())?;
    vm.power_off()
}

fn net(queue_pairs: u8) -> Devices {
    let net = NetSpec {
        tap: wire::TAP.into(),
        mac: None,
        queue_pairs,
    };
    Devices {
        nets: vec![net],
        ..Devices::default()
    }
}

/// Frames are sent and come back, before and after each swap; a tap may drop some.
fn frames(cmdline: &str, pairs: u8, times: usize) -> anyhow::Result<()> {
    let mut vm = with(cmdline, net(pairs))?;
    works_over_swaps(&mut vm, times, |r| r.net.received)?;
    let seen = vm.pulse.look()?.vcpus[DRIVER].net;
    ensure!(seen.pairs == u64::from(pairs), "{seen:?}");
    vm.power_off()
}

#[test]
fn frames_on_a_tap() -> anyhow::Result<()> {
    needs_kvm!();
    if !wire::is_beside("frames_on_a_tap")? {
        return Ok(());
    }
    frames("mode1=net", 1, 12)
}

#[test]
fn frames_while_halted_on_two_pairs_of_queues() -> anyhow::Result<()> {
    needs_kvm!();
    if !wire::is_beside("frames_while_halted_on_two_pairs_of_queues")? {
        return Ok(());
    }
    frames("mode1=net wait=halt", 2, 12)
}

#[test]
fn attacks_on_a_network_device() -> anyhow::Result<()> {
    needs_kvm!();
    if !wire::is_beside("attacks_on_a_network_device")? {
        return Ok(());
    }
    let mut vm = with("mode1=hostile hostile=net", net(1))?;
    withstands(&mut vm, "net")?;
    vm.power_off()
}

fn vsock() -> Devices {
    Devices {
        vsock: Some(VsockSpec { cid: 42 }),
        ..Devices::default()
    }
}

/// Sends so much and reads it back.
fn round(stream: &mut BufReader<UnixStream>, number: u8, len: usize) -> anyhow::Result<()> {
    let sent: Vec<u8> = (0..len).map(|at| (at / 7) as u8 ^ number).collect();
    stream.get_mut().write_all(&sent)?;
    let mut back = vec![0; len];
    stream.read_exact(&mut back)?;
    ensure!(back == sent, "round {number} came back changed");
    Ok(())
}

/// One connection of the guest's and one of the host's live through all swaps.
fn sockets(cmdline: &str, times: u8) -> anyhow::Result<()> {
    let mut vm = with(&format!("{cmdline} port={HOST_PORT}"), vsock())?;
    echo(&vm.dir())?;
    goes_on(&vm, "records", 3, |r| r.vsock.rounds)?;
    let mut call = call(&vm.dir())?;
    for number in 0..times {
        // On its way back over the swap.
        round(&mut call, number, 40_000)?;
        call.get_mut().write_all(&[number; 1000])?;
        vm.must_move(Release::Current)?;
        let mut back = [0; 1000];
        call.read_exact(&mut back)?;
        ensure!(back == [number; 1000], "what was under way changed");
        goes_on(&vm, "records", 3, |r| r.vsock.rounds)?;
        vm.is_well().with_context(|| vm.log())?;
    }
    let seen = vm.pulse.look()?.vcpus[DRIVER].vsock;
    ensure!((seen.opened, seen.accepted) == (1, 1), "{seen:?}");
    vm.power_off()
}

#[test]
fn sockets_by_interrupts() -> anyhow::Result<()> {
    needs_kvm!();
    sockets("mode1=vsock", 12)
}

#[test]
fn sockets_while_halted() -> anyhow::Result<()> {
    needs_kvm!();
    sockets("mode1=vsock wait=halt", 12)
}

#[test]
fn attacks_on_sockets() -> anyhow::Result<()> {
    needs_kvm!();
    let mut vm = with("mode1=hostile hostile=vsock", vsock())?;
    withstands(&mut vm, "vsock")?;
    vm.power_off()
}
