//! Some cells of the crash matrix, and some swaps with kills at random moments: few enough for every
//! run. All cells: `make faults`; as many swaps as you like: `make faults-random`.

use anyhow::{Context, ensure};
use stillpoint_tests::matrix::{self, Cell, Host};
use stillpoint_tests::needs_kvm;

/// One for each rule by which a guest is saved or lost.
const CELLS: [&str; 8] = [
    "offered / successor / kill -9",
    "saved / predecessor / error",
    "sealed / predecessor / kill -9",
    "load / daemon / kill -9",
    "given-up / predecessor / kill -9",
    "take / successor / kill -9",
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

#[test]
fn kills_at_random_moments() -> anyhow::Result<()> {
    needs_kvm!();
    let dir = tempfile::tempdir()?;
    let seed = std::env::var("STILLPOINT_SEED").ok();
    let seed = seed
        .and_then(|seed| seed.parse().ok())
        .unwrap_or_else(|| fastrand::u64(..));
    println!("STILLPOINT_SEED={seed}");
    let tally = matrix::random(&mut Host::start(dir.path())?, seed, 10)?;
    println!("{tally:?}");
    Ok(())
}
