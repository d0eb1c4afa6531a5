//! A driver for tests of devices: rings in memory, and a guest's side of them.
//!
//! A [`Driver`] has the device and speaks with its registers, as a vCPU would; it can exchange the
//! device for a successor over the same memory, the same kicks and the same interrupt. A [`Ring`]
//! is one queue, and needs nothing but memory, kick and interrupt: it can be moved to a thread of
//! its own, which goes on while the device is exchanged. It waits *by interrupt* and kicks only
//! when it was asked to, so that a lost one of either ends its test.
//!
//! Addresses below [`FREE`] are the rings'; all above are the test's to use.

use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use stillpoint_state::{Saved, Unclaimed};
use vm_memory::{Bytes, GuestAddress};

use super::Kind;
use super::mmio::VirtioMmio;
use super::queue::Buffer;
use super::slot::Slot;
use crate::devices::{Busy, Device};
use crate::handover::lend::{Borrowed, Lending};
use crate::irq::{Kick, Line};
use crate::memory::Memory;

/// First address that no ring uses.
pub(super) const FREE: u64 = 0x10_0000;
/// Bytes of memory.
pub(super) const RAM: u64 = 64 << 20;

/// `VIRTIO_F_VERSION_1`.
pub(super) const VERSION_1: u64 = 1 << 32;
/// `VIRTIO_RING_F_EVENT_IDX`.
pub(super) const EVENT_IDX: u64 = 1 << 29;

/// Where the rings of queue `n` begin: a descriptor table, an available and a used ring of at most
/// 1024 entries each.
const fn rings(queue: u64) -> u64 {
    0x1000 + queue * 0xa000
}
const AVAIL: u64 = 0x4000;
const USED: u64 = 0x6000;

/// How long anything may take that a working device does at once.
pub(super) const PATIENCE: Duration = Duration::from_secs(20);

/// Descriptor flags (virtio 1.2, 2.7.5).
pub(super) const NEXT: u16 = 1;
pub(super) const WRITE: u16 = 2;
pub(super) const INDIRECT: u16 = 4;

/// Fresh memory.
pub(super) fn memory() -> Memory {
    Memory::from_ranges(&[(GuestAddress(0), RAM as usize)]).expect("memory")
}

/// A buffer at an address.
pub(super) fn buffer(address: u64, len: u32) -> Buffer {
    let address = GuestAddress(address);
    Buffer { address, len }
}

/// A device and the registers' side of its driver.
#[derive(Debug)]
pub(super) struct Driver {
    pub(super) memory: Memory,
    pub(super) device: VirtioMmio,
    interrupt: OwnedFd,
    queues: usize,
}

impl Driver {
    /// A fresh device in fresh memory.
    pub(super) fn boot(name: &str, kind: Box<dyn Kind>) -> Self {
        let memory = memory();
        let queues = kind.queue_sizes().len();
        let kicks = (0..queues).map(|_| Kick::new().expect("kick")).collect();
        let interrupt = eventfd(0, EventfdFlags::NONBLOCK).expect("eventfd");
        let slot = place(name, kicks, &interrupt, &memory);
        let device = VirtioMmio::new(slot, kind);
        device.resume();
        Self {
            memory,
            device,
            interrupt,
            queues,
        }
    }

