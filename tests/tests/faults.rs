//! Swaps in which one side fails: whoever owns the guest by the ownership word runs it on, whole,
//! and a later swap moves it as if nothing had been.
//!
//! The failing side is a release built with fault points; the table of points is in
//! `vmm/src/faults.rs`.

use std::os::fd::AsFd;
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use stillpoint_control::client::ClientError;
use stillpoint_control::message::Handover;
use stillpoint_control::ownership::{Epoch, Owner};
use stillpoint_control::report::{Outcome, SwapReport};
use stillpoint_tests::needs_kvm;
use stillpoint_tests::releases::Release;
use stillpoint_tests::swap::Terms;
use stillpoint_tests::vm::{Recipe, Vm};

/// A budget that a hanging successor breaks soon.
const SHORT: Duration = Duration::from_millis(200);
/// How late a busy machine may notice that a budget is over.
const SLACK: Duration = Duration::from_secs(2);

fn guest() -> anyhow::Result<Vm> {
    Vm::up(&Recipe::pulse(2, "ram=8M duty=50"))
}

fn guest_of(release: Release) -> anyhow::Result<Vm> {
    let recipe = Recipe::pulse(2, "ram=8M duty=50");
    Vm::up(&Recipe { release, ..recipe })
}

fn held(epoch: u64) -> Owner {
    Owner::Held(Epoch(epoch))
}

fn taken(epoch: u64) -> Owner {
    Owner::Taken(Epoch(epoch))
}

/// The guest is where it was, whole, owned as `owner` says, and a good swap moves it.
fn lives_on(mut vm: Vm, pid: u32, owner: Owner) -> anyhow::Result<()> {
    ensure!(vm.pid() == pid, "another process has the guest");
    ensure!(vm.owner()? == owner, "the word says {:?}", vm.owner()?);
    vm.is_well()?;
    vm.must_move(Release::Current)?;
    let next = Owner::Taken(owner.epoch().next());
    ensure!(vm.owner()? == next, "the word says {:?}", vm.owner()?);
    vm.is_well()?;
    vm.power_off()
}

/// Offers the guest to a successor that fails; it must stay. Gives the report.
fn must_stay(vm: &mut Vm, to: Release, terms: &Terms) -> anyhow::Result<SwapReport> {
    let report = vm.swap(to, terms)?;
    ensure!(report.outcome == Outcome::Kept, "{}", report.outcome);
    ensure!(report.reason.is_some(), "kept for no reason");
    let last = vm.client()?.last_report()?.context("no report kept")?;
    ensure!(last == report, "it reports something else now: {last:#?}");
    Ok(report)
}

/// A successor that fails by `fault`; the guest stays, the word ends as `owner`.
fn stays(fault: &'static str, terms: Terms, owner: Owner) -> anyhow::Result<SwapReport> {
    let mut vm = guest()?;
    let pid = vm.pid();
    let report = must_stay(&mut vm, Release::Faulty(fault), &terms)?;
    lives_on(vm, pid, owner)?;
    Ok(report)
}

/// As [`stays`], before anything was frozen.
fn never_frozen(fault: &'static str, terms: Terms) -> anyhow::Result<()> {
    let report = stays(fault, terms, held(0))?;
    ensure!(report.blackout.host.is_zero(), "{:?}", report.blackout);
    Ok(())
}

/// As [`stays`], ended by the predecessor's own timer.
fn ended_by_budget(fault: &'static str) -> anyhow::Result<SwapReport> {
    let report = stays(fault, Terms::budget(SHORT), held(1))?;
    let frozen = report.blackout.host;
    ensure!(frozen <= SHORT + SLACK, "frozen for {frozen:?}");
    Ok(report)
}

/// As [`stays`], ended by the successor's failure long before the budget is.
fn ended_at_once(fault: &'static str) -> anyhow::Result<()> {
    let terms = Terms::default();
    let report = stays(fault, terms, held(1))?;
    let frozen = report.blackout.host;
    ensure!(frozen < terms.budget / 2, "frozen for {frozen:?}");
    Ok(())
}

