//! Swaps of guests whose virtio devices are at work, by drivers that count what they are owed; and
//! devices under attack.

use anyhow::{Context, ensure};
use stillpoint_guest_abi::pulse::Report;
use stillpoint_guest_abi::virtio::Driver;
use stillpoint_tests::devices::Devices;
use stillpoint_tests::needs_kvm;
use stillpoint_tests::patience::PATIENCE;
use stillpoint_tests::releases::Release;
use stillpoint_tests::vm::{Recipe, Vm};

/// The vCPU that drives the device; vCPU 0 has the console.
const DRIVER: usize = 1;

fn with(cmdline: &str, devices: Devices) -> anyhow::Result<Vm> {
    let recipe = Recipe::pulse(2, &format!("ram=2M gap_us=500 {cmdline}"));
    Vm::up(&Recipe { devices, ..recipe })
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
    let made = |r: &Report| r.hostile.each.iter().map(|t| u64::from(t.made)).sum();
    for _ in 0..3 {
        goes_on(&vm, "attacks", 60, made)?;
        vm.must_move(Release::Current)?;
    }
    let seen = goes_on(&vm, "attacks", 60, made)?.hostile;
    ensure!(seen.worked > 0 && seen.needs_reset > 0, "{seen:?}");
    vm.is_well()?;
    vm.power_off()
}
