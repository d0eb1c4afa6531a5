//! Maps RAM above 4 GiB; `boot.s` has the first 4 GiB.

use core::cell::UnsafeCell;
use core::sync::atomic::{AtomicU64, Ordering::Relaxed};

const GIB: u64 = 1 << 30;
const BIG_PAGE: u64 = 2 << 20;
const PRESENT_WRITABLE_USER: u64 = 7;
const BIG: u64 = 0x80;
/// Page directories kept for RAM above 4 GiB, 1 GiB each.
const DIRECTORIES: usize = 12;

/// Where the map ends at most.
pub(crate) const LIMIT: u64 = (4 + DIRECTORIES as u64) * GIB;

#[repr(C, align(4096))]
struct Directories(UnsafeCell<[[u64; 512]; DIRECTORIES]>);

// SAFETY: written once, by the BSP, before any other vCPU runs.
unsafe impl Sync for Directories {}

static HIGH: Directories = Directories(UnsafeCell::new([[0; 512]; DIRECTORIES]));

static TOP: AtomicU64 = AtomicU64::new(0);

/// The end of the highest RAM.
pub(crate) fn top() -> u64 {
    TOP.load(Relaxed)
}

unsafe extern "C" {
    static mut pdpt: [u64; 512];
}

/// Maps from 4 GiB up to `top`, in whole GiB, as far as [`LIMIT`].
pub(crate) fn map_above_4g(top: u64) {
    TOP.store(top, Relaxed);
    for index in 0..DIRECTORIES {
        let base = (4 + index as u64) * GIB;
        if base >= top {
            return;
        }
        // SAFETY: only the BSP runs; the directory is not in use before it is linked.
        unsafe {
            let directory = &raw mut (*HIGH.0.get())[index];
            for entry in 0..512 {
                (*directory)[entry] =
                    (base + entry as u64 * BIG_PAGE) | BIG | PRESENT_WRITABLE_USER;
            }
            let slot = (&raw mut pdpt).cast::<u64>().add(4 + index);
            slot.write_volatile(directory as u64 | PRESENT_WRITABLE_USER);
        }
    }
}
