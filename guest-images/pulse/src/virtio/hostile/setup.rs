//! Queues that are set up as none can be.

use stillpoint_guest_virtio::registers::offset;

use super::bench::{Bench, SIZE};
use super::{Attack, Then};
use crate::paging;

pub(super) const ATTACKS: &[Attack] = &[
    used_over_descriptors,
    |b| elsewhere(b, |address, n| address ^ 1 << (40 + n)),
    |b| elsewhere(b, |address, _| 0xd000_1000 | address & 0xf0),
    |b| elsewhere(b, |address, n| address + 1 + n % 3),
    |b| elsewhere(b, |_, n| (paging::top() - 16) - 16 * (n % 2)),
    |b| sized(b, |_| 0),
    |b| sized(b, |n| [3, 24, 31][(n % 3) as usize]),
    |b| {
        sized(b, |n| {
            [0x8000, 0x1_0000, 0x1_0020, u32::MAX][(n % 4) as usize]
        })
    },
    without_addresses,
];

/// The device writes over what it has to read. Where that leads it lies below 2 MiB, where by now
/// nothing is, for as long as a descriptor says that it may be written.
fn used_over_descriptors(b: &mut Bench) -> Then {
    b.agree(u64::MAX);
    let ring = b.ring();
    let table = ring.descriptors.address();
    b.queue_at(
        b.target(),
        SIZE.into(),
        [table, ring.avail.address(), table],
    );
    b.drive();
    b.describe(b.request().all());
    for _ in 0..SIZE {
        b.offer(0);
    }
    b.show();
    b.wait();
    Then::MayBeSilent
}

/// Moves one of the three parts of a ring, or all.
fn elsewhere(b: &mut Bench, to: fn(u64, u64) -> u64) -> Then {
    b.agree(u64::MAX);
    let ring = b.ring();
    let mut parts = [ring.descriptors, ring.avail, ring.used].map(|part| part.address());
    let random = b.random.draw();
    match random % 4 {
        3 => parts = parts.map(|part| to(part, random >> 8 & 7)),
        n => parts[n as usize] = to(parts[n as usize], random >> 8 & 7),
    }
    b.queue_at(b.target(), SIZE.into(), parts);
    begin(b)
}

fn sized(b: &mut Bench, size: fn(u64) -> u32) -> Then {
    b.agree(u64::MAX);
    let size = size(b.random.draw() >> 8);
    b.queue(b.target(), size, b.ring());
    begin(b)
}

fn begin(b: &mut Bench) -> Then {
    b.describe(b.request().all());
    b.drive();
    b.offer(0);
    b.show();
    b.wait();
    Then::MayBeSilent
}

/// So that they are 0: whatever lies there, nobody needs it any more.
fn without_addresses(b: &mut Bench) -> Then {
    b.agree(u64::MAX);
    let window = b.window();
    window.write32(offset::QUEUE_SEL, b.target());
    window.write32(offset::QUEUE_READY, 1);
    begin(b)
}
