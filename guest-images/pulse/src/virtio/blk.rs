//! Mode `blk`.

use stillpoint_guest_abi::pulse::Report;
use stillpoint_guest_virtio::blk::{Disk, FLUSH, MAX_BUFFERS, READ_ONLY, WRITE_ZEROES, Workload};
use stillpoint_guest_virtio::registers::{feature, kind, offset};
use stillpoint_guest_virtio::ring::Ring;

use super::arena;
use super::device::Device;
use crate::pages::{self, place};
use crate::{options, tsc};

/// A disk.
pub(super) struct Blk {
    device: Device,
    ring: Ring,
    workload: Workload,
    report: *mut Report,
    /// Requests made; every other one has a table of its own, where that was agreed on.
    made: u64,
}

impl Blk {
    /// Finds one and sets it up.
    pub(super) fn start(vcpu: usize) -> Option<Self> {
        let device = Device::find(vcpu, kind::BLK, READ_ONLY | FLUSH | WRITE_ZEROES)?;
        let mut memory = arena(vcpu);
        let Some(mut ring) = device.ring(&mut memory, 0) else {
            device.refuse();
            return None;
        };
        let window = device.window();
        let halves = [0, 4].map(|at| u64::from(window.read32(offset::CONFIG + at)));
        let disk = Disk {
            sectors: halves[1] << 32 | halves[0],
            features: device.features(),
        };
        let report = pages::report(vcpu);
        let counts = pages::shown(place!(report.blk));
        let blocks = options::get().blocks;
        let workload = Workload::new(&mut memory, disk, blocks, tsc::read(), counts);
        pages::show(place!(report.blk), workload.counts());
        device.go(core::slice::from_mut(&mut ring));
        Some(Self {
            device,
            ring,
            workload,
            report,
            made: 0,
        })
    }

    /// Judges what came back and, if there is to be `more`, makes requests. False if the device no
    /// longer works.
    pub(super) fn turn(&mut self, now: u64, more: bool) -> bool {
        let rings = core::slice::from_mut(&mut self.ring);
        if self.device.has_news(rings, now) {
            while let Some((token, _)) = self.device.take(&mut self.ring) {
                self.workload.complete(token);
            }
        }
        while more && self.ring.free() >= MAX_BUFFERS {
            let Some(request) = self.workload.next_request() else {
                break;
            };
            self.made += 1;
            let (buffers, token) = (request.buffers(), request.token);
            let indirect =
                self.device.features() & feature::INDIRECT != 0 && self.made.is_multiple_of(2);
            // There is room, as just seen.
            let _ = match indirect {
                true => self.ring.add_indirect(request.table, buffers, token, now),
                false => self.ring.add(buffers, token, now),
            };
            self.device.submitted();
        }
        self.device.publish(&mut self.ring, 0);
        let report = self.report;
        pages::show(place!(report.blk), self.workload.counts());
        self.device.care([&mut self.ring], now)
    }

    /// Whether requests are in flight.
    pub(super) fn is_busy(&self) -> bool {
        self.ring.outstanding() > 0
    }

    pub(super) fn device(&self) -> &Device {
        &self.device
    }
}
