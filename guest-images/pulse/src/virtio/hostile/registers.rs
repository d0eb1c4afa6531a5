//! Registers out of turn, out of range, and of the wrong width.

use stillpoint_guest_virtio::registers::{feature, offset, status};

use super::bench::{Bench, SIZE};
use super::{Attack, Then};

pub(super) const ATTACKS: &[Attack] = &[
    unknown_queue,
    kick_too_early,
    driver_ok_alone,
    status_out_of_order,
    status_garbled,
    features_not_offered,
    without_version_1,
    features_too_late,
    access_sizes,
    config_writes,
    garbled,
];

fn unknown_queue(b: &mut Bench) -> Then {
    let window = b.window();
    for queue in [63, 64, 0x100, 0xffff, 0x1_0000, u32::MAX] {
        window.write32(offset::QUEUE_SEL, queue);
        window.read32(offset::QUEUE_NUM_MAX);
        window.read32(offset::QUEUE_READY);
        b.queue_at(queue, SIZE.into(), [1 << 45, 1 << 46, 1 << 47]);
        window.write32(offset::QUEUE_NOTIFY, queue);
    }
    b.wait();
    Then::Judge
}

/// Nothing may be taken from a queue before DRIVER_OK (3.1.1).
fn kick_too_early(b: &mut Bench) -> Then {
    b.agree(u64::MAX);
    b.ring().clear();
    b.queue(b.target(), SIZE.into(), b.ring());
    b.describe(b.request().all());
    b.offer(0);
    b.show();
    b.wait();
    if b.ring().used_index() != 0 {
        // As bad as any write to memory that the device has no right to.
        b.red().set8(0, 0);
    }
    b.drive();
    Then::Judge
}

fn begin(b: &Bench) -> super::super::window::Window {
    let window = b.window();
    window.write32(offset::STATUS, 0);
    window.write32(offset::STATUS, status::ACKNOWLEDGE | status::DRIVER);
    window
}

/// DRIVER_OK of a device with which nothing is agreed, and whose queue is ready all the same.
fn go(b: &mut Bench) -> Then {
    let window = b.window();
    b.queue(b.target(), SIZE.into(), b.ring());
    let state = window.read32(offset::STATUS);
    window.write32(offset::STATUS, state | status::DRIVER_OK);
    b.describe(b.request().all());
    b.offer(0);
    b.show();
    b.wait();
    Then::MayBeSilent
}

fn driver_ok_alone(b: &mut Bench) -> Then {
    begin(b);
    go(b)
}

fn status_out_of_order(b: &mut Bench) -> Then {
    let window = b.window();
    window.write32(offset::STATUS, 0);
    let mut bits = [
        status::DRIVER_OK,
        status::FEATURES_OK,
        status::DRIVER,
        status::ACKNOWLEDGE,
    ];
    bits.rotate_left(b.random.below(4) as usize);
    for bit in bits {
        window.write32(offset::STATUS, bit);
        window.read32(offset::STATUS);
    }
    go(b)
}

fn status_garbled(b: &mut Bench) -> Then {
    let window = b.window();
    for value in [
        u32::MAX,
        0x100,
        status::NEEDS_RESET,
        status::FAILED,
        1 << 31,
    ] {
        window.write32(offset::STATUS, value);
        window.read32(offset::STATUS);
        window.write32(offset::INTERRUPT_ACK, value);
    }
    b.kick();
    b.wait();
    Then::MayBeSilent
}

fn features_not_offered(b: &mut Bench) -> Then {
    let window = begin(b);
    for half in [0, 1, 2, u32::MAX] {
        window.write32(offset::DEVICE_FEATURES_SEL, half);
        window.read32(offset::DEVICE_FEATURES);
        window.write32(offset::DRIVER_FEATURES_SEL, half);
        window.write32(offset::DRIVER_FEATURES, u32::MAX);
    }
    let state = window.read32(offset::STATUS);
    window.write32(offset::STATUS, state | status::FEATURES_OK);
    go(b)
}

fn without_version_1(b: &mut Bench) -> Then {
    let window = begin(b);
    window.write32(offset::DRIVER_FEATURES_SEL, 0);
    window.write32(offset::DRIVER_FEATURES, feature::INDIRECT as u32);
    let state = window.read32(offset::STATUS);
    window.write32(offset::STATUS, state | status::FEATURES_OK);
    go(b)
}

fn features_too_late(b: &mut Bench) -> Then {
    let window = b.window();
    for half in 0..2 {
        window.write32(offset::DRIVER_FEATURES_SEL, half);
        window.write32(offset::DRIVER_FEATURES, u32::MAX);
    }
    let chain = b.request();
    b.post(chain.all())
}

/// All but 32 bits at a multiple of 4; and what lies behind the registers.
fn access_sizes(b: &mut Bench) -> Then {
    let window = b.window();
    for _ in 0..200 {
        let (random, value) = (b.random.draw(), b.random.draw());
        let at = random >> 8 & 0xff8;
        match random % 8 {
            0 => drop(window.read8(at | random >> 4 & 7)),
            1 => drop(window.read16(at | random >> 4 & 6)),
            2 => drop(window.read64(at)),
            3 => window.write8(at | random >> 4 & 7, value as u8),
            4 => window.write16(at | random >> 4 & 6, value as u16),
            5 => window.write64(at, value | 1 << 45),
            // Of the right width, where nothing is.
            6 => window.write32(0x200 + (at & 0x7f8), value as u32),
            _ => drop(window.read32(at)),
        }
    }
    Then::MayBeSilent
}

fn config_writes(b: &mut Bench) -> Then {
    let window = b.window();
    for _ in 0..200 {
        let (random, value) = (b.random.draw(), b.random.draw());
        let at = offset::CONFIG + (random >> 8 & 0xf8);
        match random % 4 {
            0 => window.write8(at | random >> 4 & 7, value as u8),
            1 => window.write16(at | random >> 4 & 6, value as u16),
            2 => window.write32(at | random >> 4 & 4, value as u32),
            _ => window.write64(at, value),
        }
    }
    Then::Judge
}

/// Registers at random, but for the lower halves of addresses: then all of them are 0 there, or
/// where no machine has RAM.
fn garbled(b: &mut Bench) -> Then {
    let window = b.window();
    for _ in 0..300 {
        let (random, value) = (b.random.draw(), b.random.draw() as u32);
        let at = random >> 8 & 0xfc;
        match at {
            offset::QUEUE_DESC | offset::QUEUE_DRIVER | offset::QUEUE_DEVICE => {}
            0x84 | 0x94 | 0xa4 => window.write32(at, value | 0x2000),
            // Small numbers mean something now and then.
            _ if random % 2 == 0 => window.write32(at, value & 0xf),
            _ => window.write32(at, value),
        }
    }
    Then::MayBeSilent
}
