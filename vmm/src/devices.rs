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

use stillpoint_state::{Saved, StateError};

/// A device on the bus.
pub trait Device: Send + Sync + std::fmt::Debug {
    /// Name, for people.
    fn name(&self) -> &'static str;

    /// A read by the guest at `offset` in the device's window; `data` comes filled with ones.
    fn read(&self, offset: u64, data: &mut [u8]);

    /// A write by the guest.
    fn write(&self, offset: u64, data: &[u8]);

    /// Called after every vCPU is parked. On return nothing is in flight, and until
    /// [`Device::resume`] the device raises no interrupt and touches nothing outside itself.
    /// Freezing twice is freezing once.
    fn freeze(&self);

    /// Called by the process that owns the guest, before any vCPU runs. Raises again every
    /// interrupt that the guest has not acknowledged; a spurious one is allowed, a lost one not.
    fn resume(&self);

    /// Adds the device's section. Only between freeze and resume.
    fn save(&self, to: &mut Saved) -> Result<(), StateError>;
}
