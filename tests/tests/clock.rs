//! Clocks across swaps, in short; `make clock` takes the same figures in full length.

use std::time::Duration;

use anyhow::ensure;
use stillpoint_control::clock::Policy;
use stillpoint_control::report::Outcome;
use stillpoint_tests::cli::{must_refuse, vmm};
use stillpoint_tests::clocks::figures::{self, Part, Pause, must_keep};
use stillpoint_tests::clocks::rigged::{Portion, figures_on};
use stillpoint_tests::ground::ignores_tsc_offsets;
use stillpoint_tests::linux::images::Kernel;
use stillpoint_tests::needs_kvm;
use stillpoint_tests::releases::{self, Release};
use stillpoint_tests::rig;
use stillpoint_tests::swap::Terms;
use stillpoint_tests::vm::{Recipe, Vm};

#[test]
fn clock_timers_and_flags_over_swaps() -> anyhow::Result<()> {
    needs_kvm!();
    must_keep(&figures::swaps(20, |_| {})?.figures)
}

#[test]
fn a_periodic_timer_keeps_its_phase() -> anyhow::Result<()> {
    needs_kvm!();
    must_keep(&figures::periodic(10, false, |_| {})?)
}

#[test]
fn latecomers_step_no_clock() -> anyhow::Result<()> {
    needs_kvm!();
    must_keep(&figures::latecomers(Duration::from_secs(3))?)
}

#[test]
fn what_is_spoilt_is_caught() -> anyhow::Result<()> {
    needs_kvm!();
    must_keep(&figures::controls()?)
}

#[test]
fn a_pause_of_seconds() -> anyhow::Result<()> {
    needs_kvm!();
    must_keep(&figures::long_pause(Pause::SHORT)?)
}

#[test]
fn tscs_that_differ_stay_so() -> anyhow::Result<()> {
    needs_kvm!();
    must_keep(&figures::apart()?)
}

#[test]
fn hold_is_kept_or_refused_by_name() -> anyhow::Result<()> {
    needs_kvm!();
    must_keep(&figures::hold()?)
}

fn on_an_emulated_host(portion: Portion) -> anyhow::Result<()> {
    stillpoint_tests::needs!(rig::missing);
    must_keep(&figures_on(Kernel::Bookworm, portion, true)?)
}

/// On a KVM that moves a guest's TSC where it is told to.
#[test]
fn pulse_on_an_emulated_host() -> anyhow::Result<()> {
    on_an_emulated_host(Portion::Pulse)
}

/// Of the kernel that has a driver for vmclock.
#[test]
fn a_stock_guest_on_an_emulated_host() -> anyhow::Result<()> {
    on_an_emulated_host(Portion::Linux(Kernel::Backports, Part::Swaps))
}

/// Of the other, which boots with a vmclock all the same.
#[test]
fn pauses_of_a_stock_guest_on_an_emulated_host() -> anyhow::Result<()> {
    on_an_emulated_host(Portion::Linux(Kernel::Bookworm, Part::Pauses))
}

/// A machine whose every swap would be refused is not booted either.
#[test]
fn a_machine_that_can_not_be_held_is_refused() -> anyhow::Result<()> {
    needs_kvm!();
    if !ignores_tsc_offsets()? {
        eprintln!("SKIPPED a_machine_that_can_not_be_held_is_refused: this KVM moves TSCs");
        return Ok(());
    }
    let dir = tempfile::tempdir()?;
    let spec = serde_json::json!({
        "name": "held",
        "kernel": { "path": releases::pulse()? },
        "clock": { "policy": "hold", "correction": "ptp" },
    });
    let mut command = vmm()?;
    command.arg("run").args(["--spec", "-"]);
    command.arg("--dir").arg(dir.path().join("vm"));
    must_refuse(command, &spec.to_string())?.says(&["policy hold", "ignores TSC offsets"])
}

/// Whatever the host can do: late for ever is no wall clock.
#[test]
fn hold_without_a_correction_is_refused() -> anyhow::Result<()> {
    needs_kvm!();
    let mut vm = Vm::up(&Recipe::pulse(1, "ram=4M"))?;
    let terms = Terms {
        clock: Some(Policy::Hold),
        ..Terms::default()
    };
    let report = vm.swap(Release::Current, &terms)?;
    ensure!(report.outcome == Outcome::Kept, "{report:#?}");
    let why = report.reason.unwrap_or_default();
    ensure!(why.contains("nothing would correct"), "{why}");
    ensure!(report.blackout.host.is_zero(), "it was frozen for it");
    vm.is_well()?;
    vm.power_off()
}
