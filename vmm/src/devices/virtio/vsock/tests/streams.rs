//! Connections, their data, their ends.

use super::super::packet::{HOST_CID, NO_MORE, NO_MORE_IN, NO_MORE_OUT, Op};
use super::*;

#[test]
fn it_is_a_socket_device_of_its_guest() {
    let place = Place::new();
    assert_eq!(place.driver.read(8), 19);
    assert_eq!(place.driver.config(0, 8), u64::from(CID).to_le_bytes());
    assert_eq!(place.driver.offered() & 0xff_ffff, 0, "streams alone");
    let meta = std::fs::metadata(place.socket()).expect("socket");
    assert_eq!(
        std::os::unix::fs::PermissionsExt::mode(&meta.permissions()) & 0o777,
        0o600
    );
}

#[test]
fn a_host_program_connects_and_both_sides_are_heard() {
    let mut place = Place::new();
    let (mut stream, mut program) = place.connected(1024);
    // The second program's port is another one.
    let (other, _other) = place.connected(1024);
    assert_ne!(stream.ports, other.ports);
    program.get_mut().write_all(b"to the guest").expect("write");
    assert_eq!(place.guest.data(&mut stream), b"to the guest");
    place.guest.send(&mut stream, b"to the host");
    assert_eq!(read(&mut program, 11), b"to the host");
}

#[test]
fn what_follows_the_first_line_is_the_guests() {
    let mut place = Place::new();
    let mut program = place.call();
    program.write_all(b"CONN").expect("write");
    program.write_all(b"ECT 7\r\nand on").expect("write");
    let mut stream = place.guest.accept(7);
    assert_eq!(place.guest.data(&mut stream), b"and on");
}

#[test]
fn a_program_whose_port_nobody_serves_is_sent_away() {
    let mut place = Place::new();
    let mut program = place.call();
    writeln!(program, "CONNECT 9").expect("write");
    let request = place.guest.hear_op(Op::Request);
    let stream = guest::Stream::new(request.ports());
    place.guest.tell(&stream, Op::Reset);
    assert_eq!(read_all(&mut program), b"", "no OK");
    // And the device owes nothing for it: the next is served.
    place.connected(10);
}

#[test]
fn a_first_line_that_is_none_is_the_last() {
    let mut place = Place::new();
    for line in [
        &b"HELLO\n"[..],
        b"CONNECT x\n",
        b"CONNECT 1234567890123456789012345678901234567890",
    ] {
        let mut program = place.call();
        program.write_all(line).expect("write");
        // What it sent in vain may make it a reset instead of an end.
        let mut bytes = Vec::new();
        let _ = program.read_to_end(&mut bytes);
        assert_eq!(bytes, b"");
    }
    place.connected(10);
}

#[test]
fn the_guest_connects_to_a_host_program() {
    let mut place = Place::new();
    let listener = place.serve(5000);
    let mut stream = place.guest.connect(5000, 33);
    let mut program = patient(listener.accept().expect("accept").0);
    place.guest.send(&mut stream, b"hello");
    assert_eq!(read(&mut program, 5), b"hello");
    program.write_all(b"yes?").expect("write");
    assert_eq!(place.guest.data(&mut stream), b"yes?");
}

#[test]
fn where_no_host_program_is_the_guest_is_reset() {
    let mut place = Place::new();
    drop(place.serve(5001));
    for port in [5000, 5001, u32::MAX] {
        let stream = guest::Stream::new(packet::Ports {
            host: port,
            guest: 33,
        });
        place.guest.tell(&stream, Op::Request);
        let packet = place.guest.hear();
        assert_eq!(packet.op(), Op::Reset);
        assert_eq!(packet.ports(), stream.ports);
        assert_eq!(packet.header.from_cid, HOST_CID);
    }
}

#[test]
fn a_host_program_that_sends_no_more_can_still_read() {
    let mut place = Place::new();
    let (mut stream, mut program) = place.connected(1);
    program.get_mut().write_all(b"last").expect("write");
    let shutdown = std::net::Shutdown::Write;
    program.get_ref().shutdown(shutdown).expect("shutdown");
    assert_eq!(place.guest.data(&mut stream), b"last");
    let packet = place.guest.hear();
    assert_eq!(
        (packet.op(), packet.header.flags),
        (Op::Shutdown, NO_MORE_OUT)
    );
    place.guest.send(&mut stream, b"still here");
    assert_eq!(read(&mut program, 10), b"still here");
    // Then the guest has nothing to say either.
    place.guest.shut(&stream, NO_MORE);
    assert_eq!(place.guest.hear().op(), Op::Reset);
    assert_eq!(read_all(&mut program), b"");
}

