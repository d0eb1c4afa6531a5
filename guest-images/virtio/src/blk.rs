//! virtio-blk (section 5.2): a workload that knows what every block of the disk must hold.
//!
//! Writes, reads, zeroings and flushes, many at once, never two on one block. A read must give what
//! the latest write to the block put there. A flush makes durable what was done when it was asked
//! for; the table that the host reads says so, block by block (`stillpoint_guest_abi::disk`). It is
//! written in an order that keeps it true at every instant: `issued` before the device hears of a
//! write, `durable` after it has said that a flush is done.

use stillpoint_guest_abi::disk::{self, BLOCK_SECTORS, Block, Content, SECTOR};
use stillpoint_guest_abi::virtio::Blk as Counts;

use crate::memory::Area;
use crate::random::Random;
use crate::ring::{Buffer, DESCRIPTOR};

/// Feature: the disk cannot be written.
pub const READ_ONLY: u64 = 1 << 5;
/// Feature: the disk has a cache, and can flush it.
pub const FLUSH: u64 = 1 << 9;
/// Feature: it can zero.
pub const WRITE_ZEROES: u64 = 1 << 14;

/// Request types (5.2.6).
pub mod request {
    /// Read.
    pub const IN: u32 = 0;
    /// Write.
    pub const OUT: u32 = 1;
    /// Make durable what is done.
    pub const FLUSH: u32 = 4;
    /// Tell the disk's name, 20 bytes.
    pub const GET_ID: u32 = 8;
    /// Forget ranges.
    pub const DISCARD: u32 = 11;
    /// Zero ranges.
    pub const WRITE_ZEROES: u32 = 13;
}

const STATUS_OK: u8 = 0;
const STATUS_LAST: u8 = 2;
/// No status of the specification's.
const STATUS_UNWRITTEN: u8 = 0xee;

/// Requests in flight.
pub const DEPTH: u16 = 16;
/// The most blocks.
pub const MAX_BLOCKS: u64 = 4096;
const BLOCK: usize = SECTOR * BLOCK_SECTORS as usize;
/// The most buffers of a request: header, data in up to three, status.
pub const MAX_BUFFERS: u16 = 5;

// A request's memory.
const HEADER: usize = 0;
const STATUS: usize = 16;
const RANGE: usize = 32;
const TABLE: usize = 64;
const DATA: usize = 512;
const SLOT: usize = DATA + BLOCK;
const _: () = assert!(TABLE + DESCRIPTOR * MAX_BUFFERS as usize <= DATA);

const ENTRY: usize = size_of::<Block>();
// What we know of a block beside the table: the write that it holds, and when that was done.
const KNOWN: usize = 16;
/// Nobody knows what a block holds whose last write failed.
const UNKNOWN: u64 = u64::MAX;

/// The disk, as its configuration says.
#[derive(Clone, Copy, Debug)]
pub struct Disk {
    /// Its size in sectors.
    pub sectors: u64,
    /// The features agreed on.
    pub features: u64,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Act {
    #[default]
    None,
    Read,
    Write,
    Zero,
    Flush,
}

#[derive(Clone, Copy, Debug, Default)]
struct Slot {
    act: Act,
    block: u64,
    /// The write's number; for a flush, the requests done when it was asked for.
    number: u64,
}

/// A request to be added to the queue.
#[derive(Clone, Copy, Debug)]
pub struct Request {
    /// What to add it with.
    pub token: u16,
    /// Memory for an indirect table.
    pub table: Area,
    buffers: [Buffer; MAX_BUFFERS as usize],
    count: usize,
}

impl Request {
    /// Its buffers.
    pub fn buffers(&self) -> &[Buffer] {
        &self.buffers[..self.count]
    }
}

/// The workload.
#[derive(Debug)]
pub struct Workload {
    disk: Disk,
    counts: Counts,
    random: Random,
    memory: Area,
    table: Area,
    known: Area,
    slots: [Slot; DEPTH as usize],
    issued: u64,
    done: u64,
}

impl Workload {
    /// One on `disk`, over at most `blocks` blocks spread over all of it, in memory of `area`.
    /// `run` is a number that no other run has; `counts` go on from an earlier one.
    pub fn new(area: &mut Area, disk: Disk, blocks: u64, run: u64, counts: Counts) -> Self {
        let there = disk.sectors / BLOCK_SECTORS;
        let blocks = blocks.min(there).min(MAX_BLOCKS);
        let table = area.take(ENTRY * blocks as usize, 8);
        let known = area.take(KNOWN * blocks as usize, 8);
        table.fill(0);
        known.fill(0);
        let counts = Counts {
            run,
            table_gpa: table.address(),
            blocks,
            stride: there.checked_div(blocks).unwrap_or(0) * BLOCK_SECTORS,
            ..counts
        };
        Self {
            disk,
            counts,
            random: Random::new(run),
            memory: area.take(SLOT * usize::from(DEPTH), 512),
            table,
            known,
            slots: [Slot::default(); DEPTH as usize],
            issued: 0,
            done: 0,
        }
    }

