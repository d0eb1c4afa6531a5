//! The connections against a host of a few lines.

use super::*;

const PATIENCE: Patience = Patience {
    retry: 100,
    answer: 5000,
    record: 100_000,
};
const CID: u64 = 42;
const PORT: u32 = 5000;

/// A host that accepts, and sends back what comes, in pieces of its own.
struct Host {
    open: Option<u32>,
    pending: Vec<u8>,
    taken: u32,
    buffer: u32,
}

fn packet(op: u16, from_port: u32, to_port: u32) -> Header {
    Header {
        from_cid: HOST,
        to_cid: CID,
        from_port,
        to_port,
        kind: 1,
        op,
        buffer: 4096,
        ..Header::default()
    }
}

fn sockets(host_port: u32) -> (Sockets, Area) {
    let mut memory = Area::of_test(128 << 10);
    let buffer = memory.take(BUFFER, 4096);
    let sockets = Sockets::new(&mut memory, CID, host_port, 7, PATIENCE, Counts::default());
    (sockets, buffer)
}

fn deliver(sockets: &mut Sockets, buffer: Area, header: Header, payload: &[u8]) {
    let header = Header {
        len: payload.len() as u32,
        ..header
    };
    header.write(buffer);
    buffer.write(HEADER, payload);
    sockets.receive(buffer, HEADER + payload.len(), 0);
}

fn take(sockets: &mut Sockets, buffer: Area, now: u64) -> Option<(Header, Vec<u8>)> {
    let len = sockets.next_packet(buffer, now)?;
    let header = Header::read(buffer, len)?;
    let mut payload = vec![0; len - HEADER];
    buffer.read(HEADER, &mut payload);
    assert_eq!(header.len as usize, payload.len());
    assert_eq!((header.from_cid, header.to_cid), (CID, HOST));
    Some((header, payload))
}

impl Host {
    fn turn(&mut self, sockets: &mut Sockets, buffer: Area, now: u64, piece: usize) {
        while let Some((header, payload)) = take(sockets, buffer, now) {
            match header.op {
                operation::REQUEST => {
                    self.open = Some(header.from_port);
                    let mut response = packet(operation::RESPONSE, PORT, header.from_port);
                    response.buffer = self.buffer;
                    deliver(sockets, buffer, response, &[]);
                }
                operation::RW => {
                    self.pending.extend(payload);
                    assert!(
                        self.pending.len() <= self.buffer as usize,
                        "beyond its credit"
                    );
                }
                _ => {}
            }
        }
        let Some(port) = self.open else { return };
        let len = piece.min(self.pending.len());
        let payload: Vec<u8> = self.pending.drain(..len).collect();
        self.taken = self.taken.wrapping_add(len as u32);
        let mut header = packet(operation::RW, PORT, port);
        (header.buffer, header.used) = (self.buffer, self.taken);
        deliver(sockets, buffer, header, &payload);
    }
}

fn open(buffer_len: u32) -> (Sockets, Area, Host) {
    let (mut sockets, buffer) = sockets(PORT);
    let mut host = Host {
        open: None,
        pending: Vec::new(),
        taken: 0,
        buffer: buffer_len,
    };
    assert!(take(&mut sockets, buffer, 99).is_none(), "not yet");
    host.turn(&mut sockets, buffer, 100, 0);
    assert_eq!(sockets.counts().opened, 1);
    (sockets, buffer, host)
}

#[test]
fn records_go_round_whatever_the_pieces_and_the_credit() {
    for credit in [1, 100, 65_536] {
        let (mut sockets, buffer, mut host) = open(credit);
        for turn in 0..8000 {
            host.turn(&mut sockets, buffer, 200 + turn, 1 + turn as usize % 3000);
        }
        let counts = *sockets.counts();
        assert!(counts.rounds >= 2, "credit {credit}: {counts:?}");
        assert_eq!((counts.wrong, counts.broken, counts.bad_packets), (0, 0, 0));
    }
}

#[test]
fn bytes_misplaced_doubled_or_changed_are_found_out() {
    let sins: [fn(&mut Vec<u8>); 3] = [
        |bytes| bytes.rotate_left(1),
        |bytes| bytes.insert(0, bytes[0]),
        |bytes| bytes[0] ^= 1,
    ];
    for sin in sins {
        let (mut sockets, buffer, mut host) = open(65_536);
        for turn in 0..100 {
            host.turn(&mut sockets, buffer, 200, 500);
            if turn == 50 {
                while host.pending.is_empty() {
                    host.turn(&mut sockets, buffer, 200, 0);
                }
                sin(&mut host.pending);
            }
        }
        assert!(sockets.counts().wrong > 0);
    }
}

