//! The probe: a guest tells the host where it logs gaps in its own TSC readings.
//!
//! The guest spins (or ticks) on every vCPU, reads its TSC, and logs each gap between two
//! readings that is longer than a threshold it chose. It writes the guest-physical address of
//! its table to [`REG_TABLE`] of the probe device. After a swap the VMM looks for the gap that
//! overlaps the freeze: that is the blackout as the guest saw it. The VMM only ever reads it.
//!
//! ```text
//! table (4 KiB aligned)            record of vCPU i at table + 4096 * (i + 1)
//! +------------------------+       +----------------------------+
//! | Header                 |       | Record: ring of gaps       | 2 KiB
//! | (rest: the guest's own)|       | (rest: the guest's own)    | 2 KiB
//! +------------------------+       +----------------------------+
//! ```

/// Guest-physical address of the device's registers (one page of MMIO).
pub const MMIO_BASE: u64 = 0xd000_0000;
/// Length of the register window in bytes.
pub const MMIO_SIZE: u64 = 0x1000;

/// R, u32: [`DEVICE_ID`].
pub const REG_ID: u64 = 0x00;
/// R, u32: [`VERSION`].
pub const REG_VERSION: u64 = 0x04;
/// RW, u64 (8-byte accesses): keeps what was written. Lets a guest prove that each access of a
/// loop happened exactly once.
pub const REG_SCRATCH: u64 = 0x08;
/// RW, u64 (8-byte accesses): guest-physical address of the table; 0 for none.
pub const REG_TABLE: u64 = 0x10;

/// "SPRB" as a little-endian u32.
pub const DEVICE_ID: u32 = u32::from_le_bytes(*b"SPRB");
/// Version of the registers and of the table.
pub const VERSION: u32 = 1;
/// First eight bytes of a table.
pub const TABLE_MAGIC: u64 = u64::from_le_bytes(*b"SPPROBE1");
/// Bytes from one record to the next, and from the table to the first record.
pub const RECORD_STRIDE: u32 = 4096;
/// Gaps kept for each vCPU.
pub const RING: usize = 64;

/// The head of the table.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Header {
    /// [`TABLE_MAGIC`]; written last, when the rest of the header is valid.
    pub magic: u64,
    /// [`VERSION`].
    pub version: u32,
    /// Number of records that follow.
    pub vcpus: u32,
    /// Offset of the first record from the table, bytes.
    pub record_offset: u32,
    /// Bytes from one record to the next.
    pub record_stride: u32,
}

/// A gap between two successive TSC readings of one vCPU, in guest TSC cycles.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Gap {
    /// The reading before the gap.
    pub start: u64,
    /// The reading after it.
    pub end: u64,
}

/// What one vCPU logs. Written by that vCPU alone; a reader tolerates a torn last entry by
/// reading `count` before and after.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Record {
    /// Gaps logged since boot. Entry n is `ring[n % RING]`; the entry is written first, then
    /// `count` is raised.
    pub count: u64,
    /// Gaps shorter than this many cycles are not logged.
    pub threshold: u64,
    /// The latest TSC reading: a heartbeat.
    pub last: u64,
    /// The longest gap since boot (or since the guest was told to forget).
    pub largest: Gap,
    /// The latest gaps.
    pub ring: [Gap; RING],
    /// Pieces of work done since boot, of whatever size is the guest's own choice: how many there are in a second
    /// tells how fast it is. 0 from a guest that does not count.
    pub work: u64,
}

const _: () = assert!(size_of::<Record>() <= 2048);
const _: () = assert!(size_of::<Header>() <= 64);
