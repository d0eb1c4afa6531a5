//! Guests whose RAM outlives the kernel: stored for a jump, taken back, revived once and never twice.
//! The jump itself is in `rig.rs`; here the VMM is killed in its place, and the carve-out is a file.

use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, ensure};
use stillpoint_carveout::area::Place;
use stillpoint_carveout::layout::Extent;
use stillpoint_carveout::map::Device;
use stillpoint_carveout::mark::Mark;
use stillpoint_carveout::record::Label;
use stillpoint_control::message::GuestState;
use stillpoint_control::report::{Outcome, SwapReport};
use stillpoint_tests::daemon::Daemon;
use stillpoint_tests::needs_kvm;
use stillpoint_tests::patience::{PATIENCE, wait_for};
use stillpoint_tests::releases::{self, Release};
use stillpoint_tests::swap::Terms;
use stillpoint_tests::vm::{Ram, Recipe, Vm};

const SWAP: &str = "k1";
const NONCE: &str = "0123456789abcdef";
/// Longer than any test.
const LONG: Duration = Duration::from_secs(30);

fn guest() -> anyhow::Result<Vm> {
    guest_in(Ram::Carved)
}

fn guest_in(ram: Ram) -> anyhow::Result<Vm> {
    Vm::up(&Recipe {
        ram,
        memory_mib: 64,
        ..Recipe::pulse(2, "ram=16M duty=50")
    })
}

/// The place of the guest's record.
fn place(vm: &Vm) -> anyhow::Result<Place> {
    let at = vm.spec().memory.carve_out.as_ref().context("a place")?;
    let extent = Extent {
        start: at.record,
        len: at.record_len,
    };
    let device = match at.is_memfd() {
        true => Device::of(&at.path, vm.client()?.lend_guest()?.0)?,
        false => Device::open(&at.path)?,
    };
    Ok(Place::of(&device, extent)?)
}

fn counters(vm: &Vm) -> anyhow::Result<Vec<u64>> {
    let seen = vm.pulse.look()?;
    Ok(seen.vcpus.iter().map(|vcpu| vcpu.counter).collect())
}

fn stands_still(vm: &Vm) -> anyhow::Result<()> {
    let before = counters(vm)?;
    std::thread::sleep(Duration::from_millis(200));
    let after = counters(vm)?;
    ensure!(before == after, "it runs: {before:?} {after:?}");
    ensure!(vm.client()?.describe()?.state == GuestState::Frozen);
    Ok(())
}

/// All of the carve-out's bytes.
fn bytes(vm: &Vm) -> anyhow::Result<Vec<u8>> {
    let at = vm.spec().memory.carve_out.as_ref().context("a place")?;
    Ok(std::fs::read(&at.path)?)
}

fn report(vm: &Vm) -> anyhow::Result<SwapReport> {
    wait_for("the report", PATIENCE, || Ok(vm.client()?.last_report()?))
}

#[test]
fn a_guest_that_nobody_takes_along_runs_on_and_its_record_is_of_the_past() -> anyhow::Result<()> {
    needs_kvm!();
    let mut vm = guest()?;
    let record = place(&vm)?;
    // By the ceiling, with nobody there.
    vm.client()?
        .store(SWAP, NONCE, Duration::from_millis(1500))?;
    ensure!(record.mark() == Mark::Stored, "{}", record.mark());
    ensure!(record.read()?.label.nonce == NONCE);
    stands_still(&vm)?;
    vm.is_well()?;
    ensure!(record.mark() == Mark::Withdrawn, "{}", record.mark());
    let told = report(&vm)?;
    ensure!(told.outcome == Outcome::Resumed, "{told:#?}");
    // By whoever asked for it; the jump that was said to come has moved the ceiling.
    let client = vm.client()?;
    client.store("k2", NONCE, Duration::from_millis(700))?;
    client.await_jump("k2", LONG)?;
    std::thread::sleep(Duration::from_millis(900));
    stands_still(&vm)?;
    let told = vm.client()?.resume("k2")?;
    ensure!(
        told.outcome == Outcome::Resumed && told.reason.is_none(),
        "{told:#?}"
    );
    ensure!(record.mark() == Mark::Withdrawn, "{}", record.mark());
    vm.is_well()?;
    let error = vm.client()?.await_jump("k2", LONG).expect_err("it runs");
    ensure!(error.to_string().contains("k2"), "{error}");
    // What was withdrawn is never run: not even when its VMM is gone.
    let error = vm.revive(NONCE).expect_err("withdrawn").to_string();
    ensure!(error.contains("marked as withdrawn"), "{error}");
    Ok(())
}

#[test]
fn a_stored_guest_goes_on_elsewhere_once() -> anyhow::Result<()> {
    needs_kvm!();
    goes_on_elsewhere_once(guest()?)
}

/// Its memfd is all that there is of it, as live update hands it over.
#[test]
fn a_guest_that_is_stored_in_its_memfd_goes_on_elsewhere_once() -> anyhow::Result<()> {
    needs_kvm!();
    goes_on_elsewhere_once(guest_in(Ram::Kept)?)
}

