//! A device that is driven as the specification says: found, started, kicked, listened to.

use core::sync::atomic::{AtomicBool, Ordering::Acquire, Ordering::Relaxed, Ordering::Release};

use stillpoint_guest_abi::pulse::Report;
use stillpoint_guest_abi::virtio::{Driver, FIRST_GSI, SLOTS};
use stillpoint_guest_virtio::memory::Area;
use stillpoint_guest_virtio::registers::{
    INTERRUPT_CONFIG, MAGIC, VERSION, feature, offset, status,
};
use stillpoint_guest_virtio::ring::{Ring, Used};

use super::window::Window;
use crate::local::{self, Local};
use crate::options::{self, Waits};
use crate::pages::{self, place};
use crate::{apic, idt, ioapic, tsc};

/// A used ring that has moved for this long without an interrupt: one was lost.
const INTERRUPT_US: u64 = 2_000_000;
/// A request that is not done after this long is lost.
const REQUEST_US: u64 = 10_000_000;
/// How often these two are looked at, and whether the device still works.
const CARE_US: u64 = 50_000;
/// A reset ends before that.
const RESET_US: u64 = 40_000_000;
/// The most of a span without a look at the clock that counts as time.
const STEP_US: u64 = 5000;

/// The guest's own time: of a span in which it did not look, a freeze or a vCPU that was not
/// scheduled, a few milliseconds count. A device that was as little at work is not late.
pub(crate) struct Clock {
    last: u64,
    total: u64,
}

impl Clock {
    /// Begins at 0.
    pub(super) fn new() -> Self {
        let last = tsc::read();
        Self { last, total: 0 }
    }

    /// The time, after a look.
    pub(super) fn tick(&mut self) -> u64 {
        let now = tsc::read();
        self.total += now.saturating_sub(self.last).min(tsc::cycles(STEP_US));
        self.last = now;
        self.total
    }

    /// The time at the last look.
    pub(super) fn now(&self) -> u64 {
        self.total
    }
}

/// A device in each slot belongs to one vCPU at most.
static TAKEN: [AtomicBool; SLOTS] = [const { AtomicBool::new(false) }; SLOTS];

/// A slot that is ours until it is dropped.
pub(super) struct Claim(usize);

impl Claim {
    /// The slot, if nobody has it and a device of this kind (of any, if 0) is in it.
    pub(super) fn of(slot: usize, kind: u32) -> Option<Self> {
        let taken = TAKEN.get(slot)?;
        // Before it is claimed: a vCPU that only looks must not keep a device from the one that it is for.
        let window = Window::of(slot);
        let there = window.read32(offset::MAGIC) == MAGIC
            && window.read32(offset::VERSION) == VERSION
            && match window.read32(offset::DEVICE_ID) {
                0 => false,
                id => kind == 0 || id == kind,
            };
        (there && !taken.swap(true, Acquire)).then(|| Self(slot))
    }

    /// The slot that the command line gives the vCPU, or the first that will do.
    fn find(vcpu: usize, kind: u32) -> Option<Self> {
        match options::get().slots[vcpu] {
            Some(slot) => Self::of(slot, kind),
            None => (0..SLOTS).find_map(|slot| Self::of(slot, kind)),
        }
    }

    /// Its registers.
    pub(super) fn window(&self) -> Window {
        Window::of(self.0)
    }

    /// Which it is.
    pub(super) fn slot(&self) -> usize {
        self.0
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        TAKEN[self.0].store(false, Release);
    }
}

/// Resets a device. False if it does not come to rest.
pub(super) fn reset(window: Window) -> bool {
    let mut clock = Clock::new();
    window.write32(offset::STATUS, 0);
    while window.read32(offset::STATUS) != 0 {
        if clock.tick() > tsc::cycles(RESET_US) {
            return false;
        }
    }
    true
}

/// A device at work.
pub(super) struct Device {
    claim: Claim,
    window: Window,
    local: &'static Local,
    report: *mut Report,
    counts: Driver,
    waits: Waits,
    /// Interrupts accounted for.
    seen: u64,
    /// Since when a used ring has moved and no interrupt has come.
    unheard: Option<u64>,
    cared_at: u64,
}

