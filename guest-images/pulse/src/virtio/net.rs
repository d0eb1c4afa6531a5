//! Mode `net`: receive queues are even, transmit queues odd, and behind them is the one for
//! commands (5.1.2).

use stillpoint_guest_abi::pulse::Report;
use stillpoint_guest_virtio::memory::Area;
use stillpoint_guest_virtio::net::{
    BUFFER, CONTROL, CONTROL_OK, Frames, MAC, MULTIQUEUE, SET_PAIRS,
};
use stillpoint_guest_virtio::registers::{kind, offset};
use stillpoint_guest_virtio::ring::{Buffer, Ring};

use super::arena;
use super::device::{Clock, Device};
use crate::pages::{self, place};
use crate::tsc;

const MAX_PAIRS: usize = 4;
const MAX_QUEUES: usize = 2 * MAX_PAIRS;
/// Buffers of each queue.
const DEPTH: usize = 16;
/// Frames on their way before we wait for them.
const WAVE: u64 = 64;
/// How long we wait; what is not back then may never be.
const PACE_US: u64 = 5000;
/// A command is done before that.
const COMMAND_US: u64 = 5_000_000;
/// Offset of `max_virtqueue_pairs` in the configuration.
const PAIRS: u64 = 8;

/// A network card.
pub(super) struct Net {
    device: Device,
    rings: [Ring; MAX_QUEUES],
    queues: usize,
    /// Buffers of each queue, one after another.
    buffers: Area,
    free: [[bool; DEPTH]; MAX_QUEUES],
    frames: Frames,
    report: *mut Report,
    /// The transmit queue for the next frame; they take turns.
    next: usize,
    waiting_since: u64,
}

impl Net {
    /// Finds one and sets it up.
    pub(super) fn start(vcpu: usize) -> Option<Self> {
        let device = Device::find(vcpu, kind::NET, MAC | CONTROL | MULTIQUEUE)?;
        let mut memory = arena(vcpu);
        let window = device.window();
        let many = device.features() & (CONTROL | MULTIQUEUE) == CONTROL | MULTIQUEUE;
        let most = match many {
            true => usize::from(window.read16(offset::CONFIG + PAIRS)),
            false => 1,
        };
        let queues = 2 * most.clamp(1, MAX_PAIRS);
        let Some((mut rings, mut command)) = Self::rings(&device, &mut memory, queues, most, many)
        else {
            device.refuse();
            return None;
        };
        let mac = core::array::from_fn(|n| window.read8(offset::CONFIG + n as u64));
        let mac = match device.features() & MAC {
            0 => [2, 0x53, 0x50, 0, 0, vcpu as u8],
            _ => mac,
        };
        let report = pages::report(vcpu);
        let counts = pages::shown(place!(report.net));
        let mut frames = Frames::new(tsc::read(), mac, counts);
        frames.set_pairs(queues as u64 / 2);
        device.go(&mut rings[..queues]);
        let mut net = Self {
            device,
            rings,
            queues,
            buffers: memory.take(MAX_QUEUES * DEPTH * BUFFER, 64),
            free: [[true; DEPTH]; MAX_QUEUES],
            frames,
            report,
            next: 0,
            waiting_since: 0,
        };
        if queues > 2 && !net.set_pairs(command.as_mut()?, 2 * most as u32) {
            net.device.refuse();
            return None;
        }
        Some(net)
    }

    /// The queues in use, and the one for commands. Unused places hold the last of them again, in
    /// memory of its own that no device knows.
    fn rings(
        device: &Device,
        memory: &mut Area,
        queues: usize,
        most: usize,
        many: bool,
    ) -> Option<([Ring; MAX_QUEUES], Option<Ring>)> {
        let mut failed = false;
        let rings = core::array::from_fn(|queue| {
            let ring = (queue < queues).then(|| device.ring(memory, queue as u32));
            failed |= ring.as_ref().is_some_and(Option::is_none);
            let unused = || Ring::new(memory, 2, false);
            ring.flatten().unwrap_or_else(unused)
        });
        let command = many.then(|| device.ring(memory, 2 * most as u32));
        failed |= command.as_ref().is_some_and(Option::is_none);
        (!failed).then_some((rings, command.flatten()))
    }

