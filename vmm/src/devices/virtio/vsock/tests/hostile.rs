//! What no guest and no host program should do.

use std::collections::HashSet;
use std::time::Instant;

use super::super::connection::{Given, Stage};
use super::super::connections::{GREETING_PATIENCE, MOST_GREETINGS, MOST_RESETS};
use super::super::packet::{HEADER, HOST_CID, Header, Op, Ports};
use super::*;
use crate::devices::virtio::driver::{FREE, buffer};

/// Beyond the guest's own buffers.
const SPARE: u64 = FREE + (40 << 20);

fn stray(host: u32) -> guest::Stream {
    guest::Stream::new(Ports { host, guest: 1 })
}

/// Waits until the device has shown that it failed.
fn failed(place: &Place) {
    let deadline = Instant::now() + PATIENCE;
    while !place.driver.has_failed() {
        assert!(Instant::now() < deadline, "the device goes on");
        std::thread::yield_now();
    }
}

#[test]
fn packets_of_nobodys_connection_are_answered_by_resets() {
    let mut place = Place::new();
    for op in [
        Op::Response,
        Op::Shutdown,
        Op::Data,
        Op::CreditUpdate,
        Op::CreditRequest,
    ] {
        place.guest.tell(&stray(7), op);
        let packet = place.guest.hear();
        assert_eq!((packet.op(), packet.ports()), (Op::Reset, stray(7).ports));
    }
    // A reset is not answered, nor is what does not come from the guest.
    place.guest.tell(&stray(7), Op::Reset);
    let spoofed = Header {
        from_cid: 3,
        ..stray(7).header(Op::Request)
    };
    place.guest.say(spoofed, &[]);
    let upper = Header {
        from_cid: u64::from(CID) | 1 << 32,
        ..stray(7).header(Op::Request)
    };
    place.guest.say(upper, &[]);
    place.guest.tell(&stray(8), Op::Request);
    assert_eq!(place.guest.hear().ports(), stray(8).ports);
    assert!(place.guest.poll().is_none());
}

#[test]
fn other_hosts_other_types_and_unknown_ops_are_reset() {
    let mut place = Place::new();
    let listener = place.serve(7);
    let request = stray(7).header(Op::Request);
    let elsewhere = Header {
        to_cid: 9,
        ..request
    };
    place.guest.say(elsewhere, &[]);
    let packet = place.guest.hear();
    assert_eq!((packet.op(), packet.header.from_cid), (Op::Reset, 9));
    let seqpacket = Header { kind: 2, ..request };
    place.guest.say(seqpacket, &[]);
    let packet = place.guest.hear();
    assert_eq!((packet.op(), packet.header.kind), (Op::Reset, 2));
    let unknown = Header { op: 99, ..request };
    place.guest.say(unknown, &[]);
    assert_eq!(place.guest.hear().op(), Op::Reset);
    // None of them has reached the host.
    listener.set_nonblocking(true).expect("nonblocking");
    listener.accept().expect_err("nobody came");
    // Within a connection an unknown op ends it.
    let (stream, mut program) = place.connected(1);
    let unknown = Header {
        op: 0,
        ..stream.header(Op::Data)
    };
    place.guest.say(unknown, &[]);
    assert_eq!(place.guest.hear().op(), Op::Reset);
    assert_eq!(read_all(&mut program), b"");
}

#[test]
fn ops_out_of_turn_end_the_connection() {
    let mut place = Place::new();
    for op in [Op::Request, Op::Response] {
        let (stream, mut program) = place.connected(1);
        place.guest.tell(&stream, op);
        let packet = place.guest.hear();
        assert_eq!((packet.op(), packet.ports()), (Op::Reset, stream.ports));
        assert_eq!(read_all(&mut program), b"");
    }
    // Data before the guest has accepted.
    let mut program = place.call();
    writeln!(program, "CONNECT 1").expect("write");
    let request = place.guest.hear_op(Op::Request);
    let mut stream = guest::Stream::new(request.ports());
    place.guest.send(&mut stream, b"too early");
    assert_eq!(place.guest.hear().op(), Op::Reset);
    assert_eq!(read_all(&mut program), b"");
}

