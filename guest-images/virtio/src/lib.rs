//! The driver's half of virtio, for our bare-metal test guest.
//!
//! Everything here works on memory alone: rings, requests, and workloads that know at any time
//! what a device owes them. How registers are reached and interrupts come in is pulse's part, so
//! this crate's tests run on any host, against a device made of a few lines.
//!
//! * [`memory`]: memory that a device uses at the same time.
//! * [`ring`]: a split virtqueue. It trusts the device with nothing.
//! * [`registers`]: the numbers of virtio-mmio.
//! * [`blk`], [`net`], [`vsock`]: the workloads.
//! * [`random`]: numbers in no order, the same for the same seed.
//!
//! Sections cited are those of the virtio specification, version 1.2.
#![cfg_attr(not(test), no_std)]

pub mod blk;
pub mod memory;
pub mod net;
pub mod random;
pub mod registers;
pub mod ring;
pub mod vsock;
