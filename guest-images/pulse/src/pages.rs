//! The pages the host reads: the probe's table and records, and pulse's own half of each.
//!
//! Every field has one writer (its vCPU) unless said otherwise, and readers at any time: the host,
//! and the BSP for the `report` command. So all access is by relaxed atomics, through [`field!`].

use core::cell::UnsafeCell;
use core::sync::atomic::{AtomicU64, Ordering::Acquire, Ordering::Relaxed, Ordering::Release};

use stillpoint_guest_abi::probe::{self, Header, Record};
use stillpoint_guest_abi::pulse::{
    GLOBALS_MAGIC, GLOBALS_OFFSET, Globals, MAX_VCPUS, REPORT_OFFSET, Report, VERSION,
};

use crate::bootinfo::BootInfo;
use crate::options::Options;
use crate::{options, paging};

const PAGE: usize = probe::RECORD_STRIDE as usize;

#[repr(C, align(4096))]
struct Table(UnsafeCell<[u8; PAGE * (MAX_VCPUS + 1)]>);

// SAFETY: only reached through atomics.
unsafe impl Sync for Table {}

static TABLE: Table = Table(UnsafeCell::new([0; PAGE * (MAX_VCPUS + 1)]));

/// One 64-bit field behind a pointer to a structure, as an atomic.
macro_rules! field {
    ($base:ident . $($field:tt)+) => {
        // SAFETY: `pages` hands out pointers into a static of its own, and the fields of the
        // structures there are aligned.
        unsafe {
            ::core::sync::atomic::AtomicU64::from_ptr(&raw mut (*$base).$($field)+)
        }
    };
}
pub(crate) use field;

/// The same for a 32-bit field.
macro_rules! field32 {
    ($base:ident . $($field:tt)+) => {
        // SAFETY: as for `field!`.
        unsafe {
            ::core::sync::atomic::AtomicU32::from_ptr(&raw mut (*$base).$($field)+)
        }
    };
}
pub(crate) use field32;

fn page(index: usize) -> *mut u8 {
    // SAFETY: callers stay within the table, by MAX_VCPUS.
    unsafe { TABLE.0.get().cast::<u8>().add(PAGE * index) }
}

/// What all vCPUs share.
pub(crate) fn globals() -> *mut Globals {
    page(0).wrapping_add(GLOBALS_OFFSET as usize).cast()
}

/// The probe record of one vCPU.
pub(crate) fn record(vcpu: usize) -> *mut Record {
    page(1 + vcpu).cast()
}

/// The report of one vCPU.
pub(crate) fn report(vcpu: usize) -> *mut Report {
    page(1 + vcpu).wrapping_add(REPORT_OFFSET as usize).cast()
}

/// Adds to a counter that only we write.
pub(crate) fn add(counter: &AtomicU64, by: u64) {
    counter.store(counter.load(Relaxed).wrapping_add(by), Relaxed);
}

/// Raises a maximum that only we write.
pub(crate) fn raise(maximum: &AtomicU64, to: u64) {
    if to > maximum.load(Relaxed) {
        maximum.store(to, Relaxed);
    }
}

/// Copies a whole structure, made of 64-bit words, to a place in these pages that only we write.
pub(crate) fn show<T: Copy>(place: *mut T, value: &T) {
    const { assert!(size_of::<T>().is_multiple_of(8) && align_of::<T>() == 8) };
    let from = core::ptr::from_ref(value).cast::<u64>();
    for word in 0..size_of::<T>() / 8 {
        // SAFETY: both hold as many words; the place is a field of ours, by the caller.
        unsafe {
            let to = AtomicU64::from_ptr(place.cast::<u64>().add(word));
            to.store(from.add(word).read(), Relaxed);
        }
    }
}

/// What such a place holds.
pub(crate) fn shown<T: Copy>(place: *mut T) -> T {
    // SAFETY: a field of these pages, made of integers: at worst some are newer than others.
    unsafe { place.read_volatile() }
}

/// The address of a field of a structure in these pages.
macro_rules! place {
    ($base:ident . $field:ident) => {
        // SAFETY: as for `field!`; nothing is read.
        unsafe { &raw mut (*$base).$field }
    };
}
pub(crate) use place;

unsafe extern "C" {
    /// TSC at the first instruction, by boot.s.
    static born: u64;
}

/// Fills in the header and where the pattern lies. The table is not announced yet.
pub(crate) fn publish(info: &BootInfo) {
    let (base, len) = place_pattern(info, options::get());
    let globals = globals();
    field!(globals.pattern_base).store(base, Relaxed);
    field!(globals.pattern_len).store(len, Relaxed);
    field32!(globals.version).store(VERSION, Relaxed);
    // SAFETY: boot.s wrote it before it came here, and nobody does since.
    field!(globals.born).store(unsafe { born }, Relaxed);

    let header = page(0).cast::<Header>();
    field32!(header.version).store(probe::VERSION, Relaxed);
    field32!(header.vcpus).store(options::get().cpus as u32, Relaxed);
    field32!(header.record_offset).store(probe::RECORD_STRIDE, Relaxed);
    field32!(header.record_stride).store(probe::RECORD_STRIDE, Relaxed);
    field!(header.magic).store(probe::TABLE_MAGIC, Release);
}

/// Tells the probe device, if there is one, where the table is, and then says that pulse is up.
pub(crate) fn announce() {
    if has_probe() {
        let register = (probe::MMIO_BASE + probe::REG_TABLE) as *mut u64;
        // SAFETY: the device is there and has this register.
        unsafe { register.write_volatile(table()) };
    }
    let globals = globals();
    field!(globals.magic).store(GLOBALS_MAGIC, Release);
}

/// Whether pulse is up.
pub(crate) fn is_announced() -> bool {
    let globals = globals();
    field!(globals.magic).load(Acquire) == GLOBALS_MAGIC
}

/// Where the table lies.
pub(crate) fn table() -> u64 {
    page(0) as u64
}

/// Whether the machine has a probe device.
pub(crate) fn has_probe() -> bool {
    let register = (probe::MMIO_BASE + probe::REG_ID) as *const u32;
    // SAFETY: the page is mapped for ring 3; without a device it reads as anything.
    unsafe { register.read_volatile() == probe::DEVICE_ID }
}

/// The pattern's base and length: the whole of what was asked where some RAM can hold it, else
/// as much as the largest range holds. Whole pages for each of the most vCPUs.
fn place_pattern(info: &BootInfo, options: &Options) -> (u64, u64) {
    let (from, wanted) = (options.ram_from, options.ram);
    let mut best = (from, 0);
    for region in info.ram() {
        let start = region.start.max(from).next_multiple_of(PAGE as u64);
        let len = region
            .end
            .min(paging::LIMIT)
            .saturating_sub(start)
            .min(wanted);
        if len > best.1 {
            best = (start, len);
        }
    }
    (best.0, best.1 & !(PAGE as u64 - 1))
}
