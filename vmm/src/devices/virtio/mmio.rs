//! The registers of a virtio device on memory-mapped I/O, version 2 (virtio 1.2, section 4.2).
//!
//! ```text
//!  reset ─▶ ACKNOWLEDGE ─▶ DRIVER ─▶ FEATURES_OK ─▶ DRIVER_OK ──▶ (at work)
//!    ▲                                                  │ a ring that lies, a bug
//!    └────────────── status = 0 ◀── NEEDS_RESET ◀───────┘
//! ```
//!
//! Registers are 32 bits wide; other accesses read as 0 and write nothing. What a driver does out
//! of turn is ignored, or fails the device; it never harms anything but the guest itself.
//!
//! Locks: the registers first, then the device's (`worker`). Interrupt status and acknowledgment
//! take neither, so a vCPU that handles an interrupt waits for nobody.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use stillpoint_state::contents::{Contents, Kind as SectionKind};
use stillpoint_state::sections::{VirtioMmio as Section, VirtioQueue};
use stillpoint_state::{Saved, Section as _, StateError, Unclaimed};
use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET,
    VIRTIO_F_VERSION_1,
};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::{Queue, QueueState, QueueT};

use super::queue::{Broken, open};
use super::slot::{Place, QUEUE_NOTIFY, Slot};
use super::{Kind, worker};
use crate::devices::{Busy, Device};
use crate::handover::lend::Lending;

// Offsets of registers (virtio 1.2, 4.2.2).
const MAGIC: u64 = 0x00;
const VERSION: u64 = 0x04;
const DEVICE_ID: u64 = 0x08;
const VENDOR_ID: u64 = 0x0c;
const DEVICE_FEATURES: u64 = 0x10;
const DEVICE_FEATURES_SEL: u64 = 0x14;
const DRIVER_FEATURES: u64 = 0x20;
const DRIVER_FEATURES_SEL: u64 = 0x24;
const QUEUE_SEL: u64 = 0x30;
const QUEUE_SIZE_MAX: u64 = 0x34;
const QUEUE_SIZE: u64 = 0x38;
const QUEUE_READY: u64 = 0x44;
const INTERRUPT_STATUS: u64 = 0x60;
const INTERRUPT_ACK: u64 = 0x64;
const STATUS: u64 = 0x70;
const QUEUE_DESC: [u64; 2] = [0x80, 0x84];
const QUEUE_AVAIL: [u64; 2] = [0x90, 0x94];
const QUEUE_USED: [u64; 2] = [0xa0, 0xa4];
/// Length of a shared memory region, low and high: all ones says that there is none.
const SHM_LEN: [u64; 2] = [0xb0, 0xb4];
const CONFIG_GENERATION: u64 = 0xfc;
const CONFIG_SPACE: u64 = 0x100;

/// "virt".
const MAGIC_VALUE: u32 = u32::from_le_bytes(*b"virt");
/// "STPT"; any value does.
const VENDOR: u32 = u32::from_le_bytes(*b"STPT");

const DRIVER_OK: u32 = VIRTIO_CONFIG_S_DRIVER_OK;
const FEATURES_OK: u32 = VIRTIO_CONFIG_S_FEATURES_OK;
const NEEDS_RESET: u32 = VIRTIO_CONFIG_S_NEEDS_RESET;

/// How long a driver's reset may wait for disk I/O that is under way.
const RESET_PATIENCE: Duration = Duration::from_secs(30);

const fn bit(number: u32) -> u64 {
    1 << number
}

/// What the transport offers beside the kind's features.
const TRANSPORT: u64 =
    bit(VIRTIO_F_VERSION_1) | bit(VIRTIO_RING_F_INDIRECT_DESC) | bit(VIRTIO_RING_F_EVENT_IDX);

/// One queue as the driver wrote it.
#[derive(Clone, Copy, Debug, Default)]
struct QueueRegisters {
    size: u32,
    ready: bool,
    desc: u64,
    avail: u64,
    used: u64,
}

#[derive(Debug, Default)]
struct Registers {
    device_features_sel: u32,
    driver_features_sel: u32,
    driver_features: u64,
    queue_sel: u32,
    status: u32,
    queues: Vec<QueueRegisters>,
}

/// A virtio device of whichever kind.
#[derive(Debug)]
pub struct VirtioMmio {
    registers: Mutex<Registers>,
    slot: Slot,
    device_type: u32,
    features: u64,
    sizes: &'static [u16],
    kind: SectionKind,
}

impl VirtioMmio {
    /// A fresh device.
    pub fn new(slot: Slot, kind: Box<dyn Kind>) -> Self {
        let device = Self::shell(slot, &*kind);
        device.slot.worker.install(kind, device.no_queues(), false);
        device
    }