    pub(super) fn read(&self, offset: u64) -> u32 {
        let mut bytes = [0; 4];
        self.device.read(offset, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    pub(super) fn write(&self, offset: u64, value: u32) {
        self.device.write(offset, &value.to_le_bytes());
    }

    /// `len` bytes of the configuration space.
    pub(super) fn config(&self, offset: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.device.read(0x100 + offset, &mut bytes);
        bytes
    }

    /// The `Status` register.
    pub(super) fn status(&self) -> u32 {
        self.read(0x70)
    }

    /// Whether the device asks for a reset.
    pub(super) fn has_failed(&self) -> bool {
        self.status() & 0x40 != 0
    }

    /// All features that the device offers.
    pub(super) fn offered(&self) -> u64 {
        self.write(0x14, 0);
        let low = u64::from(self.read(0x10));
        self.write(0x14, 1);
        low | u64::from(self.read(0x10)) << 32
    }

    /// Sets the device up with `features` and every queue at its largest size (virtio 1.2, 3.1.1).
    pub(super) fn start(&self, features: u64) -> Vec<Ring> {
        let features = features | VERSION_1;
        self.write(0x70, 0);
        self.write(0x70, 1 | 2);
        for half in 0..2u32 {
            self.write(0x24, half);
            self.write(0x20, (features >> (32 * half)) as u32);
        }
        self.write(0x70, 1 | 2 | 8);
        assert_ne!(self.status() & 8, 0, "the device refuses these features");
        let rings = (0..self.queues).map(|queue| self.start_queue(queue, features));
        let rings = rings.collect();
        self.write(0x70, 1 | 2 | 8 | 4);
        rings
    }

    fn start_queue(&self, queue: usize, features: u64) -> Ring {
        self.write(0x30, queue as u32);
        let size = self.read(0x34);
        let base = rings(queue as u64);
        self.write(0x38, size);
        for (register, address) in [(0x80, base), (0x90, base + AVAIL), (0xa0, base + USED)] {
            self.write(register, address as u32);
            self.write(register + 4, (address >> 32) as u32);
        }
        let zeroes = vec![0; 0xa000];
        let at = GuestAddress(base);
        self.memory.write_slice(&zeroes, at).expect("ring");
        self.write(0x44, 1);
        let kick = self.device.kick(queue).as_fd().try_clone_to_owned();
        Ring {
            memory: self.memory.clone(),
            kick: Kick::adopt(kick.expect("dup")),
            interrupt: self.interrupt.try_clone().expect("dup"),
            base,
            size: size as u16,
            event_idx: features & EVENT_IDX != 0,
            free: (0..size as u16).rev().collect(),
            chains: vec![Vec::new(); size as usize],
            out: vec![0; size as usize],
            added: 0,
            kicked: 0,
            taken: 0,
        }
    }

    /// Waits until the device has failed, and has told its driver so.
    pub(super) fn await_failure(&self) {
        let deadline = Instant::now() + PATIENCE;
        while !(self.has_failed() && self.read(0x60) & 2 != 0) {
            let left = deadline.saturating_duration_since(Instant::now());
            assert!(sleep(&self.interrupt, left), "the device goes on");
        }
    }

    /// Acknowledges whatever the device told of; gives what it was.
    pub(super) fn acknowledge(&self) -> u32 {
        let why = self.read(0x60);
        self.write(0x64, why);
        why
    }

    /// Whether the device raised its interrupt since the last look.
    pub(super) fn interrupted(&self) -> bool {
        rustix::io::read(&self.interrupt, &mut [0; 8]).is_ok()
    }

    /// What the standing device saves.
    pub(super) fn saved(&self) -> Vec<u8> {
        let mut saved = Saved::default();
        self.device.save(&mut saved).expect("save");
        saved.finish(3, "", "", 0)
    }

    /// Brings the device to rest as a swap does.
    pub(super) fn stand_still(&self, patience: Duration) -> Result<(), Busy> {
        let deadline = Instant::now() + patience;
        self.device.drain(deadline)?;
        self.device.freeze(deadline)
    }

    /// Exchanges the device for a successor, which `restore` makes a kind for: from saved state,
    /// and from the files that came. Rings go on meanwhile.
    pub(super) fn swap(
        mut self,
        restore: impl FnOnce(&mut Unclaimed, &mut Borrowed) -> Box<dyn Kind>,
    ) -> Self {
        let mut lending = Lending::default();
        self.device.lend(&mut lending).expect("lend");
        self.stand_still(PATIENCE).expect("came to rest");
        self.device.lend(&mut lending).expect("lend");
        let saved = self.saved();
        let mut files = lending.arrive();
        let name = self.device.instance().to_owned();
        let kicks = (0..self.queues).map(|queue| files.take(&format!("{name}/kick{queue}")));
        let kicks = kicks.map(|kick| Kick::adopt(kick.expect("kick"))).collect();
        let slot = place(&name, kicks, &self.interrupt, &self.memory);
        let mut state = Unclaimed::decode(&saved).expect("decode");
        let kind = restore(&mut state, &mut files);
        let device = VirtioMmio::restore(slot, kind, &mut state).expect("restore");
        state.finish().expect("all of the state was taken");
        drop(std::mem::replace(&mut self.device, device));
        // As an edge that got lost between two machines.
        let _ = self.interrupted();
        self.device.resume();
        self
    }
}

fn place(name: &str, kicks: Vec<Kick>, interrupt: &OwnedFd, memory: &Memory) -> Slot {
    let line = Line::loose_into(interrupt.try_clone().expect("dup"));
    Slot::loose_with(name, kicks, line, memory)
}

/// Sleeps until an interrupt; `false` if none came in so long.
fn sleep(interrupt: &OwnedFd, patience: Duration) -> bool {
    let timeout = Timespec::try_from(patience).expect("a short time");
    let mut fds = [PollFd::new(interrupt, PollFlags::IN)];
    let came = !patience.is_zero() && poll(&mut fds, Some(&timeout)).is_ok_and(|ready| ready > 0);
    let _ = rustix::io::read(interrupt, &mut [0; 8]);
    came
}

/// A request that came back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Used {
    /// Its first descriptor, as [`Ring::add`] gave it.
    pub(super) head: u16,
    /// Bytes the device says it has written.
    pub(super) len: u32,
}

/// One queue, from the driver's side. Rings of one device that wait must do so on one thread: an
/// interrupt wakes one of them.
#[derive(Debug)]
pub(super) struct Ring {
    memory: Memory,
    kick: Kick,
    interrupt: OwnedFd,
    base: u64,
    size: u16,
    event_idx: bool,
    free: Vec<u16>,
    /// Descriptors of the chain that begins with this one.
    chains: Vec<Vec<u16>>,
    /// How often this head was made available and has not come back.
    out: Vec<u16>,
    added: u16,
    kicked: u16,
    taken: u16,
}

impl Ring {
    fn put<T: vm_memory::ByteValued>(&self, offset: u64, value: T) {
        let at = GuestAddress(self.base + offset);
        self.memory.write_obj(value, at).expect("in RAM");
    }

