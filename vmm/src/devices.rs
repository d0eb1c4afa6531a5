//! What every device can do, and where each lies.
//!
//! A device takes `&self` and holds one private lock, so the bus needs none. It never knows that
//! it is being swapped, only that it is frozen. No method has a default body: a device that
//! forgets to freeze or to save would lose guest state in silence.
//!
//! Laws, tested for each device in its own module: *round trip* (a device made from saved state
//! saves the same), *every field changes the saved form*, *frozen means silent* (no interrupt, no
//! byte of guest memory, no output between freeze and resume).

pub mod power;
pub mod probe;
pub mod serial;
pub mod virtio;
pub mod vmclock;

use std::time::Instant;

use stillpoint_state::contents::Contents;
use stillpoint_state::{Saved, StateError};

/// A device that did not come to rest in time.
#[derive(Debug, thiserror::Error)]
#[error("{device} did not come to rest in time: {in_flight} requests are under way")]
pub struct Busy {
    /// Its name in the machine.
    pub device: String,
    /// Requests not ended yet.
    pub in_flight: usize,
}

/// A device on the bus.
pub trait Device: Send + Sync + std::fmt::Debug {
    /// Name, for people.
    fn name(&self) -> &str;

    /// A read by the guest at `offset` in the device's window; `data` comes filled with ones.
    fn read(&self, offset: u64, data: &mut [u8]);

    /// A write by the guest.
    fn write(&self, offset: u64, data: &[u8]);

    /// Called while the guest still runs: the device takes no new requests, and those under way
    /// end. So a slow disk costs the guest's I/O a moment, and not the whole guest a pause.
    fn drain(&self, deadline: Instant) -> Result<(), Busy>;

    /// Called after every vCPU is parked. On success nothing is in flight, and until
    /// [`Device::resume`] the device raises no interrupt and touches nothing outside itself.
    /// Freezing twice is freezing once.
    fn freeze(&self, deadline: Instant) -> Result<(), Busy>;

    /// Called by the process that owns the guest, before any vCPU runs. Raises again every
    /// interrupt that the guest has not acknowledged; a spurious one is allowed, a lost one not.
    /// Also undoes a drain or freeze that failed.
    fn resume(&self);

    /// Says which sections there will be when it is saved. At any time.
    fn announce(&self, to: &mut Contents);

    /// Adds the device's section. Only between freeze and resume.
    fn save(&self, to: &mut Saved) -> Result<(), StateError>;
}
