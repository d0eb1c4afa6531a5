//! Rings that say what is not so, and memory that changes while the device looks.

use stillpoint_guest_virtio::registers::offset;
use stillpoint_guest_virtio::ring::{Buffer, Layout, WRITE};

use super::super::device::{Clock, reset};
use super::bench::{Bench, SIZE};
use super::{Attack, Then};
use crate::tsc;

pub(super) const ATTACKS: &[Attack] = &[
    head_outside,
    avail_jumps,
    avail_goes_back,
    head_twice,
    descriptors_change,
    header_changes,
    avail_changes,
    garbled,
    kick_storm,
    reset_in_flight,
    queue_changed_in_flight,
];

/// How long memory changes under the device.
const CHANGES_US: u64 = 300;

fn head_outside(b: &mut Bench) -> Then {
    let head = match b.random.below(3) {
        0 => SIZE,
        1 => 0x8000,
        _ => 0xffff,
    };
    b.describe(b.request().all());
    b.offer(head);
    b.show();
    b.pause();
    Then::Judge
}

fn avail_jumps(b: &mut Bench) -> Then {
    b.describe(b.request().all());
    let by = match b.random.below(3) {
        0 => SIZE + 1,
        1 => 0x7fff,
        _ => 0x8001,
    };
    b.skip(by);
    b.show();
    b.pause();
    Then::Judge
}

/// After two requests that were done. A device that looks only when the next one has made up for
/// it sees nothing wrong, and nothing to do.
fn avail_goes_back(b: &mut Bench) -> Then {
    for _ in 0..2 {
        let chain = b.request();
        b.post(chain.all());
    }
    b.skip(0xffff);
    b.show();
    b.pause();
    Then::MayBeSilent
}

fn head_twice(b: &mut Bench) -> Then {
    b.describe(b.request().all());
    for _ in 0..SIZE {
        b.offer(0);
    }
    b.show();
    b.pause();
    Then::Judge
}

/// Runs `change` with 0, 1, 2, ... while the device, in a thread of its own, looks.
fn meanwhile(b: &mut Bench, change: impl Fn(&Bench, u64)) {
    b.show();
    let mut clock = Clock::new();
    let mut n = 0;
    while clock.tick() < tsc::cycles(CHANGES_US) {
        for _ in 0..64 {
            change(b, n);
            n += 1;
        }
        b.kick();
    }
    // As it was first.
    change(b, 0);
}

fn descriptors_change(b: &mut Bench) -> Then {
    let chain = b.request();
    b.describe(chain.all());
    for _ in 0..8 {
        b.offer(0);
    }
    meanwhile(b, |b, n| {
        let (table, right) = (b.ring().descriptors, chain.buffers[0]);
        match n % 8 {
            1 => table.set64(0, 1 << 45),
            2 => table.set32(8, u32::MAX),
            3 => table.set16(12, 7),
            4 => table.set16(14, 0),
            5 => table.set64(0, 0xd000_1000),
            _ => {
                table.set64(0, right.address);
                table.set32(8, right.len);
                b.describe(chain.all());
            }
        }
    });
    Then::Judge
}

/// The words that the device reads first, whatever they mean to it.
fn header_changes(b: &mut Bench) -> Then {
    let chain = b.request();
    b.describe(chain.all());
    for _ in 0..8 {
        b.offer(0);
    }
    let memory = b.memory();
    let right: [u64; 6] = core::array::from_fn(|n| memory.get64(8 * n));
    meanwhile(b, |_, n| {
        for (word, right) in right.iter().enumerate() {
            let wrong = if n % 2 == 0 { 0 } else { u64::MAX << (n % 61) };
            memory.set64(8 * word, right ^ wrong);
        }
    });
    Then::Judge
}

fn avail_changes(b: &mut Bench) -> Then {
    b.describe(b.request().all());
    for _ in 0..8 {
        b.offer(0);
    }
    meanwhile(b, |b, n| {
        let ring = b.ring();
        for entry in 0..8 {
            let head = if n % 2 == 0 {
                0
            } else {
                (n as u16) << 4 | entry
            };
            ring.set_avail(entry, head);
        }
    });
    Then::Judge
}

/// Everything at random. Addresses lie in the pit, or so high that no machine has RAM there. What
/// may be written lies apart from what is read: a status byte must not become a disk's order to
/// write.
fn garbled(b: &mut Bench) -> Then {
    let ring = b.ring();
    for n in 0..SIZE {
        let (random, flags) = (b.random.draw(), b.random.draw() as u16);
        // Mostly a table's, so that chains have some length.
        let flags = if random >> 37 & 7 == 0 {
            flags
        } else {
            flags & 7
        };
        let next = (random >> 44) as u16;
        let next = if random >> 34 & 7 == 0 {
            next
        } else {
            next % SIZE
        };
        let half = if flags & WRITE == 0 { 0 } else { 0x8000 };
        let address = match random % 4 {
            0 => 1 << 50 | random,
            1 => 0xd000_0000 + (random >> 8 & 0xffff),
            _ => b.pit().address() + half + (random >> 8 & 0x7dff),
        };
        let len = match random >> 32 & 3 {
            // Across the hole below 4 GiB, whatever RAM there is.
            0 => 0xf000_0000 | (random >> 40) as u32,
            _ => (random >> 40) as u32 & 0x1ff,
        };
        let buffer = Buffer {
            address,
            len,
            device_writes: false,
        };
        Layout::describe(ring.descriptors, n, buffer, flags, next);
        let head = b.random.draw() as u16;
        b.offer(if random >> 41 & 15 == 0 {
            head
        } else {
            head % SIZE
        });
    }
    b.show();
    b.pause();
    Then::Judge
}

fn kick_storm(b: &mut Bench) -> Then {
    for _ in 0..500 {
        b.kick();
    }
    Then::Judge
}

/// A device lets go of memory with the end of its reset (2.4.1). Reads of a disk are long ones, or
/// they would all be done by then.
fn reset_in_flight(b: &mut Bench) -> Then {
    let mut chain = b.request();
    let (pit, mut at) = (b.pit(), 0);
    for buffer in chain.all_mut().iter_mut().filter(|b| b.device_writes) {
        if buffer.len == 512 {
            buffer.len = 0x1_0000;
        }
        buffer.address = pit.address() + at;
        at += u64::from(buffer.len);
    }
    b.describe(chain.all());
    for _ in 0..SIZE {
        b.offer(0);
    }
    b.show();
    let mut clock = Clock::new();
    // From none to 2 ms, short ones as often as long ones.
    let longest = 1 << b.random.below(12);
    let moment = b.random.below(tsc::cycles(longest));
    while clock.tick() < moment {}
    if !reset(b.window()) {
        return Then::Reset;
    }
    // Whatever was done before is in order; from here on nothing may change.
    let used = b.ring().used;
    pit.fill(0x77);
    used.fill(0x77);
    b.wait();
    if !pit.is_all(0x77) || !used.is_all(0x77) {
        b.red().set8(0, 0);
    }
    Then::Reset
}

/// Registers of a queue that is in use: what a device makes of it is its own affair.
fn queue_changed_in_flight(b: &mut Bench) -> Then {
    b.describe(b.request().all());
    for _ in 0..8 {
        b.offer(0);
    }
    b.show();
    let window = b.window();
    let target = b.target();
    b.queue_at(target, 7, [1 << 45, 1 << 46, 1 << 47]);
    window.write32(offset::QUEUE_SEL, target);
    window.write32(offset::QUEUE_READY, 0);
    b.kick();
    b.queue(target, SIZE.into(), b.ring());
    b.kick();
    b.wait();
    Then::MayBeSilent
}
