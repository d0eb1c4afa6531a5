//! `touch=`: writes a word into every page of RAM once, so that the host has to back it all.
//!
//! vCPU 0 does it, a few pages in each turn of its loop, and leaves the pattern's pages to the
//! pattern. Afterwards the guest works on the pattern alone: much RAM held, little in use.

use core::cell::UnsafeCell;
use core::sync::atomic::AtomicBool;
use core::sync::atomic::Ordering::Relaxed;

use crate::bootinfo::BootInfo;
use crate::gaps::Gaps;
use crate::pages::{self, add, field};
use crate::{options, paging, tsc};

const PAGE: u64 = 4096;
/// Pages touched in a loop, at most.
const SLICE: u64 = 16;
/// Ranges of RAM that are looked at.
const RANGES: usize = 8;

struct Plan(UnsafeCell<[(u64, u64); RANGES]>);

// SAFETY: written once, by the BSP, before any other vCPU runs.
unsafe impl Sync for Plan {}

static PLAN: Plan = Plan(UnsafeCell::new([(0, 0); RANGES]));

/// All of it is to be touched once more.
static AGAIN: AtomicBool = AtomicBool::new(false);
/// And then again and again: a guest whose work is all of its RAM.
static ALWAYS: AtomicBool = AtomicBool::new(false);

/// Has vCPU 0 touch everything once more, from the beginning: after a swap, to see what that costs.
pub(crate) fn again() {
    AGAIN.store(true, Relaxed);
}

/// Has vCPU 0 begin anew whenever it has touched everything; each pass notes its end.
pub(crate) fn always() {
    again();
    ALWAYS.store(true, Relaxed);
}

/// Chooses the ranges: `touch=` bytes of RAM, the pattern among them, as far as there is RAM.
pub(crate) fn plan(info: &BootInfo) {
    let globals = pages::globals();
    let pattern = field!(globals.pattern_base).load(Relaxed);
    let pattern_len = field!(globals.pattern_len).load(Relaxed);
    let mut left = options::get().touch.saturating_sub(pattern_len) & !(PAGE - 1);
    let mut ranges = [(0, 0); RANGES];
    let mut wanted = 0;
    for (range, region) in ranges.iter_mut().zip(info.ram()) {
        let mut start = region.start.max(options::ABOVE_IMAGE);
        // The pattern lies at the start of its region.
        if (region.start..region.end).contains(&pattern) {
            start = pattern + pattern_len;
        }
        let start = start.next_multiple_of(PAGE);
        let end = region.end.min(paging::LIMIT) & !(PAGE - 1);
        let len = end.saturating_sub(start).min(left);
        *range = (start, start + len);
        left -= len;
        wanted += len;
    }
    // SAFETY: only the BSP runs.
    unsafe { *PLAN.0.get() = ranges };
    field!(globals.touch_wanted).store(wanted, Relaxed);
}

/// Whether there is RAM to touch, and not all of it was, ever.
pub(crate) fn is_to_come() -> bool {
    let globals = pages::globals();
    field!(globals.touch_wanted).load(Relaxed) != 0
        && field!(globals.touch_passes).load(Relaxed) == 0
}

/// How far it is.
pub(crate) struct Touch {
    ranges: &'static [(u64, u64)],
    at: u64,
}

impl Touch {
    /// At the beginning for vCPU 0; nothing to do for the others.
    pub(crate) fn new(vcpu: usize) -> Self {
        let ranges = if vcpu == 0 { Self::planned() } else { &[] };
        let at = ranges.first().map_or(0, |range| range.0);
        Self { ranges, at }
    }

    fn planned() -> &'static [(u64, u64)] {
        // SAFETY: no one writes after bring-up.
        unsafe { &*PLAN.0.get() }
    }

    /// Begins once more, if that was asked of vCPU 0.
    pub(crate) fn begin_again(&mut self) {
        if AGAIN.swap(false, Relaxed) {
            self.begin();
        }
    }

    fn begin(&mut self) {
        let globals = pages::globals();
        field!(globals.touched).store(0, Relaxed);
        *self = Self::new(0);
    }

    /// What follows the last range.
    fn end(&mut self) {
        let globals = pages::globals();
        field!(globals.touch_ended).store(tsc::read(), Relaxed);
        add(field!(globals.touch_passes), 1);
        if ALWAYS.load(Relaxed) {
            self.begin();
        }
    }

    /// Whether everything is touched.
    pub(crate) fn is_over(&self) -> bool {
        self.ranges.is_empty()
    }

    /// Touches the next few pages; looks at the TSC after each, since it may take a fault.
    pub(crate) fn walk(&mut self, gaps: &mut Gaps) {
        for _ in 0..SLICE {
            let Some((&(_, end), rest)) = self.ranges.split_first() else {
                return;
            };
            if self.at >= end {
                self.ranges = rest;
                self.at = rest.first().map_or(0, |range| range.0);
                if rest.is_empty() {
                    self.end();
                }
                continue;
            }
            // SAFETY: the page lies in RAM that the memory map gave and no one else uses.
            unsafe { (self.at as *mut u64).write_volatile(self.at) };
            self.at += PAGE;
            let globals = pages::globals();
            add(field!(globals.touched), PAGE);
            gaps.tick();
        }
    }
}