/// A successor that is slow within its budget has the guest.
fn slow_but_moves(fault: &'static str, in_blackout: Option<Duration>) -> anyhow::Result<()> {
    // Never asleep, or it would see less of the pause; and it logs no lesser gaps, of which a busy
    // machine has so many that they push out the one of the pause.
    let mut vm = Vm::up(&Recipe::pulse(2, "ram=8M gap_us=5000"))?;
    let report = vm.must_move(Release::Faulty(fault))?;
    if let Some(least) = in_blackout {
        let blackout = report.blackout.host;
        ensure!(blackout >= least, "a blackout of {blackout:?}");
        let seen = report.blackout.guest_worst().context("no gap seen")?;
        ensure!(seen >= least, "the guest saw {seen:?}");
        // A successor that is slow is not a host that is short of cores.
        let unqueued = report.blackout.unqueued_worst().context("no stamps")?;
        ensure!(unqueued >= least / 2, "less waits for a core: {unqueued:?}");
    }
    let pid = vm.pid();
    lives_on(vm, pid, taken(1))
}

fn short_brownout() -> Terms {
    Terms {
        brownout: Duration::from_millis(500),
        ..Terms::default()
    }
}

// Adopting: the guest was never frozen.

#[test]
fn adopt_crash() -> anyhow::Result<()> {
    needs_kvm!();
    never_frozen("adopt=crash", Terms::default())
}

#[test]
fn adopt_fail() -> anyhow::Result<()> {
    needs_kvm!();
    never_frozen("adopt=fail", Terms::default())
}

#[test]
fn adopt_hang() -> anyhow::Result<()> {
    needs_kvm!();
    never_frozen("adopt=hang", short_brownout())
}

#[test]
fn adopt_slow() -> anyhow::Result<()> {
    needs_kvm!();
    slow_but_moves("adopt=slow:100", None)
}

// Loading: frozen and sealed, taken back by unsealing.

#[test]
fn load_crash() -> anyhow::Result<()> {
    needs_kvm!();
    ended_at_once("load=crash")
}

#[test]
fn load_fail() -> anyhow::Result<()> {
    needs_kvm!();
    ended_at_once("load=fail")
}

#[test]
fn load_hang() -> anyhow::Result<()> {
    needs_kvm!();
    ended_by_budget("load=hang").map(drop)
}

#[test]
fn load_slow() -> anyhow::Result<()> {
    needs_kvm!();
    slow_but_moves("load=slow:50", Some(Duration::from_millis(50)))
}

#[test]
fn loaded_crash() -> anyhow::Result<()> {
    needs_kvm!();
    ended_at_once("loaded=crash")
}

#[test]
fn loaded_fail() -> anyhow::Result<()> {
    needs_kvm!();
    ended_at_once("loaded=fail")
}

#[test]
fn loaded_hang() -> anyhow::Result<()> {
    needs_kvm!();
    ended_by_budget("loaded=hang").map(drop)
}

#[test]
fn loaded_slow() -> anyhow::Result<()> {
    needs_kvm!();
    slow_but_moves("loaded=slow:50", Some(Duration::from_millis(50)))
}

#[test]
fn too_slow_a_load_is_not_followed_by_giving_up() -> anyhow::Result<()> {
    needs_kvm!();
    // It loads in time, but what follows would cost as much again.
    let report = ended_by_budget("load=slow:150")?;
    let reason = report.reason.unwrap_or_default();
    ensure!(reason.contains("budget"), "{reason}");
    Ok(())
}

// Taking: given up, and taken back by the ownership word.

#[test]
fn take_crash() -> anyhow::Result<()> {
    needs_kvm!();
    ended_at_once("take=crash")
}

#[test]
fn take_fail() -> anyhow::Result<()> {
    needs_kvm!();
    ended_at_once("take=fail")
}

