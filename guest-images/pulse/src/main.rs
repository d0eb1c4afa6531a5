//! pulse: a bare-metal guest that watches its own clocks, timers, memory and registers.
//!
//! Ring 0 is assembly alone (`boot.s`, `traps.s`): all of this Rust runs in ring 3, where even a
//! software KVM runs it natively. See README.md for the memory layout, modes and commands.
#![no_std]
#![no_main]

mod apic;
mod bootinfo;
mod clock;
mod console;
mod fatal;
mod gaps;
mod gate;
mod idt;
mod ioapic;
mod local;
mod mem;
mod modes;
mod options;
mod pages;
mod paging;
mod pattern;
mod registers;
mod serial;
mod timers;
mod touch;
mod tsc;
mod vcpu;
mod virtio;

use core::arch::global_asm;

global_asm!(include_str!("boot.s"), options(att_syntax));
global_asm!(include_str!("traps.s"), options(att_syntax));

/// Where `boot.s` leaves ring 0: on every vCPU, in ring 3, with interrupts masked.
#[unsafe(no_mangle)]
extern "C" fn ring3_main(apic_id: u64, boot: u64, protocol: u64) -> ! {
    if protocol != bootinfo::AP {
        bring_up(boot, protocol);
    }
    vcpu::Vcpu::new(apic_id as usize).run()
}

/// What the BSP does once, before any vCPU's loop.
fn bring_up(boot: u64, protocol: u64) {
    idt::fill();
    let info = bootinfo::read(boot, protocol);
    let options = options::parse(info.command_line(), apic::count());
    options::set(options);
    paging::map_above_4g(info.top());
    apic::init();
    tsc::calibrate();
    pages::publish(&info);
    touch::plan(&info);
    clock::publish_wall_clock();
}
