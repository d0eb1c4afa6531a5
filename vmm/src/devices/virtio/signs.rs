//! Signs of life of a device: what waits in its queues, and whether it takes it.
//!
//! A look is brief, changes nothing, and waits for no thread of the device: one that holds the
//! device's lock for longer than a look is a sign of its own.

use std::sync::atomic::Ordering;
use std::time::Duration;

use stillpoint_control::health::{DeviceSign, QueueSign};
use virtio_queue::{Queue, QueueT};

use super::mmio::VirtioMmio;
use super::worker::Work;

/// A turn of a device's thread lasts microseconds; on a host that is overrun its thread may lose its
/// core in the middle of one.
const PATIENCE: Duration = Duration::from_millis(100);

impl VirtioMmio {
    /// How it is.
    pub fn sign(&self) -> DeviceSign {
        let worker = self.worker();
        let mut sign = DeviceSign {
            name: self.instance().to_owned(),
            failed: worker.interrupt().has_failed(),
            ..DeviceSign::default()
        };
        match worker.lock_within(PATIENCE) {
            Some(work) => self.look(&work, &mut sign),
            None => sign.stuck = true,
        }
        sign
    }

    fn look(&self, work: &Work, sign: &mut DeviceSign) {
        sign.in_flight = work.in_flight() as u64;
        let Some(kind) = work.kind.as_ref().filter(|_| work.live) else {
            return;
        };
        for (number, queue) in work.queues.iter().enumerate() {
            if let Some(queue) = queue.as_ref().filter(|_| kind.takes_at_once(number)) {
                sign.queues.extend(self.queue_sign(number, queue));
            }
        }
    }

    /// `None` for a ring that can't be read: the device finds that out by itself.
    fn queue_sign(&self, number: usize, queue: &Queue) -> Option<QueueSign> {
        let taken = queue.next_avail();
        let offered = queue
            .avail_idx(self.worker().memory(), Ordering::Acquire)
            .ok()?;
        Some(QueueSign {
            queue: u32::try_from(number).unwrap_or(u32::MAX),
            waiting: offered.0.wrapping_sub(taken),
            taken,
        })
    }
}
