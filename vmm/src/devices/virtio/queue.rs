//! Queues and the chains of buffers that a driver puts into them.
//!
//! Everything in a ring is the guest's claim. A chain is read once, into memory of ours, and judged
//! there: every buffer lies in RAM, readable ones come before writable ones, and the chain ends
//! where it says that it ends. What was judged is what is used; a guest that rewrites its ring
//! meanwhile changes nothing. Whatever is wrong is [`Broken`], and fails the device.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering, fence};

use virtio_queue::desc::split::Descriptor;
use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueState, QueueT};
use vm_memory::bitmap::BS;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, VolatileSlice};

use crate::irq::Line;
use crate::memory::Memory;

/// `InterruptStatus` bit: a queue has used buffers (virtio 1.2, 4.2.2).
pub(super) const USED: u32 = 1;
/// `InterruptStatus` bit: the configuration, or the device's status, has changed.
pub(super) const CONFIG: u32 = 2;

/// Bytes before the elements of a used ring, and of each (virtio 1.2, 2.7.8).
const USED_RING: u64 = 4;
const USED_ELEMENT: u64 = 8;
/// Bytes before the elements of an available ring (2.7.6).
const AVAIL_RING: u64 = 4;

/// What a driver did that none may do. The device fails until the driver resets it.
#[derive(Debug, thiserror::Error)]
pub enum Broken {
    /// The ring itself.
    #[error("the ring is broken: {0}")]
    Ring(#[from] virtio_queue::Error),
    /// A buffer that is not in RAM.
    #[error("a buffer of {len} bytes at {address:#x} is not in RAM")]
    OutsideRam {
        /// Guest-physical address.
        address: u64,
        /// Bytes.
        len: u32,
    },
    /// A chain that does not end where it says, or is ordered as none may be.
    #[error("a chain of buffers {0}")]
    Chain(&'static str),
    /// The content of a request.
    #[error("a request {0}")]
    Request(&'static str),
    /// A bug of ours, seen in time.
    #[error("the device failed: {0}")]
    Bug(String),
}

/// A buffer in guest RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Buffer {
    /// Guest-physical address.
    pub address: GuestAddress,
    /// Bytes.
    pub len: u32,
}

/// One request: buffers that the device reads, then buffers that it fills.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Chain {
    /// Its first descriptor, by which it is given back.
    pub head: u16,
    /// What the device may read.
    pub readable: Vec<Buffer>,
    /// What the device may write.
    pub writable: Vec<Buffer>,
}

/// Bytes of all buffers together.
pub fn total(buffers: &[Buffer]) -> u64 {
    buffers.iter().map(|buffer| u64::from(buffer.len)).sum()
}

/// The buffers that hold `len` bytes from `skip` on; `None` if there are not as many.
pub fn part(buffers: &[Buffer], skip: u64, len: u64) -> Option<Vec<Buffer>> {
    let (mut skip, mut left) = (skip, len);
    let mut parts = Vec::with_capacity(buffers.len());
    for buffer in buffers {
        let whole = u64::from(buffer.len);
        let from = skip.min(whole);
        let take = (whole - from).min(left);
        if take > 0 {
            parts.push(Buffer {
                // Within a buffer that lies in RAM: neither can overflow.
                address: GuestAddress(buffer.address.0 + from),
                len: take as u32,
            });
        }
        skip -= from;
        left -= take;
    }
    (left == 0 && skip == 0).then_some(parts)
}

/// The buffers as memory of this process, for vectored reads and writes.
pub fn slices<'m>(
    memory: &'m Memory,
    buffers: &[Buffer],
) -> Result<Vec<VolatileSlice<'m, BS<'m, ()>>>, Broken> {
    let mut slices = Vec::with_capacity(buffers.len());
    for buffer in buffers {
        let (address, len) = (buffer.address.0, buffer.len);
        // One for each region of RAM that the buffer touches.
        for slice in memory.get_slices(buffer.address, len as usize) {
            slices.push(slice.map_err(|_| Broken::OutsideRam { address, len })?);
        }
    }
    Ok(slices)
}

impl Chain {
    fn of(chain: DescriptorChain<&Memory>, memory: &Memory) -> Result<Self, Broken> {
        let mut judged = Self {
            head: chain.head_index(),
            ..Self::default()
        };
        let mut open = true;
        for descriptor in chain {
            open = descriptor.has_next();
            judged.add(descriptor, memory)?;
        }
        // The iterator stops in silence at a loop, and at a descriptor that can't be.
        if open {
            return Err(Broken::Chain("does not end, or leads nowhere"));
        }
        // Drivers must not (virtio 1.2, 2.7.4.2), and our sums of lengths rely on it.
        if total(&judged.readable) + total(&judged.writable) > u64::from(u32::MAX) {
            return Err(Broken::Chain("is longer than 4 GiB"));
        }
        Ok(judged)
    }