    /// The counters.
    pub fn counts(&self) -> &Counts {
        &self.counts
    }

    /// The next request, if one more may be in flight.
    pub fn next_request(&mut self) -> Option<Request> {
        let slot = self.slots.iter().position(|slot| slot.act == Act::None)?;
        let block = self.idle_block()?;
        let act = self.choose();
        let number = match act {
            Act::Write | Act::Zero => self.issue(block, act),
            _ => self.done,
        };
        self.slots[slot] = Slot { act, block, number };
        Some(self.request(slot))
    }

    fn idle_block(&mut self) -> Option<u64> {
        let block = match self.counts.blocks {
            0 => return None,
            blocks => self.random.below(blocks),
        };
        let taken = |slot: &Slot| slot.act != Act::None && slot.block == block;
        // A flush holds no block; that it seems to costs a turn, now and then.
        (!self.slots.iter().any(taken)).then_some(block)
    }

    fn choose(&mut self) -> Act {
        let of_20 = self.random.below(20);
        if self.disk.features & READ_ONLY != 0 {
            return Act::Read;
        }
        match of_20 {
            0..9 => Act::Write,
            9 if self.disk.features & WRITE_ZEROES != 0 => Act::Zero,
            9 => Act::Write,
            10 if self.disk.features & FLUSH != 0 => Act::Flush,
            _ => Act::Read,
        }
    }

    fn issue(&mut self, block: u64, act: Act) -> u64 {
        self.issued += 1;
        let mut entry = self.entry(block);
        entry.issued = self.issued;
        if act == Act::Zero {
            entry.zeroed = self.issued;
        }
        self.set_entry(block, entry);
        self.issued
    }

    fn request(&mut self, slot: usize) -> Request {
        let Slot { act, block, number } = self.slots[slot];
        let memory = self.memory.part(slot * SLOT, SLOT);
        let sector = block * self.counts.stride;
        let (kind, named) = match act {
            Act::Write => (request::OUT, sector),
            Act::Flush => (request::FLUSH, 0),
            Act::Zero => (request::WRITE_ZEROES, 0),
            Act::Read | Act::None => (request::IN, sector),
        };
        memory.set32(HEADER, kind);
        memory.set32(HEADER + 4, 0);
        memory.set64(HEADER + 8, named);
        memory.set8(STATUS, STATUS_UNWRITTEN);
        let mut request = Request {
            token: slot as u16,
            table: memory.part(TABLE, DATA - TABLE),
            buffers: [Buffer::readable(memory.part(HEADER, 16)); MAX_BUFFERS as usize],
            count: 1,
        };
        let data = memory.part(DATA, BLOCK);
        match act {
            Act::Write => {
                for n in 0..BLOCK_SECTORS {
                    let words = disk::words(self.counts.run, sector + n, number);
                    for (word, value) in words.enumerate() {
                        data.set64(n as usize * SECTOR + word * 8, value);
                    }
                }
                self.split(&mut request, Buffer::readable(data));
            }
            Act::Read | Act::None => {
                // What lies there may be just what is due.
                data.fill(0xa5);
                self.split(&mut request, Buffer::writable(data));
            }
            Act::Zero => {
                let range = memory.part(RANGE, 16);
                range.set64(0, sector);
                range.set32(8, BLOCK_SECTORS as u32);
                range.set32(12, self.random.below(2) as u32);
                request.push(Buffer::readable(range));
            }
            Act::Flush => {}
        }
        request.push(Buffer::writable(memory.part(STATUS, 1)));
        request
    }

