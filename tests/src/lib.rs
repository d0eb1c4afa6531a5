//! The harness: real VMMs, a real guest, and questions to both.
//!
//! | module | what it holds |
//! |---|---|
//! | [`releases`] | the binaries under test, by name |
//! | [`vm`] | a VMM process with its guest |
//! | [`swap`] | its swap, driven as the daemon does it |
//! | [`start`] | how these processes are started |
//! | [`guest`] | what pulse writes down, read from the RAM file |
//! | [`devices`] | its virtio devices, and what its disks must hold |
//! | [`furnished`] | a guest with all kinds of devices, all of them at work |
//! | [`compat`] | swaps to and fro between releases that know different states, and refusals by name |
//! | [`saved`] | a guest's saved state, and what was said of it before |
//! | [`matrix`] | the crash matrix: a fault in every phase, on every side |
//! | [`cli`] | its command line, for what it refuses |
//! | [`console`] | a viewer at the guest's console |
//! | [`clocks`] | a guest's clock, timers and flags, read from its RAM; and the figures of `make clock` |
//! | [`patience`] | waiting for something, with an end to it |
//! | [`daemon`] | a stillpointd of its own, and the `stillpoint` command against it |
//! | [`fd_store`] | what systemd does for a daemon's descriptors |
//! | [`linux`] | stock Linux guests, their workloads and their kernels' logs |
//! | [`rig`] | a whole host, emulated, with KVM inside |
//! | [`wire`] | a tap on which every frame comes back |
//! | [`ground`] | what this machine can do, and skipping by name what it can't |

pub mod budget;
pub mod cli;
pub mod clocks;
pub mod compat;
pub mod console;
pub mod daemon;
pub mod devices;
pub mod fd_store;
pub mod furnished;
pub mod ground;
pub mod guarded;
pub mod guest;
pub mod linux;
pub mod matrix;
pub mod pair;
pub mod parameters;
pub mod patience;
pub mod rehearse;
pub mod releases;
pub mod rig;
pub mod saved;
pub mod shares;
pub mod start;
pub mod swap;
pub mod vm;
pub mod wire;
