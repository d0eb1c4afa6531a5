//! A device on the bench: set up by hand, register by register.

use stillpoint_guest_virtio::blk::request;
use stillpoint_guest_virtio::memory::Area;
use stillpoint_guest_virtio::net::{self, HEADER};
use stillpoint_guest_virtio::random::Random;
use stillpoint_guest_virtio::registers::{INTERRUPT_CONFIG, feature, kind, offset, status};
use stillpoint_guest_virtio::ring::{Buffer, DESCRIPTOR, INDIRECT, Layout, NEXT};
use stillpoint_guest_virtio::vsock;

use super::super::arena;
use super::super::device::{Claim, Clock, reset};
use super::super::window::Window;
use super::Then;
use crate::tsc;

/// Descriptors of each ring.
pub(super) const SIZE: u16 = 32;
/// The most queues that are set up.
const QUEUES: usize = 3;
const PIT: usize = 80 << 10;
const PAGE: usize = 4096;
/// How long an attack is given to show itself.
const MOMENT_US: u64 = 1000;

/// Up to three buffers in a row.
#[derive(Clone, Copy)]
pub(super) struct Chain {
    pub(super) buffers: [Buffer; 3],
    pub(super) len: usize,
}

impl Chain {
    /// Of these.
    pub(super) fn of(buffers: &[Buffer]) -> Self {
        let mut chain = Self {
            buffers: [buffers[0]; 3],
            len: buffers.len(),
        };
        chain.buffers[..buffers.len()].copy_from_slice(buffers);
        chain
    }

    pub(super) fn all(&self) -> &[Buffer] {
        &self.buffers[..self.len]
    }

    pub(super) fn all_mut(&mut self) -> &mut [Buffer] {
        &mut self.buffers[..self.len]
    }
}

/// The device, and memory to work with.
pub(super) struct Bench {
    /// Ours for as long as the bench is there.
    _claim: Claim,
    window: Window,
    kind: u32,
    queues: usize,
    rings: [Layout; QUEUES],
    /// The queue attacked, on which the driver asks.
    target: usize,
    /// Entries made in its available ring.
    made: u16,
    /// Of an attack's request, and of the probe's.
    request: Area,
    probe: Area,
    table: Area,
    red: Area,
    pit: Area,
    pub(super) random: Random,
}

impl Bench {
    /// The device of a slot, if it is there, free, and of this kind (any if 0).
    pub(super) fn find(vcpu: usize, slot: usize, kind: u32, seed: u64) -> Option<Self> {
        let claim = Claim::of(slot, kind)?;
        let window = claim.window();
        let kind = window.read32(offset::DEVICE_ID);
        let mut memory = arena(vcpu);
        let rings = core::array::from_fn(|_| Layout::take(&mut memory, SIZE));
        let mut page = || memory.take(PAGE, PAGE);
        let (request, probe, red) = (page(), page(), page());
        Some(Self {
            window,
            kind,
            _claim: claim,
            queues: 0,
            rings,
            target: usize::from(matches!(kind, kind::NET | kind::VSOCK)),
            made: 0,
            request,
            probe,
            red,
            table: memory.take(16 * PAGE, PAGE),
            pit: memory.take(PIT, PAGE),
            random: Random::new(seed),
        })
    }

    /// Whether the device says that it needs a reset.
    pub(super) fn failed(&self) -> bool {
        self.window.read32(offset::STATUS) & status::NEEDS_RESET != 0
    }

    /// A request that any device of the kind answers, with its memory at the start of an area:
    /// read sector 0; 64 random bytes; a frame of zeros; a reset of a connection that is none.
    pub(super) fn proper(&self, memory: Area) -> Chain {
        memory.fill(0);
        match self.kind {
            kind::BLK => {
                memory.set32(0, request::IN);
                memory.set8(2048, 0xff);
                Chain::of(&[
                    Buffer::readable(memory.part(0, 16)),
                    Buffer::writable(memory.part(512, 512)),
                    Buffer::writable(memory.part(2048, 1)),
                ])
            }
            kind::NET => Chain::of(&[
                Buffer::readable(memory.part(0, HEADER)),
                Buffer::readable(memory.part(HEADER, 60)),
            ]),
            kind::VSOCK => {
                self.packet(vsock::operation::RST).write(memory);
                Chain::of(&[Buffer::readable(memory.part(0, vsock::HEADER))])
            }
            _ => Chain::of(&[Buffer::writable(memory.part(0, 64))]),
        }
    }

