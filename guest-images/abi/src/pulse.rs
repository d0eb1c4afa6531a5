//! What pulse writes beside the probe's structures.
//!
//! [`Globals`] lies at offset 64 of the probe table's page; [`Report`] lies in the second half
//! of each vCPU's record page (offset 2048). All counters start at zero at boot and only grow,
//! except where a field says otherwise.

use crate::virtio::{Blk, Driver, Hostile, Net, Rng, Vsock};

/// Version of what pulse writes: [`Globals::version`]. A pulse of before wrote 0, and had no
/// virtio drivers; one of version 2 told no [`Report::count`], and one of version 3 not when it was
/// [`Globals::born`].
pub const VERSION: u32 = 5;
/// Offset of [`Globals`] in the table's page.
pub const GLOBALS_OFFSET: u64 = 64;
/// Offset of [`Report`] in a vCPU's page.
pub const REPORT_OFFSET: u64 = 2048;
/// First eight bytes of [`Globals`].
pub const GLOBALS_MAGIC: u64 = u64::from_le_bytes(*b"SPPULSE1");
/// The most vCPUs pulse brings up.
pub const MAX_VCPUS: usize = 16;

/// What all vCPUs share.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Globals {
    /// [`GLOBALS_MAGIC`], written when pulse is up.
    pub magic: u64,
    /// vCPUs that have reached ring 3.
    pub online: u32,
    /// kvmclock frequency basis: 1 if kvmclock is present and enabled, else 0.
    pub kvmclock: u32,
    /// Times that a vCPU read a kvmclock value below one that another vCPU had read *before*
    /// (the cross-vCPU warp loop of kvm-unit-tests).
    pub warps: u64,
    /// The worst of them, ns.
    pub worst_warp_ns: u64,
    /// The highest kvmclock reading so far, ns (the warp loop's shared word).
    pub clock_high_ns: u64,
    /// Physical address and length in bytes of the RAM pattern.
    pub pattern_base: u64,
    /// See `pattern_base`.
    pub pattern_len: u64,
    /// A word both of two VMMs would touch if the guest ever ran twice: every vCPU adds 1 to it
    /// per loop with an atomic add, and to its own `Report::counter`; the sum must agree.
    pub total: u64,
    /// Guest-physical address of the 12-byte wall clock structure given to KVM, 0 if none.
    pub wall_clock_gpa: u64,
    /// Bytes beside the pattern that `touch=` is to write once; what RAM there is bounds it.
    pub touch_wanted: u64,
    /// Bytes of them that were written. Equal to `touch_wanted` when all is done.
    pub touched: u64,
    /// How often all of them were written.
    pub touch_passes: u64,
    /// TSC when that last was done.
    pub touch_ended: u64,
    /// [`VERSION`].
    pub version: u32,
    /// 0.
    pub reserved: u32,
    /// TSC at pulse's first instruction.
    pub born: u64,
}

/// How one kind of timer fared. Armed one by one: the next is armed when the last has fired.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Timers {
    /// Timers armed.
    pub armed: u64,
    /// Timers that fired. `armed - fired` is 0 or 1; 2 or more, or a 1 that stays for longer
    /// than the timer's period, is a lost timer.
    pub fired: u64,
    /// Interrupts that came with no timer armed: a doubled timer.
    pub doubled: u64,
    /// Timers that fired before their time.
    pub early: u64,
    /// The longest a timer fired after its time, TSC cycles.
    pub worst_late: u64,
}

/// What is left of a periodic timer's count, between two readings of the TSC: the phase of its ticks,
/// whatever keeps the vCPU from taking them.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Count {
    /// TSC before it was read.
    pub before: u64,
    /// TSC after.
    pub after: u64,
    /// Nanoseconds to the next tick; 0 for one that is due.
    pub left_ns: u64,
}

/// What a vCPU is doing; [`Report::mode`].
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Not started (an AP that got no SIPI yet).
    Offline = 0,
    /// Runs the whole loop: TSC, kvmclock, RAM pattern, timers.
    Spin = 1,
    /// Halted (`hlt`, interrupts on) between timers of 10 ms.
    Halt = 2,
    /// The loop, with `rep outsb` of known lines to the serial port.
    Pio = 3,
    /// The loop, with MMIO reads and writes on the probe's scratch register.
    Mmio = 4,
    /// The loop, with interrupts masked for 50 ms at a time while a timer comes due: the
    /// interrupt stays pending and must be taken once, after the unmasking.
    Masked = 5,
    /// Halted with interrupts on and no timer armed at all: only a swap's bugs would wake it.
    Idle = 6,
    /// The loop, with verified writes, reads and flushes on a virtio-blk disk.
    Blk = 7,
    /// The loop, with numbered frames on a virtio-net device.
    Net = 8,
    /// The loop, with requests for entropy.
    Rng = 9,
    /// The loop, with numbered records on vsock connections.
    Vsock = 10,
    /// The loop, with malformed requests to virtio devices.
    Hostile = 11,
}

/// What one vCPU reports.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Report {
    /// A [`Mode`].
    pub mode: u32,
    /// Local APIC id.
    pub apic_id: u32,
    /// Loops done.
    pub counter: u64,
    /// `tsc` readings that were lower than the one before on the same vCPU.
    pub tsc_backwards: u64,
    /// kvmclock readings.
    pub clock_reads: u64,
    /// The latest, ns since the guest's boot.
    pub clock_ns: u64,
    /// Readings lower than the one before on the same vCPU.
    pub clock_backwards: u64,
    /// The worst of them, ns.
    pub worst_backwards_ns: u64,
    /// Guest-physical address of this vCPU's pvclock structure, 0 if none.
    pub pvclock_gpa: u64,
    /// LAPIC one-shot timers (default period 2 ms).
    pub oneshot: Timers,
    /// TSC-deadline timers (default period 3 ms); zero where CPUID lacks it.
    pub deadline: Timers,
    /// LAPIC periodic ticks: `armed` counts expected ticks by the TSC. KVM coalesces ticks of a
    /// vCPU that isn't scheduled, so these are judged against a run without a swap.
    pub periodic: Timers,
    /// Whole passes over the RAM pattern.
    pub ram_passes: u64,
    /// 8-byte words that did not hold what was written in the pass before.
    pub ram_errors: u64,
    /// Checksum of the last whole pass (depends on the pass number only). Written before
    /// `ram_expected`: a reader may see one without the other; `ram_sums_wrong` can't be seen in part.
    pub ram_checksum: u64,
    /// The checksum it should have had.
    pub ram_expected: u64,
    /// MMIO accesses done.
    pub mmio_ops: u64,
    /// MMIO reads that did not return what was written.
    pub mmio_errors: u64,
    /// Lines written by `rep outsb`.
    pub pio_lines: u64,
    /// Times the SSE registers did not hold what was put in them before.
    pub fpu_errors: u64,
    /// Exceptions or interrupts nobody asked for.
    pub stray_interrupts: u64,
    /// The virtio device that the vCPU drives.
    pub driver: Driver,
    /// Mode `blk`.
    pub blk: Blk,
    /// Mode `net`.
    pub net: Net,
    /// Mode `rng`.
    pub rng: Rng,
    /// Mode `vsock`.
    pub vsock: Vsock,
    /// Mode `hostile`.
    pub hostile: Hostile,
    /// Whole passes whose checksum was not what it should have been.
    pub ram_sums_wrong: u64,
    /// The latest reading of a periodic timer.
    pub count: Count,
}

const _: () = assert!(size_of::<Report>() <= 2048);
const _: () = assert!(size_of::<Globals>() <= 2048);
