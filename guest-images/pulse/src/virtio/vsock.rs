//! Mode `vsock`: queue 0 receives, 1 transmits, 2 brings events (5.10.2).

use stillpoint_guest_abi::pulse::Report;
use stillpoint_guest_virtio::memory::Area;
use stillpoint_guest_virtio::registers::{kind, offset};
use stillpoint_guest_virtio::ring::{Buffer, Ring};
use stillpoint_guest_virtio::vsock::{BUFFER, Patience, Sockets};

use super::arena;
use super::device::Device;
use crate::pages::{self, place};
use crate::{options, tsc};

const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
const EVENTS: usize = 2;
/// Buffers of each of the first two queues.
const DEPTH: usize = 16;
/// Bytes of an event, and how many may come at once.
const EVENT: usize = 4;
const EVENT_DEPTH: usize = 4;

/// A socket device.
pub(super) struct Vsock {
    device: Device,
    rings: [Ring; 3],
    buffers: Area,
    events: Area,
    /// Buffers not in flight, of the first two queues.
    free: [[bool; DEPTH]; 2],
    sockets: Sockets,
    report: *mut Report,
}

fn cid(device: &Device) -> u64 {
    let half = |at| u64::from(device.window().read32(offset::CONFIG + at));
    half(4) << 32 | half(0)
}

impl Vsock {
    /// Finds one and sets it up.
    pub(super) fn start(vcpu: usize) -> Option<Self> {
        let device = Device::find(vcpu, kind::VSOCK, 0)?;
        let mut memory = arena(vcpu);
        let mut ring = |queue: usize| device.ring(&mut memory, queue as u32);
        let rings = (ring(RECEIVE), ring(TRANSMIT), ring(EVENTS));
        let (Some(receive), Some(transmit), Some(events)) = rings else {
            device.refuse();
            return None;
        };
        let mut rings = [receive, transmit, events];
        let patience = Patience {
            retry: tsc::cycles(100_000),
            answer: tsc::cycles(5_000_000),
            record: tsc::cycles(10_000_000),
        };
        let report = pages::report(vcpu);
        let counts = pages::shown(place!(report.vsock));
        let (cid, port) = (cid(&device), options::get().port);
        let buffers = memory.take(2 * DEPTH * BUFFER, 64);
        let event_area = memory.take(EVENT_DEPTH * EVENT, 64);
        let run = tsc::read();
        let sockets = Sockets::new(&mut memory, cid, port, run, patience, counts);
        device.go(&mut rings);
        let mut vsock = Self {
            device,
            rings,
            buffers,
            events: event_area,
            free: [[true; DEPTH]; 2],
            sockets,
            report,
        };
        for slot in 0..EVENT_DEPTH {
            vsock.await_event(slot, 0);
        }
        Some(vsock)
    }

    fn buffer(&self, queue: usize, slot: usize) -> Area {
        self.buffers.part((queue * DEPTH + slot) * BUFFER, BUFFER)
    }

    /// Takes what came in, and sends what is to be sent. False if the device no longer works.
    pub(super) fn turn(&mut self, now: u64) -> bool {
        if self.device.has_news(&self.rings, now) {
            self.collect(now);
        }
        for slot in 0..DEPTH {
            if self.free[RECEIVE][slot] {
                let buffer = Buffer::writable(self.buffer(RECEIVE, slot));
                self.add(RECEIVE, slot, buffer, now);
            }
        }
        while let Some(slot) = self.free[TRANSMIT].iter().position(|free| *free) {
            let buffer = self.buffer(TRANSMIT, slot);
            let room = self.rings[TRANSMIT].free() > 0;
            let Some(len) = room
                .then(|| self.sockets.next_packet(buffer, now))
                .flatten()
            else {
                break;
            };
            self.add(TRANSMIT, slot, Buffer::readable(buffer.part(0, len)), now);
        }
        for queue in 0..self.rings.len() {
            self.device.publish(&mut self.rings[queue], queue as u32);
        }
        let report = self.report;
        pages::show(place!(report.vsock), self.sockets.counts());
        self.device.care([&mut self.rings[TRANSMIT]], now)
    }

    fn collect(&mut self, now: u64) {
        while let Some((token, _)) = self.device.take(&mut self.rings[TRANSMIT]) {
            self.free[TRANSMIT][usize::from(token)] = true;
        }
        while let Some((token, len)) = self.device.take(&mut self.rings[RECEIVE]) {
            let slot = usize::from(token);
            self.free[RECEIVE][slot] = true;
            let buffer = self.buffer(RECEIVE, slot);
            self.sockets.receive(buffer, len as usize, now);
        }
        while let Some((token, _)) = self.device.take(&mut self.rings[EVENTS]) {
            // There is one kind of event alone.
            self.sockets.transport_reset(cid(&self.device), now);
            self.await_event(token.into(), now);
        }
    }

    fn await_event(&mut self, slot: usize, now: u64) {
        let buffer = Buffer::writable(self.events.part(slot * EVENT, EVENT));
        if self.rings[EVENTS].add(&[buffer], slot as u16, now).is_ok() {
            self.device.submitted();
        }
    }

    fn add(&mut self, queue: usize, slot: usize, buffer: Buffer, now: u64) {
        let added = self.rings[queue].add(&[buffer], slot as u16, now);
        self.free[queue][slot] = added.is_err();
        self.device.submitted();
    }

    pub(super) fn device(&self) -> &Device {
        &self.device
    }
}