    /// From saved state; it stands still until resumed.
    pub fn restore(
        slot: Slot,
        kind: Box<dyn Kind>,
        from: &mut Unclaimed,
    ) -> Result<Self, StateError> {
        let section: Section = from.take(&slot.name)?;
        let mut device = Self::shell(slot, &*kind);
        let queues = device.take_in(&section)?;
        let live = section.status & DRIVER_OK != 0 && !section.failed;
        device.slot.worker.install(kind, queues, live);
        Ok(device)
    }

    fn shell(slot: Slot, kind: &dyn Kind) -> Self {
        let sizes = kind.queue_sizes();
        let fresh = Registers {
            queues: vec![QueueRegisters::default(); sizes.len()],
            ..Registers::default()
        };
        Self {
            registers: Mutex::new(fresh),
            device_type: kind.device_type(),
            features: kind.features() | TRANSPORT,
            sizes,
            kind: kind.section(),
            slot,
        }
    }

    fn no_queues(&self) -> Vec<Option<Queue>> {
        self.sizes.iter().map(|_| None).collect()
    }

    /// Its name in the machine: `disk0`, `net1`, `vsock`, `rng`.
    pub fn instance(&self) -> &str {
        &self.slot.name
    }

    pub(super) fn worker(&self) -> &worker::Worker {
        &self.slot.worker
    }

    /// Where it lies.
    pub fn place(&self) -> Place {
        self.slot.place
    }

    /// The kick of a queue, to be rung as KVM rings it.
    #[cfg(test)]
    pub(super) fn kick(&self, queue: usize) -> &crate::irq::Kick {
        &self.slot.kicks[queue]
    }

    /// Lends a successor every file it needs and has not had yet: kicks, and the kind's own.
    pub fn lend(&self, to: &mut Lending) -> std::io::Result<()> {
        let name = &self.slot.name;
        for (queue, kick) in self.slot.kicks.iter().enumerate() {
            to.offer(format!("{name}/kick{queue}"), kick)?;
        }
        match &self.slot.worker.lock().kind {
            Some(kind) => kind.lend(name, to),
            None => Ok(()),
        }
    }

    fn registers(&self) -> MutexGuard<'_, Registers> {
        self.registers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn read_register(&self, offset: u64) -> u32 {
        let interrupt = self.slot.worker.interrupt();
        if offset == INTERRUPT_STATUS {
            return interrupt.status();
        }
        let registers = self.registers();
        let half = |value: u64, select: u32| match select {
            0 => value as u32,
            1 => (value >> 32) as u32,
            _ => 0,
        };
        let queue = registers.queues.get(registers.queue_sel as usize);
        match offset {
            MAGIC => MAGIC_VALUE,
            VERSION => 2,
            DEVICE_ID => self.device_type,
            VENDOR_ID => VENDOR,
            DEVICE_FEATURES => half(self.features, registers.device_features_sel),
            QUEUE_SIZE_MAX => {
                let size = self.sizes.get(registers.queue_sel as usize);
                size.copied().map_or(0, u32::from)
            }
            QUEUE_READY => queue.map_or(0, |queue| queue.ready.into()),
            STATUS if interrupt.has_failed() => registers.status | NEEDS_RESET,
            STATUS => registers.status,
            offset if SHM_LEN.contains(&offset) => u32::MAX,
            // Constant, as are all our configuration spaces while a driver is at work.
            CONFIG_GENERATION => 0,
            _ => 0,
        }
    }

    fn write_register(&self, offset: u64, value: u32) {
        if offset == INTERRUPT_ACK {
            return self.slot.worker.interrupt().acknowledge(value);
        }
        let mut registers = self.registers();
        match offset {
            DEVICE_FEATURES_SEL => registers.device_features_sel = value,
            DRIVER_FEATURES_SEL => registers.driver_features_sel = value,
            DRIVER_FEATURES if registers.status & FEATURES_OK == 0 => {
                let shift = match registers.driver_features_sel {
                    0 => 0,
                    1 => 32,
                    _ => return,
                };
                let keep = registers.driver_features & !(u64::from(u32::MAX) << shift);
                registers.driver_features = keep | u64::from(value) << shift;
            }
            QUEUE_SEL => registers.queue_sel = value,
            QUEUE_NOTIFY => {
                if let Some(kick) = self.slot.kicks.get(value as usize) {
                    kick.ring();
                }
            }
            STATUS => self.write_status(&mut registers, value),
            _ => self.write_queue(&mut registers, offset, value),
        }
    }

