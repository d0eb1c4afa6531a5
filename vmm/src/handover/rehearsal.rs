//! A rehearsal: would another release load this guest, as it is now? Found out before any freeze.
//!
//! ```text
//!  the guest's VMM                           a throw-away process of the other release
//!  (guest runs)                              (started by the daemon)
//!      │ ── Rehearse + fds, Files + fds ───────▶ │  build an own VM over a view of RAM
//!      │ ◀─────────────────────────── Adopted ── │
//!   peek ═══ the guest stands still ════════     │
//!      │ ── Files that were opened meanwhile ──▶ │
//!      │ ── State ─────────────────────────────▶ │  load, late MSRs too; save again
//!      │ ◀──────────────── Rehearsed + memfd ── │
//!   compare                                      ends
//! ```
//!
//! What the throw-away process is given it can harm nobody with, whatever it does: guest RAM as a file
//! open for reading only, which it maps privately; disks' images opened anew, for reading only, so
//! without the guest's locks; in place of kicks, taps, sockets and listeners fresh ones that lead
//! nowhere (`standins`); no ownership page, no secret, no console. It enters no vCPU. And it never
//! hears of an [`Offer`], which is another packet.
//!
//! Must never: seal, or touch the ownership word; hold the guest for longer than the budget.

mod compare;
mod peek;
mod stage;
mod standins;

use prost::Message;

use super::Offer;

pub use peek::{Errand, Jump, rehearse};
pub use stage::{StageError, perform};

/// What is to be rehearsed. Beside it travel guest RAM, open for reading only, and a memfd for the
/// state.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct Rehearse {
    /// As it would be offered; without secret, directory and name of a swap.
    #[prost(message, optional, tag = "1")]
    pub offer: Option<Offer>,
    /// A jump is rehearsed: the memfd will hold a record.
    #[prost(bool, tag = "2")]
    pub record: bool,
}

/// Number of fds beside it.
const REHEARSED_FDS: usize = 2;

/// The state was loaded and saved again. The second state travels beside it, in a memfd.
#[derive(Clone, Copy, PartialEq, Eq, Message)]
pub struct Rehearsed {
    /// Bytes of it.
    #[prost(uint64, tag = "1")]
    pub len: u64,
    /// How long loading took, ns.
    #[prost(uint64, tag = "2")]
    pub load_ns: u64,
    /// MSRs that write guest memory were left out.
    #[prost(bool, tag = "3")]
    pub without_late: bool,
}