fn goes_on_elsewhere_once(mut vm: Vm) -> anyhow::Result<()> {
    let record = place(&vm)?;
    vm.client()?.store(SWAP, NONCE, LONG)?;
    let before = counters(&vm)?;
    vm.revive(NONCE)?;
    ensure!(record.mark() == Mark::Consumed, "{}", record.mark());
    let after = counters(&vm)?;
    ensure!(
        after.iter().zip(&before).all(|(a, b)| a >= b),
        "{before:?} {after:?}"
    );
    vm.is_well()?;
    let told = report(&vm)?;
    ensure!(
        told.outcome == Outcome::Moved && told.component == "kernel",
        "{told:#?}"
    );
    ensure!(
        told.swap == SWAP && !told.blackout.host.is_zero(),
        "{told:#?}"
    );
    for name in ["park", "save", "jump", "load", "take", "enter"] {
        ensure!(
            told.phases.iter().any(|phase| phase.name == name),
            "no {name}: {told:#?}"
        );
    }
    let clock = told.clock.as_ref().context("a receipt")?;
    if clock.masterclock_before {
        let error = clock.kvmclock_error_ns.context("its kvmclock's error")?;
        ensure!(error.abs() <= 50, "{clock:#?}");
    }
    ensure!(clock.told_of_pause == [true, true], "{clock:#?}");
    // Its disks have moved on since: the host that crashes now must not run it from there again.
    let error = vm.revive(NONCE).expect_err("consumed").to_string();
    ensure!(error.contains("was consumed"), "{error}");
    ensure!(record.mark() == Mark::Consumed, "{}", record.mark());
    Ok(())
}

#[test]
fn a_record_that_is_none_of_the_jumps_or_not_whole_is_left_as_it_is() -> anyhow::Result<()> {
    needs_kvm!();
    let mut vm = guest()?;
    let record = place(&vm)?;
    vm.client()?.store(SWAP, NONCE, LONG)?;
    vm.kill()?;
    let before = bytes(&vm)?;
    let error = vm.revive("another").expect_err("another jump").to_string();
    ensure!(error.contains("another jump"), "{error}");
    ensure!(bytes(&vm)? == before, "something was written");
    let at = vm.spec().memory.carve_out.clone().context("a place")?;
    let file = std::fs::File::options()
        .read(true)
        .write(true)
        .open(&at.path)?;
    let spot = at.record + 8000;
    let mut byte = [0];
    file.read_exact_at(&mut byte, spot)?;
    file.write_all_at(&[byte[0] ^ 1], spot)?;
    let error = vm.revive(NONCE).expect_err("damaged").to_string();
    ensure!(error.contains("damaged"), "{error}");
    ensure!(record.mark() == Mark::Stored, "{}", record.mark());
    // A later try, when what was wrong is mended, finds all of it.
    file.write_all_at(&byte, spot)?;
    ensure!(bytes(&vm)? == before, "something was written");
    vm.revive(NONCE)?;
    vm.is_well()
}

/// Says something else in a guest's record, as if it had been stored so.
fn relabel(place: &Place, change: impl FnOnce(&mut Label)) -> anyhow::Result<()> {
    let mut record = place.read()?;
    change(&mut record.label);
    place.clear()?;
    Ok(place.store(&record)?)
}

#[test]
fn under_another_tsc_nobody_is_run() -> anyhow::Result<()> {
    needs_kvm!();
    let mut vm = guest()?;
    let record = place(&vm)?;
    vm.client()?.store(SWAP, NONCE, LONG)?;
    vm.kill()?;
    // All but the record, which is written over here.
    let at = vm.spec().memory.carve_out.clone().context("a place")?;
    let record_at = usize::try_from(at.record)?..usize::try_from(at.record + at.record_len)?;
    let others = |vm: &Vm| -> anyhow::Result<Vec<u8>> {
        let mut all = bytes(vm)?;
        all.drain(record_at.clone());
        Ok(all)
    };
    let before = others(&vm)?;
    let label = record.read()?.label;
    // A host whose TSC counts less than when the guest was stopped.
    relabel(&record, |label| label.kicked_tsc = u64::MAX / 2)?;
    let error = vm.revive(NONCE).expect_err("its TSC was reset").to_string();
    ensure!(error.contains("TSC was reset"), "{error}");
    ensure!(record.mark() == Mark::Stored, "{}", record.mark());
    // One that is a fifth faster: refused, where KVM can't make up for it; and then nothing was done to it.
    relabel(&record, |now| {
        (now.kicked_tsc, now.tsc_khz) = (label.kicked_tsc, label.tsc_khz / 5 * 4);
    })?;
    match vm.revive(NONCE) {
        Ok(()) => return vm.is_well(),
        Err(error) => {
            let error = error.to_string();
            ensure!(error.contains("can't scale"), "{error}");
        }
    }
    ensure!(record.mark() == Mark::Stored, "{}", record.mark());
    relabel(&record, |now| *now = label.clone())?;
    ensure!(others(&vm)? == before, "something was written");
    // One that was calibrated anew is the same.
    relabel(&record, |now| now.tsc_khz += now.tsc_khz / 500)?;
    vm.revive(NONCE)?;
    vm.is_well()
}

