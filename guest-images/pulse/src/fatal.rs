//! The end: exceptions and panics print one line and halt the vCPU for good.

use core::panic::PanicInfo;

use crate::serial::say;
use crate::{apic, gate};

/// `traps.s` comes here, in ring 3 with interrupts masked, after any exception.
#[unsafe(no_mangle)]
extern "C" fn fault_main(vector: u64, error: u64, rip: u64, cr2: u64) -> ! {
    say!(
        "pulse: FATAL vcpu={} exception={vector} error={error:#x} rip={rip:#x} cr2={cr2:#x}",
        apic::id()
    );
    stop()
}

#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    say!("pulse: FATAL vcpu={} {info}", apic::id());
    stop()
}

fn stop() -> ! {
    let never = 0u64;
    loop {
        gate::halt_if(&raw const never, 0);
    }
}