    fn add(&mut self, descriptor: Descriptor, memory: &Memory) -> Result<(), Broken> {
        let buffer = Buffer {
            address: descriptor.addr(),
            len: descriptor.len(),
        };
        if buffer.len == 0 {
            return Err(Broken::Chain("has a buffer of no bytes"));
        }
        if !memory.check_range(buffer.address, buffer.len as usize) {
            return Err(Broken::OutsideRam {
                address: buffer.address.0,
                len: buffer.len,
            });
        }
        if descriptor.is_write_only() {
            self.writable.push(buffer);
        } else if self.writable.is_empty() {
            self.readable.push(buffer);
        } else {
            return Err(Broken::Chain("has a readable buffer after a writable one"));
        }
        Ok(())
    }

    /// Copies `into.len()` bytes from offset `from` of the readable part.
    pub fn read(&self, memory: &Memory, from: u64, into: &mut [u8]) -> Result<(), Broken> {
        let parts = part(&self.readable, from, into.len() as u64)
            .ok_or(Broken::Request("is shorter than its kind"))?;
        let mut rest = into;
        for buffer in parts {
            let (now, later) = rest.split_at_mut(buffer.len as usize);
            memory
                .read_slice(now, buffer.address)
                .map_err(|_| outside(buffer))?;
            rest = later;
        }
        Ok(())
    }

    /// Copies `bytes` to offset `to` of the writable part.
    pub fn write(&self, memory: &Memory, to: u64, bytes: &[u8]) -> Result<(), Broken> {
        let parts = part(&self.writable, to, bytes.len() as u64)
            .ok_or(Broken::Request("has too little room for its answer"))?;
        let mut rest = bytes;
        for buffer in parts {
            let (now, later) = rest.split_at(buffer.len as usize);
            memory
                .write_slice(now, buffer.address)
                .map_err(|_| outside(buffer))?;
            rest = later;
        }
        Ok(())
    }
}

fn outside(buffer: Buffer) -> Broken {
    Broken::OutsideRam {
        address: buffer.address.0,
        len: buffer.len,
    }
}

/// The device's interrupt: its status register and its line.
#[derive(Debug)]
pub struct Interrupt {
    status: AtomicU32,
    line: Line,
    /// The device has failed: shows in its status, without a lock.
    failed: AtomicBool,
}

impl Interrupt {
    pub(super) fn new(line: Line) -> Self {
        Self {
            status: AtomicU32::new(0),
            line,
            failed: AtomicBool::new(false),
        }
    }

    pub(super) fn status(&self) -> u32 {
        self.status.load(Ordering::SeqCst)
    }

    pub(super) fn set_status(&self, status: u32) {
        self.status.store(status, Ordering::SeqCst);
    }

    pub(super) fn acknowledge(&self, bits: u32) {
        self.status.fetch_and(!bits, Ordering::SeqCst);
    }

    pub(super) fn raise(&self, why: u32) {
        self.status.fetch_or(why, Ordering::SeqCst);
        // An eventfd write of 1 fails only if nobody ever took 2^64 of them.
        let _ = self.line.raise();
    }

    /// Whether the device has failed and waits for a reset.
    pub(super) fn has_failed(&self) -> bool {
        self.failed.load(Ordering::SeqCst)
    }

    pub(super) fn set_failed(&self, failed: bool) {
        self.failed.store(failed, Ordering::SeqCst);
    }
}

/// A device's queues as its kind sees them. All of it happens on the device's own thread.
#[derive(Debug)]
pub struct Queues<'a> {
    pub(super) memory: &'a Memory,
    pub(super) queues: &'a mut [Option<Queue>],
    pub(super) interrupt: &'a Interrupt,
    /// Queues to be looked at in the next turn, one bit for each.
    pub(super) again: &'a mut u64,
    /// Queues with requests given back of which the driver was not told yet, likewise.
    pub(super) untold: &'a mut u64,
}

/// The most queues of a device.
pub const MAX_QUEUES: usize = 64;

