//! Mode `rng`.

use stillpoint_guest_abi::pulse::Report;
use stillpoint_guest_abi::virtio::Rng as Counts;
use stillpoint_guest_virtio::memory::Area;
use stillpoint_guest_virtio::random::Random;
use stillpoint_guest_virtio::registers::kind;
use stillpoint_guest_virtio::ring::{Buffer, Ring};

use super::arena;
use super::device::Device;
use crate::pages::{self, place};
use crate::tsc;

/// Requests in flight, and the most that each asks for.
const DEPTH: usize = 4;
const MOST: usize = 1024;
/// Shorter answers may be alike by chance.
const TELLING: usize = 16;

/// A source of entropy.
pub(super) struct Rng {
    device: Device,
    ring: Ring,
    buffers: Area,
    free: [bool; DEPTH],
    random: Random,
    /// The first bytes of the latest answer.
    last: u64,
    counts: Counts,
    report: *mut Report,
}

impl Rng {
    /// Finds one and sets it up.
    pub(super) fn start(vcpu: usize) -> Option<Self> {
        let device = Device::find(vcpu, kind::RNG, 0)?;
        let mut memory = arena(vcpu);
        let Some(mut ring) = device.ring(&mut memory, 0) else {
            device.refuse();
            return None;
        };
        device.go(core::slice::from_mut(&mut ring));
        let report = pages::report(vcpu);
        Some(Self {
            device,
            ring,
            buffers: memory.take(DEPTH * MOST, 64),
            free: [true; DEPTH],
            random: Random::new(tsc::read()),
            last: 0,
            counts: pages::shown(place!(report.rng)),
            report,
        })
    }

    /// Judges what came back, and asks for more. False if the device no longer works.
    pub(super) fn turn(&mut self, now: u64, more: bool) -> bool {
        let rings = core::slice::from_mut(&mut self.ring);
        if self.device.has_news(rings, now) {
            while let Some((token, len)) = self.device.take(&mut self.ring) {
                self.judge(token.into(), len as usize);
            }
        }
        for slot in 0..DEPTH {
            if more && self.free[slot] {
                let len = 1 + self.random.below(MOST as u64) as usize;
                let buffer = self.buffers.part(slot * MOST, len);
                buffer.fill(0);
                let asked = self.ring.add(&[Buffer::writable(buffer)], slot as u16, now);
                self.free[slot] = asked.is_err();
                self.device.submitted();
            }
        }
        self.device.publish(&mut self.ring, 0);
        let report = self.report;
        pages::show(place!(report.rng), &self.counts);
        self.device.care([&mut self.ring], now)
    }

    fn judge(&mut self, slot: usize, len: usize) {
        self.free[slot] = true;
        if len == 0 || len > MOST {
            self.counts.hollow += 1;
            return;
        }
        let buffer = self.buffers.part(slot * MOST, len);
        self.counts.bytes += len as u64;
        if len < TELLING {
            return;
        }
        if buffer.is_all(0) {
            self.counts.hollow += 1;
        } else if buffer.get64(0) == self.last {
            self.counts.repeated += 1;
        }
        self.last = buffer.get64(0);
    }

    /// Whether requests are in flight.
    pub(super) fn is_busy(&self) -> bool {
        self.ring.outstanding() > 0
    }

    pub(super) fn device(&self) -> &Device {
        &self.device
    }
}
