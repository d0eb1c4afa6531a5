//! Some cells of the crash matrix, and some swaps with kills at random moments: few enough for every
//! run. All cells: `make faults`; as many swaps as you like: `make faults-random`.

use anyhow::{Context, ensure};
use stillpoint_tests::matrix::{self, Cell, Host};
use stillpoint_tests::needs_kvm;
use stillpoint_tests::releases::Release;
use stillpoint_tests::swap::Terms;
use stillpoint_tests::vm::{Recipe, Vm};

/// One for each rule by which a guest is saved or lost.
const CELLS: [&str; 9] = [
    "offered / successor / kill -9",
    "saved / predecessor / error",
    "sealed / predecessor / kill -9",
    "load / daemon / kill -9",
    "given-up / predecessor / kill -9",
    "take / successor / kill -9",
    "take / successor / both",
    "take / successor / slow",
    "taken / successor / kill -9",
];

#[test]
fn cells_of_the_crash_matrix() -> anyhow::Result<()> {
    needs_kvm!();
    let dir = tempfile::tempdir()?;
    let mut host = Host::start(dir.path())?;
    for name in CELLS {
        let cell = Cell::all().find(|cell| cell.to_string() == name);
        let verdict = matrix::run(&mut host, &cell.with_context(|| name.to_owned())?)?;
        ensure!(verdict.is_good(), "{name}: {verdict:?}");
    }
    Ok(())
}

/// A predecessor that runs on the guest it gave up, beside its successor: what is judged after every cell
/// must not be satisfied with that.
#[test]
fn a_guest_that_two_processes_run_is_seen() -> anyhow::Result<()> {
    needs_kvm!();
    let recipe = Recipe::pulse(2, "ram=2M");
    let mut vm = Vm::up(&Recipe {
        release: Release::Faulty("spoil=ownership"),
        ..recipe
    })?;
    vm.is_well()?;
    let seen = match vm.swap(Release::Current, &Terms::default()) {
        // It did not even live through it.
        Err(error) => error,
        Ok(_) => match vm.is_well() {
            Err(error) => error,
            Ok(()) => anyhow::bail!("two ran it, and nothing is wrong"),
        },
    };
    println!("seen as: {seen:#}");
    Ok(())
}

#[test]
fn kills_at_random_moments() -> anyhow::Result<()> {
    needs_kvm!();
    let dir = tempfile::tempdir()?;
    let seed = std::env::var("STILLPOINT_SEED").ok();
    let seed = seed
        .and_then(|seed| seed.parse().ok())
        .unwrap_or_else(|| fastrand::u64(..));
    println!("STILLPOINT_SEED={seed}");
    let tally = matrix::random(&mut Host::start(dir.path())?, seed, 10, || true)?;
    println!("{tally:?}");
    Ok(())
}
