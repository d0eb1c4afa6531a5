//! virtio devices (virtio 1.2): one transport, and what differs from kind to kind.
//!
//! ```text
//!  vCPU thread ── registers ──▶ VirtioMmio ── lock ──▶ Worker ◀── kicks (ioeventfd)
//!                                (mmio.rs)              │  ▲
//!                                                       ▼  └──── files of the kind (tap, sockets,
//!                                                  dyn Kind          threads that do disk I/O)
//! ```
//!
//! | file | what it holds |
//! |---|---|
//! | [`mmio`] | the registers a driver sees; freeze, save, resume |
//! | `worker` | the thread behind each device, and how it comes to rest |
//! | [`queue`] | rings and chains of buffers: judged once, then used |
//! | `signs` | signs of life, for whoever watches a swap |
//! | [`slot`] | a device's place in a machine: window, line, kicks, thread |
//! | [`backend`] | what a device is made of on the host: opened at a boot, handed over at a swap |
//! | `complaints` | what goes to the log, however often a guest gives cause |
//! | one for each kind | [`blk`], [`net`], [`rng`], [`vsock`] |
//!
//! A kind never runs on a vCPU's thread, and what may take long, such as disk I/O, not on the
//! device's thread either: it is *in flight* on threads of the kind's own.

pub mod backend;
pub mod blk;
mod complaints;
#[cfg(feature = "fuzzing")]
pub mod fuzz;
pub mod mmio;
pub mod net;
pub mod poller;
pub mod queue;
pub mod rng;
mod signs;
pub mod slot;
pub mod vsock;

#[cfg(test)]
mod driver;
mod worker;

use stillpoint_state::contents::Kind as SectionKind;
use stillpoint_state::{Saved, StateError};

use crate::handover::lend::Lending;
use poller::Poller;
use queue::{Broken, Queues};

/// The first token of a kind's own files at its [`Poller`].
pub const FIRST_TOKEN: u64 = 1 << 16;

/// What a kind of device does. Every method is called with the device's lock held, so none may
/// wait for anything; none has a default body, since one that was forgotten would lose guest
/// state.
///
/// A kind is made in two ways: fresh, and from its saved section. Both begin with the same
/// [`backend`].
pub trait Kind: Send + std::fmt::Debug {
    /// Device type (virtio 1.2, section 5).
    fn device_type(&self) -> u32;

    /// Features offered, beside those of the transport (VERSION_1, INDIRECT_DESC, EVENT_IDX).
    fn features(&self) -> u64;

    /// The largest size of each queue.
    fn queue_sizes(&self) -> &'static [u16];

    /// The configuration space as it is now, little endian. Reads beyond it give 0.
    fn config(&self) -> Vec<u8>;

    /// The driver writes to the configuration space.
    fn write_config(&mut self, offset: u64, data: &[u8]);

    /// The driver has set the device up, with these features of those offered. An error fails it.
    fn start(&mut self, features: u64) -> Result<(), Broken>;

    /// The driver has reset the device: everything that came from it is forgotten. Nothing is in
    /// flight.
    fn reset(&mut self);

    /// Watches the kind's own files; called once, on whichever thread. Tokens start at
    /// [`FIRST_TOKEN`].
    fn watch(&mut self, poller: &Poller) -> std::io::Result<()>;

    /// Does what waits in this queue. Called when the driver kicked it, and for every queue after
    /// the device was let go; it may find nothing.
    fn serve(&mut self, queue: usize, queues: &mut Queues<'_>) -> Result<(), Broken>;

    /// Whether what a driver puts into this queue is taken as soon as it can be. Of others it is
    /// taken when there is something to fill it with.
    fn takes_at_once(&self, queue: usize) -> bool;

    /// A file of the kind's own is ready. `live`: the driver has set the device up and it has not
    /// failed; otherwise the queues take nothing and only what is in flight may end.
    fn ready(&mut self, token: u64, live: bool, queues: &mut Queues<'_>) -> Result<(), Broken>;

    /// Requests that were taken from a queue and not given back yet.
    fn in_flight(&self) -> usize;

    /// The kind of its own section.
    fn section(&self) -> SectionKind;

    /// Adds the kind's own section, as `instance`. The device stands still and nothing is in flight.
    fn save(&self, instance: &str, to: &mut Saved) -> Result<(), StateError>;

    /// Offers every file that a successor needs, as `instance/role`. Called while the guest runs
    /// and again when it stands still; what was lent before is not lent again, so a name stands
    /// for one file for ever.
    fn lend(&self, instance: &str, to: &mut Lending) -> std::io::Result<()>;
}