/// The halt of a vCPU that waits for a device.
pub(crate) struct Rest {
    local: &'static Local,
    slot: usize,
    seen: u64,
}

impl Rest {
    /// The device has interrupted.
    pub(crate) fn is_over(&self) -> bool {
        self.local.lines[self.slot].load(Relaxed) != self.seen
    }
}

impl Device {
    /// Finds a device and agrees on features: those `wanted` and the transport's. Its queues are
    /// next, then [`Device::go`].
    pub(super) fn find(vcpu: usize, kind: u32, wanted: u64) -> Option<Self> {
        let report = pages::report(vcpu);
        let mut counts = pages::shown(place!(report.driver));
        let Some(claim) = Claim::find(vcpu, kind) else {
            counts.absent += 1;
            pages::show(place!(report.driver), &counts);
            return None;
        };
        let local = local::of(vcpu);
        let slot = claim.slot();
        counts.slot = slot as u32 + 1;
        counts.kind = kind;
        let waits = options::get().waits;
        counts.waits = waits as u64;
        let mut device = Self {
            window: claim.window(),
            claim,
            local,
            report,
            counts,
            waits,
            seen: local.lines[slot].load(Relaxed),
            unheard: None,
            cared_at: 0,
        };
        if device.agree(wanted) {
            let line = FIRST_GSI + slot as u32;
            if waits != Waits::Poll {
                ioapic::route(line, idt::DEVICES + slot as u8, apic::id());
            }
            return Some(device);
        }
        device.refuse();
        None
    }

    /// Steps 1 to 6 of 3.1.1.
    fn agree(&mut self, wanted: u64) -> bool {
        if !reset(self.window) {
            return false;
        }
        let window = self.window;
        let mut state = status::ACKNOWLEDGE;
        window.write32(offset::STATUS, state);
        state |= status::DRIVER;
        window.write32(offset::STATUS, state);
        let wanted = wanted | feature::VERSION_1 | feature::INDIRECT | feature::EVENT_IDX;
        let mut agreed = 0;
        for half in 0..2 {
            window.write32(offset::DEVICE_FEATURES_SEL, half);
            let offered = window.read32(offset::DEVICE_FEATURES);
            let ours = offered & (wanted >> (32 * half)) as u32;
            window.write32(offset::DRIVER_FEATURES_SEL, half);
            window.write32(offset::DRIVER_FEATURES, ours);
            agreed |= u64::from(ours) << (32 * half);
        }
        self.counts.features = agreed;
        state |= status::FEATURES_OK;
        window.write32(offset::STATUS, state);
        agreed & feature::VERSION_1 != 0 && window.read32(offset::STATUS) == state
    }

    /// Counts a start that went wrong, and gives up the device.
    pub(super) fn refuse(mut self) {
        self.counts.refused += 1;
    }

    /// The features agreed on.
    pub(super) fn features(&self) -> u64 {
        self.counts.features
    }

    /// Its registers, for its configuration.
    pub(super) fn window(&self) -> Window {
        self.window
    }

    /// Sets up a queue in memory of `area`. None if the device has no such queue.
    pub(super) fn ring(&self, area: &mut Area, queue: u32) -> Option<Ring> {
        let window = self.window;
        window.write32(offset::QUEUE_SEL, queue);
        let most = window.read32(offset::QUEUE_NUM_MAX);
        if most == 0 || window.read32(offset::QUEUE_READY) != 0 {
            return None;
        }
        // A power of two that both can.
        let size = most.min(options::get().queue.into());
        let size = 1 << size.ilog2();
        let ring = Ring::new(area, size, self.features() & feature::EVENT_IDX != 0);
        let layout = ring.layout();
        window.write32(offset::QUEUE_NUM, layout.size.into());
        window.write_address(offset::QUEUE_DESC, layout.descriptors.address());
        window.write_address(offset::QUEUE_DRIVER, layout.avail.address());
        window.write_address(offset::QUEUE_DEVICE, layout.used.address());
        window.write32(offset::QUEUE_READY, 1);
        (window.read32(offset::QUEUE_READY) == 1).then_some(ring)
    }

