//! Packets that lie (5.10.6).

use stillpoint_guest_virtio::registers::offset;
use stillpoint_guest_virtio::ring::{Buffer, Layout};
use stillpoint_guest_virtio::vsock::{HEADER, HOST, Header, operation};

use super::super::device::Clock;
use super::bench::{Bench, SIZE};
use super::{Attack, Then};
use crate::tsc;

/// A device that works has said all that it has to say by then.
const ANSWERS_US: u64 = 2_000_000;

pub(super) const ATTACKS: &[Attack] = &[
    length_lies,
    |b| lie(b, |h, n| h.op = [0, 8, 0x100, 0xffff][(n % 4) as usize]),
    cid_wrong,
    credit_lies,
    |b| lie(b, |h, n| h.kind = [0, 2, 3, 0xffff][(n % 4) as usize]),
    header_short,
    without_connection,
    flood,
    receive_tiny,
];

/// A packet without payload, after a change.
fn lie(b: &mut Bench, change: impl Fn(&mut Header, u64)) -> Then {
    let op = 1 + b.random.below(7) as u16;
    let mut header = b.packet(op);
    let random = b.random.draw();
    change(&mut header, random);
    let memory = b.memory();
    memory.fill(0);
    header.write(memory);
    b.post(&[Buffer::readable(memory.part(0, HEADER))])
}

/// More payload than there is, and less.
fn length_lies(b: &mut Bench) -> Then {
    let random = b.random.draw();
    let mut header = b.packet(operation::RW);
    header.len = [1, 100, 0x1_0000, u32::MAX, u32::MAX - 43][(random % 5) as usize];
    let there = [0, 50, 3000][(random >> 8) as usize % 3];
    let memory = b.memory();
    memory.fill(0);
    header.write(memory);
    b.post(&[Buffer::readable(memory.part(0, HEADER + there))])
}

/// From another guest, from the host, to another guest, to ourselves.
fn cid_wrong(b: &mut Bench) -> Then {
    lie(b, |header, random| match random % 5 {
        0 => header.from_cid = HOST,
        1 => header.from_cid += 1,
        2 => header.to_cid = 1,
        3 => header.to_cid = header.from_cid,
        _ => header.to_cid = u64::MAX,
    })
}

/// The host may have sent more than there is, or than it ever did.
fn credit_lies(b: &mut Bench) -> Then {
    lie(b, |header, random| {
        header.buffer = [0, 1, u32::MAX][(random % 3) as usize];
        header.used = [1, 0x8000_0000, u32::MAX][(random >> 8) as usize % 3];
    })
}

fn header_short(b: &mut Bench) -> Then {
    let len = 1 + b.random.below(HEADER as u64 - 1) as usize;
    b.packet(operation::REQUEST).write(b.memory());
    b.post(&[Buffer::readable(b.memory().part(0, len))])
}

fn without_connection(b: &mut Bench) -> Then {
    let op = 2 + b.random.below(6) as u16;
    let port = b.random.draw() as u32;
    lie(b, |header, _| {
        (header.op, header.from_port, header.to_port) = (op, port, port ^ 1);
        header.flags = 3;
    })
}

/// Connections without number, whose answers nobody takes. A device that keeps none of them for
/// ever takes no more at some point; it goes on when there is room for its answers.
fn flood(b: &mut Bench) -> Then {
    for round in 0..60u32 {
        for n in 0..u32::from(SIZE / 2) {
            let mut header = b.packet(operation::REQUEST);
            (header.from_port, header.to_port) = (round * 100 + n, 1 + n);
            let memory = b.table().part(n as usize * 64, 64);
            header.write(memory);
            let buffer = Buffer::readable(memory.part(0, HEADER));
            Layout::describe(b.ring().descriptors, n as u16, buffer, 0, 0);
            // More than a ring holds would be another attack.
            if b.has_room() {
                b.offer(n as u16);
            }
        }
        b.show();
        b.pause();
    }
    take_answers(b);
    Then::Judge
}

/// Gives room for all that the device has to say, until it has taken all that we said.
fn take_answers(b: &Bench) {
    let ring = b.layout(0);
    for n in 0..SIZE {
        let buffer = Buffer::writable(b.pit().part(usize::from(n) * 64, 64));
        Layout::describe(ring.descriptors, n, buffer, 0, 0);
        ring.set_avail(n, n);
    }
    let mut clock = Clock::new();
    while !b.is_done() && !b.failed() && clock.tick() < tsc::cycles(ANSWERS_US) {
        ring.set_avail_index(ring.used_index().wrapping_add(SIZE));
        b.window().write32(offset::QUEUE_NOTIFY, 0);
    }
}

/// No room for an answer's header.
fn receive_tiny(b: &mut Bench) -> Then {
    let ring = b.layout(0);
    for n in 0..SIZE {
        let len = 1 + b.random.below(HEADER as u64 - 1) as usize;
        let buffer = Buffer::writable(b.pit().part(usize::from(n) * 64, len));
        Layout::describe(ring.descriptors, n, buffer, 0, 0);
        ring.set_avail(n, n);
    }
    ring.set_avail_index(SIZE);
    b.window().write32(offset::QUEUE_NOTIFY, 0);
    b.packet(operation::REQUEST).write(b.memory());
    b.post(&[Buffer::readable(b.memory().part(0, HEADER))])
}