    /// Adds the data in one to three buffers, cut between sectors.
    fn split(&mut self, request: &mut Request, whole: Buffer) {
        let pieces = 1 + self.random.below(3) as u32;
        let (mut at, len) = (0, BLOCK_SECTORS as u32);
        for piece in 0..pieces {
            let left = len - at;
            let sectors = if piece + 1 == pieces {
                left
            } else {
                1 + self.random.below(u64::from(left + piece + 1 - pieces)) as u32
            };
            request.push(Buffer {
                address: whole.address + u64::from(at) * SECTOR as u64,
                len: sectors * SECTOR as u32,
                ..whole
            });
            at += sectors;
        }
    }

    /// The device gave a request back.
    pub fn complete(&mut self, token: u16) {
        let slot = usize::from(token);
        let Slot { act, block, number } = core::mem::take(&mut self.slots[slot]);
        let memory = self.memory.part(slot * SLOT, SLOT);
        self.done += 1;
        let status = memory.get8(STATUS);
        if status > STATUS_LAST {
            self.counts.bad_status += 1;
        } else if status != STATUS_OK {
            self.counts.errors += 1;
        }
        let ok = status == STATUS_OK;
        match act {
            Act::Read if ok => self.check(block, memory.part(DATA, BLOCK)),
            Act::Write | Act::Zero => self.written(block, act, number, ok),
            Act::Flush if ok => self.flushed(number),
            Act::None | Act::Read | Act::Flush => {}
        }
    }

    fn written(&mut self, block: u64, act: Act, number: u64, ok: bool) {
        let at = block as usize * KNOWN;
        self.known.set64(at, if ok { number } else { UNKNOWN });
        self.known.set64(at + 8, self.done);
        if !ok {
            return;
        }
        match act {
            Act::Zero => self.counts.zeroings += 1,
            _ => self.counts.writes += 1,
        }
        // A disk without a cache has made it durable by now (5.2.6.2).
        if self.disk.features & FLUSH == 0 {
            self.make_durable(block, number);
        }
    }

    fn flushed(&mut self, asked_at: u64) {
        self.counts.flushes += 1;
        for block in 0..self.counts.blocks {
            let at = block as usize * KNOWN;
            let (number, done_at) = (self.known.get64(at), self.known.get64(at + 8));
            if number != 0 && number != UNKNOWN && done_at <= asked_at {
                self.make_durable(block, number);
            }
        }
    }

    fn make_durable(&mut self, block: u64, number: u64) {
        let mut entry = self.entry(block);
        entry.durable = number;
        self.set_entry(block, entry);
    }

    fn check(&mut self, block: u64, data: Area) {
        self.counts.reads += 1;
        let known = self.known.get64(block as usize * KNOWN);
        let entry = self.entry(block);
        let first = block * self.counts.stride;
        for n in 0..BLOCK_SECTORS {
            let at = n as usize * SECTOR;
            let word = |index: usize| data.get64(at + index * 8);
            let found = disk::content(self.counts.run, first + n, word);
            let right = match known {
                0 => matches!(found, Content::Foreign | Content::Zeros),
                UNKNOWN => entry.allows(found),
                number if number == entry.zeroed => found == Content::Zeros,
                number => found == Content::Written(number),
            };
            if !right {
                self.counts.wrong += 1;
                if self.counts.wrong_sector == 0 {
                    self.counts.wrong_sector = first + n + 1;
                }
            }
        }
    }

    /// What the table says of a block.
    pub fn entry(&self, block: u64) -> Block {
        let at = block as usize * ENTRY;
        Block {
            issued: self.table.get64(at),
            durable: self.table.get64(at + 8),
            zeroed: self.table.get64(at + 16),
        }
    }

    fn set_entry(&mut self, block: u64, entry: Block) {
        let at = block as usize * ENTRY;
        self.table.set64(at, entry.issued);
        self.table.set64(at + 8, entry.durable);
        self.table.set64(at + 16, entry.zeroed);
    }
}

impl Request {
    fn push(&mut self, buffer: Buffer) {
        self.buffers[self.count] = buffer;
        self.count += 1;
    }
}

#[cfg(test)]
mod tests;