    /// The header of a vsock packet to the host.
    pub(super) fn packet(&self, op: u16) -> vsock::Header {
        let half = |at| u64::from(self.window.read32(offset::CONFIG + at));
        vsock::Header {
            from_cid: half(4) << 32 | half(0),
            to_cid: vsock::HOST,
            from_port: 9999,
            to_port: 9999,
            kind: 1,
            op,
            buffer: 4096,
            ..vsock::Header::default()
        }
    }

    /// A proper request in memory of its own, for an attack to spoil.
    pub(super) fn request(&self) -> Chain {
        self.proper(self.request)
    }

    pub(super) fn kind(&self) -> u32 {
        self.kind
    }

    pub(super) fn window(&self) -> Window {
        self.window
    }

    /// The ring attacked.
    pub(super) fn ring(&self) -> Layout {
        self.rings[self.target]
    }

    /// Memory of the request.
    pub(super) fn memory(&self) -> Area {
        self.request
    }

    /// Memory of the request that tells whether the device works.
    pub(super) fn probe(&self) -> Area {
        self.probe
    }

    /// Memory for tables of descriptors.
    pub(super) fn table(&self) -> Area {
        self.table
    }

    /// Memory that no device may write to.
    pub(super) fn red(&self) -> Area {
        self.red
    }

    /// Memory that any may.
    pub(super) fn pit(&self) -> Area {
        self.pit
    }

    /// Sets it up as it should be, with those of its features that are among `wanted`.
    pub(super) fn start(&mut self, wanted: u64) -> bool {
        if !self.agree(wanted) {
            return false;
        }
        for queue in 0..self.queues {
            let ring = self.rings[queue];
            ring.clear();
            self.queue(queue as u32, SIZE.into(), ring);
        }
        self.drive();
        true
    }

    /// From the reset to the features.
    pub(super) fn agree(&mut self, wanted: u64) -> bool {
        if !reset(self.window) {
            return false;
        }
        let window = self.window;
        let state = status::ACKNOWLEDGE | status::DRIVER;
        window.write32(offset::STATUS, state);
        // Large segments and many pairs would make ours no proper requests.
        let wanted = match self.kind {
            kind::NET => wanted & (net::MAC | net::CONTROL | u64::from(u32::MAX) << 32),
            _ => wanted,
        };
        let wanted = wanted | feature::VERSION_1 | feature::INDIRECT & self.random.draw();
        for half in 0..2 {
            window.write32(offset::DEVICE_FEATURES_SEL, half);
            window.write32(offset::DRIVER_FEATURES_SEL, half);
            let offered = window.read32(offset::DEVICE_FEATURES);
            window.write32(
                offset::DRIVER_FEATURES,
                offered & (wanted >> (32 * half)) as u32,
            );
        }
        let state = state | status::FEATURES_OK;
        window.write32(offset::STATUS, state);
        self.made = 0;
        self.queues = (0..QUEUES).take_while(|queue| self.has(*queue)).count();
        window.read32(offset::STATUS) == state
    }

    fn has(&self, queue: usize) -> bool {
        self.window.write32(offset::QUEUE_SEL, queue as u32);
        self.window.read32(offset::QUEUE_NUM_MAX) >= SIZE.into()
    }

    /// Writes a queue's registers.
    pub(super) fn queue(&self, queue: u32, size: u32, ring: Layout) {
        let parts = [ring.descriptors, ring.avail, ring.used].map(|part| part.address());
        self.queue_at(queue, size, parts);
    }

