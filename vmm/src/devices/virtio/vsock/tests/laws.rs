//! The laws of every device.

use std::os::fd::OwnedFd;

use prost::Message;
use stillpoint_state::sections::{VirtioVsock, VsockConnection, VsockReset, VsockStage};

use super::super::packet::Op;
use super::*;
use crate::devices::Device;

fn socket() -> OwnedFd {
    UnixStream::pair().expect("pair").0.into()
}

/// One with something in every field.
fn full() -> VirtioVsock {
    let connection = VsockConnection {
        number: 3,
        stage: VsockStage::Open.into(),
        socket: true,
        line: Vec::new(),
        host_port: 1,
        guest_port: 2,
        own_room: 40,
        consumed: 30,
        told: 20,
        guest_room: 70,
        guest_consumed: 50,
        sent: 60,
        for_host: vec![1, 2, 3],
        guest_shut: 1,
        host_shut: 2,
        told_shut: 2,
        owes_credit: true,
    };
    let greeting = VsockConnection {
        number: 4,
        stage: VsockStage::Greeting.into(),
        socket: true,
        line: b"CONN".to_vec(),
        own_room: 40,
        ..VsockConnection::default()
    };
    let gone = VsockConnection {
        number: 5,
        stage: VsockStage::Open.into(),
        socket: false,
        host_port: 9,
        ..VsockConnection::default()
    };
    VirtioVsock {
        next: 7,
        next_port: HOST_PORTS.start + 3,
        connections: vec![connection, greeting, gone],
        resets: vec![VsockReset {
            cid: 2,
            host_port: 5,
            guest_port: 6,
            kind: 1,
        }],
    }
}

fn again(section: &VirtioVsock) -> VirtioVsock {
    let restored = saved::connections(section, |_| Some(socket()));
    saved::section(&restored.expect("restore"))
}

#[test]
fn round_trip() {
    let full = full();
    assert_eq!(again(&full), full);
    let stages = [
        VsockStage::Requesting,
        VsockStage::Requested,
        VsockStage::Answering,
        VsockStage::Lingering,
    ];
    for stage in stages {
        let mut other = full.clone();
        other.connections[0].stage = stage.into();
        assert_eq!(again(&other), other);
    }
}

#[test]
fn every_field_changes_the_saved_form() {
    let changes: Vec<fn(&mut VirtioVsock)> = vec![
        |s| s.next += 1,
        |s| s.next_port += 1,
        |s| s.connections.truncate(2),
        |s| s.connections[0].number -= 1,
        |s| s.connections[0].stage = VsockStage::Lingering.into(),
        |s| s.connections[0].socket = false,
        |s| s.connections[1].line.push(b'E'),
        |s| s.connections[0].host_port += 1,
        |s| s.connections[0].guest_port += 1,
        |s| s.connections[0].own_room += 1,
        |s| s.connections[0].consumed += 1,
        |s| s.connections[0].told += 1,
        |s| s.connections[0].guest_room += 1,
        |s| s.connections[0].guest_consumed += 1,
        |s| s.connections[0].sent += 1,
        |s| s.connections[0].for_host[2] += 1,
        |s| s.connections[0].guest_shut = 0,
        |s| s.connections[0].host_shut = 3,
        |s| s.connections[0].told_shut = 3,
        |s| s.connections[0].owes_credit = false,
        |s| s.resets[0].cid += 1,
        |s| s.resets[0].host_port += 1,
        |s| s.resets[0].guest_port += 1,
        |s| s.resets[0].kind += 1,
    ];
    let before = again(&full()).encode_to_vec();
    for (number, change) in changes.into_iter().enumerate() {
        let mut changed = full();
        change(&mut changed);
        let after = again(&changed);
        assert_eq!(after, changed, "change {number} is kept");
        assert_ne!(after.encode_to_vec(), before, "change {number} shows");
    }
}

#[test]
fn state_that_cannot_be_is_refused() {
    let changes: Vec<fn(&mut VirtioVsock)> = vec![
        |s| s.next = 5,
        |s| s.next = u64::MAX,
        |s| s.next_port = 80,
        |s| s.connections[0].stage = 0,
        |s| s.connections[0].stage = 77,
        |s| s.connections[0].own_room = 2,
        |s| s.connections[0].guest_shut = 4,
        |s| s.connections[1].line = vec![b'x'; 33],
        |s| s.connections[1].number = 3,
        |s| s.connections[2].host_port = 1,
        |s| s.resets[0].kind = 1 << 16,
        |s| {
            let first = s.connections[0].clone();
            s.connections = vec![first; 1024];
        },
    ];
    for (number, change) in changes.into_iter().enumerate() {
        let mut changed = full();
        changed.connections[2].guest_port = 2;
        change(&mut changed);
        let restored = saved::connections(&changed, |_| Some(socket()));
        let error = restored.expect_err(&format!("change {number}"));
        assert!(error.to_string().contains("virtio-vsock"), "{error}");
    }
}

#[test]
fn frozen_means_silent() {
    let mut place = Place::new();
    let listener = place.serve(5);
    let (mut stream, mut program) = place.connected(1);
    let mut half = place.call();
    half.write_all(b"CONNECT").expect("write");
    place.driver.stand_still(PATIENCE).expect("rest");
    let _ = place.driver.interrupted();
    let saved = place.driver.saved();
    // Both sides go on as if nothing were.
    place.guest.send(&mut stream, b"from the guest");
    let request = guest::Stream::new(packet::Ports { host: 5, guest: 6 });
    place.guest.tell(&request, Op::Request);
    program
        .get_mut()
        .write_all(b"from the host")
        .expect("write");
    half.write_all(b" 2\n").expect("write");
    let another = place.call();
    listener.set_nonblocking(true).expect("nonblocking");
    program
        .get_ref()
        .set_nonblocking(true)
        .expect("nonblocking");
    // Long enough for a thread that does something to have done it.
    for _ in 0..200 {
        std::thread::yield_now();
    }
    assert!(place.guest.poll().is_none() && !place.driver.interrupted());
    listener.accept().expect_err("nobody came");
    program.get_mut().read(&mut [0]).expect_err("nothing came");
    assert_eq!(place.driver.saved(), saved);
    place.driver.device.resume();
    program.get_ref().set_nonblocking(false).expect("blocking");
    assert_eq!(read(&mut program, 14), b"from the guest");
    assert_eq!(place.guest.data(&mut stream), b"from the host");
    place.guest.accept(2);
    drop(another);
}