#[test]
fn a_host_program_that_is_gone_ends_both_ways() {
    let mut place = Place::new();
    let (mut stream, mut program) = place.connected(1);
    program.get_mut().write_all(b"last").expect("write");
    drop(program);
    assert_eq!(place.guest.data(&mut stream), b"last");
    let packet = place.guest.hear();
    assert_eq!((packet.op(), packet.header.flags), (Op::Shutdown, NO_MORE));
    // What the guest had under way is taken and forgotten.
    place.guest.send(&mut stream, b"anybody there?");
    place.guest.tell(&stream, Op::CreditRequest);
    let packet = place.guest.hear_op(Op::CreditUpdate);
    assert_eq!(packet.header.fwd_cnt, stream.sent);
    place.guest.tell(&stream, Op::Reset);
    place.connected(2);
}

#[test]
fn a_guest_that_sends_no_more_can_still_read() {
    let mut place = Place::new();
    let (mut stream, mut program) = place.connected(1);
    place.guest.send(&mut stream, b"last");
    place.guest.shut(&stream, NO_MORE_OUT);
    assert_eq!(read_all(&mut program), b"last");
    program.get_mut().write_all(b"still here").expect("write");
    assert_eq!(place.guest.data(&mut stream), b"still here");
    drop(program);
    let packet = place.guest.hear();
    assert_eq!((packet.op(), packet.header.flags), (Op::Shutdown, NO_MORE));
}

#[test]
fn a_guest_that_reads_no_more_can_still_send() {
    let mut place = Place::new();
    let (mut stream, mut program) = place.connected(1);
    place.guest.shut(&stream, NO_MORE_IN);
    // Once the device has heard it, the program can't write.
    let error = loop {
        match program.get_mut().write_all(b"x") {
            Ok(()) => std::thread::yield_now(),
            Err(error) => break error,
        }
    };
    assert_eq!(error.kind(), std::io::ErrorKind::BrokenPipe);
    place.guest.send(&mut stream, b"still here");
    assert_eq!(read(&mut program, 10), b"still here");
}

#[test]
fn a_host_program_that_reads_no_more_can_still_send() {
    let mut place = Place::new();
    let (mut stream, mut program) = place.connected(1);
    program
        .get_ref()
        .shutdown(std::net::Shutdown::Read)
        .expect("shutdown");
    place.guest.send(&mut stream, b"deaf?");
    let packet = place.guest.hear();
    assert_eq!(
        (packet.op(), packet.header.flags),
        (Op::Shutdown, NO_MORE_IN)
    );
    program.get_mut().write_all(b"deaf").expect("write");
    assert_eq!(place.guest.data(&mut stream), b"deaf");
}

#[test]
fn a_program_that_gives_up_waiting_is_told_of_to_the_guest() {
    let mut place = Place::new();
    let mut program = place.call();
    writeln!(program, "CONNECT 1").expect("write");
    let request = place.guest.hear_op(Op::Request);
    drop(program);
    let packet = place.guest.hear();
    assert_eq!((packet.op(), packet.ports()), (Op::Reset, request.ports()));
}

#[test]
fn the_guest_is_sent_no_more_than_it_has_room_for() {
    let mut place = Place::new();
    let mut program = place.call();
    writeln!(program, "CONNECT 1").expect("write");
    let request = place.guest.hear_op(Op::Request);
    let mut stream = guest::Stream::new(request.ports());
    stream.room = 100;
    place.guest.tell(&stream, Op::Response);
    program.write_all(&pattern_of(0..250)).expect("write");
    let mut had = Vec::new();
    while had.len() < 250 {
        had.extend(place.guest.data(&mut stream));
        assert!(had.len() <= 100 + (had.len() - 1) / 100 * 100);
        if had.len() < 250 {
            // Full: it asks, once, and gets nothing until the program in the guest has read.
            assert_eq!(place.guest.hear().op(), Op::CreditRequest);
            let full = guest::Stream {
                taken: stream.taken - 100,
                ..stream
            };
            place.guest.tell(&full, Op::CreditUpdate);
            place.guest.tell(&full, Op::CreditRequest);
            assert_eq!(place.guest.hear().op(), Op::CreditUpdate);
            assert!(place.guest.poll().is_none());
            place.guest.tell(&stream, Op::CreditUpdate);
        }
    }
    assert_eq!(had, pattern_of(0..250));
}