    fn get<T: vm_memory::ByteValued>(&self, offset: u64) -> T {
        let at = GuestAddress(self.base + offset);
        self.memory.read_obj(at).expect("in RAM")
    }

    /// Writes a descriptor as it is, for rings that lie.
    pub(super) fn describe(&self, index: u16, buffer: Buffer, flags: u16, next: u16) {
        let at = u64::from(index) * 16;
        self.put(at, buffer.address.0.to_le());
        self.put(at + 8, buffer.len.to_le());
        self.put(at + 12, flags.to_le());
        self.put(at + 14, next.to_le());
    }

    /// Makes a chain of descriptors available under `head`, whatever it is.
    pub(super) fn make_available(&mut self, head: u16) {
        let slot = u64::from(self.added % self.size);
        self.put(AVAIL + 4 + 2 * slot, head.to_le());
        self.added = self.added.wrapping_add(1);
        if let Some(out) = self.out.get_mut(usize::from(head)) {
            *out += 1;
        }
        self.publish(self.added);
    }

    /// Says that this many requests were made available so far.
    pub(super) fn publish(&self, index: u16) {
        let at = GuestAddress(self.base + AVAIL + 2);
        let order = std::sync::atomic::Ordering::SeqCst;
        self.memory.store(index.to_le(), at, order).expect("in RAM");
    }

