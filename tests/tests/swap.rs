//! A guest lives through swaps of its VMM between two releases: on one vCPU or many, ten times
//! or two hundred.

use std::io::ErrorKind;
use std::time::Duration;

use anyhow::ensure;
use stillpoint_control::report::SwapReport;
use stillpoint_tests::patience::PATIENCE;
use stillpoint_tests::releases::Release;
use stillpoint_tests::start::Manner;
use stillpoint_tests::vm::{Recipe, Vm};
use stillpoint_tests::{ground, needs_kvm};

/// What most clock errors stay within, ns.
const USUAL_CLOCK_ERROR_NS: u64 = 12;

/// Upgrade and downgrade in turn.
fn release(swap: usize) -> Release {
    match swap % 2 {
        0 => Release::Compat,
        _ => Release::Current,
    }
}

/// Swaps `count` times, each followed by progress on every vCPU.
fn swap_in_turn(vm: &mut Vm, count: usize) -> anyhow::Result<Vec<SwapReport>> {
    let mut reports = Vec::with_capacity(count);
    for swap in 0..count {
        let report = vm.must_move(release(swap))?;
        // The older release speaks format 1 alone, so every one of these swaps uses it.
        ensure!(report.state_format == 1, "format {}", report.state_format);
        vm.is_well()?;
        reports.push(report);
    }
    Ok(reports)
}

fn most_clocks_are_close(reports: &[SwapReport]) -> anyhow::Result<()> {
    let error = |r: &SwapReport| r.clock.as_ref().and_then(|c| c.kvmclock_error_ns);
    let errors: Vec<_> = reports.iter().filter_map(error).collect();
    let close = |e: &&i64| e.unsigned_abs() <= USUAL_CLOCK_ERROR_NS;
    ensure!(
        errors.iter().filter(close).count() * 2 > reports.len(),
        "kvmclock errors: {errors:?}"
    );
    Ok(())
}

/// The guest is whole after `count` swaps, and passes over its RAM go on.
fn is_whole(vm: &Vm, count: usize) -> anyhow::Result<()> {
    let before = vm.pulse.look()?;
    let passed = |s: &stillpoint_tests::guest::Snapshot| {
        let pairs = s.vcpus.iter().zip(&before.vcpus);
        pairs
            .into_iter()
            .all(|(now, then)| now.ram_passes > then.ram_passes + 1)
    };
    vm.pulse
        .wait("passes over the RAM pattern", PATIENCE, passed)?;
    vm.is_well()?;
    let told = vm.client()?.describe()?;
    ensure!(told.swaps == count as u64, "{} swaps counted", told.swaps);
    Ok(())
}

fn swaps_between_releases(vcpus: u8, count: usize, cmdline: &str) -> anyhow::Result<()> {
    let mut vm = Vm::up(&Recipe::pulse(vcpus, cmdline))?;
    let reports = swap_in_turn(&mut vm, count)?;
    most_clocks_are_close(&reports)?;
    is_whole(&vm, count)?;
    vm.power_off()
}

#[test]
fn one_vcpu() -> anyhow::Result<()> {
    needs_kvm!();
    swaps_between_releases(1, 10, "ram=8M")
}

#[test]
fn two_vcpus() -> anyhow::Result<()> {
    needs_kvm!();
    swaps_between_releases(2, 10, "ram=32M")
}

#[test]
fn four_vcpus() -> anyhow::Result<()> {
    needs_kvm!();
    swaps_between_releases(4, 10, "ram=16M duty=40")
}

#[test]
fn eight_vcpus() -> anyhow::Result<()> {
    needs_kvm!();
    swaps_between_releases(8, 10, "ram=16M duty=20")
}

