//! vmclock: tells the guest that its TSC was disturbed, in a page that it reads without an exit.
//!
//! The page is the one of Linux's include/uapi/linux/vmclock-abi.h, found by the ACPI device
//! `AMZNC10C`; programs map it, and poll `/dev/vmclock0` to hear of a change (drivers/ptp/ptp_vmclock.c,
//! Linux 7.0 and later). At every swap the sequence goes on by two and the guest is notified. The
//! *disruption marker* changes only when the TSC did not run on as if nothing had been: after a pause
//! that was held, or on a host that could not put the TSC back exactly. A clock daemon throws away
//! what it has learnt when the marker changes, so a swap that disturbed nothing must not change it.
//!
//! The page carries no time: its counter is marked invalid and its clock unknown. A time without an
//! honest bound of its error would be worse than none, and the guest has one by ptp_kvm.
//!
//! Sequence and marker are this device's own; what the guest writes into the page is overwritten.
//! It writes guest memory at a boot, and in [`VmClock::note_swap`], which is for the process that
//! owns the guest, before any vCPU runs. It has no registers and no line: the
//! [power device](super::power) tells of it.

use std::sync::atomic::{Ordering, fence};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use stillpoint_state::contents::Contents;
use stillpoint_state::{Saved, StateError, Unclaimed, sections};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use super::{Busy, Device};
use crate::memory::Memory;

/// Where the page lies: reserved in the memory map, behind the ACPI tables.
pub const PAGE: GuestAddress = GuestAddress(0xf_e000);
/// Its length.
pub const PAGE_SIZE: u32 = 4096;

/// "VCLK".
const MAGIC: u32 = 0x4b4c_4356;
const VERSION: u16 = 1;
/// `VMCLOCK_COUNTER_INVALID`.
const NO_COUNTER: u8 = 0xff;
/// `VMCLOCK_FLAG_NOTIFICATION_PRESENT`: the guest hears of each change.
const NOTIFIES: u64 = 1 << 9;

// Offsets in `struct vmclock_abi`. What is not named here is zero: clock status unknown, no time.
const AT_MAGIC: usize = 0;
const AT_SIZE: usize = 4;
const AT_VERSION: usize = 8;
const AT_COUNTER: usize = 10;
const AT_SEQUENCE: usize = 12;
const AT_MARKER: usize = 16;
const AT_FLAGS: usize = 24;
/// Bytes of the structure.
const LEN: usize = 112;

#[derive(Clone, Copy, Debug, Default)]
struct Inner {
    /// Even: at rest.
    sequence: u32,
    marker: u64,
}

/// The vmclock device.
#[derive(Debug)]
pub struct VmClock {
    memory: Memory,
    inner: Mutex<Inner>,
}

impl VmClock {
    /// A new one; writes its page into fresh RAM.
    pub fn new(memory: &Memory) -> Result<Self, GuestMemoryError> {
        let clock = Self {
            memory: memory.clone(),
            inner: Mutex::default(),
        };
        let inner = *clock.inner();
        clock.write(&inner)?;
        Ok(clock)
    }

    /// From saved state. The page is as the predecessor left it.
    pub fn restore(memory: &Memory, from: &mut Unclaimed) -> Result<Self, StateError> {
        let sections::VmClock { sequence, marker } = from.take("")?;
        Ok(Self {
            memory: memory.clone(),
            inner: Mutex::new(Inner {
                // Odd is a change that was never ended, which we never save.
                sequence: sequence & !1,
                marker,
            }),
        })
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A swap is over, in which the guest's TSC was disturbed or not. The guest is ours, and its
    /// vCPUs stand still; it is to be notified.
    pub fn note_swap(&self, disturbed: bool) -> Result<(), GuestMemoryError> {
        let mut inner = self.inner();
        inner.marker = inner.marker.wrapping_add(disturbed.into());
        inner.sequence = inner.sequence.wrapping_add(2);
        self.write(&inner)
    }

    /// Writes the page under its sequence lock: a program of the guest that was stopped in the middle
    /// of reading it reads again.
    fn write(&self, inner: &Inner) -> Result<(), GuestMemoryError> {
        let sequence = GuestAddress(PAGE.0 + AT_SEQUENCE as u64);
        let odd = inner.sequence.wrapping_sub(1) | 1;
        self.memory.store(odd.to_le(), sequence, Ordering::SeqCst)?;
        fence(Ordering::SeqCst);
        let image = image(inner);
        self.memory.write_slice(&image[..AT_SEQUENCE], PAGE)?;
        let behind = AT_SEQUENCE + 4;
        let at = GuestAddress(PAGE.0 + behind as u64);
        self.memory.write_slice(&image[behind..], at)?;
        fence(Ordering::SeqCst);
        let even = inner.sequence.to_le();
        self.memory.store(even, sequence, Ordering::SeqCst)
    }
}

/// The page at rest.
fn image(inner: &Inner) -> [u8; LEN] {
    let mut page = [0; LEN];
    let mut put = |at: usize, bytes: &[u8]| page[at..at + bytes.len()].copy_from_slice(bytes);
    put(AT_MAGIC, &MAGIC.to_le_bytes());
    put(AT_SIZE, &PAGE_SIZE.to_le_bytes());
    put(AT_VERSION, &VERSION.to_le_bytes());
    put(AT_COUNTER, &[NO_COUNTER]);
    put(AT_SEQUENCE, &inner.sequence.to_le_bytes());
    put(AT_MARKER, &inner.marker.to_le_bytes());
    put(AT_FLAGS, &NOTIFIES.to_le_bytes());
    page
}

impl Device for VmClock {
    fn name(&self) -> &str {
        "vmclock"
    }

