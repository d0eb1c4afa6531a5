//! Several guests of one host, swapped at the same time.

use anyhow::{anyhow, ensure};
use stillpoint_tests::needs_kvm;
use stillpoint_tests::patience::PATIENCE;
use stillpoint_tests::releases::Release;
use stillpoint_tests::vm::{Recipe, Vm};

const GUESTS: usize = 4;

/// Does the same to every guest at once, each on a thread of its own.
fn all_at_once(
    vms: &mut [Vm],
    act: impl Fn(&mut Vm) -> anyhow::Result<()> + Sync,
) -> anyhow::Result<()> {
    std::thread::scope(|scope| {
        let act = &act;
        let threads: Vec<_> = vms
            .iter_mut()
            .map(|vm| scope.spawn(move || act(vm)))
            .collect();
        for thread in threads {
            thread.join().map_err(|_| anyhow!("a thread panicked"))??;
        }
        Ok(())
    })
}

#[test]
fn four_guests_at_once() -> anyhow::Result<()> {
    needs_kvm!();
    let recipe = Recipe::pulse(2, "ram=8M duty=20");
    let mut vms = (0..GUESTS)
        .map(|_| Vm::up(&recipe))
        .collect::<anyhow::Result<Vec<_>>>()?;
    for to in [Release::Compat, Release::Current, Release::Current] {
        all_at_once(&mut vms, |vm| vm.must_move(to).map(drop))?;
        all_at_once(&mut vms, |vm| vm.is_well())?;
    }
    for vm in vms {
        let passed = |s: &stillpoint_tests::guest::Snapshot| s.vcpus[1].ram_passes > 1;
        let seen = vm.pulse.wait("passes over RAM", PATIENCE, passed)?;
        ensure!(seen.faults().is_empty(), "{:#?}", seen.faults());
        vm.power_off()?;
    }
    Ok(())
}