    /// Tells the device how many pairs are in use.
    fn set_pairs(&mut self, ring: &mut Ring, queue: u32) -> bool {
        let memory = self.buffers;
        memory.write(0, &SET_PAIRS);
        memory.set16(2, self.queues as u16 / 2);
        memory.set8(4, !CONTROL_OK);
        let command = [
            Buffer::readable(memory.part(0, 2)),
            Buffer::readable(memory.part(2, 2)),
            Buffer::writable(memory.part(4, 1)),
        ];
        let mut clock = Clock::new();
        if ring.add(&command, 0, 0).is_err() {
            return false;
        }
        self.device.submitted();
        self.device.publish(ring, queue);
        while self.device.take(ring).is_none() {
            if clock.tick() > tsc::cycles(COMMAND_US) {
                return false;
            }
        }
        memory.get8(4) == CONTROL_OK
    }

    fn buffer(&self, queue: usize, slot: usize) -> Area {
        self.buffers.part((queue * DEPTH + slot) * BUFFER, BUFFER)
    }

    /// Judges what came in, and sends. False if the device no longer works.
    pub(super) fn turn(&mut self, now: u64) -> bool {
        if self.device.has_news(&self.rings[..self.queues], now) {
            for queue in 0..self.queues {
                self.collect(queue);
            }
        }
        for queue in (0..self.queues).step_by(2) {
            self.refill(queue, now);
        }
        let waited = now - self.waiting_since > tsc::cycles(PACE_US);
        if self.frames.under_way() < WAVE || waited {
            self.waiting_since = now;
            self.send(now);
        }
        for queue in 0..self.queues {
            self.device.publish(&mut self.rings[queue], queue as u32);
        }
        let report = self.report;
        pages::show(place!(report.net), self.frames.counts());
        // What waits on a receive queue is not late: that depends on others.
        let transmit = self.rings[..self.queues].iter_mut().skip(1).step_by(2);
        self.device.care(transmit, now)
    }

    fn collect(&mut self, queue: usize) {
        while let Some((token, len)) = self.device.take(&mut self.rings[queue]) {
            let slot = usize::from(token);
            self.free[queue][slot] = true;
            if queue.is_multiple_of(2) {
                let buffer = self.buffer(queue, slot);
                self.frames.receive(buffer, len as usize);
            }
        }
    }

    fn refill(&mut self, queue: usize, now: u64) {
        for slot in 0..DEPTH {
            let buffer = self.buffer(queue, slot);
            if self.free[queue][slot] && self.add(queue, slot, Buffer::writable(buffer), now) {
                buffer.set8(0, 0xff);
            }
        }
    }

    /// A frame on each transmit queue in turn, as long as there are buffers, some at a time.
    fn send(&mut self, now: u64) {
        for _ in 0..8 {
            let queue = 2 * (self.next % (self.queues / 2)) + 1;
            let Some(slot) = self.free[queue].iter().position(|free| *free) else {
                return;
            };
            if self.rings[queue].free() == 0 {
                return;
            }
            self.next += 1;
            let buffer = self.buffer(queue, slot);
            let len = self.frames.send(buffer);
            self.add(queue, slot, Buffer::readable(buffer.part(0, len)), now);
        }
    }

    fn add(&mut self, queue: usize, slot: usize, buffer: Buffer, now: u64) -> bool {
        let added = self.rings[queue].add(&[buffer], slot as u16, now).is_ok();
        if added {
            self.free[queue][slot] = false;
            self.device.submitted();
        }
        added
    }

    pub(super) fn device(&self) -> &Device {
        &self.device
    }
}