#[test]
fn a_packet_may_lie_in_pieces() {
    let mut place = Place::new();
    let (stream, mut program) = place.connected(1);
    let data = pattern_of(0..300);
    let header = Header {
        len: 300,
        ..stream.header(Op::Data)
    };
    place
        .guest
        .put(SPARE, &[header.to_bytes(), data.clone()].concat());
    // The header in two buffers, the second with data behind it.
    let pieces = [(0, 10), (10, 100), (110, 234)];
    let pieces = pieces.map(|(at, len)| buffer(SPARE + at, len));
    place.guest.tx.add(&pieces, &[]);
    place.guest.tx.kick();

    assert_eq!(read(&mut program, 300), data);
    // And a buffer for the guest's packets in pieces too.
    let mut place = Place::starving();
    let sizes = [20, 30, 200];
    let mut at = SPARE;
    let pieces = sizes.map(|len| {
        at += 1000;
        buffer(at, len)
    });
    place.guest.rx.add(&[], &pieces);
    place.guest.rx.kick();
    place.guest.tell(&stray(7), Op::Request);
    assert_eq!(place.guest.rx.wait().len, HEADER as u32);
    let mut bytes = [0; HEADER];
    let mut at = 0;
    for piece in &pieces[..2] {
        let len = (piece.len as usize).min(HEADER - at);
        let into = &mut bytes[at..at + len];
        vm_memory::Bytes::read_slice(&place.guest.memory, into, piece.address).expect("in RAM");
        at += len;
    }
    assert_eq!(Header::from_bytes(&bytes).op, Op::Reset as u16);
}

#[test]
fn a_header_that_is_cut_off_fails_the_device_and_a_reset_mends_it() {
    let mut place = Place::new();
    let (_, mut program) = place.connected(1);
    place.guest.tx.add(&[buffer(SPARE, HEADER as u32 - 1)], &[]);
    place.guest.tx.kick();
    failed(&place);
    // Host programs are not left waiting by a device that has failed.
    drop(place.call());
    assert_eq!(read_all(&mut program), b"");
    place.guest = Guest::start(&place.driver);
    place.connected(2);
}

#[test]
fn a_length_that_lies_fails_the_device() {
    for len in [1, 5000, u32::MAX] {
        let mut place = Place::new();
        let (stream, _program) = place.connected(1);
        let header = Header {
            len,
            ..stream.header(Op::Data)
        };
        place.guest.put(SPARE, &header.to_bytes());
        place.guest.tx.add(&[buffer(SPARE, HEADER as u32)], &[]);
        place.guest.tx.kick();
        failed(&place);
    }
}

#[test]
fn a_buffer_too_small_for_a_packet_fails_the_device() {
    let mut place = Place::starving();
    place.guest.rx.add(&[], &[buffer(SPARE, HEADER as u32)]);
    place.guest.rx.kick();
    place.guest.tell(&stray(7), Op::Request);
    failed(&place);
}

#[test]
fn a_guest_that_takes_no_resets_is_not_heard_beyond_some() {
    let mut place = Place::starving();
    let most = MOST_RESETS as u32;
    for host in 0..most {
        place.guest.tell(&stray(host), Op::Data);
    }
    place.guest.heard();
    let beyond = 10;
    for host in most..most + beyond {
        place.guest.tell(&stray(host), Op::Data);
    }
    // The device has looked at its queues when it has looked at this.
    let mut program = place.call();
    program.write_all(b"\n").expect("write");
    assert_eq!(read_all(&mut program), b"");
    assert!(place.guest.tx.take().is_none(), "it heard more");
    // Every one is answered when there are buffers.
    place.guest.feed(64);
    let mut answered = HashSet::new();
    for _ in 0..most + beyond {
        let packet = place.guest.hear();
        assert_eq!(packet.op(), Op::Reset);
        answered.insert(packet.header.from_port);
    }
    assert_eq!(answered.len() as u32, most + beyond);
    place.guest.heard();
}

#[test]
fn first_lines_that_never_end_keep_nobody_out_for_ever() {
    let mut place = Place::new();
    let mut idle: Vec<_> = (0..MOST_GREETINGS)
        .map(|_| {
            let mut program = place.call();
            program.write_all(b"CONNECT ").expect("write");
            program
        })
        .collect();
    let mut program = place.call();
    writeln!(program, "CONNECT 1").expect("write");
    // It waits at the listener until one of the others is gone.
    idle.pop();
    place.guest.accept(1);
    assert!(line(&mut BufReader::new(program)).starts_with("OK "));
}

