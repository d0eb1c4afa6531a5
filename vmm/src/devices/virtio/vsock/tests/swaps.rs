//! Connections over swaps, one stage after the other.

use super::super::packet::{NO_MORE, Op, Ports};
use super::*;
use crate::devices::Device;

#[test]
fn a_first_line_may_begin_before_a_swap_and_end_after_it() {
    let mut place = Place::new();
    let mut program = place.call();
    // Each piece is read, or not, before the next swap: both are fine.
    for piece in [&b"C"[..], b"ONNECT", b" 10", b"24", b"\n"] {
        program.write_all(piece).expect("write");
        place = place.swap();
    }
    let stream = place.guest.accept(1024);
    place = place.swap();
    let ok = line(&mut BufReader::new(program));
    assert_eq!(ok, format!("OK {}\n", stream.ports.host));
    drop(place);
}

#[test]
fn a_program_at_the_listener_is_let_in_by_the_successor() {
    let place = Place::new();
    place.driver.stand_still(PATIENCE).expect("rest");
    let mut program = place.call();
    writeln!(program, "CONNECT 3").expect("write");
    let mut place = place.swap();
    place.guest.accept(3);
    assert!(line(&mut BufReader::new(program)).starts_with("OK "));
}

#[test]
fn a_request_is_answered_to_the_successor() {
    let mut place = Place::new();
    let mut program = place.call();
    writeln!(program, "CONNECT 3").expect("write");
    let request = place.guest.hear_op(Op::Request);
    let mut place = place.swap();
    let stream = guest::Stream::new(request.ports());
    place.guest.tell(&stream, Op::Response);
    assert!(line(&mut BufReader::new(program)).starts_with("OK "));
}

#[test]
fn what_the_guest_has_no_buffers_for_is_told_by_the_successor() {
    let mut place = Place::starving();
    let listener = place.serve(5);
    let answered = guest::Stream::new(Ports { host: 5, guest: 6 });
    place.guest.tell(&answered, Op::Request);
    let refused = guest::Stream::new(Ports { host: 4, guest: 6 });
    place.guest.tell(&refused, Op::Request);
    place.guest.heard();
    let mut program = patient(listener.accept().expect("connected").0);
    let mut place = place.swap().swap();
    place.guest.feed(8);
    let reset = place.guest.hear_op(Op::Reset);
    assert_eq!(reset.ports(), refused.ports);
    let mut stream = answered;
    stream.hear(&place.guest.hear_op(Op::Response));
    place.guest.send(&mut stream, b"hello");
    assert_eq!(read(&mut program, 5), b"hello");
}

#[test]
fn what_the_host_has_not_taken_travels() {
    let mut place = Place::new();
    let (mut stream, mut program) = place.connected(1);
    let sent = place.fill(&mut stream);
    let mut place = place.swap().swap();
    assert!(read(&mut program, sent) == pattern_of(0..sent));
    // The guest hears that it may go on.
    while stream.credit() < 1000 {
        stream.hear(&place.guest.hear_op(Op::CreditUpdate));
    }
    place.guest.send(&mut stream, b"on");
    assert_eq!(read(&mut program, 2), b"on");
}

#[test]
fn a_guest_that_left_is_read_to_its_end_after_a_swap() {
    let mut place = Place::new();
    let (mut stream, mut program) = place.connected(1);
    let sent = place.fill(&mut stream);
    place.guest.shut(&stream, NO_MORE);
    assert_eq!(place.guest.hear_op(Op::Reset).ports(), stream.ports);
    let place = place.swap().swap();
    assert!(read_all(&mut program) == pattern_of(0..sent));
    drop(place);
}

#[test]
fn a_connection_whose_socket_is_lost_is_reset_and_the_others_live() {
    let mut place = Place::new();
    let (lost, mut lost_program) = place.connected(1);
    let (mut kept, mut kept_program) = place.connected(2);
    let mut place = place.swap_but(|name| name == "vsock/conn0");
    let packet = place.guest.hear();
    assert_eq!((packet.op(), packet.ports()), (Op::Reset, lost.ports));
    // The last one who held it is gone.
    assert_eq!(read_all(&mut lost_program), b"");
    place.guest.send(&mut kept, b"here");
    assert_eq!(read(&mut kept_program, 4), b"here");
}

#[test]
fn a_connection_that_ends_between_two_lends_ends_for_its_program() {
    let mut place = Place::new();
    let (stream, mut program) = place.connected(1);
    let mut lending = Lending::default();
    place.driver.device.lend(&mut lending).expect("lend");
    // Another process has the socket by now.
    let early = lending.take_waiting();
    place.guest.tell(&stream, Op::Reset);
    assert_eq!(read_all(&mut program), b"", "though a duplicate lives");
    place.driver.stand_still(PATIENCE).expect("rest");
    place.driver.device.lend(&mut lending).expect("lend");
    assert_eq!(lending.count(), 0, "nothing new");
    let files = early.into_iter().unzip();
    let (names, fds): (Vec<_>, Vec<_>) = files;
    assert!(names.contains(&"vsock/conn0".to_owned()));
    let mut files = Borrowed::default();
    files.add(names, fds);
    let mut state = Unclaimed::decode(&place.driver.saved()).expect("decode");
    let restored = take_over(place.dir.path(), &mut state, &mut files, |_| false);
    assert!(restored.connections.all.is_empty());
}

#[test]
fn a_retired_predecessor_ends_no_connection() {
    let mut place = Place::new();
    let (mut stream, mut program) = place.connected(1);
    let mut lending = Lending::default();
    place.driver.stand_still(PATIENCE).expect("rest");
    place.driver.device.lend(&mut lending).expect("lend");
    let saved = place.driver.saved();
    let mut files = lending.arrive();
    let mut state = Unclaimed::decode(&saved).expect("decode");
    let kept = take_over(place.dir.path(), &mut state, &mut files, |_| false);
    // A successor that comes to nothing doesn't either.
    drop(kept);
    place.driver.device.resume();
    let mut place = place.swap();
    place.guest.send(&mut stream, b"here");
    assert_eq!(read(&mut program, 4), b"here");
}