impl Queues<'_> {
    /// Guest RAM.
    pub fn memory(&self) -> &Memory {
        self.memory
    }

    /// How many queues there are, used by the driver or not.
    pub fn count(&self) -> usize {
        self.queues.len()
    }

    /// Whether the driver uses this queue.
    pub fn is_used(&self, queue: usize) -> bool {
        matches!(self.queues.get(queue), Some(Some(_)))
    }

    /// Takes the next request; `None` when there is none. When it says so it has also asked the
    /// driver to kick for the next one.
    pub fn pop(&mut self, queue: usize) -> Result<Option<Chain>, Broken> {
        let Some(Some(ring)) = self.queues.get_mut(queue) else {
            return Ok(None);
        };
        loop {
            // Before the iterator looks: what the driver adds after this is not missed, and what
            // is there by now must be found.
            if ring.avail_idx(self.memory, Ordering::Acquire)?.0 != ring.next_avail() {
                // By the iterator and not by `pop_descriptor_chain`, which keeps errors to itself.
                let chain = ring.iter(self.memory)?.next().ok_or(Broken::Chain(
                    "begins with a descriptor that does not exist",
                ))?;
                return Chain::of(chain, self.memory).map(Some);
            }
            if !ring.enable_notification(self.memory)? {
                return Ok(None);
            }
        }
    }

    /// Puts the request taken last back to where it was, to be taken again.
    pub fn put_back(&mut self, queue: usize) {
        if let Some(Some(ring)) = self.queues.get_mut(queue) {
            ring.go_to_previous_position();
        }
    }

    /// Has this queue looked at again in the next turn, kicked or not. A kind that leaves requests
    /// in a queue to keep its turn short says so by this.
    pub fn again(&mut self, queue: usize) {
        *self.again |= bit(queue);
    }

    /// Gives a request back, with `written` bytes of its writable part filled.
    pub fn push(&mut self, queue: usize, head: u16, written: u32) -> Result<(), Broken> {
        match self.queues.get_mut(queue) {
            Some(Some(ring)) => ring.add_used(self.memory, head, written)?,
            _ => return Ok(()),
        }
        *self.untold |= bit(queue);
        Ok(())
    }

    /// How many entries the driver gave the queue; 0 for one that it does not use.
    pub fn size(&self, queue: usize) -> usize {
        match self.queues.get(queue) {
            Some(Some(ring)) => ring.size().into(),
            _ => 0,
        }
    }

    /// Gives several requests back at one stroke, each with the bytes written: a driver never sees
    /// some of them without the others, as a frame in several buffers must not be seen in part.
    /// Interrupts the driver if it wants to hear of one of them.
    pub fn push_together(&mut self, queue: usize, requests: &[(u16, u32)]) -> Result<(), Broken> {
        let Some((&(last, written), before)) = requests.split_last() else {
            return Ok(());
        };
        let Some(Some(ring)) = self.queues.get_mut(queue) else {
            return Ok(());
        };
        let first = ring.next_used();
        for (number, &(head, written)) in (0u16..).zip(before) {
            let place = u64::from(first.wrapping_add(number) % ring.size());
            // The ring lies in RAM whole: `open` has seen to it.
            let address = GuestAddress(ring.used_ring() + USED_RING + place * USED_ELEMENT);
            // `struct virtq_used_elem`: id, then length.
            let element = u64::from(head) | u64::from(written) << 32;
            self.memory
                .write_obj(element.to_le(), address)
                .map_err(virtio_queue::Error::GuestMemory)?;
        }
        // The index moves with the last one, past all of them.
        ring.set_next_used(first.wrapping_add(before.len() as u16));
        ring.add_used(self.memory, last, written)?;
        *self.untold |= bit(queue);
        if !before.is_empty() && ring.event_idx_enabled() {
            // The ring counts the last one only, and may overlook that the driver waits for
            // another. Whether it does is virtio 1.2, 2.7.7.2, as in the ring.
            fence(Ordering::SeqCst);
            let address = ring.avail_ring() + AVAIL_RING + 2 * u64::from(ring.size());
            let event = self
                .memory
                .load(GuestAddress(address), Ordering::Relaxed)
                .map(u16::from_le)
                .map_err(virtio_queue::Error::GuestMemory)?;
            let now = ring.next_used();
            if now.wrapping_sub(event).wrapping_sub(1) < now.wrapping_sub(first) {
                self.interrupt.raise(USED);
            }
        }
        Ok(())
    }

    /// Interrupts the driver, if it wants to hear of what was given back since the last time. If nothing was, there is
    /// nothing to hear of: the ring itself would have a driver without EVENT_IDX interrupted each time.
    pub fn signal(&mut self, queue: usize) -> Result<(), Broken> {
        if *self.untold & bit(queue) == 0 {
            return Ok(());
        }
        *self.untold &= !bit(queue);
        if let Some(Some(ring)) = self.queues.get_mut(queue)
            && ring.needs_notification(self.memory)?
        {
            self.interrupt.raise(USED);
        }
        Ok(())
    }
}

fn bit(queue: usize) -> u64 {
    1 << (queue % MAX_QUEUES)
}

/// A queue that a driver has set up, from what it wrote into the registers.
pub(super) fn open(state: QueueState, memory: &Memory) -> Result<Queue, Broken> {
    let queue = Queue::try_from(state)?;
    match queue.is_valid(memory) {
        true => Ok(queue),
        false => Err(Broken::Chain("is to be found in rings that are not in RAM")),
    }
}
