//! A guest lives through the swap of its VMM.

use std::time::Duration;

use anyhow::ensure;
use stillpoint_tests::needs_kvm;
use stillpoint_tests::releases::Release;
use stillpoint_tests::vm::{Recipe, Vm};

#[test]
fn ten_swaps_between_two_releases() -> anyhow::Result<()> {
    needs_kvm!();
    let mut vm = Vm::boot(&Recipe::pulse(2, "ram=32M"))?;
    vm.pulse.wait_online(2)?;
    for n in 0..10 {
        let to = if n % 2 == 0 {
            Release::Compat
        } else {
            Release::Current
        };
        let report = vm.must_move(to)?;
        println!(
            "host {:?} guest {:?} clock {:?}",
            report.blackout.host,
            report.blackout.guest_worst(),
            report.clock
        );
        for phase in &report.phases {
            println!("   {:?} {} {:?}", phase.side, phase.name, phase.duration);
        }
        let seen = vm.pulse.wait_progress(&[0, 1], 50)?;
        ensure!(seen.faults().is_empty(), "{:#?}", seen.faults());
    }
    rustix::thread::nanosleep(&rustix::time::Timespec {
        tv_sec: 1,
        tv_nsec: 0,
    });
    let seen = vm.pulse.look()?;
    println!("{seen:#?}");
    let _ = Duration::ZERO;
    vm.power_off()
}