    fn write_queue(&self, registers: &mut Registers, offset: u64, value: u32) {
        let number = registers.queue_sel as usize;
        let live = registers.status & DRIVER_OK != 0;
        let Some(queue) = registers.queues.get_mut(number) else {
            return;
        };
        if live {
            // Set up once, before DRIVER_OK; after it a driver can only take a queue away.
            if offset == QUEUE_READY && value == 0 {
                queue.ready = false;
                if let Some(ring) = self.slot.worker.lock().queues.get_mut(number) {
                    *ring = None;
                }
            }
            return;
        }
        let place = |to: &mut u64, offsets: [u64; 2]| {
            let shift = if offset == offsets[0] { 0 } else { 32 };
            *to = *to & !(u64::from(u32::MAX) << shift) | u64::from(value) << shift;
        };
        match offset {
            QUEUE_SIZE => queue.size = value,
            QUEUE_READY => queue.ready = value & 1 != 0,
            offset if QUEUE_DESC.contains(&offset) => place(&mut queue.desc, QUEUE_DESC),
            offset if QUEUE_AVAIL.contains(&offset) => place(&mut queue.avail, QUEUE_AVAIL),
            offset if QUEUE_USED.contains(&offset) => place(&mut queue.used, QUEUE_USED),
            _ => {}
        }
    }

    fn write_status(&self, registers: &mut Registers, value: u32) {
        if value == 0 {
            return self.reset(registers);
        }
        let mut value = value & !NEEDS_RESET;
        let fresh = value & !registers.status;
        let features = registers.driver_features;
        let agreed = features & !self.features == 0 && features & bit(VIRTIO_F_VERSION_1) != 0;
        if fresh & FEATURES_OK != 0 && !agreed {
            // The driver reads the bit back and sees that we don't agree (3.1.1, step 6).
            value &= !FEATURES_OK;
        }
        if fresh & DRIVER_OK != 0 {
            if value & FEATURES_OK == 0 {
                value &= !DRIVER_OK;
            } else {
                self.begin(registers);
            }
        }
        // A driver only adds bits (2.1.1); what it leaves out stays.
        registers.status |= value;
    }

    /// DRIVER_OK: the queues are judged, and the kind begins.
    fn begin(&self, registers: &Registers) {
        let worker = &self.slot.worker;
        let mut work = worker.lock();
        let started = self.open_queues(registers).and_then(|queues| {
            work.queues = queues;
            match &mut work.kind {
                Some(kind) => kind.start(registers.driver_features),
                None => Ok(()),
            }
        });
        work.live = true;
        if let Err(why) = started {
            worker.fail(&mut work, &why);
        }
    }

    fn open_queues(&self, registers: &Registers) -> Result<Vec<Option<Queue>>, Broken> {
        let event_idx = registers.driver_features & bit(VIRTIO_RING_F_EVENT_IDX) != 0;
        let pairs = registers.queues.iter().zip(self.sizes);
        pairs
            .map(|(queue, &max_size)| {
                if !queue.ready {
                    return Ok(None);
                }
                let size = u16::try_from(queue.size)
                    .map_err(|_| Broken::Chain("is to be found in a ring of an impossible size"))?;
                let state = QueueState {
                    max_size,
                    next_avail: 0,
                    next_used: 0,
                    event_idx_enabled: event_idx,
                    size,
                    ready: true,
                    desc_table: queue.desc,
                    avail_ring: queue.avail,
                    used_ring: queue.used,
                };
                open(state, self.slot.worker.memory()).map(Some)
            })
            .collect()
    }

    fn reset(&self, registers: &mut Registers) {
        let worker = &self.slot.worker;
        let mut work = worker.lock();
        work.live = false;
        work.queues = self.no_queues();
        // Requests under way still read and write guest memory; the driver may reuse it as soon
        // as this write is done, so it is not done before.
        match worker.await_quiet(work, Instant::now() + RESET_PATIENCE) {
            Ok(mut work) => {
                if let Some(kind) = &mut work.kind {
                    kind.reset();
                }
            }
            Err(busy) => {
                tracing::warn!(%busy, "a driver's reset waited for disk I/O in vain");
                worker.interrupt().set_failed(true);
                return;
            }
        }
        worker.interrupt().set_failed(false);
        worker.interrupt().set_status(0);
        *registers = Registers {
            queues: vec![QueueRegisters::default(); self.sizes.len()],
            ..Registers::default()
        };
    }

    fn section(&self, registers: &Registers, work: &worker::Work) -> Section {
        let queues = registers.queues.iter().enumerate().map(|(number, queue)| {
            let live = work.queues.get(number).and_then(Option::as_ref);
            VirtioQueue {
                size: queue.size,
                ready: queue.ready,
                desc: queue.desc,
                avail: queue.avail,
                used: queue.used,
                open: live.is_some(),
                next_avail: live.map_or(0, |ring| ring.next_avail().into()),
                next_used: live.map_or(0, |ring| ring.next_used().into()),
            }
        });
        Section {
            device_type: self.device_type,
            device_features_sel: registers.device_features_sel,
            driver_features_sel: registers.driver_features_sel,
            driver_features: registers.driver_features,
            queue_sel: registers.queue_sel,
            status: registers.status,
            interrupt_status: self.slot.worker.interrupt().status(),
            failed: self.slot.worker.interrupt().has_failed(),
            queues: queues.collect(),
        }
    }