#[test]
fn take_hang() -> anyhow::Result<()> {
    needs_kvm!();
    let report = ended_by_budget("take=hang")?;
    let reason = report.reason.unwrap_or_default();
    ensure!(reason.contains("taken back"), "{reason}");
    Ok(())
}

#[test]
fn take_slow() -> anyhow::Result<()> {
    needs_kvm!();
    slow_but_moves("take=slow:50", Some(Duration::from_millis(50)))
}

#[test]
fn a_successor_that_takes_too_late_finds_the_guest_reclaimed() -> anyhow::Result<()> {
    needs_kvm!();
    let mut vm = guest()?;
    let pid = vm.pid();
    let mut late = vm.start_successor(Release::Faulty("take=slow:1500"))?;
    let outcome = late.ask(&vm.client()?, &Terms::budget(SHORT), |_| {})??;
    ensure!(matches!(outcome, Handover::Kept { .. }), "{outcome:?}");
    // Not killed: it wakes up, finds that the word is not its own, and leaves by itself.
    ensure!(!late.wait_end()?.success(), "it ended well");
    let log = vm.log();
    ensure!(log.contains("not ours to take"), "{log}");
    lives_on(vm, pid, held(1))
}

#[test]
fn a_successor_killed_right_after_its_adoption() -> anyhow::Result<()> {
    needs_kvm!();
    let mut vm = guest()?;
    let pid = vm.pid();
    // It hangs where the state has come, so that it is killed before it could take anything.
    let mut successor = vm.start_successor(Release::Faulty("load=hang"))?;
    let request = successor.request(&Terms::default())?;
    let client = vm.client()?;
    let socket = successor.socket.take().context("its socket")?;
    let state = successor.state.try_clone()?;
    let mut killed = Ok(());
    let outcome = client.hand_over(&request, socket.try_clone()?, state.as_fd(), |phase| {
        if phase.name == "adopt" {
            killed = successor.kill();
        }
    })?;
    killed?;
    let Handover::Kept { report } = outcome else {
        bail!("it moved to a dead process");
    };
    let frozen = report.blackout.host;
    ensure!(
        frozen < Terms::default().budget / 2,
        "frozen for {frozen:?}"
    );
    lives_on(vm, pid, held(1))
}

#[test]
fn many_failures_in_a_row_leave_no_trace() -> anyhow::Result<()> {
    needs_kvm!();
    let mut vm = guest()?;
    let pid = vm.pid();
    let faults = [
        "adopt=fail",
        "load=crash",
        "loaded=fail",
        "take=crash",
        "take=fail",
    ];
    for fault in faults.into_iter().cycle().take(20) {
        must_stay(&mut vm, Release::Faulty(fault), &Terms::default())?;
        vm.is_well()?;
    }
    // Each attempt that was sealed had a number of its own.
    lives_on(vm, pid, held(16))
}

// The predecessor fails.

#[test]
fn the_predecessor_fails_when_frozen() -> anyhow::Result<()> {
    needs_kvm!();
    predecessor_fails("frozen=fail", held(0))
}

#[test]
fn the_predecessor_fails_when_sealed() -> anyhow::Result<()> {
    needs_kvm!();
    predecessor_fails("sealed=fail", held(1))
}

fn predecessor_fails(fault: &'static str, owner: Owner) -> anyhow::Result<()> {
    let mut vm = guest_of(Release::Faulty(fault))?;
    let pid = vm.pid();
    let mut successor = vm.start_successor(Release::Current)?;
    let outcome = successor.ask(&vm.client()?, &Terms::default(), |_| {})??;
    ensure!(matches!(outcome, Handover::Kept { .. }), "{outcome:?}");
    ensure!(!successor.wait_end()?.success(), "the successor ended well");
    ensure!(vm.pid() == pid && vm.owner()? == owner, "{:?}", vm.owner()?);
    vm.is_well()
}

