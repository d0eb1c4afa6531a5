//! Nouns. No I/O, no clock.

mod amount;
mod audit;
mod event;
mod fleet;
mod gate;
mod host_swap;
mod journal;
mod kernel;
mod kvm_swap;
mod label;
mod moment;
mod pause;
mod policy;
mod preflight;
mod problem;
mod reach;
mod release;
mod safeguards;
mod swap;
mod url;
mod vm;
mod window;

pub use amount::{Amount, NoAmount};
pub use audit::{AuditEntry, Outcome};
pub use event::Event;
pub use fleet::{
    DOMAINS, Domain, DomainCount, DomainError, HostName, MOST_DOMAINS, RolloutId, Rung,
};
pub use gate::{Gate, GateAsk, GateError, GateSaid, GateSpec, MAX_GATE, MOST_GATES};
pub use host_swap::{CommandEnd, HostSwap, HostSwapState};
pub use journal::{JournalEntry, JournalKind};
pub use kernel::{
    JUMP, JumpPhase, KernelJump, Share, WallCorrection, bad_command_line, forgets_live_update,
    forgets_memory, nonce_of, to_be_used_again, with_nonce,
};
pub use kvm_swap::{AS_BOOTED, CameBackOn, KvmCheck, KvmSwap, Module, kvm_release};
pub use label::{Label, Labels, LabelsError, MOST_LABELS, NoLabel, labels};
pub use moment::Moment;
pub use pause::{
    Approval, Approver, EventId, Group, MAX_NOTICE_NS, Measured, Notice, Pause, PauseId,
    PauseState, Profile,
};
pub use policy::{AtOnce, Limits, Policy, PolicyError, Stage};
pub use preflight::Preflight;
pub use problem::{Code, Problem};
pub use reach::{MAX_REACH, NoReach, Reach};
pub use release::{Manifest, Pin, Release, Signer, VMM, validate_minimum, validate_version};
pub use safeguards::{
    Before, DEFAULT_WATCH_NS, Health, HealthState, MAX_WATCH_NS, Rehearsed, Safeguards,
};
pub use swap::{HOST, KVM, SwapId, SwapRecord, SwapState};
pub use url::{HttpUrl, NoHttpUrl};
pub use vm::{VmName, VmRecord, VmState, Wanted};
pub use window::{NoWindow, Opening, Window, opening};