#[test]
fn each_vcpu_tells_how_long_it_was_out_and_what_it_waited_for_a_core() -> anyhow::Result<()> {
    needs_kvm!();
    const VCPUS: u8 = 8;
    // None ever rests: where they outnumber the cores, some wait while others are saved, loaded and let in.
    let mut vm = Vm::up(&Recipe::pulse(VCPUS, "ram=8M gap_us=5000"))?;
    let report = vm.must_move(Release::Current)?;
    let blackout = report.blackout;
    ensure!(blackout.vcpus.len() == usize::from(VCPUS), "{blackout:?}");
    for vcpu in &blackout.vcpus {
        ensure!(!vcpu.out.is_zero() && vcpu.out <= blackout.host, "{vcpu:?}");
    }
    let waited: Duration = blackout.vcpus.iter().map(|vcpu| vcpu.queued).sum();
    ensure!(
        ground::cores() >= VCPUS.into() || !waited.is_zero(),
        "{blackout:?}"
    );
    vm.is_well()?;
    vm.power_off()
}

#[test]
fn two_hundred_swaps_in_a_row() -> anyhow::Result<()> {
    needs_kvm!();
    swaps_between_releases(2, 200, "ram=16M duty=50")
}

#[test]
fn a_release_to_itself_in_the_newest_format() -> anyhow::Result<()> {
    needs_kvm!();
    let mut vm = Vm::up(&Recipe::pulse(2, "ram=8M"))?;
    for _ in 0..3 {
        let report = vm.must_move(Release::Current)?;
        ensure!(report.state_format == 3, "format {}", report.state_format);
        vm.is_well()?;
    }
    vm.power_off()
}

/// How the scheduler weighs our session, where it groups by session.
fn autogroup() -> anyhow::Result<Option<String>> {
    match std::fs::read_to_string("/proc/self/autogroup") {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        read => Ok(Some(read?)),
    }
}

#[test]
fn a_session_shared_with_others_is_left_as_it_is() -> anyhow::Result<()> {
    needs_kvm!();
    let before = autogroup()?;
    let manner = Manner {
        in_our_session: true,
        ..Manner::default()
    };
    let recipe = Recipe::pulse(1, "ram=4M");
    let mut vm = Vm::up(&Recipe { manner, ..recipe })?;
    // The predecessor that retires makes itself small, and nobody else.
    vm.must_move(Release::Current)?;
    vm.is_well()?;
    ensure!(
        autogroup()? == before,
        "{before:?} became {:?}",
        autogroup()?
    );
    vm.power_off()
}

/// What a pass over the RAM after a swap costs more than one before it, by the guest's own count of its work.
fn lost_after(vm: &mut Vm, to: Release) -> anyhow::Result<Duration> {
    let swap = vm.must_move(to)?.swap;
    let report = vm.report_of_recovery(&swap)?;
    let [guest] = &report.recovery[..] else {
        anyhow::bail!("not of the guest alone: {:?}", report.recovery);
    };
    ensure!(
        guest.of == "guest" && guest.before_per_s > 0 && guest.lost <= guest.watched,
        "{guest:?}"
    );
    if let Some(until) = guest.until_ns.map(Duration::from_nanos) {
        ensure!(until <= guest.watched, "{guest:?}");
    }
    Ok(guest.lost)
}

#[test]
fn what_a_guest_loses_after_a_swap_is_told_and_page_tables_that_were_not_filled_show()
-> anyhow::Result<()> {
    needs_kvm!();
    let mut recipe = Recipe::pulse(1, "ram=256M");
    recipe.memory_mib = 384;
    let mut vm = Vm::up(&recipe)?;
    vm.pulse.wait("a pass over all of it", PATIENCE, |seen| {
        seen.vcpus.iter().all(|vcpu| vcpu.ram_passes > 0)
    })?;
    let (mut filled, mut faulted) = (Vec::new(), Vec::new());
    for _ in 0..3 {
        filled.push(lost_after(&mut vm, Release::Current)?);
        faulted.push(lost_after(&mut vm, Release::Faulty("spoil=populate"))?);
    }
    // The least that any of the ones lost, and the most of the others: the machine's noise is in both.
    ensure!(
        filled.iter().min() < faulted.iter().max(),
        "filled {filled:?}, faulted {faulted:?}"
    );
    vm.is_well()?;
    vm.power_off()
}
