//! Requests that no disk can do (5.2.6). None of them would change what is on it.

use stillpoint_guest_virtio::blk::request;
use stillpoint_guest_virtio::memory::Area;
use stillpoint_guest_virtio::registers::offset;
use stillpoint_guest_virtio::ring::{Buffer, Layout, NEXT};

use super::bench::{Bench, Chain};
use super::{Attack, Then};

pub(super) const ATTACKS: &[Attack] = &[
    |b| at_sector(b, |capacity, n| capacity - n % 2),
    |b| {
        at_sector(b, |_, n| {
            [u64::MAX, u64::MAX / 512, 1 << 55, 1 << 63][(n % 4) as usize]
        })
    },
    length_odd,
    type_unknown,
    no_status,
    header_short,
    header_in_bytes,
    |b| ranges(b, request::DISCARD),
    |b| ranges(b, request::WRITE_ZEROES),
];

const HEADER: usize = 16;
const DATA: usize = 512;
const STATUS: usize = 2048;

fn header(b: &Bench, kind: u32, sector: u64) -> Area {
    let memory = b.memory();
    memory.fill(0);
    memory.set32(0, kind);
    memory.set64(8, sector);
    memory.set8(STATUS, 0xff);
    memory
}

/// A request with `len` bytes of data.
fn chain(memory: Area, len: usize, device_writes: bool) -> Chain {
    let data = Buffer {
        device_writes,
        ..Buffer::readable(memory.part(DATA, len))
    };
    let status = Buffer::writable(memory.part(STATUS, 1));
    Chain::of(&[Buffer::readable(memory.part(0, HEADER)), data, status])
}

/// Reads and writes of two sectors where the disk has none, or one.
fn at_sector(b: &mut Bench, sector: fn(u64, u64) -> u64) -> Then {
    let half = |at| u64::from(b.window().read32(offset::CONFIG + at));
    let capacity = half(4) << 32 | half(0);
    let random = b.random.draw();
    let read = random >> 32 & 1 == 0;
    let kind = if read { request::IN } else { request::OUT };
    let memory = header(b, kind, sector(capacity, random));
    let chain = chain(memory, 1024, read);
    b.post(chain.all())
}

fn length_odd(b: &mut Bench) -> Then {
    let memory = header(b, request::IN, 0);
    let len = [1, 511, 513, 1023][b.random.below(4) as usize];
    let chain = chain(memory, len, true);
    b.post(chain.all())
}

fn type_unknown(b: &mut Bench) -> Then {
    let kind = [2, 3, 5, 9, 0x8000_0000, u32::MAX][b.random.below(6) as usize];
    let memory = header(b, kind, 0);
    let chain = chain(memory, 512, b.random.below(2) == 0);
    b.post(chain.all())
}

fn no_status(b: &mut Bench) -> Then {
    let memory = header(b, request::IN, 0);
    let chain = chain(memory, 512, true);
    let len = 1 + b.random.below(2) as usize;
    b.post(&chain.all()[..len])
}

fn header_short(b: &mut Bench) -> Then {
    let memory = header(b, request::IN, 0);
    let mut chain = chain(memory, 512, true);
    chain.buffers[0].len = 1 + b.random.below(15) as u32;
    b.post(chain.all())
}

/// In order: a device must not expect how a request is cut (2.7.4.3).
fn header_in_bytes(b: &mut Bench) -> Then {
    let memory = header(b, request::IN, 0);
    let chain = chain(memory, 512, true);
    let table = b.ring().descriptors;
    for n in 0..HEADER as u16 {
        let byte = Buffer::readable(memory.part(n.into(), 1));
        Layout::describe(table, n, byte, NEXT, n + 1);
    }
    Layout::describe(table, 16, chain.buffers[1], NEXT, 17);
    Layout::describe(table, 17, chain.buffers[2], 0, 0);
    b.offer(0);
    b.show();
    b.pause();
    Then::Judge
}

/// Ranges that the disk doesn't have, are cut off, or have flags that nobody knows.
fn ranges(b: &mut Bench, kind: u32) -> Then {
    let memory = header(b, kind, 0);
    let mut len = 16;
    let (mut sector, mut count, mut flags) = (1 << 50, 8, 0);
    match b.random.below(5) {
        0 => {}
        1 => (sector, count) = (u64::MAX - 3, 8),
        2 => (sector, count) = (1, u32::MAX),
        3 => flags = 0xffff_fffe,
        _ => len = 16 * 60 + 5,
    }
    for range in (0..960).step_by(16) {
        memory.set64(DATA + range, sector);
        memory.set32(DATA + range + 8, count);
        memory.set32(DATA + range + 12, flags);
    }
    let chain = chain(memory, len, false);
    b.post(chain.all())
}