#[test]
fn a_vmm_is_swapped_over_ram_in_a_carve_out() -> anyhow::Result<()> {
    needs_kvm!();
    let mut vm = guest()?;
    for _ in 0..2 {
        let told = vm.swap(Release::Current, &Terms::default())?;
        ensure!(told.outcome == Outcome::Moved, "{told:#?}");
        vm.is_well()?;
    }
    // What came by a swap is stored and revived like any other.
    vm.client()?.store(SWAP, NONCE, LONG)?;
    vm.revive(NONCE)?;
    vm.is_well()?;
    ensure!(vm.client()?.describe()?.swaps == 3);
    let told = vm.swap(Release::Current, &Terms::default())?;
    ensure!(told.outcome == Outcome::Moved, "{told:#?}");
    vm.is_well()?;
    vm.power_off()
}

fn daemon(dir: &Path, carve_out: Option<&Path>) -> anyhow::Result<Daemon> {
    let path = carve_out.map(|path| path.display().to_string());
    let args = path.as_ref().map(|path| ["--carve-out", path.as_str()]);
    Daemon::start_with(dir, args.as_ref().map_or(&[], |args| args.as_slice()))
}

/// What a command that must be refused says.
fn refused(daemon: &Daemon, args: &[&str]) -> anyhow::Result<String> {
    let answer = daemon.stillpoint(args)?;
    ensure!(!answer.success, "{args:?} must be refused: {}", answer.json);
    Ok(format!("{}{}", answer.error, answer.json))
}

#[test]
fn what_can_not_outlive_the_kernel_is_refused_by_name() -> anyhow::Result<()> {
    needs_kvm!();
    let dir = tempfile::tempdir()?;
    let kernel = releases::pulse()?.display().to_string();
    let run = [
        "--memory",
        "64M",
        "--kernel",
        &kernel,
        "--cmdline",
        "pulse ram=16M duty=10",
    ];
    let survive = ["--survive", "kernel"];
    let image = ["swap", "kernel", "--kernel", &kernel];
    {
        let none = daemon(dir.path(), None)?;
        let said = refused(&none, &[&["run", "a"], &run[..], &survive].concat())?;
        ensure!(
            said.contains("no carve-out") && said.contains("host prepare"),
            "{said}"
        );
        none.must(&[&["run", "plain"], &run[..]].concat())?;
        let said = refused(&none, &image)?;
        ensure!(
            said.contains("guest plain") && said.contains("memfd"),
            "{said}"
        );
        let said = refused(&none, &["adopt"])?;
        ensure!(said.contains("no carve-out"), "{said}");
        none.must(&["stop", "plain"])?;
    }
    let file = dir.path().join("carve-out");
    std::fs::File::create(&file)?.set_len(128 << 20)?;
    let some = daemon(dir.path(), Some(&file))?;
    let odd = ["run", "a", "--memory", "63M", "--kernel", &kernel];
    let said = refused(&some, &[&odd[..], &survive].concat())?;
    ensure!(said.contains("memory.size"), "{said}");
    let large = ["run", "a", "--memory", "256M", "--kernel", &kernel];
    let said = refused(&some, &[&large[..], &survive].concat())?;
    ensure!(said.contains("MiB left"), "{said}");
    some.must(&[&["run", "a"], &run[..], &survive].concat())?;
    let shown = some.must(&["show", "a"])?;
    ensure!(
        shown["rungs"].to_string().contains("page cache"),
        "{shown:#}"
    );
    // A file is none that a kernel leaves to the next: nobody is paused for it.
    let said = refused(&some, &image)?;
    ensure!(said.contains("page cache"), "{said}");
    // Nor for a release that could not be started after the jump.
    let stored = format!(
        "state/releases/{}/stillpoint-vmm",
        env!("CARGO_PKG_VERSION")
    );
    let (stored, other) = (dir.path().join(stored), dir.path().join("other"));
    std::fs::write(&other, "another")?;
    let kept = dir.path().join("kept");
    std::fs::rename(&stored, &kept)?;
    std::fs::rename(&other, &stored)?;
    let said = refused(&some, &image)?;
    ensure!(said.contains("its guests would not be revived"), "{said}");
    std::fs::rename(&kept, &stored)?;
    let view = some.must(&["adopt"])?;
    ensure!(
        view["guests"][0]["vm"] == "a" && view["guests"][0]["record"] == "empty",
        "{view:#}"
    );
    let said = refused(&some, &["adopt", "--forget", "a"])?;
    ensure!(said.contains("stop it first"), "{said}");
    let said = refused(&some, &["adopt", "--retry", "a"])?;
    ensure!(said.contains("marked as empty"), "{said}");
    let pulse = some.pulse("a")?;
    pulse.wait_progress(&[0], 20)?;
    some.must(&["stop", "a"])?;
    some.must(&["rm", "a"])?;
    let view = some.must(&["adopt"])?;
    ensure!(
        view["guests"].as_array().map(Vec::len) == Some(0),
        "{view:#}"
    );
    Ok(())
}