    /// Adds a request; gives its first descriptor. The device hears of it by [`Ring::kick`].
    pub(super) fn add(&mut self, readable: &[Buffer], writable: &[Buffer]) -> u16 {
        let buffers = readable.iter().map(|&buffer| (buffer, 0));
        let buffers = buffers.chain(writable.iter().map(|&buffer| (buffer, WRITE)));
        let buffers: Vec<_> = buffers.collect();
        let at = self.free.len().checked_sub(buffers.len());
        let chain = self.free.split_off(at.expect("room in the ring"));
        for (place, &(buffer, flags)) in buffers.iter().enumerate() {
            let (flags, next) = match chain.get(place + 1) {
                Some(&next) => (flags | NEXT, next),
                None => (flags, 0),
            };
            self.describe(chain[place], buffer, flags, next);
        }
        let head = chain[0];
        self.chains[usize::from(head)] = chain;
        self.make_available(head);
        head
    }

    /// Tells the device of what was added, if it wants to hear of it (virtio 1.2, 2.7.13.4).
    pub(super) fn kick(&mut self) {
        let order = std::sync::atomic::Ordering::SeqCst;
        std::sync::atomic::fence(order);
        let wanted = if self.event_idx {
            let event = u16::from_le(self.get(USED + 4 + 8 * u64::from(self.size)));
            let new = self.added.wrapping_sub(self.kicked);
            self.added.wrapping_sub(event).wrapping_sub(1) < new
        } else {
            u16::from_le(self.get(USED)) & 1 == 0
        };
        self.kicked = self.added;
        if wanted {
            self.kick.ring();
        }
    }

    /// Kicks, wanted or not.
    pub(super) fn kick_anyway(&self) {
        self.kick.ring();
    }

    /// Takes a request that came back, if there is one.
    pub(super) fn take(&mut self) -> Option<Used> {
        let at = GuestAddress(self.base + USED + 2);
        let order = std::sync::atomic::Ordering::SeqCst;
        let index = u16::from_le(self.memory.load(at, order).expect("in RAM"));
        if index == self.taken {
            return None;
        }
        let slot = u64::from(self.taken % self.size);
        let head = u32::from_le(self.get(USED + 4 + 8 * slot)) as u16;
        let len = u32::from_le(self.get(USED + 8 + 8 * slot));
        self.taken = self.taken.wrapping_add(1);
        let out = self.out.get_mut(usize::from(head)).expect("a head");
        *out = out.checked_sub(1).expect("what comes back was out");
        let chain = self.chains.get_mut(usize::from(head));
        let chain = std::mem::take(chain.expect("a head that exists"));
        self.free.extend(chain);
        Some(Used { head, len })
    }

    /// Asks for an interrupt when the next request comes back.
    fn ask(&self) {
        if self.event_idx {
            let at = GuestAddress(self.base + AVAIL + 4 + 2 * u64::from(self.size));
            let order = std::sync::atomic::Ordering::SeqCst;
            let stored = self.memory.store(self.taken.to_le(), at, order);
            stored.expect("in RAM");
        }
    }

    /// Waits for a request to come back; sleeps until the interrupt.
    pub(super) fn wait(&mut self) -> Used {
        self.try_wait(PATIENCE).unwrap_or_else(|| {
            let lost = match self.take() {
                Some(_) => "an interrupt was lost",
                None => "no request came back",
            };
            panic!("{lost} in {PATIENCE:?}");
        })
    }

    /// As [`Ring::wait`], for so long; `None` if no interrupt came with a request.
    pub(super) fn try_wait(&mut self, patience: Duration) -> Option<Used> {
        let deadline = Instant::now() + patience;
        loop {
            self.ask();
            if let Some(used) = self.take() {
                return Some(used);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if !sleep(&self.interrupt, left) {
                return None;
            }
        }
    }
}

/// Waits until something is so.
pub(super) fn until(what: &str, mut so: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !so() {
        assert!(Instant::now() < deadline, "waited {PATIENCE:?} for {what}");
        std::thread::yield_now();
    }
}
