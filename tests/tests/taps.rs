//! A guest's tap, from outside: no frame is lost by swaps, nobody else gets it meanwhile, and what is
//! no tap.

use std::process::Command;

use anyhow::{Context, ensure};
use stillpoint_control::spec::NetSpec;
use stillpoint_guest_abi::pulse::Report;
use stillpoint_guest_abi::virtio::Net;
use stillpoint_tests::cli::{Refusal, must_refuse, vmm};
use stillpoint_tests::console::Console;
use stillpoint_tests::needs_kvm;
use stillpoint_tests::patience::PATIENCE;
use stillpoint_tests::releases::{self, Release};
use stillpoint_tests::vm::{Recipe, Vm};
use stillpoint_tests::wire::{self, TAP};

/// The vCPU that drives the device; vCPU 0 has the console.
const DRIVER: usize = 1;

fn net(tap: &str, queue_pairs: u8) -> NetSpec {
    NetSpec {
        tap: tap.into(),
        mac: None,
        queue_pairs,
    }
}

fn recipe(cmdline: &str, nets: &[NetSpec]) -> Recipe {
    let mut recipe = Recipe::pulse(2, &format!("ram=2M gap_us=500 {cmdline}"));
    recipe.devices.nets = nets.to_vec();
    recipe
}

/// Waits until so many frames more have come back than when it began; gives the counts.
fn frames_come(vm: &Vm, more: u64) -> anyhow::Result<Net> {
    let received = |report: &Report| report.net.received;
    let from = received(&vm.pulse.look()?.vcpus[DRIVER]);
    let seen = vm.pulse.wait("frames that come back", PATIENCE, |s| {
        received(&s.vcpus[DRIVER]) >= from + more || !s.faults().is_empty()
    })?;
    ensure!(
        seen.faults().is_empty(),
        "{:#?}\n{}",
        seen.faults(),
        vm.log()
    );
    Ok(seen.vcpus[DRIVER].net)
}

/// No frame that was sent over these swaps is missing, and none came twice.
fn no_frame_is_lost(pairs: u8, cmdline: &str) -> anyhow::Result<()> {
    let mut vm = Vm::up(&recipe(cmdline, &[net(TAP, pairs)]))?;
    // What is sent before the host has seen the tap's carrier is lost; more frames than the guest
    // remembers later that shows, and no more after it.
    let before = frames_come(&vm, 4096)?;
    ensure!(before.pairs == u64::from(pairs), "{before:?}");
    for _ in 0..20 {
        frames_come(&vm, 50)?;
        vm.must_move(Release::Current)?;
        vm.is_well().with_context(|| vm.log())?;
    }
    let after = frames_come(&vm, 4096)?;
    ensure!(after.lost == before.lost, "{before:?} {after:?}");
    // The guest begins anew, in the same process and with the same tap.
    let mut console = Console::open(&vm)?;
    console.type_line("reset")?;
    console.wait("pulse: 2 vCPUs online", 2)?;
    frames_come(&vm, 100)?;
    vm.must_move(Release::Current)?;
    frames_come(&vm, 100)?;
    vm.is_well()?;
    vm.power_off()
}

#[test]
fn no_frame_is_lost_by_swaps() -> anyhow::Result<()> {
    needs_kvm!();
    if !wire::is_beside("no_frame_is_lost_by_swaps")? {
        return Ok(());
    }
    no_frame_is_lost(1, "mode1=net")
}

#[test]
fn no_frame_is_lost_by_swaps_with_several_queues() -> anyhow::Result<()> {
    needs_kvm!();
    if !wire::is_beside("no_frame_is_lost_by_swaps_with_several_queues")? {
        return Ok(());
    }
    no_frame_is_lost(4, "mode1=net wait=poll")
}

/// Boots with this interface, which must be refused.
fn refused(net: &NetSpec) -> anyhow::Result<Refusal> {
    let dir = tempfile::tempdir()?;
    let spec = serde_json::json!({
        "name": "nets",
        "kernel": { "path": releases::pulse()? },
        "nets": [net],
    });
    let mut command = vmm()?;
    command.arg("run").args(["--spec", "-"]);
    command.arg("--dir").arg(dir.path().join("vm"));
    must_refuse(command, &spec.to_string())
}

#[test]
fn what_is_no_tap() -> anyhow::Result<()> {
    if !wire::is_beside("what_is_no_tap")? {
        return Ok(());
    }
    let tap = ["tuntap", "add", "dev", "t1", "mode", "tap"];
    ensure!(Command::new("ip").args(tap).status()?.success());
    let field = "field `nets.tap`";
    let remedy = "ip tuntap add dev t9 mode tap";
    refused(&net("t9", 1))?.says(&[field, "no interface `t9`", remedy])?;
    refused(&net("lo", 1))?.says(&[field, "`lo`", "not a tap"])?;
    let queues = "field `nets.queue_pairs`";
    refused(&net("t1", 2))?.says(&[queues, "`t1`", "one queue"])
}

#[test]
fn a_tap_of_another_guest() -> anyhow::Result<()> {
    needs_kvm!();
    if !wire::is_beside("a_tap_of_another_guest")? {
        return Ok(());
    }
    let mut vm = Vm::up(&recipe("", &[net(TAP, 1)]))?;
    for _ in 0..2 {
        refused(&net(TAP, 1))?.says(&["field `nets.tap`", "`t0`", "another process"])?;
        vm.must_move(Release::Current)?;
    }
    vm.is_well()?;
    vm.power_off()?;
    Vm::up(&recipe("", &[net(TAP, 1)]))?.power_off()
}
