//! What pulse writes down of the virtio devices it drives; parts of [`super::pulse::Report`].
//!
//! A vCPU drives one device at a time and goes on adding when it comes back to a mode. Counters
//! named in `faults` of the harness must stay 0 under a VMM that treats its guest well, whatever
//! is swapped meanwhile.

/// Guest-physical address of the first device's registers; each has a page.
pub const MMIO_BASE: u64 = 0xd000_1000;
/// Bytes from one device's registers to the next.
pub const MMIO_STRIDE: u64 = 0x1000;
/// The most devices.
pub const SLOTS: usize = 18;
/// Interrupt line of the first device; the others follow.
pub const FIRST_GSI: u32 = 6;

/// Any device: requests and interrupts.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Driver {
    /// The device in use, counted from 1; 0 while none is.
    pub slot: u32,
    /// Its virtio device ID.
    pub kind: u32,
    /// The features agreed on.
    pub features: u64,
    /// 0: the used rings are polled; 1: looked at after an interrupt only; 2: that, and the vCPU
    /// halts until then.
    pub waits: u64,
    /// Times that no device of the kind wanted was there, or free.
    pub absent: u64,
    /// Devices that did not go through the start-up of the specification.
    pub refused: u64,
    /// Buffers given to the device.
    pub submitted: u64,
    /// Buffers that it gave back.
    pub completed: u64,
    /// Buffers that it gave back though it did not have them: a request done twice.
    pub doubled: u64,
    /// Requests that were still not done when the guest had run for 10 s.
    pub lost: u64,
    /// Used rings whose index made no sense.
    pub torn: u64,
    /// Times the device said that it needs a reset.
    pub needs_reset: u64,
    /// Kicks.
    pub kicks: u64,
    /// Interrupts.
    pub interrupts: u64,
    /// Interrupts with nothing to tell; a swap may cause them.
    pub spurious: u64,
    /// Times a used ring had moved, an interrupt was due, and none came while the guest ran for 2 s.
    pub interrupts_lost: u64,
}

/// Mode `blk`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Blk {
    /// Distinguishes what this run wrote from what was on the disk before; see [`super::disk`].
    pub run: u64,
    /// Guest-physical address of an array of [`super::disk::Block`], 0 if there is none.
    pub table_gpa: u64,
    /// Its length.
    pub blocks: u64,
    /// Block n lies at sector `n * stride`.
    pub stride: u64,
    /// Blocks read.
    pub reads: u64,
    /// Blocks written.
    pub writes: u64,
    /// Blocks zeroed by the device.
    pub zeroings: u64,
    /// Flushes.
    pub flushes: u64,
    /// Requests that the device said had failed.
    pub errors: u64,
    /// Sectors read that did not hold what was written last.
    pub wrong: u64,
    /// The first of them: its number plus 1.
    pub wrong_sector: u64,
    /// Status bytes that are none, or were never written.
    pub bad_status: u64,
}

/// Mode `net`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Net {
    /// Pairs of queues in use.
    pub pairs: u64,
    /// Numbered frames sent.
    pub sent: u64,
    /// Numbered frames that came back.
    pub received: u64,
    /// Frames that had not come back when [`super::frame::WINDOW`] more were sent. No fault: a
    /// tap may drop, or nobody may be there to send them back.
    pub lost: u64,
    /// Frames that came back twice.
    pub duplicated: u64,
    /// Frames with our mark and a wrong length, number or content.
    pub corrupted: u64,
    /// virtio-net headers of received frames that ask for what was not agreed on.
    pub bad_headers: u64,
    /// Frames of others.
    pub foreign: u64,
}

/// Mode `rng`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Rng {
    /// Bytes of entropy.
    pub bytes: u64,
    /// Buffers that held zeros alone, or came back untouched or empty.
    pub hollow: u64,
    /// Buffers that held what the one before held.
    pub repeated: u64,
}

/// Mode `vsock`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Vsock {
    /// Our CID.
    pub cid: u64,
    /// Connections opened by us.
    pub opened: u64,
    /// Connections accepted.
    pub accepted: u64,
    /// Times nobody listened at the host's port.
    pub refused: u64,
    /// Open connections that ended without our doing.
    pub broken: u64,
    /// Records that went to the host and came back.
    pub rounds: u64,
    /// Bytes that came back in them.
    pub bytes: u64,
    /// Bytes that came on accepted connections and were sent back.
    pub echoed: u64,
    /// Bytes that came back and were not what was sent.
    pub wrong: u64,
    /// Packets that break the protocol.
    pub bad_packets: u64,
    /// Records that had not come back when the guest had run for 10 s.
    pub stalled: u64,
}

/// How many kinds of attack there can be.
pub const ATTACKS: usize = 96;

/// Mode `hostile`: what the device made of each attack. Only the first four counters may differ
/// from 0.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Hostile {
    /// The attack under way (see [`super::attack::NAMES`]) plus 1.
    pub current: u64,
    /// Attacks after which the device went on working.
    pub worked: u64,
    /// Attacks after which it said that it needs a reset.
    pub needs_reset: u64,
    /// Attacks of the kind that the device may meet with silence until it is reset.
    pub silent: u64,
    /// Attacks after which it neither worked nor said that it needs a reset.
    pub stuck: u64,
    /// Resets that did not end.
    pub reset_stuck: u64,
    /// Devices that did not work again after a reset.
    pub dead: u64,
    /// Attacks after which memory had changed that the device had no right to write.
    pub scribbled: u64,
    /// For each attack how often it was made, and how often it was one of the last four.
    pub each: [Tally; ATTACKS],
}

/// How one kind of attack went.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Times made.
    pub made: u32,
    /// Times that it succeeded, to our regret.
    pub succeeded: u32,
}

impl Default for Hostile {
    fn default() -> Self {
        Self {
            current: 0,
            worked: 0,
            needs_reset: 0,
            silent: 0,
            stuck: 0,
            reset_stuck: 0,
            dead: 0,
            scribbled: 0,
            each: [Tally::default(); ATTACKS],
        }
    }
}

impl core::fmt::Debug for Hostile {
    /// The table as the names of those that succeeded.
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        let succeeded = super::attack::NAMES.iter().zip(&self.each);
        let succeeded = succeeded.filter(|(_, tally)| tally.succeeded > 0);
        f.debug_struct("Hostile")
            .field("current", &self.current)
            .field("worked", &self.worked)
            .field("needs_reset", &self.needs_reset)
            .field("silent", &self.silent)
            .field("stuck", &self.stuck)
            .field("reset_stuck", &self.reset_stuck)
            .field("dead", &self.dead)
            .field("scribbled", &self.scribbled)
            .field("succeeded", &Names(succeeded.map(|(name, _)| *name)))
            .finish()
    }
}

/// A list for `Debug`.
struct Names<I>(I);

impl<I: Iterator<Item = &'static str> + Clone> core::fmt::Debug for Names<I> {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_list().entries(self.0.clone()).finish()
    }
}

/// Port at which pulse's mode `vsock` accepts connections, and sends back what comes.
pub const VSOCK_ECHO_PORT: u32 = 1025;
