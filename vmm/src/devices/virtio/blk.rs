//! Disks (virtio 1.2, section 5.2) over raw images and block devices.
//!
//! ```text
//!   queue ─ pop ─▶ request.rs ─▶ pool.rs ═▶ disk.rs (on threads) ═▶ bell ─▶ status, used, interrupt
//!                      └──────── what needs no disk ───────────────────────────▲
//! ```
//!
//! | file | what it holds |
//! |---|---|
//! | [`image`] | opening and locking what a spec names; adopting it |
//! | `request` | a chain of buffers as a request, judged |
//! | `pool` | the threads that do the I/O |
//! | `disk` | the I/O itself |
//! | `holder` | who has locked a disk, for an error's text |
//!
//! A request is given back when it is done, not before: after a drain nothing is under way, and
//! whatever the guest was told of is in the host's page cache, or on its disk after a flush. Both
//! are the file's, which the successor has; so nothing of it is state.
//!
//! Must never: touch the image on a vCPU's thread or on the device's own.

pub mod image;

mod disk;
mod holder;
mod pool;
mod request;

#[cfg(test)]
mod tests;

use stillpoint_state::contents::Kind as SectionKind;
use stillpoint_state::{Saved, Section as _, StateError, Unclaimed, sections};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH,
    VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_TOPOLOGY, VIRTIO_BLK_F_WRITE_ZEROES,
};

use super::poller::{Poller, Watch};
use super::queue::{Broken, Chain, Queues, total};
use super::{FIRST_TOKEN, Kind};
use crate::handover::lend::Lending;
use disk::SECTOR;
use image::Image;
use pool::Order;
use request::{Limits, Request, Status};

/// Device type of a disk.
const BLOCK: u32 = 2;
/// The one queue.
const QUEUE: usize = 0;
/// Its largest size, and the most requests in flight: a driver can't have more of them, and one
/// that lies about it gets no more of the host's memory.
const DEPTH: usize = 256;
/// Requests taken in one turn, so that the device's lock is never held for long.
const TURN: usize = 64;
/// Offset of `writeback` in the configuration space.
const WRITEBACK: u64 = 32;

const fn bit(number: u32) -> u64 {
    1 << number
}

/// The device.
#[derive(Debug)]
pub struct Blk {
    image: Image,
    /// Bytes, as the guest knows them.
    size: u64,
    /// What is written is durable after a flush; otherwise at once.
    write_back: bool,
    in_flight: usize,
}

impl Blk {
    /// A fresh device.
    pub fn new(image: Image) -> Self {
        Self {
            size: image.disk.size,
            image,
            write_back: true,
            in_flight: 0,
        }
    }

    /// From its section. An image that has grown is as good: the guest sees the rest when it boots.
    pub fn restore(image: Image, instance: &str, from: &mut Unclaimed) -> Result<Self, StateError> {
        let section: sections::VirtioBlk = from.take(instance)?;
        let wrong = |problem: String| StateError::Value {
            section: sections::VirtioBlk::NAME,
            problem: format!("{instance}: {problem}"),
        };
        let (known, found) = (section.size, image.disk.size);
        if !known.is_multiple_of(SECTOR) || known == 0 {
            return Err(wrong(format!("a disk of {known} bytes")));
        }
        if found < known {
            return Err(wrong(format!(
                "its image has {found} bytes where the guest knows {known}: somebody has cut it off"
            )));
        }
        Ok(Self {
            size: known,
            write_back: section.write_back,
            ..Self::new(image)
        })
    }

    fn limits(&self) -> Limits {
        Limits {
            size: self.size,
            read_only: self.image.disk.read_only,
            through: !self.write_back,
        }
    }

    /// Begins a request, or answers it at once.
    fn begin(&mut self, chain: Chain, queues: &mut Queues<'_>) -> Result<(), Broken> {
        match request::read(&chain, queues.memory(), self.limits())? {
            Request::Io(io) => {
                let memory = queues.memory().clone();
                self.image.pool.order(Order { chain, io, memory })?;
                self.in_flight += 1;
                Ok(())
            }
            Request::Identity => {
                let room = total(&chain.writable) - 1;
                let len = room.min(self.image.serial.len() as u64);
                let serial = &self.image.serial[..len as usize];
                chain.write(queues.memory(), 0, serial)?;
                give_back(&chain, Status::Ok, len, queues)
            }
            Request::Refused(status) => give_back(&chain, status, 0, queues),
        }
    }
}

/// Gives a request back, of whose data `filled` bytes were written.
fn give_back(
    chain: &Chain,
    status: Status,
    filled: u64,
    queues: &mut Queues<'_>,
) -> Result<(), Broken> {
    let room = total(&chain.writable) - 1;
    chain.write(queues.memory(), room, &[status as u8])?;
    // The status counts only if nothing before it was left out (virtio 1.2, 2.7.8.2). Chains of
    // more than 4 GiB were refused by the queue.
    let written = filled + u64::from(filled == room);
    queues.push(QUEUE, chain.head, written as u32)
}

