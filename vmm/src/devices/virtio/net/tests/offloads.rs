//! Checksums and segmentation left to the other side.

use super::commands::command;
use super::*;

const GUEST_CSUM: u64 = 1 << 1;
const GUEST_TSO4: u64 = 1 << 7;
const CSUM: u64 = 1;
const HOST_TSO4: u64 = 1 << 11;
const CTRL_OFFLOADS: u64 = 1 << 2;
/// `VIRTIO_NET_HDR_F_NEEDS_CSUM`.
const NEEDS_CSUM: u8 = 1;

#[test]
fn checksums_are_left_open_only_for_a_driver_that_agreed() {
    own_network!(
        "checksums_are_left_open_only_for_a_driver_that_agreed",
        ONE_TAP
    );
    let mut driver = boot("t0", 1);
    let host = host_socket();
    let seen = |receiver: &mut Receiver| {
        host.send(b"payload").expect("send");
        let frame = receiver.frame();
        (frame.header[0], checksum_is_right(&frame))
    };
    let (mut receiver, ..) = card(&driver, MERGE);
    assert_eq!(seen(&mut receiver), (0, true));
    let agreed = MERGE | COMMANDS | CTRL_OFFLOADS | GUEST_CSUM;
    let (mut receiver, _, mut ring) = card(&driver, agreed);
    assert_eq!(seen(&mut receiver), (NEEDS_CSUM, false));
    driver = swap(driver);
    assert_eq!(seen(&mut receiver), (NEEDS_CSUM, false), "after a swap");
    assert!(command(&driver, &mut ring, 5, 0, &[0; 8]));
    assert_eq!(seen(&mut receiver), (0, true), "switched off");
    driver = swap(driver);
    assert_eq!(seen(&mut receiver), (0, true), "and off after a swap");
    assert!(command(&driver, &mut ring, 5, 0, &GUEST_CSUM.to_le_bytes()));
    assert_eq!(seen(&mut receiver), (NEEDS_CSUM, false), "and on again");
    // A driver after this one that wants nothing of it.
    let (mut receiver, ..) = card(&driver, MERGE);
    assert_eq!(seen(&mut receiver), (0, true));
}

/// Two taps with a router between them.
const TWO_TAPS: &str = "
    echo 1 > /proc/sys/net/ipv4/ip_forward
    for n in 0 1; do
        ip tuntap add dev t$n mode tap
        ip link set t$n address 02:00:00:00:00:01
        ip addr add 10.77.$n.1/24 dev t$n
        ip link set t$n up
        ip neigh add 10.77.$n.2 lladdr 02:00:00:00:00:02 dev t$n nud permanent
    done";

/// Payload of the long packet, and of each of its segments.
const LONG: usize = 8000;
const SEGMENT: usize = 1000;

/// TCP from 10.77.0.2 to 10.77.1.2, longer than the wire's frames, its checksum left open.
fn long_packet() -> Vec<u8> {
    let mut frame = ethernet_ip(6, 20 + LONG);
    frame[30..34].copy_from_slice(&[10, 77, 1, 2]);
    frame[24..26].fill(0);
    let right = !sum(&frame[14..34]);
    frame[24..26].copy_from_slice(&right.to_be_bytes());
    let mut tcp = [1u16, 2].map(u16::to_be_bytes).concat();
    tcp.extend(1000u32.to_be_bytes());
    tcp.extend(0u32.to_be_bytes());
    tcp.extend([0x50, 0x10, 0x20, 0, 0, 0, 0, 0]);
    // The pseudo header's part of the checksum is the sender's.
    let mut pseudo = frame[26..34].to_vec();
    pseudo.extend([0, 6]);
    pseudo.extend(((20 + LONG) as u16).to_be_bytes());
    tcp[16..18].copy_from_slice(&sum(&pseudo).to_be_bytes());
    frame.extend(tcp);
    frame.extend((0..LONG).map(|at| (at / 3) as u8));
    frame
}

/// `virtio_net_hdr_v1` of [`long_packet`]: NEEDS_CSUM from byte 34 on, at 16; GSO_TCPV4.
fn long_header() -> [u8; HEADER] {
    let [low, high] = (SEGMENT as u16).to_le_bytes();
    [NEEDS_CSUM, 1, 54, 0, low, high, 34, 0, 16, 0, 0, 0]
}

#[test]
fn long_packets_go_whole_to_who_takes_them_and_in_segments_to_who_does_not() {
    own_network!(
        "long_packets_go_whole_to_who_takes_them_and_in_segments_to_who_does_not",
        TWO_TAPS
    );
    let from = boot("t0", 1);
    let mut to = boot("t1", 1);
    let (_from_receiver, mut sender, _) = card(&from, MERGE | CSUM | HOST_TSO4);
    let agreed = MERGE | COMMANDS | CTRL_OFFLOADS | GUEST_CSUM | GUEST_TSO4;
    let (mut receiver, _, mut ring) = card(&to, agreed);
    let mut arrives = |receiver: &mut Receiver| {
        sender.send_in(long_header(), &long_packet(), 700);
        let mut payloads = Vec::new();
        let mut frames = Vec::new();
        while payloads.len() < LONG {
            let frame = receiver.any_frame(PATIENCE).expect("a frame");
            if frame.bytes[23] == 6 {
                payloads.extend_from_slice(&frame.bytes[54..]);
                frames.push(frame);
            }
        }
        assert!(payloads == long_packet()[54..]);
        frames
    };
    for swapped in [false, true] {
        if swapped {
            to = swap(to);
        }
        let whole = arrives(&mut receiver);
        assert_eq!(whole.len(), 1);
        assert_eq!(whole[0].header[1], 1, "GSO_TCPV4");
        assert_eq!(whole[0].header[4..6], (SEGMENT as u16).to_le_bytes());
        assert!(whole[0].buffers > 5);
    }
    assert!(command(&to, &mut ring, 5, 0, &[0; 8]));
    let segments = arrives(&mut receiver);
    assert_eq!(segments.len(), LONG / SEGMENT);
    assert!(segments.iter().all(|frame| frame.header[..2] == [0, 0]));
}