    fn read(&self, _offset: u64, data: &mut [u8]) {
        // It is on no bus.
        data.fill(0);
    }

    fn write(&self, _offset: u64, _data: &[u8]) {}

    fn drain(&self, _deadline: Instant) -> Result<(), Busy> {
        Ok(())
    }

    fn freeze(&self, _deadline: Instant) -> Result<(), Busy> {
        Ok(())
    }

    fn resume(&self) {}

    fn announce(&self, to: &mut Contents) {
        to.announce(&sections::VmClock::KIND, "");
    }

    fn save(&self, to: &mut Saved) -> Result<(), StateError> {
        let Inner { sequence, marker } = *self.inner();
        to.put("", &sections::VmClock { sequence, marker })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn memory() -> Memory {
        Memory::from_ranges(&[(GuestAddress(0), 1 << 20)]).expect("memory")
    }

    fn page(memory: &Memory) -> [u8; LEN] {
        let mut page = [0; LEN];
        memory.read_slice(&mut page, PAGE).expect("read");
        page
    }

    fn word(page: &[u8], at: usize) -> u64 {
        u64::from_le_bytes(*page[at..].first_chunk().expect("eight bytes"))
    }

    fn saved(clock: &VmClock) -> Vec<u8> {
        let mut saved = Saved::default();
        clock.save(&mut saved).expect("save");
        saved.finish(3, "", "", 0)
    }

    fn restored(memory: &Memory, bytes: &[u8]) -> VmClock {
        let mut state = Unclaimed::decode(bytes).expect("decode");
        let clock = VmClock::restore(memory, &mut state).expect("restore");
        state.finish().expect("nothing left");
        clock
    }

    #[test]
    fn the_page_says_what_it_is_and_tells_no_time() {
        let memory = memory();
        VmClock::new(&memory).expect("new");
        let page = page(&memory);
        assert_eq!(&page[..4], b"VCLK");
        assert_eq!(page[4..10], [0, 0x10, 0, 0, 1, 0]);
        assert_eq!(page[AT_COUNTER], 0xff);
        assert_eq!(word(&page, AT_FLAGS), 1 << 9);
        assert!(page[32..].iter().all(|&byte| byte == 0), "no time");
    }

    #[test]
    fn the_marker_changes_when_the_tsc_was_disturbed_and_only_then() {
        let memory = memory();
        let clock = VmClock::new(&memory).expect("new");
        let read = || {
            let page = page(&memory);
            (page[AT_SEQUENCE], word(&page, AT_MARKER))
        };
        assert_eq!(read(), (0, 0));
        clock.note_swap(false).expect("note");
        assert_eq!(read(), (2, 0));
        clock.note_swap(true).expect("note");
        assert_eq!(read(), (4, 1));
    }

    #[test]
    fn round_trip_and_every_field_counts() {
        let memory = memory();
        let clock = VmClock::new(&memory).expect("new");
        let mut before = saved(&clock);
        for disturbed in [false, true] {
            clock.note_swap(disturbed).expect("note");
            let now = saved(&clock);
            assert_ne!(now, before);
            assert_eq!(saved(&restored(&memory, &now)), now);
            before = now;
        }
    }

    #[test]
    fn what_a_guest_scribbles_is_not_believed() {
        let memory = memory();
        let clock = VmClock::new(&memory).expect("new");
        clock.note_swap(true).expect("note");
        memory.write_slice(&[0xff; LEN], PAGE).expect("scribble");
        let again = restored(&memory, &saved(&clock));
        assert_eq!(page(&memory), [0xff; LEN], "restoring writes nothing");
        again.note_swap(true).expect("note");
        let page = page(&memory);
        assert_eq!((page[AT_SEQUENCE], word(&page, AT_MARKER)), (4, 2));
    }

    #[test]
    fn frozen_means_silent() {
        let memory = memory();
        let clock = VmClock::new(&memory).expect("new");
        let before = page(&memory);
        clock.freeze(Instant::now()).expect("freeze");
        saved(&clock);
        clock.resume();
        assert_eq!(page(&memory), before);
    }
}