    /// The same with any three addresses.
    pub(super) fn queue_at(&self, queue: u32, size: u32, [table, avail, used]: [u64; 3]) {
        let window = self.window;
        window.write32(offset::QUEUE_SEL, queue);
        window.write32(offset::QUEUE_NUM, size);
        window.write_address(offset::QUEUE_DESC, table);
        window.write_address(offset::QUEUE_DRIVER, avail);
        window.write_address(offset::QUEUE_DEVICE, used);
        window.write32(offset::QUEUE_READY, 1);
    }

    /// The number of the queue attacked.
    pub(super) fn target(&self) -> u32 {
        self.target as u32
    }

    /// The ring of any queue.
    pub(super) fn layout(&self, queue: usize) -> Layout {
        self.rings[queue]
    }

    /// DRIVER_OK.
    pub(super) fn drive(&self) {
        let state = self.window.read32(offset::STATUS);
        self.window
            .write32(offset::STATUS, state | status::DRIVER_OK);
    }

    /// Puts a chain into the descriptors from 0 on.
    pub(super) fn describe(&self, chain: &[Buffer]) {
        for (n, buffer) in (0..).zip(chain) {
            let last = usize::from(n) + 1 == chain.len();
            let flags = if last { 0 } else { NEXT };
            Layout::describe(self.ring().descriptors, n, *buffer, flags, n + 1);
        }
    }

    /// Has descriptor 0 point to a table of `len` bytes.
    pub(super) fn point(&self, address: u64, len: u32, flags: u16) {
        let buffer = Buffer {
            address,
            len,
            device_writes: false,
        };
        Layout::describe(self.ring().descriptors, 0, buffer, flags | INDIRECT, 1);
    }

    /// Puts a proper request into the table for indirect descriptors; gives its length in bytes.
    pub(super) fn tabulate(&self) -> u32 {
        let chain = self.request();
        for (n, buffer) in (0..).zip(chain.all()) {
            let last = usize::from(n) + 1 == chain.len;
            let flags = if last { 0 } else { NEXT };
            Layout::describe(self.table, n, *buffer, flags, n + 1);
        }
        (chain.len * DESCRIPTOR) as u32
    }

    /// Adds a head to the available ring, without showing it.
    pub(super) fn offer(&mut self, head: u16) {
        self.ring().set_avail(self.made, head);
        self.made = self.made.wrapping_add(1);
    }

    /// Whether the ring attacked can take one more.
    pub(super) fn has_room(&self) -> bool {
        self.made.wrapping_sub(self.ring().used_index()) < SIZE - 1
    }

    /// Whether all that was shown has come back.
    pub(super) fn is_done(&self) -> bool {
        self.ring().used_index() == self.made
    }

    /// Has the index of the available ring lie.
    pub(super) fn skip(&mut self, by: u16) {
        self.made = self.made.wrapping_add(by);
    }

    /// Shows what was added, and kicks.
    pub(super) fn show(&self) {
        self.ring().set_avail_index(self.made);
        self.kick();
    }

    pub(super) fn kick(&self) {
        self.window
            .write32(offset::QUEUE_NOTIFY, self.target as u32);
    }

    /// Offers and shows a chain, and waits a moment.
    pub(super) fn post(&mut self, chain: &[Buffer]) -> Then {
        self.describe(chain);
        self.offer(0);
        self.show();
        self.pause();
        Then::Judge
    }

    /// Waits until all that was shown has come back or the device has failed, a moment at most.
    pub(super) fn pause(&self) {
        let mut clock = Clock::new();
        let why = || self.window.read32(offset::INTERRUPT_STATUS);
        while !self.is_done()
            && why() & INTERRUPT_CONFIG == 0
            && clock.tick() < tsc::cycles(MOMENT_US)
        {}
    }

    /// Waits a moment, whatever happens meanwhile.
    pub(super) fn wait(&self) {
        let mut clock = Clock::new();
        while clock.tick() < tsc::cycles(MOMENT_US) {}
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        reset(self.window);
    }
}