#[test]
fn the_predecessor_panics_when_frozen() -> anyhow::Result<()> {
    needs_kvm!();
    predecessor_panics("frozen=panic", held(0))
}

#[test]
fn the_predecessor_panics_when_sealed() -> anyhow::Result<()> {
    needs_kvm!();
    predecessor_panics("sealed=panic", held(1))
}

/// A bug in the handover costs the swap, not the guest.
fn predecessor_panics(fault: &'static str, owner: Owner) -> anyhow::Result<()> {
    let mut vm = guest_of(Release::Faulty(fault))?;
    let pid = vm.pid();
    let mut successor = vm.start_successor(Release::Current)?;
    match successor.ask(&vm.client()?, &Terms::default(), |_| {})? {
        Err(ClientError::Refused { message, .. }) if message.contains("panicked") => {}
        other => bail!("a predecessor that panicked says {other:?}"),
    }
    ensure!(!successor.wait_end()?.success(), "the successor ended well");
    ensure!(vm.pid() == pid && vm.owner()? == owner, "{:?}", vm.owner()?);
    vm.is_well()
}

/// What the daemon hears of a predecessor that dies on the way.
fn dies(outcome: Result<Handover, ClientError>) -> anyhow::Result<()> {
    match outcome {
        Err(ClientError::Frame(_)) => Ok(()),
        other => bail!("a dead predecessor says {other:?}"),
    }
}

#[test]
fn the_predecessor_crashes_sealed_and_the_successor_takes_over() -> anyhow::Result<()> {
    needs_kvm!();
    let mut vm = guest_of(Release::Faulty("sealed=crash"))?;
    let mut successor = vm.start_successor(Release::Current)?;
    dies(successor.ask(&vm.client()?, &Terms::default(), |_| {})?)?;
    goes_on_in(vm, successor)
}

#[test]
fn the_predecessor_is_killed_sealed_and_the_successor_takes_over() -> anyhow::Result<()> {
    needs_kvm!();
    let mut vm = guest_of(Release::Faulty("sealed=hang"))?;
    let mut successor = vm.start_successor(Release::Current)?;
    let client = vm.client()?;
    let terms = Terms::default();
    std::thread::scope(|scope| {
        let asked = scope.spawn(|| successor.ask(&client, &terms, |_| {}));
        let sealed = || Ok((vm.ownership.read()? == Owner::Sealed(Epoch(1))).then_some(()));
        let patience = stillpoint_tests::patience::PATIENCE;
        let waited = stillpoint_tests::patience::wait_for("the seal", patience, sealed);
        vm.kill()?;
        waited?;
        dies(asked.join().map_err(|_| anyhow::anyhow!("panicked"))??)
    })?;
    goes_on_in(vm, successor)
}

/// The predecessor is dead, and the successor has the guest.
fn goes_on_in(mut vm: Vm, successor: stillpoint_tests::swap::Successor) -> anyhow::Result<()> {
    let swap = successor.swap.clone();
    ensure!(!vm.inherit(successor)?.success(), "the predecessor lives");
    let report = vm.report(&swap)?;
    ensure!(report.outcome == Outcome::Moved, "{report:#?}");
    let pid = vm.pid();
    lives_on(vm, pid, taken(1))
}

#[test]
fn the_predecessor_crashes_before_the_seal_and_the_guest_is_gone() -> anyhow::Result<()> {
    needs_kvm!();
    let mut vm = guest_of(Release::Faulty("frozen=crash"))?;
    let mut successor = vm.start_successor(Release::Current)?;
    dies(successor.ask(&vm.client()?, &Terms::default(), |_| {})?)?;
    ensure!(!successor.wait_end()?.success(), "the successor ended well");
    ensure!(!vm.wait_end()?.success(), "the predecessor lives");
    ensure!(vm.owner()? == held(0), "{:?}", vm.owner()?);
    ensure!(vm.client().is_err(), "somebody answers");
    Ok(())
}
