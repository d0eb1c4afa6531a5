//! Nouns. No I/O, no clock.

mod event;
mod pause;
mod problem;
mod release;
mod swap;
mod vm;

pub use event::Event;
pub use pause::{
    Approval, Approver, EventId, Group, MAX_NOTICE_NS, Measured, Notice, Pause, PauseId,
    PauseState, Profile,
};
pub use problem::{Code, Problem};
pub use release::{Manifest, Release, VMM, validate_version};
pub use swap::{SwapId, SwapRecord, SwapState};
pub use vm::{VmName, VmRecord, VmState, Wanted};
