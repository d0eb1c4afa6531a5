//! What a guest gets done, counted from beside it: no vCPU comes back from the guest for it, and no thread of a
//! device is waited for.

use std::collections::BTreeMap;
use std::sync::{Arc, Weak};

use stillpoint_control::health::QueueSign;
use vm_memory::GuestAddress;

use super::Machine;
use crate::devices::probe;
use crate::devices::virtio::mmio::VirtioMmio;
use crate::memory::Memory;

/// The name of what the guest's own vCPUs do.
pub const GUEST: &str = "guest";

/// How much was done by each, since the gauge was made or since the guest's boot.
pub type Counts = BTreeMap<String, u64>;

/// Counts. It keeps none of the machine's devices alive.
#[derive(Debug)]
pub struct Gauge {
    memory: Memory,
    table: Option<GuestAddress>,
    vcpus: u8,
    devices: Vec<Requests>,
}

/// The requests that a device took.
#[derive(Debug)]
struct Requests {
    device: Weak<VirtioMmio>,
    last: Vec<QueueSign>,
    sum: u64,
}

impl Machine {
    /// A gauge of it.
    pub fn gauge(&self) -> Gauge {
        let requests = |device: &Arc<VirtioMmio>| Requests {
            device: Arc::downgrade(device),
            last: device.sign().queues,
            sum: 0,
        };
        Gauge {
            memory: self.ram.map().clone(),
            table: self.probe.table(),
            vcpus: u8::try_from(self.vcpus.count()).unwrap_or(u8::MAX),
            devices: self.virtio.iter().map(requests).collect(),
        }
    }
}

impl Gauge {
    /// Counts up to now.
    pub fn read(&mut self) -> Counts {
        let work = |table| probe::work(&self.memory, table, self.vcpus);
        let work = self.table.and_then(work);
        let devices = self.devices.iter_mut().filter_map(Requests::read);
        let work = work.map(|work| (GUEST.to_owned(), work));
        devices.chain(work).collect()
    }
}

impl Requests {
    /// Queues tell how many they took modulo 2^16.
    fn read(&mut self) -> Option<(String, u64)> {
        let sign = self.device.upgrade()?.sign();
        // One that is at work this very moment tells the next time.
        if !sign.stuck {
            for (last, now) in self.last.iter().zip(&sign.queues) {
                self.sum += u64::from(now.taken.wrapping_sub(last.taken));
            }
            self.last = sign.queues;
        }
        Some((sign.name, self.sum))
    }
}