    /// The registers from a section, and the queues they describe.
    fn take_in(&mut self, from: &Section) -> Result<Vec<Option<Queue>>, StateError> {
        let wrong = |problem: String| StateError::Value {
            section: Section::NAME,
            problem: format!("{}: {problem}", self.slot.name),
        };
        if from.device_type != self.device_type {
            let (found, own) = (from.device_type, self.device_type);
            return Err(wrong(format!("device type {found} where {own} belongs")));
        }
        if from.queues.len() != self.sizes.len() {
            let (found, own) = (from.queues.len(), self.sizes.len());
            return Err(wrong(format!("{found} queues where {own} belong")));
        }
        // Before FEATURES_OK the register holds whatever a driver wrote; agreed is nothing yet.
        let beyond = from.driver_features & !self.features;
        if from.status & FEATURES_OK != 0 && beyond != 0 {
            return Err(wrong(format!(
                "its driver uses features {beyond:#x}, which this release does not have"
            )));
        }
        let event_idx = from.driver_features & bit(VIRTIO_RING_F_EVENT_IDX) != 0;
        let index = |value| u16::try_from(value).map_err(|_| wrong(format!("index {value}")));
        let mut queues = Vec::with_capacity(from.queues.len());
        for (queue, &max_size) in from.queues.iter().zip(self.sizes) {
            if !queue.open {
                queues.push(None);
                continue;
            }
            let state = QueueState {
                max_size,
                next_avail: index(queue.next_avail)?,
                next_used: index(queue.next_used)?,
                event_idx_enabled: event_idx,
                size: index(queue.size)?,
                ready: true,
                desc_table: queue.desc,
                avail_ring: queue.avail,
                used_ring: queue.used,
            };
            let ring = open(state, self.slot.worker.memory());
            queues.push(Some(ring.map_err(|why| wrong(why.to_string()))?));
        }
        let interrupt = self.slot.worker.interrupt();
        interrupt.set_status(from.interrupt_status);
        interrupt.set_failed(from.failed);
        let registers = from.queues.iter().map(|queue| QueueRegisters {
            size: queue.size,
            ready: queue.ready,
            desc: queue.desc,
            avail: queue.avail,
            used: queue.used,
        });
        *self.registers() = Registers {
            device_features_sel: from.device_features_sel,
            driver_features_sel: from.driver_features_sel,
            driver_features: from.driver_features,
            queue_sel: from.queue_sel,
            status: from.status,
            queues: registers.collect(),
        };
        Ok(queues)
    }
}

impl Device for VirtioMmio {
    fn name(&self) -> &str {
        &self.slot.name
    }

    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let Some(at) = offset.checked_sub(CONFIG_SPACE) {
            let config = match &self.slot.worker.lock().kind {
                Some(kind) => kind.config(),
                None => return,
            };
            let bytes = config
                .iter()
                .skip(usize::try_from(at).unwrap_or(usize::MAX));
            for (to, from) in data.iter_mut().zip(bytes) {
                *to = *from;
            }
        } else if data.len() == 4 && offset.is_multiple_of(4) {
            data.copy_from_slice(&self.read_register(offset).to_le_bytes());
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let Some(at) = offset.checked_sub(CONFIG_SPACE) {
            if let Some(kind) = &mut self.slot.worker.lock().kind {
                kind.write_config(at, data);
            }
        } else if let Ok(value) = data.try_into().map(u32::from_le_bytes)
            && offset.is_multiple_of(4)
        {
            self.write_register(offset, value);
        }
    }

    fn drain(&self, deadline: Instant) -> Result<(), Busy> {
        self.slot.worker.drain(deadline)
    }

    fn freeze(&self, deadline: Instant) -> Result<(), Busy> {
        self.slot.worker.freeze(deadline)
    }

    fn resume(&self) {
        self.slot.worker.go();
    }

    fn announce(&self, to: &mut Contents) {
        to.announce(&Section::KIND, &self.slot.name);
        to.announce(&self.kind, &self.slot.name);
    }

    fn save(&self, to: &mut Saved) -> Result<(), StateError> {
        let registers = self.registers();
        let work = self.slot.worker.lock();
        to.put(&self.slot.name, &self.section(&registers, &work))?;
        match &work.kind {
            Some(kind) => kind.save(&self.slot.name, to),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests;
