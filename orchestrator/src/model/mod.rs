//! Nouns. No I/O, no clock.

mod event;
mod problem;
mod release;
mod swap;
mod vm;

pub use event::Event;
pub use problem::{Code, Problem};
pub use release::{Manifest, Release, VMM, validate_version};
pub use swap::{SwapId, SwapRecord, SwapState};
pub use vm::{VmName, VmRecord, VmState, Wanted};
