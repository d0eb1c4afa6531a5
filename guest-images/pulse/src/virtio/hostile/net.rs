//! Frames, headers and commands that are none (5.1.6).

use stillpoint_guest_virtio::net::{CONTROL, HEADER, SET_PAIRS};
use stillpoint_guest_virtio::registers::offset;
use stillpoint_guest_virtio::ring::{Buffer, Layout, NEXT};

use super::bench::{Bench, SIZE};
use super::{Attack, Then};

pub(super) const ATTACKS: &[Attack] = &[
    frame_short,
    frame_huge,
    header_lies,
    receive_tiny,
    |b| {
        command(
            b,
            |random| [random as u8, (random >> 8) as u8],
            |random| random as u16,
        )
    },
    |b| {
        command(
            b,
            |_| SET_PAIRS,
            |n| [0, 2, 0x8000, 0x8001, 0xffff][(n % 5) as usize],
        )
    },
];

/// Less than a header, a header alone, less than an Ethernet header.
fn frame_short(b: &mut Bench) -> Then {
    let len = [1, HEADER - 1, HEADER, HEADER + 5][b.random.below(4) as usize];
    b.memory().fill(0);
    b.post(&[Buffer::readable(b.memory().part(0, len))])
}

/// More than any frame has, in one buffer and in many.
fn frame_huge(b: &mut Bench) -> Then {
    let pit = b.pit();
    match b.random.below(2) {
        0 => b.post(&[Buffer::readable(pit.part(0, 70_000))]),
        _ => b.post(&[Buffer::readable(pit.part(0, 30_000)); 20]),
    }
}

fn header_lies(b: &mut Bench) -> Then {
    let chain = b.request();
    let memory = b.memory();
    let random = b.random.draw();
    // Flags, type of segmentation, header's length, segment's, where the checksum is.
    memory.set8(0, random as u8);
    memory.set8(1, (random >> 8) as u8);
    for (n, at) in [2, 4, 6, 8, 10].into_iter().enumerate() {
        let value = match random >> (16 + 2 * n) & 3 {
            0 => 0,
            1 => 0xffff,
            2 => 40,
            _ => (random >> 40) as u16,
        };
        memory.set16(at, value);
    }
    b.post(chain.all())
}

/// No room for what comes in, for whatever does. To make something come in is a peer's part.
fn receive_tiny(b: &mut Bench) -> Then {
    let ring = b.layout(0);
    for n in 0..SIZE {
        let len = 1 + b.random.below(HEADER as u64 + 20) as usize;
        let buffer = Buffer::writable(b.pit().part(usize::from(n) * 64, len));
        Layout::describe(ring.descriptors, n, buffer, 0, 0);
        ring.set_avail(n, n);
    }
    ring.set_avail_index(SIZE);
    b.window().write32(offset::QUEUE_NOTIFY, 0);
    let chain = b.request();
    b.post(chain.all())
}

/// A command of this class and number, with this argument. Behind pairs that nobody uses, its
/// queue has the number that the configuration implies.
fn command(b: &mut Bench, what: fn(u64) -> [u8; 2], argument: fn(u64) -> u16) -> Then {
    b.agree(CONTROL);
    let window = b.window();
    window.write32(offset::DEVICE_FEATURES_SEL, 0);
    if u64::from(window.read32(offset::DEVICE_FEATURES)) & CONTROL == 0 {
        return Then::Skipped;
    }
    // Two queues for each pair there may be; without many pairs agreed on it is the third.
    let (queue, ring) = (2, b.layout(2));
    ring.clear();
    b.ring().clear();
    b.queue(queue, SIZE.into(), ring);
    b.queue(b.target(), SIZE.into(), b.ring());
    b.drive();
    let random = b.random.draw();
    let memory = b.memory();
    memory.fill(0);
    memory.write(0, &what(random));
    memory.set16(2, argument(random >> 16));
    let parts = [
        Buffer::readable(memory.part(0, 2)),
        Buffer::readable(memory.part(2, 1 + (random >> 40 & 1) as usize)),
        Buffer::writable(memory.part(8, 1)),
    ];
    // With an answer's place mostly, without an argument now and then.
    let parts = match random >> 44 & 7 {
        0 => &parts[..2],
        1 => &parts[..1],
        _ => &parts[..],
    };
    for (n, buffer) in (0..).zip(parts) {
        let last = usize::from(n) + 1 == parts.len();
        let flags = if last { 0 } else { NEXT };
        Layout::describe(ring.descriptors, n, *buffer, flags, n + 1);
    }
    ring.set_avail(0, 0);
    ring.set_avail_index(1);
    window.write32(offset::QUEUE_NOTIFY, queue);
    b.wait();
    Then::Judge
}
