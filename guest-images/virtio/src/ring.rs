//! A split virtqueue, the driver's side (section 2.7).
//!
//! What is in flight is kept in memory of our own: a device that gives back what it does not have,
//! or whose index jumps, is found out, and can't make us lose our place.
//!
//! ```text
//! add ─▶ publish ─▶ (the device works) ─▶ pop
//!         └ says whether a kick is due
//! ```

use crate::memory::{Area, full_barrier, read_barrier, write_barrier};

/// The most descriptors of a ring here.
pub const MAX_SIZE: u16 = 64;
const MAX: usize = MAX_SIZE as usize;
/// Bytes of a descriptor.
pub const DESCRIPTOR: usize = 16;
/// Descriptor flag: another follows.
pub const NEXT: u16 = 1;
/// Descriptor flag: the device writes it.
pub const WRITE: u16 = 2;
/// Descriptor flag: it points to a table of descriptors.
pub const INDIRECT: u16 = 4;
const NO_INTERRUPT: u16 = 1;
const NO_NOTIFY: u16 = 1;

/// One buffer of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Buffer {
    /// Its guest-physical address.
    pub address: u64,
    /// Its length in bytes.
    pub len: u32,
    /// Whether the device writes it, and not reads.
    pub device_writes: bool,
}

impl Buffer {
    /// The device reads all of an area.
    pub fn readable(area: Area) -> Self {
        Self {
            address: area.address(),
            len: area.len() as u32,
            device_writes: false,
        }
    }

    /// The device writes it.
    pub fn writable(area: Area) -> Self {
        Self {
            device_writes: true,
            ..Self::readable(area)
        }
    }
}

/// The three parts of a ring in memory, for whoever writes them by hand.
#[derive(Clone, Copy, Debug)]
pub struct Layout {
    /// Descriptors.
    pub size: u16,
    /// The descriptor table.
    pub descriptors: Area,
    /// The available ring, ours.
    pub avail: Area,
    /// The used ring, the device's.
    pub used: Area,
}

impl Layout {
    /// Takes a ring's memory, zeroed, off the front of an area. `size` is a power of two.
    pub fn take(area: &mut Area, size: u16) -> Self {
        let n = usize::from(size);
        let layout = Self {
            size,
            descriptors: area.take(DESCRIPTOR * n, 16),
            avail: area.take(6 + 2 * n, 2),
            used: area.take(6 + 8 * n, 4),
        };
        layout.clear();
        layout
    }

    /// Zeroes it. No device may be using it.
    pub fn clear(&self) {
        self.descriptors.fill(0);
        self.avail.fill(0);
        self.used.fill(0);
    }

    /// Writes a descriptor into a table, which may be an indirect one.
    pub fn describe(table: Area, index: u16, buffer: Buffer, flags: u16, next: u16) {
        let at = usize::from(index) * DESCRIPTOR;
        let write = if buffer.device_writes { WRITE } else { 0 };
        table.set64(at, buffer.address);
        table.set32(at + 8, buffer.len);
        table.set16(at + 12, flags | write);
        table.set16(at + 14, next);
    }

    /// Writes entry `index` of the available ring, modulo its size.
    pub fn set_avail(&self, index: u16, head: u16) {
        self.avail
            .set16(4 + 2 * usize::from(index & (self.size - 1)), head);
    }

    /// Says how many entries of the available ring there ever were, modulo 2^16.
    pub fn set_avail_index(&self, index: u16) {
        write_barrier();
        self.avail.set16(2, index);
    }

    /// How many entries of the used ring there ever were, modulo 2^16.
    pub fn used_index(&self) -> u16 {
        let index = self.used.get16(2);
        read_barrier();
        index
    }

    /// Entry `index` of the used ring, modulo its size: id and length.
    pub fn used_entry(&self, index: u16) -> (u32, u32) {
        let at = 4 + 8 * usize::from(index & (self.size - 1));
        (self.used.get32(at), self.used.get32(at + 4))
    }
}

/// What a device gave back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Used {
    /// A request.
    Done {
        /// What it was added with.
        token: u16,
        /// Bytes that the device says it has written.
        len: u32,
    },
    /// Something that it did not have: done before, or never given to it.
    NotOurs,
    /// Its index went back or too far: nothing between can be told any more.
    Torn,
}

#[derive(Clone, Copy, Debug, Default)]
struct Slot {
    live: bool,
    overdue: bool,
    token: u16,
    since: u64,
}

/// There are too few free descriptors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Full;

/// A virtqueue.
#[derive(Debug)]
pub struct Ring {
    layout: Layout,
    event_idx: bool,
    /// By head.
    slots: [Slot; MAX],
    /// Our own copy of the chains; the device cannot write it.
    next: [u16; MAX],
    first_free: u16,
    free: u16,
    /// Entries of the available ring: made, and shown to the device.
    made: u16,
    shown: u16,
    /// Entries of the used ring taken.
    taken: u16,
}

impl Ring {
    /// An empty one in memory of `area`.
    pub fn new(area: &mut Area, size: u16, event_idx: bool) -> Self {
        let size = size.clamp(2, MAX_SIZE);
        Self {
            layout: Layout::take(area, size),
            event_idx,
            slots: [Slot::default(); MAX],
            next: core::array::from_fn(|i| i as u16 + 1),
            first_free: 0,
            free: size,
            made: 0,
            shown: 0,
            taken: 0,
        }
    }

