//! Budgets of blackouts: slow successors around the limit, overruns after the take, and no daemon. More
//! steps: `make budgets`.

use std::time::Duration;

use anyhow::ensure;
use stillpoint_control::report::Outcome;
use stillpoint_tests::budget::{self, POINTS, SLACK};
use stillpoint_tests::matrix::{self, Host};
use stillpoint_tests::needs_kvm;
use stillpoint_tests::releases::Release;
use stillpoint_tests::swap::Terms;

#[test]
fn slow_around_the_limit() -> anyhow::Result<()> {
    needs_kvm!();
    let mut ground = budget::Ground::prepare()?;
    for point in POINTS {
        ground.sweep(point, -2..=2, |step| println!("{step}"))?;
    }
    ground.end()
}

#[test]
fn an_overrun_after_the_take_is_reported() -> anyhow::Result<()> {
    needs_kvm!();
    let (mut vm, _) = budget::Ground::prepare()?.into_parts();
    // The predecessor gives it up with most of its budget left.
    let budget = Duration::from_secs(2);
    let report = vm.swap(Release::Faulty("taken=slow:2500"), &Terms::budget(budget))?;
    ensure!(report.outcome == Outcome::Moved, "{report:#?}");
    ensure!(report.blackout.host > budget, "{:?}", report.blackout);
    let overran = |warning: &String| warning.contains("overran its budget of 2s");
    ensure!(report.warnings.iter().any(overran), "{:?}", report.warnings);
    vm.is_well()?;
    vm.power_off()
}

#[test]
fn the_budget_is_held_with_no_daemon() -> anyhow::Result<()> {
    needs_kvm!();
    let dir = tempfile::tempdir()?;
    let report = matrix::unattended(&mut Host::start(dir.path())?)?;
    let frozen = report.blackout.host;
    println!("frozen for {frozen:?}, budget {:?}", report.budget);
    ensure!(frozen >= report.budget, "not for the budget: {frozen:?}");
    ensure!(frozen <= report.budget + SLACK, "frozen for {frozen:?}");
    Ok(())
}