#[test]
fn a_first_line_has_its_time() {
    let (program, ours) = UnixStream::pair().expect("pair");
    let mut program = patient(program);
    let mut connections = Connections::new(0, HOST_PORTS.start);
    connections
        .watch(&Poller::new().expect("epoll"))
        .expect("watch");
    connections.greet(Socket::new(ours.into()));
    let now = Instant::now();
    connections.expire(now + GREETING_PATIENCE - Duration::from_secs(1));
    assert_eq!(connections.greetings(), 1);
    connections.expire(now + GREETING_PATIENCE + Duration::from_secs(1));
    assert_eq!(connections.greetings(), 0);
    assert_eq!(read_all(&mut program), b"");
}

#[test]
fn a_program_that_says_nothing_is_sent_away_in_time() {
    let place = Place::new();
    let began = Instant::now();
    assert_eq!(read_all(&mut place.call()), b"");
    assert!(began.elapsed() >= GREETING_PATIENCE);
}

#[test]
fn where_there_is_no_place_the_half_gone_give_theirs() {
    let mut connections = Connections::new(0, HOST_PORTS.start);
    let poller = Poller::new().expect("epoll");
    connections.watch(&poller).expect("watch");
    connections.most = 2;
    for host in [7, 8] {
        let (_program, ours) = UnixStream::pair().expect("pair");
        let request = stray(host).header(Op::Request);
        assert!(connections.has_place());
        assert!(connections.answer(&request, Socket::new(ours.into())));
        let connection = connections.all.get_mut(&(connections.next - 1));
        connection.expect("it").stage = Stage::Open;
    }
    assert!(!connections.has_place());
    // The program behind the first has gone, and the guest does not say anything to it.
    let first = connections.all.get_mut(&0).expect("it");
    let shutdown = first.next_packet(&mut [0]);
    assert!(
        matches!(
            shutdown,
            Given::Packet {
                op: Op::Shutdown,
                ..
            }
        ),
        "{shutdown:?}"
    );
    assert!(connections.has_place());
    let (_program, ours) = UnixStream::pair().expect("pair");
    connections.greet(Socket::new(ours.into()));
    assert!(!connections.has_place() && connections.all.len() == 2);
    let owed: Vec<_> = connections.resets.iter().map(|reset| reset.ports).collect();
    assert_eq!(owed, [stray(7).ports]);
}

#[test]
fn host_ports_in_use_are_not_given_again() {
    let mut place = Place::new();
    let (first, _program) = place.connected(1);
    // As it would be after 2^30 connections.
    let mut connections = Connections::new(5, HOST_PORTS.end - 1);
    let stream = Socket::new(UnixStream::pair().expect("pair").0.into());
    let taken = Header {
        from_port: 1,
        to_port: HOST_PORTS.start,
        ..first.header(Op::Request)
    };
    connections
        .watch(&Poller::new().expect("epoll"))
        .expect("watch");
    assert!(connections.answer(&taken, stream));
    let mut ports = Vec::new();
    for _ in 0..2 {
        connections.greet(Socket::new(UnixStream::pair().expect("pair").0.into()));
        let id = connections.next - 1;
        connections.request(id, 1);
        ports.push(connections.all[&id].ports.host);
    }
    assert_eq!(ports, [HOST_PORTS.end - 1, HOST_PORTS.start + 1]);
    assert_eq!(HOST_CID, 2);
}

#[test]
fn many_connections_share_what_room_there_is() {
    let mut connections = Connections::new(0, HOST_PORTS.start);
    connections
        .watch(&Poller::new().expect("epoll"))
        .expect("watch");
    let mut rooms = Vec::new();
    while connections.has_place() {
        connections.greet(Socket::new(UnixStream::pair().expect("pair").0.into()));
        rooms.push(connections.all[&(connections.next - 1)].credit.own_room);
        if rooms.len() == 200 {
            break;
        }
    }
    assert_eq!(rooms[0], 256 << 10);
    assert!(rooms.windows(2).all(|pair| pair[1] <= pair[0]));
    assert!(rooms.iter().sum::<u32>() < 20 << 20);
    assert!(rooms.iter().all(|&room| room >= 4 << 10));
}
