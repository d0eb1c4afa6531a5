//! Nouns. No I/O, no clock.

mod amount;
mod event;
mod fleet;
mod moment;
mod pause;
mod policy;
mod problem;
mod reach;
mod release;
mod swap;
mod vm;
mod window;

pub use amount::{Amount, NoAmount};
pub use event::Event;
pub use fleet::{DOMAINS, Domain, DomainCount, DomainError, MOST_DOMAINS, Rung};
pub use moment::Moment;
pub use pause::{
    Approval, Approver, EventId, Group, MAX_NOTICE_NS, Measured, Notice, Pause, PauseId,
    PauseState, Profile,
};
pub use policy::{AtOnce, Limits, Policy, PolicyError, Stage};
pub use problem::{Code, Problem};
pub use reach::{MAX_REACH, NoReach, Reach};
pub use release::{Manifest, Release, VMM, validate_version};
pub use swap::{SwapId, SwapRecord, SwapState};
pub use vm::{VmName, VmRecord, VmState, Wanted};
pub use window::{NoWindow, Opening, Window, opening};