    /// The last step of the start.
    pub(super) fn go(&self, rings: &mut [Ring]) {
        let state = self.window.read32(offset::STATUS) | status::DRIVER_OK;
        for ring in rings {
            ring.want_interrupt(self.waits != Waits::Poll);
        }
        self.window.write32(offset::STATUS, state);
        self.show();
    }

    /// Shows the device what was added to a queue.
    pub(super) fn publish(&mut self, ring: &mut Ring, queue: u32) {
        if ring.publish() {
            self.counts.kicks += 1;
            self.window.write32(offset::QUEUE_NOTIFY, queue);
        }
    }

    /// A buffer was added to a queue.
    pub(super) fn submitted(&mut self) {
        self.counts.submitted += 1;
    }

    /// Whether it is time to look at these queues: at any time if we poll, else if the device has
    /// interrupted. An interrupt that should have come and did not is counted.
    pub(super) fn has_news(&mut self, rings: &[Ring], now: u64) -> bool {
        let moved = rings.iter().any(Ring::has_used);
        if self.waits == Waits::Poll {
            return moved;
        }
        let came = self.local.lines[self.claim.slot()].load(Relaxed);
        if came != self.seen {
            self.counts.interrupts += came - self.seen;
            self.seen = came;
            self.unheard = None;
            let why = self.window.read32(offset::INTERRUPT_STATUS);
            self.window.write32(offset::INTERRUPT_ACK, why);
            if why & INTERRUPT_CONFIG != 0 {
                self.cared_at = 0;
            } else if !moved {
                self.counts.spurious += 1;
            }
            return true;
        }
        if !moved {
            self.unheard = None;
            return false;
        }
        let since = *self.unheard.get_or_insert(now);
        let lost = now - since > tsc::cycles(INTERRUPT_US);
        if lost {
            self.counts.interrupts_lost += 1;
            self.unheard = None;
        }
        lost
    }

    /// The next thing that came back on a queue: its token and length. At the end the device is
    /// asked for an interrupt with the one after.
    pub(super) fn take(&mut self, ring: &mut Ring) -> Option<(u16, u32)> {
        loop {
            match ring.pop() {
                Some(Used::Done { token, len }) => {
                    self.counts.completed += 1;
                    return Some((token, len));
                }
                Some(Used::NotOurs) => self.counts.doubled += 1,
                Some(Used::Torn) => self.counts.torn += 1,
                None if self.waits == Waits::Poll => return None,
                None if ring.want_interrupt(true) => {}
                None => return None,
            }
        }
    }

    /// Looks for requests on these queues that take too long, and whether the device still works:
    /// false if not. Shows the counters.
    pub(super) fn care<'r>(
        &mut self,
        rings: impl IntoIterator<Item = &'r mut Ring>,
        now: u64,
    ) -> bool {
        let mut works = true;
        if now - self.cared_at > tsc::cycles(CARE_US) || self.cared_at == 0 {
            self.cared_at = now.max(1);
            for ring in rings {
                self.counts.lost += ring.overdue(now, tsc::cycles(REQUEST_US));
            }
            works = self.window.read32(offset::STATUS) & status::NEEDS_RESET == 0;
            if !works {
                self.counts.needs_reset += 1;
            }
        }
        self.show();
        works
    }

    /// How the vCPU is to wait, if by a halt.
    pub(super) fn rest(&self) -> Option<Rest> {
        (self.waits == Waits::Halt).then_some(Rest {
            local: self.local,
            slot: self.claim.slot(),
            seen: self.seen,
        })
    }

    fn show(&self) {
        let report = self.report;
        pages::show(place!(report.driver), &self.counts);
    }
}

impl Drop for Device {
    /// The device lets go of our memory before anything else uses it.
    fn drop(&mut self) {
        ioapic::mask(FIRST_GSI + self.claim.slot() as u32);
        if !reset(self.window) {
            self.counts.refused += 1;
        }
        self.counts.slot = 0;
        self.show();
    }
}
