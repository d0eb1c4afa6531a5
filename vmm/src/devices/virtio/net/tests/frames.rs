//! Frames both ways, long ones, and rings that lie.

use super::*;
use crate::devices::Device;
use crate::devices::virtio::driver::{EVENT_IDX, INDIRECT, NEXT, RAM, WRITE};

#[test]
fn frames_go_both_ways_and_are_what_was_sent() {
    own_network!("frames_go_both_ways_and_are_what_was_sent", ONE_TAP);
    let driver = boot("t0", 1);
    let host = host_socket();
    for features in [0, EVENT_IDX, MERGE, MERGE | EVENT_IDX] {
        let (mut receiver, mut sender, _) = card(&driver, features);
        for number in 0..300usize {
            let payload: Vec<u8> = (0..number * 4).map(|at| (at + number) as u8).collect();
            host.send(&payload).expect("send");
            let frame = receiver.frame();
            assert_eq!((frame.payload(), frame.buffers), (&payload[..], 1));
            assert_eq!(frame.header[..10], [0; 10], "nothing was agreed on");
            // A header on its own, or broken in the middle, or all in one.
            let piece = [HEADER, 7, 100, 2000][number % 4];
            sender.send_in([0; HEADER], &datagram(&payload), piece);
            assert_eq!(received(&host).expect("a datagram"), payload);
        }
    }
}

#[test]
fn what_came_for_nobody_is_not_for_the_next_driver() {
    own_network!("what_came_for_nobody_is_not_for_the_next_driver", ONE_TAP);
    let driver = boot("t0", 1);
    let host = host_socket();
    for _ in 0..2 {
        host.send(b"early").expect("send");
        let (mut receiver, ..) = card(&driver, MERGE);
        host.send(b"in time").expect("send");
        assert_eq!(receiver.frame().payload(), b"in time");
    }
}

#[test]
fn the_driver_is_told_of_the_interface() {
    own_network!(
        "the_driver_is_told_of_the_interface",
        &format!("{ONE_TAP}\nip link set t0 mtu 1400")
    );
    let driver = boot("t0", 1);
    let config = driver.config(0, 12);
    assert_eq!(config[..6], MAC);
    assert_eq!(config[6..8], [1, 0], "the link is up");
    assert_eq!(config[8..10], [1, 0], "pairs");
    assert_eq!(config[10..12], 1400u16.to_le_bytes(), "MTU");
    // MAC, MTU, STATUS, MRG_RXBUF, CTRL_VQ, CTRL_MAC_ADDR, CTRL_GUEST_OFFLOADS, CSUM, HOST_TSO4.
    for feature in [5, 3, 16, 15, 17, 23, 2, 0, 11] {
        assert_ne!(driver.offered() & 1 << feature, 0, "{feature}");
    }
    assert_eq!(driver.offered() & 1 << 22, 0, "MQ with one queue");
    driver.device.write(0x100, &[9; 6]);
    assert_eq!(driver.config(0, 12), config);
}

#[test]
fn a_long_frame_comes_in_as_many_buffers_as_it_needs() {
    own_network!(
        "a_long_frame_comes_in_as_many_buffers_as_it_needs",
        &format!("{ONE_TAP}\nip link set t0 mtu 65521")
    );
    let driver = boot("t0", 1);
    let host = host_socket();
    let payload: Vec<u8> = (0..60_000u32).map(|at| (at / 7) as u8).collect();
    for features in [MERGE, MERGE | EVENT_IDX, 0] {
        let (mut receiver, mut sender, _) = card(&driver, features);
        for _ in 0..50 {
            host.send(&payload).expect("send");
            let frame = receiver.frame();
            assert!(frame.payload() == payload);
            let expected = if features & MERGE != 0 { 40 } else { 1 };
            assert_eq!(frame.buffers, expected);
        }
        sender.send(&datagram(&payload));
        assert!(received(&host).expect("a datagram") == payload);
    }
}

#[test]
fn a_driver_that_polls_never_sees_a_part_of_a_frame() {
    own_network!(
        "a_driver_that_polls_never_sees_a_part_of_a_frame",
        &format!("{ONE_TAP}\nip link set t0 mtu 65521")
    );
    let driver = boot("t0", 1);
    let host = host_socket();
    let (mut receiver, ..) = card(&driver, MERGE | EVENT_IDX);
    for _ in 0..300 {
        host.send(&[5; 60_000]).expect("send");
        let deadline = Instant::now() + PATIENCE;
        // Without a pause: the first buffer is seen as soon as the device shows it.
        let first = loop {
            if let Some(used) = receiver.ring.take() {
                break used;
            }
            assert!(Instant::now() < deadline, "no frame");
        };
        assert_eq!(receiver.read(first).buffers, 40);
    }
}

#[test]
fn many_frames_by_one_kick() {
    own_network!("many_frames_by_one_kick", ONE_TAP);
    // More than one turn's, fewer than a socket's buffer holds.
    const MANY: u8 = 200;
    let driver = boot("t0", 1);
    let host = host_socket();
    for features in [0, EVENT_IDX] {
        let (_receiver, mut sender, _) = card(&driver, features);
        for number in 0..MANY {
            let frame = [vec![0; HEADER], datagram(&[number])].concat();
            let at = sender.base + u64::from(number) * 0x1000;
            let write = sender.memory.write_slice(&frame, GuestAddress(at));
            write.expect("in RAM");
            sender.ring.add(&[buffer(at, frame.len() as u32)], &[]);
        }
        sender.ring.kick();
        for number in 0..MANY {
            sender.ring.wait();
            assert_eq!(received(&host).expect("a datagram"), [number]);
        }
    }
}

