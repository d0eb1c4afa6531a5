//! stillpoint-vmm: one process per guest. It runs the guest, and hands it over to its successor.
//!
//! ```text
//! state ◀─ devices ◀─ machine ◀─ handover ◀─ process ◀─ main      (arrows: "is used by")
//! ```
//!
//! | module | what it holds |
//! |---|---|
//! | [`machine`] | vCPUs, RAM, interrupt controllers and devices; freeze and the guard around it |
//! | [`vcpu`] | the vCPU threads; their state, timers and MSRs |
//! | [`memory`], [`irq`], [`clock`], [`bus`], [`devices`], [`console`] | the parts |
//! | [`boot`] | what firmware would have done |
//! | [`handover`] | the protocol between predecessor and successor |
//! | [`process`] | the machine thread's loop, and the control socket before it |
//! | [`doors`] | sockets and files of a guest |
//! | `warm` | memory at hand before it is needed |
//! | [`doctor`] | what this host's KVM can and can't do |
//!
//! No async runtime, no HTTP. Raw addresses and `unsafe` live in `memory`, `raw`, `vcpu` and the
//! ownership word of `stillpoint-control`; raw descriptor numbers in `main` alone.

pub mod boot;
pub mod bus;
pub mod clock;
pub mod console;
pub mod devices;
pub mod doctor;
pub mod doors;
pub mod event;
pub mod faults;
pub mod handover;
pub mod irq;
pub mod machine;
pub mod memory;
pub mod peer;
pub mod process;
pub mod raw;
pub mod release;
pub mod vcpu;
mod warm;