#[test]
fn a_record_whose_end_is_lost_is_stalled() {
    let (mut sockets, buffer, mut host) = open(65_536);
    host.turn(&mut sockets, buffer, 200, 0);
    host.pending.pop();
    for now in [200, 100_100, 100_101, 900_000] {
        host.turn(&mut sockets, buffer, now, 9000);
        assert_eq!(sockets.counts().stalled, u64::from(now > 100_100));
    }
}

#[test]
fn a_connection_that_ends_is_broken_and_made_anew() {
    for op in [operation::RST, operation::SHUTDOWN] {
        let (mut sockets, buffer, mut host) = open(65_536);
        let port = host.open.take().expect("open");
        deliver(&mut sockets, buffer, packet(op, PORT, port), &[]);
        assert_eq!(sockets.counts().broken, 1);
        host.turn(&mut sockets, buffer, 1000, 0);
        assert_eq!(host.open, Some(port + 1));
    }
}

#[test]
fn nobody_there_is_not_broken() {
    let (mut sockets, buffer) = sockets(PORT);
    let (header, _) = take(&mut sockets, buffer, 100).expect("a request");
    let refusal = packet(operation::RST, PORT, header.from_port);
    deliver(&mut sockets, buffer, refusal, &[]);
    let (header, _) = take(&mut sockets, buffer, 200).expect("another");
    assert_eq!(header.op, operation::REQUEST);
    assert!(take(&mut sockets, buffer, 5199).is_none());
    let (header, _) = take(&mut sockets, buffer, 5200).expect("given up");
    assert_eq!(header.op, operation::RST);
    let counts = sockets.counts();
    assert_eq!((counts.refused, counts.broken), (2, 0));
}

#[test]
fn what_the_host_sends_is_sent_back() {
    let (mut sockets, buffer) = sockets(0);
    let from_host = |op| packet(op, 9, VSOCK_ECHO_PORT);
    deliver(&mut sockets, buffer, from_host(operation::REQUEST), &[]);
    let (header, _) = take(&mut sockets, buffer, 0).expect("an answer");
    assert_eq!((header.op, header.to_port), (operation::RESPONSE, 9));
    let (mut came_back, mut total) = (Vec::new(), Vec::new());
    for round in 0..100u32 {
        let sent: Vec<u8> = (0..1000).map(|n| (n + round) as u8).collect();
        let mut header = from_host(operation::RW);
        header.used = came_back.len() as u32;
        deliver(&mut sockets, buffer, header, &sent);
        total.extend(sent);
        while let Some((header, payload)) = take(&mut sockets, buffer, 0) {
            assert_eq!(header.op, operation::RW);
            came_back.extend(payload);
        }
    }
    assert_eq!(came_back, total);
    deliver(&mut sockets, buffer, from_host(operation::SHUTDOWN), &[]);
    let (header, _) = take(&mut sockets, buffer, 0).expect("an end");
    assert_eq!(header.op, operation::RST);
    let counts = sockets.counts();
    assert_eq!((counts.accepted, counts.echoed), (1, 100_000));
    assert_eq!(counts.bad_packets, 0);
}

#[test]
fn a_host_that_sends_too_much_or_nonsense_is_found_out() {
    let (mut sockets, buffer) = sockets(0);
    let from_host = |op| packet(op, 9, VSOCK_ECHO_PORT);
    deliver(&mut sockets, buffer, from_host(operation::REQUEST), &[]);
    let mut nothing_taken = from_host(operation::RW);
    nothing_taken.buffer = 0;
    for _ in 0..=16 {
        deliver(&mut sockets, buffer, nothing_taken, &[1; 1000]);
    }
    assert_eq!(sockets.counts().bad_packets, 1, "beyond our credit");
    let mut wrong = from_host(operation::RW);
    wrong.to_cid = 9;
    deliver(&mut sockets, buffer, wrong, &[]);
    deliver(&mut sockets, buffer, from_host(8), &[]);
    sockets.receive(buffer, HEADER - 1, 0);
    let mut lies = from_host(operation::RW);
    lies.len = 10;
    lies.write(buffer);
    sockets.receive(buffer, HEADER + 9, 0);
    assert_eq!(sockets.counts().bad_packets, 5);
}

#[test]
fn a_packet_for_nobody_is_answered() {
    let (mut sockets, buffer) = sockets(0);
    deliver(&mut sockets, buffer, packet(operation::RW, 9, 77), &[1]);
    let (header, _) = take(&mut sockets, buffer, 0).expect("an answer");
    assert_eq!(header.op, operation::RST);
    assert_eq!((header.from_port, header.to_port), (77, 9));
    deliver(&mut sockets, buffer, packet(operation::RST, 9, 77), &[]);
    assert!(take(&mut sockets, buffer, 0).is_none(), "never RST for RST");
}
