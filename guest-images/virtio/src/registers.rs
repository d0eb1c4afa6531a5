//! The numbers of virtio-mmio, version 2 (section 4.2), and of features that all devices share.

/// Offsets from the start of a device's registers (4.2.2).
pub mod offset {
    /// R: [`super::MAGIC`].
    pub const MAGIC: u64 = 0x000;
    /// R: [`super::VERSION`].
    pub const VERSION: u64 = 0x004;
    /// R: which kind of device; 0 for none.
    pub const DEVICE_ID: u64 = 0x008;
    /// R: who made it.
    pub const VENDOR_ID: u64 = 0x00c;
    /// R: 32 feature bits.
    pub const DEVICE_FEATURES: u64 = 0x010;
    /// W: which 32.
    pub const DEVICE_FEATURES_SEL: u64 = 0x014;
    /// W: 32 feature bits.
    pub const DRIVER_FEATURES: u64 = 0x020;
    /// W: which 32.
    pub const DRIVER_FEATURES_SEL: u64 = 0x024;
    /// W: the queue that the next five are about.
    pub const QUEUE_SEL: u64 = 0x030;
    /// R: its largest size; 0 if there is no such queue.
    pub const QUEUE_NUM_MAX: u64 = 0x034;
    /// W: its size.
    pub const QUEUE_NUM: u64 = 0x038;
    /// RW: whether it is in use.
    pub const QUEUE_READY: u64 = 0x044;
    /// W: a queue that has something new.
    pub const QUEUE_NOTIFY: u64 = 0x050;
    /// R: why it interrupted.
    pub const INTERRUPT_STATUS: u64 = 0x060;
    /// W: which of it has been dealt with.
    pub const INTERRUPT_ACK: u64 = 0x064;
    /// RW: [`super::status`].
    pub const STATUS: u64 = 0x070;
    /// W: the descriptor table's address; the higher half follows.
    pub const QUEUE_DESC: u64 = 0x080;
    /// W: the available ring's.
    pub const QUEUE_DRIVER: u64 = 0x090;
    /// W: the used ring's.
    pub const QUEUE_DEVICE: u64 = 0x0a0;
    /// R: changes when the configuration does.
    pub const CONFIG_GENERATION: u64 = 0x0fc;
    /// The configuration of its kind.
    pub const CONFIG: u64 = 0x100;
}

/// The first register.
pub const MAGIC: u32 = u32::from_le_bytes(*b"virt");
/// The second.
pub const VERSION: u32 = 2;

/// Bits of the status register (2.1).
pub mod status {
    /// The guest has seen the device.
    pub const ACKNOWLEDGE: u32 = 1;
    /// It has a driver.
    pub const DRIVER: u32 = 2;
    /// The driver is ready.
    pub const DRIVER_OK: u32 = 4;
    /// The features are agreed on.
    pub const FEATURES_OK: u32 = 8;
    /// The device cannot go on.
    pub const NEEDS_RESET: u32 = 64;
    /// The driver has given up.
    pub const FAILED: u32 = 128;
}

/// Bits of the interrupt status register: used buffers; the configuration changed.
pub const INTERRUPT_USED: u32 = 1;
/// See [`INTERRUPT_USED`].
pub const INTERRUPT_CONFIG: u32 = 2;

/// Feature bits of all devices (6).
pub mod feature {
    /// Descriptors may point to tables of descriptors.
    pub const INDIRECT: u64 = 1 << 28;
    /// Either side says when it wants to hear of the other.
    pub const EVENT_IDX: u64 = 1 << 29;
    /// This specification, and not the one before it.
    pub const VERSION_1: u64 = 1 << 32;
}

/// Device IDs (5).
pub mod kind {
    /// Network card.
    pub const NET: u32 = 1;
    /// Disk.
    pub const BLK: u32 = 2;
    /// Entropy source.
    pub const RNG: u32 = 4;
    /// Sockets between guest and host.
    pub const VSOCK: u32 = 19;
}