#[test]
fn a_buffer_that_was_not_needed_is_used_for_the_next_packet() {
    let mut place = Place::new();
    let (mut stream, mut program) = place.connected(1);
    // More rounds than the guest has buffers; after each the socket is empty.
    for _ in 0..200 {
        program.get_mut().write_all(b"ping").expect("write");
        assert_eq!(place.guest.data(&mut stream), b"ping");
        place.guest.send(&mut stream, b"pong");
        assert_eq!(read(&mut program, 4), b"pong");
    }
}

#[test]
fn a_port_is_free_again_while_the_host_still_reads() {
    let mut place = Place::new();
    let listener = place.serve(5000);
    let mut stream = place.guest.connect(5000, 33);
    let mut first = patient(listener.accept().expect("accept").0);
    let sent = place.fill(&mut stream);
    place.guest.shut(&stream, NO_MORE);
    assert_eq!(place.guest.hear_op(Op::Reset).ports(), stream.ports);
    let mut stream = place.guest.connect(5000, 33);
    let mut second = patient(listener.accept().expect("accept").0);
    place.guest.send(&mut stream, b"the second");
    assert_eq!(read(&mut second, 10), b"the second");
    assert!(read_all(&mut first) == pattern_of(0..sent));
}

#[test]
fn an_end_needs_no_credit() {
    let mut place = Place::new();
    let mut program = place.call();
    writeln!(program, "CONNECT 1").expect("write");
    let request = place.guest.hear_op(Op::Request);
    let mut stream = guest::Stream::new(request.ports());
    stream.room = 0;
    place.guest.tell(&stream, Op::Response);
    assert!(line(&mut BufReader::new(&program)).starts_with("OK "));
    drop(program);
    let packet = place.guest.hear();
    assert_eq!((packet.op(), packet.header.flags), (Op::Shutdown, NO_MORE));
}

#[test]
fn a_host_program_that_reads_nothing_stops_its_guest_and_nobody_else() {
    let mut place = Place::new();
    let (mut stream, mut program) = place.connected(1);
    let sent = place.fill(&mut stream);
    assert!(sent > 256 << 10, "socket and room are full: {sent}");
    let (mut other, mut other_program) = place.connected(2);
    place.guest.send(&mut other, b"not stopped");
    assert_eq!(read(&mut other_program, 11), b"not stopped");
    // The guest leaves; what it sent is not lost.
    place.guest.shut(&stream, NO_MORE);
    assert_eq!(place.guest.hear_op(Op::Reset).ports(), stream.ports);
    assert!(read_all(&mut program) == pattern_of(0..sent));
}

#[test]
fn more_than_the_credit_is_a_reset() {
    let mut place = Place::new();
    let (mut stream, mut program) = place.connected(1);
    let too_much = vec![0; stream.host_room as usize + 1];
    place.guest.send(&mut stream, &too_much);
    assert_eq!(place.guest.hear().op(), Op::Reset);
    assert_eq!(read_all(&mut program), b"");
}

#[test]
fn a_driver_that_resets_the_device_ends_all_and_begins_anew() {
    let mut place = Place::new();
    let (stream, mut program) = place.connected(1);
    place.guest = Guest::start(&place.driver);
    place.guest.tell(&stream, Op::CreditRequest);
    assert_eq!(place.guest.hear().op(), Op::Reset, "it is forgotten");
    assert_eq!(read_all(&mut program), b"");
    place.connected(2);
    // Without a driver nobody is there: come again later.
    place.driver.write(0x70, 0);
    let mut bytes = Vec::new();
    let _ = place.call().read_to_end(&mut bytes);
    assert_eq!(bytes, b"");
    place.guest = Guest::start(&place.driver);
    place.connected(3);
}

#[test]
fn a_guest_that_begins_anew_keeps_the_listener_and_no_connection() {
    let mut place = Place::new();
    let (_, mut program) = place.connected(1);
    place.driver.stand_still(PATIENCE).expect("rest");
    let mut lending = Lending::default();
    place.driver.device.lend(&mut lending).expect("lend");
    let mut files = lending.arrive();
    end_lent("vsock", &mut files);
    // Even though the old machine is still there.
    assert_eq!(read_all(&mut program), b"");
    let listener = files.take("vsock/listener").expect("listener");
    assert!(files.take_all("vsock/conn").is_empty());
    let kind = Vsock::new(CID, listener, place.dir.path());
    let driver = Driver::boot("vsock", Box::new(kind));
    let guest = Guest::start(&driver);
    let mut place = Place {
        driver,
        guest,
        ..place
    };
    place.connected(1);
}
