//! What a guest and the host agree on, in memory and on the bus.
//!
//! * [`probe`]: the paravirtual *probe* device and the table a guest keeps for it, so that a
//!   pause can be measured from inside any guest that cares to look at its own clock.
//! * [`pulse`]: what our bare-metal test guest writes beside it, for a harness to judge.
//! * [`virtio`], [`attack`], [`disk`] and [`frame`]: what it writes of the virtio devices it
//!   drives, in memory, on a disk and on a wire.
//! * [`power`]: the ports by which a guest powers off or resets, and hears of the power button.
//!
//! Everything is `repr(C)`, little endian, and made of naturally aligned integers. Every
//! structure here only grows: a reader checks `version` and `record_stride`.
#![no_std]

pub mod attack;
pub mod disk;
pub mod frame;
pub mod power;
pub mod probe;
pub mod pulse;
pub mod virtio;
