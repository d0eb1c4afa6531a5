//! How a guest ends, or begins anew: by its own power register, and by the control socket; in
//! the process that booted it and in a successor.

use anyhow::{anyhow, bail, ensure};
use stillpoint_control::message::Handover;
use stillpoint_tests::console::Console;
use stillpoint_tests::guest::Snapshot;
use stillpoint_tests::needs_kvm;
use stillpoint_tests::patience::PATIENCE;
use stillpoint_tests::releases::Release;
use stillpoint_tests::swap::{Terms, wait_swapping};
use stillpoint_tests::vm::{Recipe, Vm};

const ONLINE: &str = "pulse: 2 vCPUs online";

fn guest() -> anyhow::Result<Vm> {
    Vm::up(&Recipe::pulse(2, "ram=8M duty=50"))
}

/// A guest in its second process.
fn swapped() -> anyhow::Result<Vm> {
    let mut vm = guest()?;
    vm.must_move(Release::Current)?;
    Ok(vm)
}

/// Types `poweroff`; the process must end well, and nobody answer any more.
fn powers_itself_off(mut vm: Vm) -> anyhow::Result<()> {
    Console::open(&vm)?.type_line("poweroff")?;
    ensure!(vm.wait_end()?.success(), "{}", vm.log());
    ensure!(vm.client().is_err(), "somebody answers");
    // Nothing of what it wrote before is lost.
    ensure!(vm.console()?.contains(ONLINE), "{:?}", vm.console());
    Ok(())
}

/// Types `reset`; the guest must begin anew, in the same process, with the same viewer.
fn resets_itself(mut vm: Vm) -> anyhow::Result<()> {
    let pid = vm.pid();
    vm.pulse
        .wait("some life", PATIENCE, |s| s.vcpus[0].counter > 500)?;
    let mut console = Console::open(&vm)?;
    console.wait(ONLINE, 1)?;
    console.type_line("reset")?;
    console.wait(ONLINE, 2)?;
    let anew = |s: &Snapshot| s.globals.online == 2 && s.vcpus.iter().all(|v| v.counter > 0);
    let seen = vm.pulse.wait("a new life", PATIENCE, anew)?;
    ensure!(seen.vcpus[1].mmio_ops == 0, "its counters went on");
    ensure!(
        vm.pid() == pid && vm.ended()?.is_none(),
        "the process ended"
    );
    vm.is_well()?;
    // And it is a guest like any other.
    vm.must_move(Release::Compat)?;
    vm.is_well()?;
    console.ask("ping", "pong")?;
    vm.power_off()
}

#[test]
fn power_off_by_the_guest() -> anyhow::Result<()> {
    needs_kvm!();
    powers_itself_off(guest()?)
}

#[test]
fn power_off_by_the_guest_after_a_swap() -> anyhow::Result<()> {
    needs_kvm!();
    powers_itself_off(swapped()?)
}

#[test]
fn reset_by_the_guest() -> anyhow::Result<()> {
    needs_kvm!();
    resets_itself(guest()?)
}

#[test]
fn reset_by_the_guest_after_a_swap() -> anyhow::Result<()> {
    needs_kvm!();
    resets_itself(swapped()?)
}

#[test]
fn power_off_from_outside() -> anyhow::Result<()> {
    needs_kvm!();
    guest()?.power_off()?;
    swapped()?.power_off()
}

#[test]
fn the_control_socket_answers_who_it_is() -> anyhow::Result<()> {
    needs_kvm!();
    let mut vm = guest()?;
    for release in [Release::Current, Release::Compat] {
        if release != Release::Current {
            vm.must_move(release)?;
        }
        let (name, process) = vm.client()?.hello(None)?;
        ensure!(name == "pulse" && process.pid == vm.pid(), "{process:?}");
        let told = vm.client()?.describe()?;
        ensure!(told.spec == *vm.spec(), "{:?}", told.spec);
        ensure!(told.release.version == release.version(), "{told:?}");
        ensure!(told.epoch == vm.owner()?.epoch(), "{told:?}");
    }
    vm.power_off()
}

#[test]
fn a_guest_that_ends_while_a_swap_is_prepared() -> anyhow::Result<()> {
    needs_kvm!();
    let mut vm = guest()?;
    let mut console = Console::open(&vm)?;
    let mut successor = vm.start_successor(Release::Faulty("adopt=slow:1000"))?;
    let (client, onlooker) = (vm.client()?, vm.onlooker()?);
    let outcome = std::thread::scope(|scope| {
        let asked = scope.spawn(|| successor.ask(&client, &Terms::default(), |_| {}));
        wait_swapping(&onlooker)?;
        console.type_line("poweroff")?;
        asked.join().map_err(|_| anyhow!("panicked"))?
    })??;
    let Handover::Kept { report } = outcome else {
        bail!("a guest that was switched off has moved");
    };
    let reason = report.reason.unwrap_or_default();
    ensure!(reason.contains("switched itself off"), "{reason}");
    ensure!(vm.wait_end()?.success(), "{}", vm.log());
    Ok(())
}