#[test]
fn a_frame_too_long_for_its_one_buffer_is_dropped() {
    own_network!(
        "a_frame_too_long_for_its_one_buffer_is_dropped",
        &format!("{ONE_TAP}\nip link set t0 mtu 9000")
    );
    let driver = boot("t0", 1);
    let host = host_socket();
    let ring = driver.start(0).remove(0);
    let mut receiver = Receiver::new(&driver.memory, ring, FREE, 4, 1526);
    // Headers: 12, 14, 20, 8. The longest that fits, and one byte more.
    for len in [1526 - 54 + 1, 8000] {
        host.send(&vec![1; len]).expect("send");
        host.send(&vec![2; 1526 - 54]).expect("send");
        let frame = receiver.frame();
        assert!(frame.payload() == vec![2; 1526 - 54]);
    }
}

#[test]
fn a_frame_without_room_waits_and_is_neither_lost_nor_doubled() {
    own_network!(
        "a_frame_without_room_waits_and_is_neither_lost_nor_doubled",
        &format!("{ONE_TAP}\nip link set t0 mtu 65521")
    );
    let mut driver = boot("t0", 1);
    let host = host_socket();
    for swaps in [0, 1, 3] {
        let ring = driver.start(MERGE | EVENT_IDX).remove(0);
        let mut receiver = Receiver::new(&driver.memory, ring, FREE, 10, 1526);
        let long: Vec<u8> = (0..60_000u32).map(|at| (at / 11) as u8).collect();
        host.send(b"first").expect("send");
        host.send(&long).expect("send");
        host.send(b"last").expect("send");
        receiver.refill = false;
        assert_eq!(receiver.frame().payload(), b"first");
        for _ in 0..swaps {
            driver = swap(driver);
        }
        assert!(
            receiver.ring.take().is_none(),
            "there was room for the long one"
        );
        receiver.post(20);
        for _ in 0..swaps {
            driver = swap(driver);
        }
        assert!(
            receiver.ring.take().is_none(),
            "there was room for the long one"
        );
        receiver.post(40);
        assert!(receiver.frame().payload() == long);
        assert_eq!(receiver.frame().payload(), b"last");
    }
}

#[test]
fn a_tap_that_is_down_fails_nothing() {
    own_network!("a_tap_that_is_down_fails_nothing", ONE_TAP);
    let driver = boot("t0", 1);
    let (mut receiver, mut sender, _) = card(&driver, MERGE);
    ip("link set t0 down");
    for _ in 0..10 {
        sender.send(&datagram(b"into the void"));
    }
    ip("link set t0 up");
    ip("neigh replace 10.77.0.2 lladdr 02:00:00:00:00:02 dev t0 nud permanent");
    // Frames that no wire takes: too short, too long, a header that can't be.
    sender.send(&[]);
    sender.send(&[1; 5]);
    sender.send(&vec![1; 100_000]);
    sender.send_in([0xff; HEADER], &datagram(b"nonsense"), 7);
    assert!(!driver.has_failed());
    let host = host_socket();
    sender.send(&datagram(b"there"));
    assert_eq!(received(&host).expect("a datagram"), b"there");
    host.send(b"and back").expect("send");
    assert_eq!(receiver.frame().payload(), b"and back");
}

#[test]
fn a_tap_that_is_gone_fails_nothing() {
    own_network!("a_tap_that_is_gone_fails_nothing", ONE_TAP);
    let mut driver = boot("t0", 1);
    let (mut receiver, mut sender, _) = card(&driver, MERGE);
    ip("link del t0");
    for _ in 0..3 {
        sender.send(&datagram(b"into the void"));
        assert!(receiver.try_frame(Duration::ZERO).is_none());
        driver = swap(driver);
    }
    assert!(!driver.has_failed());
    // A driver that begins anew finds offloads that can't be set: it is told, and that is all.
    driver.start(MERGE);
    assert!(driver.has_failed());
    swap(driver);
}

#[test]
fn rings_that_lie_fail_the_device_until_a_reset() {
    own_network!("rings_that_lie_fail_the_device_until_a_reset", ONE_TAP);
    let driver = boot("t0", 1);
    let host = host_socket();
    // (queue, descriptors from 0 on).
    type Lie = (usize, Vec<(u64, u32, u16, u16)>);
    let lies: [Lie; 9] = [
        (0, vec![(RAM - 100, 4096, WRITE, 0)]),
        (0, vec![(FREE, 11, WRITE, 0)]),
        (0, vec![(FREE, 1526, 0, 0)]),
        (0, vec![(FREE, 1526, WRITE | NEXT, 0)]),
        (0, vec![(FREE, 0, WRITE, 0)]),
        (1, vec![(u64::MAX - 10, 100, 0, 0)]),
        (1, vec![(FREE, 100, NEXT, 9999)]),
        (1, vec![(FREE, 17, INDIRECT, 0)]),
        (2, vec![(FREE, 2, 0, 0)]),
    ];
    for (number, (queue, descriptors)) in lies.into_iter().enumerate() {
        let mut rings = driver.start(MERGE | COMMANDS);
        let ring = &mut rings[queue];
        for (index, (address, len, flags, next)) in (0..).zip(descriptors) {
            ring.describe(index, buffer(address, len), flags, next);
        }
        ring.make_available(0);
        ring.kick_anyway();
        host.send(b"to be received").expect("send");
        let deadline = Instant::now() + PATIENCE;
        while !driver.has_failed() {
            assert!(Instant::now() < deadline, "lie {number} was believed");
            std::thread::yield_now();
        }
        let (mut receiver, mut sender, _) = card(&driver, MERGE);
        sender.send(&datagram(b"well again"));
        assert_eq!(received(&host).expect("a datagram"), b"well again");
        host.send(b"and back").expect("send");
        assert_eq!(receiver.frame().payload(), b"and back");
    }
}
