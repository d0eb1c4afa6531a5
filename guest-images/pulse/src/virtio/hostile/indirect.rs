//! Indirect tables (2.7.5.3) that are none.

use stillpoint_guest_virtio::registers::feature;
use stillpoint_guest_virtio::ring::{Buffer, DESCRIPTOR, INDIRECT, Layout, NEXT};

use super::bench::Bench;
use super::{Attack, Then};
use crate::paging;

pub(super) const ATTACKS: &[Attack] = &[
    not_agreed,
    |b| entries(b, |n| (NEXT, if n == 0 { 1 } else { 0 })),
    nested,
    |b| tabled(b, |len| len + 7),
    |b| tabled(b, |_| 0),
    outside,
    |b| tabled(b, |_| 0xffff_fff0),
    with_next,
    |b| entries(b, |n| (NEXT, if n == 0 { 1 } else { 2 + n * 1000 })),
];

fn go(b: &mut Bench) -> Then {
    b.offer(0);
    b.show();
    b.pause();
    Then::Judge
}

/// A device may well do what was not agreed on; it must live.
fn not_agreed(b: &mut Bench) -> Then {
    b.start(!feature::INDIRECT);
    let len = b.tabulate();
    b.point(b.table().address(), len, 0);
    go(b)
}

/// Two entries with these flags and successors.
fn entries(b: &mut Bench, of: fn(u16) -> (u16, u16)) -> Then {
    b.start(feature::INDIRECT);
    let buffer = Buffer {
        len: 1,
        ..b.request().buffers[0]
    };
    for n in 0..2 {
        let (flags, next) = of(n);
        Layout::describe(b.table(), n, buffer, flags, next);
    }
    b.point(b.table().address(), 2 * DESCRIPTOR as u32, 0);
    go(b)
}

/// A table in a table, and that in itself.
fn nested(b: &mut Bench) -> Then {
    b.start(feature::INDIRECT);
    let whole = Buffer::readable(b.table().part(0, DESCRIPTOR));
    Layout::describe(b.table(), 0, whole, INDIRECT, 0);
    b.point(b.table().address(), DESCRIPTOR as u32, 0);
    go(b)
}

/// A proper table whose length is a lie.
fn tabled(b: &mut Bench, len: fn(u32) -> u32) -> Then {
    b.start(feature::INDIRECT);
    let right = b.tabulate();
    b.point(b.table().address(), len(right), 0);
    go(b)
}

fn outside(b: &mut Bench) -> Then {
    b.start(feature::INDIRECT);
    let address = match b.random.below(4) {
        0 => 1 << 45,
        1 => 0xd000_1000,
        2 => paging::top() - 8,
        _ => u64::MAX - 15,
    };
    b.point(address, 2 * DESCRIPTOR as u32, 0);
    go(b)
}

fn with_next(b: &mut Bench) -> Then {
    b.start(feature::INDIRECT);
    let len = b.tabulate();
    b.describe(b.request().all());
    b.point(b.table().address(), len, NEXT);
    go(b)
}
