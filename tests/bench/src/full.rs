//! `make bench-full`: every machine there is, crossed. What was measured is kept, so a run that was broken off goes on
//! where it was; another build of the VMM begins anew.

pub(crate) mod cell;
mod page;

use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use sha2::{Digest, Sha256};
use stillpoint_tests::releases::{self, Release};
use stillpoint_tests::vm::Vm;

use self::cell::{Cell, Outcome, Taken};
use crate::run::{middle, progress};
use crate::{control, environment, ours, picture};

/// A guest has so long to touch its RAM.
const TOUCHING: Duration = Duration::from_secs(180);

/// Measures every cell that was not measured yet with this build, until the time is over.
pub(crate) fn run(swaps: u32, limit: Duration) -> anyhow::Result<()> {
    let began = Instant::now();
    let root = releases::root();
    let dir = root
        .canonicalize()
        .unwrap_or(root)
        .join("target/bench/full");
    std::fs::create_dir_all(&dir).context("make target/bench/full")?;
    let build = build()?;
    let tsc_khz = environment::tsc_khz();
    let cells = cell::all();
    let of = u32::try_from(cells.len())?;
    let (mut taken, mut failed) = (Vec::new(), 0_u32);
    for (cell, number) in cells.into_iter().zip(0_u32..) {
        let path = dir.join(format!("{}.json", cell.id()));
        if let Some(known) = Taken::read(&path).filter(|known| known.build == build) {
            taken.push(known);
            continue;
        }
        if began.elapsed() > limit {
            continue;
        }
        progress(&format!("bench-full: {}", cell.title()), number, of);
        let outcome = match cell.impossible() {
            Some(reason) => Outcome::LeftOut(reason),
            None => match measure(&cell, swaps, tsc_khz) {
                Ok(outcome) => outcome,
                Err(error) => {
                    eprintln!("bench-full: {}: {error:#}", cell.title());
                    failed += 1;
                    continue;
                }
            },
        };
        let now = Taken {
            build: build.clone(),
            load: environment::load(),
            cell,
            outcome,
        };
        now.write(&path)?;
        taken.push(now);
    }
    progress("bench-full", taken.len() as u64, of);
    let text = page::render(
        &taken,
        of as usize,
        &environment::facts(environment::load()),
    );
    let page = dir.join("full.md");
    std::fs::write(&page, text).with_context(|| format!("write {}", page.display()))?;
    let field = dir.join("full.svg");
    std::fs::write(&field, picture::crossing(&taken))
        .with_context(|| format!("write {}", field.display()))?;
    println!(
        "{} of {of} machines are measured: {}, {}",
        taken.len(),
        page.display(),
        field.display()
    );
    if taken.len() < of as usize {
        println!("the rest is for another `make bench-full` (--seconds gives it more time)");
    }
    ensure!(failed == 0, "{failed} machines could not be measured");
    Ok(())
}

/// Which build of the VMM is measured, with which guest: by their bytes, since each build gives the files a new date.
fn build() -> anyhow::Result<String> {
    let mut digest = Sha256::new();
    for path in [Release::Current.binary()?, releases::pulse()?] {
        digest.update(std::fs::read(&path).with_context(|| format!("read {}", path.display()))?);
    }
    Ok(digest
        .finalize()
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect())
}

fn measure(cell: &Cell, swaps: u32, tsc_khz: u64) -> anyhow::Result<Outcome> {
    let mut vm = Vm::boot(&cell.recipe())?;
    vm.pulse.wait_online(cell.vcpus.into())?;
    if cell.touched {
        vm.pulse.wait_touched(TOUCHING)?;
    }
    let samples = ours::swaps(&mut vm, swaps, true)?;
    let none = control::windows(&vm, swaps, middle(&samples), tsc_khz)?;
    let faults = ours::faults(&vm)?;
    vm.power_off()?;
    Ok(Outcome::Measured {
        swaps: samples,
        none,
        faults,
    })
}
