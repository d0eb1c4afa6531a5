//! Descriptors that point where they must not, or to each other.

use stillpoint_guest_virtio::registers::feature;
use stillpoint_guest_virtio::ring::{Buffer, DESCRIPTOR, Layout, NEXT};

use super::bench::{Bench, Chain, SIZE};
use super::{Attack, Then};
use crate::pages::{self, field};
use crate::paging;

pub(super) const ATTACKS: &[Attack] = &[
    |b| spoil(b, |buffer, random| buffer.address = 1 << 45 | random & !7),
    at_end_of_ram,
    in_hole,
    |b| {
        spoil(b, |buffer, _| {
            (buffer.address, buffer.len) = (u64::MAX - 15, 64)
        })
    },
    |b| spoil(b, |buffer, _| buffer.len = 0),
    length_huge,
    lengths_wrap,
    |b| chained(b, |_| 0),
    |b| chained(b, |n| (n + 1) % SIZE),
    longer_than_queue,
    |b| chained(b, |n| if n == 0 { SIZE } else { 0xffff }),
    |b| turn_round(b, |writes| !writes),
    writable_first,
    flags_unknown,
    |b| turn_round(b, |_| false),
    |b| turn_round(b, |_| true),
];

/// Changes one buffer of a proper request.
fn spoil(b: &mut Bench, change: impl Fn(&mut Buffer, u64)) -> Then {
    let mut chain = b.request();
    let which = b.random.below(chain.len as u64) as usize;
    change(&mut chain.buffers[which], b.random.draw());
    b.post(chain.all())
}

/// The last bytes of RAM and the first that are none.
fn at_end_of_ram(b: &mut Bench) -> Then {
    let globals = pages::globals();
    let load =
        |word: &core::sync::atomic::AtomicU64| word.load(core::sync::atomic::Ordering::Relaxed);
    let end = load(field!(globals.pattern_base)) + load(field!(globals.pattern_len));
    if end > paging::top() - 4096 {
        return Then::Skipped;
    }
    let inside = b.random.below(64);
    spoil(b, |buffer, _| {
        (buffer.address, buffer.len) = (paging::top() - inside, 4096);
    })
}

/// Device registers: our own victim's, the local APIC's.
fn in_hole(b: &mut Bench) -> Then {
    spoil(b, |buffer, random| {
        buffer.address = match random % 3 {
            0 => 0xd000_0000,
            1 => 0xd000_1000,
            _ => 0xfee0_0000,
        };
    })
}

/// From the pit to beyond all RAM.
fn length_huge(b: &mut Bench) -> Then {
    let pit = b.pit().address();
    spoil(b, |buffer, _| {
        (buffer.address, buffer.len) = (pit, u32::MAX)
    })
}

/// Lengths whose sum is a small number if 32 bits are all that it is kept in.
fn lengths_wrap(b: &mut Bench) -> Then {
    let chain = b.request();
    let last = chain.buffers[chain.len - 1];
    let huge = |len| Buffer {
        address: b.pit().address(),
        len,
        ..last
    };
    // The first reaches into the hole below 4 GiB, whatever RAM there is.
    let huge = [huge(0xd000_0000), huge(0x3000_0000)];
    b.post(&[chain.buffers[0], huge[0], huge[1], last])
}

/// A request of one-byte buffers without end, each followed by the one that `next` says.
fn chained(b: &mut Bench, next: fn(u16) -> u16) -> Then {
    let buffer = Buffer {
        len: 1,
        ..b.request().buffers[0]
    };
    for n in 0..SIZE {
        Layout::describe(b.ring().descriptors, n, buffer, NEXT, next(n));
    }
    b.offer(0);
    b.show();
    b.pause();
    Then::Judge
}

/// A chain may be as long as its queue at most (2.7.5.3.1); this one ends, but later.
fn longer_than_queue(b: &mut Bench) -> Then {
    b.start(feature::INDIRECT);
    let buffer = Buffer {
        len: 1,
        ..b.request().buffers[0]
    };
    let long = 3 * SIZE;
    for n in 0..long {
        let flags = if n + 1 == long { 0 } else { NEXT };
        Layout::describe(b.table(), n, buffer, flags, n + 1);
    }
    b.point(b.table().address(), u32::from(long) * DESCRIPTOR as u32, 0);
    b.offer(0);
    b.show();
    b.pause();
    Then::Judge
}

/// A proper request, but for who writes what. What the device should have written lies where it
/// must not any more.
fn turn_round(b: &mut Bench, writes: fn(bool) -> bool) -> Then {
    let mut chain = b.request();
    let red = b.red().address();
    for buffer in chain.all_mut() {
        if buffer.device_writes && !writes(true) {
            buffer.address = red;
        }
        buffer.device_writes = writes(buffer.device_writes);
    }
    b.post(chain.all())
}

fn writable_first(b: &mut Bench) -> Then {
    let mut chain = b.request();
    chain.all_mut().reverse();
    // Of requests that go one way alone there is none of the other kind.
    let other = Buffer {
        device_writes: !chain.buffers[0].device_writes,
        ..Buffer::writable(b.pit().part(0, 64))
    };
    let (writable, readable) = match other.device_writes {
        true => (other, chain.buffers[0]),
        false => (chain.buffers[0], other),
    };
    b.post(Chain::of(&[writable, readable]).all())
}

fn flags_unknown(b: &mut Bench) -> Then {
    let chain = b.request();
    for (n, buffer) in (0..).zip(chain.all()) {
        let last = usize::from(n) + 1 == chain.len;
        let flags = if last { 0 } else { NEXT };
        Layout::describe(b.ring().descriptors, n, *buffer, flags | 0xfff8, n + 1);
    }
    b.offer(0);
    b.show();
    b.pause();
    Then::Judge
}