impl Kind for Blk {
    fn device_type(&self) -> u32 {
        BLOCK
    }

    fn features(&self) -> u64 {
        let always = bit(VIRTIO_BLK_F_SEG_MAX)
            | bit(VIRTIO_BLK_F_BLK_SIZE)
            | bit(VIRTIO_BLK_F_TOPOLOGY)
            | bit(VIRTIO_BLK_F_FLUSH)
            | bit(VIRTIO_BLK_F_CONFIG_WCE);
        always
            | match self.image.disk.read_only {
                true => bit(VIRTIO_BLK_F_RO),
                false => bit(VIRTIO_BLK_F_DISCARD) | bit(VIRTIO_BLK_F_WRITE_ZEROES),
            }
    }

    fn queue_sizes(&self) -> &'static [u16] {
        &[DEPTH as u16]
    }

    /// `struct virtio_blk_config` (virtio 1.2, 5.2.4), up to the fields of features not offered.
    fn config(&self) -> Vec<u8> {
        let disk = &self.image.disk;
        let blocks = disk.physical / disk.block;
        let granularity = u64::from(disk.physical) / SECTOR;
        let mut config = Vec::with_capacity(60);
        config.extend((self.size / SECTOR).to_le_bytes());
        config.extend(0u32.to_le_bytes()); // size_max: not offered
        config.extend(request::MOST_SEGMENTS.to_le_bytes());
        config.extend([0; 4]); // geometry: not offered
        config.extend(disk.block.to_le_bytes());
        config.extend([blocks.max(1).ilog2() as u8, 0]); // physical_block_exp, alignment_offset
        config.extend((blocks.max(1) as u16).to_le_bytes()); // min_io_size
        config.extend(0u32.to_le_bytes()); // opt_io_size: none
        config.extend([self.write_back.into(), 0]);
        config.extend(1u16.to_le_bytes()); // num_queues
        config.extend(request::MOST_DISCARDED.to_le_bytes());
        config.extend(request::MOST_DISCARDS.to_le_bytes());
        config.extend((granularity as u32).to_le_bytes()); // discard_sector_alignment
        config.extend(request::MOST_ZEROED.to_le_bytes());
        config.extend(request::MOST_ZEROES.to_le_bytes());
        config.extend([1, 0, 0, 0]); // write_zeroes_may_unmap
        config
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        // Whether the driver may (CONFIG_WCE) is not asked: it harms its own data at most.
        if let (WRITEBACK, [value]) = (offset, data) {
            self.write_back = value & 1 != 0;
        }
    }

    fn start(&mut self, features: u64) -> Result<(), Broken> {
        if features & bit(VIRTIO_BLK_F_FLUSH) == 0 {
            // It will never ask for a flush (5.2.6.2).
            self.write_back = false;
        }
        Ok(())
    }

    fn reset(&mut self) {
        self.write_back = true;
    }

    fn watch(&mut self, poller: &Poller) -> std::io::Result<()> {
        poller.add(&self.image.pool, FIRST_TOKEN, Watch::IN | Watch::ET)
    }

    fn serve(&mut self, queue: usize, queues: &mut Queues<'_>) -> Result<(), Broken> {
        for _ in 0..TURN {
            if self.in_flight == DEPTH {
                // The rest when one of them is done.
                return queues.signal(queue);
            }
            let Some(chain) = queues.pop(queue)? else {
                return queues.signal(queue);
            };
            self.begin(chain, queues)?;
        }
        queues.signal(queue)?;
        queues.again(queue);
        Ok(())
    }

    fn takes_at_once(&self, _queue: usize) -> bool {
        true
    }

    fn ready(&mut self, _token: u64, _live: bool, queues: &mut Queues<'_>) -> Result<(), Broken> {
        let was_full = self.in_flight == DEPTH;
        let mut ended = Ok(());
        for done in self.image.pool.done() {
            // Counted whatever becomes of its ring: it is over.
            self.in_flight -= 1;
            let (status, filled) = match done.outcome {
                outcome if outcome.ok => (Status::Ok, outcome.read),
                outcome => (Status::IoError, outcome.read),
            };
            ended = ended.and(give_back(&done.chain, status, filled, queues));
        }
        ended?;
        if was_full {
            queues.again(QUEUE);
        }
        queues.signal(QUEUE)
    }

    fn in_flight(&self) -> usize {
        self.in_flight
    }

    fn section(&self) -> SectionKind {
        sections::VirtioBlk::KIND
    }

    fn save(&self, instance: &str, to: &mut Saved) -> Result<(), StateError> {
        let section = sections::VirtioBlk {
            size: self.size,
            write_back: self.write_back,
        };
        to.put(instance, &section)
    }

    fn lend(&self, instance: &str, to: &mut Lending) -> std::io::Result<()> {
        to.offer(format!("{instance}/image"), &self.image)
    }
}