    /// Where it lies.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// Free descriptors.
    pub fn free(&self) -> u16 {
        self.free
    }

    /// Requests in flight.
    pub fn outstanding(&self) -> u16 {
        self.slots.iter().filter(|slot| slot.live).count() as u16
    }

    /// Adds a request of these buffers; `now` is when, for [`Ring::overdue`].
    pub fn add(&mut self, buffers: &[Buffer], token: u16, now: u64) -> Result<(), Full> {
        if buffers.is_empty() || buffers.len() > usize::from(self.free) {
            return Err(Full);
        }
        let head = self.first_free;
        let mut index = head;
        for (n, buffer) in buffers.iter().enumerate() {
            let last = n + 1 == buffers.len();
            let next = self.next[usize::from(index)];
            let (flags, shown_next) = if last { (0, 0) } else { (NEXT, next) };
            Layout::describe(self.layout.descriptors, index, *buffer, flags, shown_next);
            self.free -= 1;
            if last {
                self.first_free = next;
                // The chain's end, for `release`.
                self.next[usize::from(index)] = MAX_SIZE;
            } else {
                index = next;
            }
        }
        self.offer(head, token, now);
        Ok(())
    }

    /// Adds a request whose descriptors lie in a table of its own (2.7.5.3).
    pub fn add_indirect(
        &mut self,
        table: Area,
        buffers: &[Buffer],
        token: u16,
        now: u64,
    ) -> Result<(), Full> {
        if self.free == 0 {
            return Err(Full);
        }
        for (n, buffer) in buffers.iter().enumerate() {
            let last = n + 1 == buffers.len();
            let (flags, next) = if last { (0, 0) } else { (NEXT, n as u16 + 1) };
            Layout::describe(table, n as u16, *buffer, flags, next);
        }
        let head = self.first_free;
        let whole = Buffer::readable(table.part(0, buffers.len() * DESCRIPTOR));
        Layout::describe(self.layout.descriptors, head, whole, INDIRECT, 0);
        self.first_free = self.next[usize::from(head)];
        self.next[usize::from(head)] = MAX_SIZE;
        self.free -= 1;
        self.offer(head, token, now);
        Ok(())
    }

    fn offer(&mut self, head: u16, token: u16, now: u64) {
        self.slots[usize::from(head)] = Slot {
            live: true,
            overdue: false,
            token,
            since: now,
        };
        self.layout.set_avail(self.made, head);
        self.made = self.made.wrapping_add(1);
    }

    /// Shows the device what was added. True if it has to be kicked.
    pub fn publish(&mut self) -> bool {
        if self.made == self.shown {
            return false;
        }
        let before = self.shown;
        self.layout.set_avail_index(self.made);
        self.shown = self.made;
        full_barrier();
        if self.event_idx {
            // avail_event, behind the used ring (2.7.10).
            let at = 4 + 8 * usize::from(self.layout.size);
            let event = self.layout.used.get16(at);
            let new = self.shown;
            new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(before)
        } else {
            self.layout.used.get16(0) & NO_NOTIFY == 0
        }
    }

    /// Whether the device has given something back that was not taken yet.
    pub fn has_used(&self) -> bool {
        self.layout.used_index() != self.taken
    }

    /// Takes the next thing that the device gave back.
    pub fn pop(&mut self) -> Option<Used> {
        let ahead = self.layout.used_index().wrapping_sub(self.taken);
        if ahead == 0 {
            return None;
        }
        // More than there can be: the index went back, or something wrote over it.
        if ahead > self.layout.size {
            self.taken = self.taken.wrapping_add(ahead);
            return Some(Used::Torn);
        }
        let (id, len) = self.layout.used_entry(self.taken);
        self.taken = self.taken.wrapping_add(1);
        let slot = self.slots.get_mut(id as usize).filter(|slot| slot.live);
        let Some(slot) = slot else {
            return Some(Used::NotOurs);
        };
        slot.live = false;
        let token = slot.token;
        self.release(id as u16);
        Some(Used::Done { token, len })
    }

    /// Gives a chain's descriptors back to the free ones.
    fn release(&mut self, head: u16) {
        let mut index = head;
        loop {
            self.free += 1;
            let next = self.next[usize::from(index)];
            if next == MAX_SIZE {
                self.next[usize::from(index)] = self.first_free;
                self.first_free = head;
                return;
            }
            index = next;
        }
    }

    /// Asks for an interrupt with the next thing given back, or for none. True if something has
    /// been given back already: then there may be no interrupt for it (2.7.7.2).
    pub fn want_interrupt(&mut self, wanted: bool) -> bool {
        if self.event_idx {
            let at = 4 + 2 * usize::from(self.layout.size);
            // A ring's worth behind is never reached by the next few.
            let away = if wanted { 0 } else { 0x8000 };
            self.layout.avail.set16(at, self.taken.wrapping_sub(away));
        } else {
            self.layout
                .avail
                .set16(0, if wanted { 0 } else { NO_INTERRUPT });
        }
        full_barrier();
        self.has_used()
    }

    /// Requests that have just become older than `limit`; each counts once.
    pub fn overdue(&mut self, now: u64, limit: u64) -> u64 {
        let late = |slot: &&mut Slot| slot.live && !slot.overdue && now - slot.since > limit;
        let late = self.slots.iter_mut().filter(late);
        late.map(|slot| slot.overdue = true).count() as u64
    }
}

#[cfg(test)]
pub(crate) mod tests;
