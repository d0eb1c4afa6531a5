//! A guest's side of the protocol, no more of it than tests need.

use std::collections::VecDeque;

use vm_memory::{Bytes, GuestAddress};

use super::super::packet::{HEADER, HOST_CID, Header, Op, Ports, STREAM};
use super::*;
use crate::devices::virtio::driver::{EVENT_IDX, FREE, Ring, buffer};
use crate::memory::Memory;

/// Buffers for packets from the device, and the size of each.
const BUFFERS: u64 = 64;
const BUFFER: u64 = 4096;
/// Where packets to the device are put, and how many at a time.
const OUT: u64 = FREE + (1 << 20);
const OUT_SIZE: u64 = 512 << 10;
const OUTS: u64 = 32;
/// What the guest says that it can hold of each connection.
pub(super) const ROOM: u32 = 64 << 10;

/// A packet from the device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Packet {
    pub(super) header: Header,
    pub(super) data: Vec<u8>,
}

impl Packet {
    pub(super) fn op(&self) -> Op {
        Op::of(self.header.op).expect("an op that exists")
    }

    pub(super) fn ports(&self) -> Ports {
        Ports {
            host: self.header.from_port,
            guest: self.header.to_port,
        }
    }
}

/// The guest's end of a connection: what it must count.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Stream {
    pub(super) ports: Ports,
    /// What the guest holds at most.
    pub(super) room: u32,
    /// What its program has taken.
    pub(super) taken: u32,
    /// What it has sent.
    pub(super) sent: u32,
    pub(super) host_room: u32,
    pub(super) host_taken: u32,
}

impl Stream {
    pub(super) fn new(ports: Ports) -> Self {
        Self {
            ports,
            room: ROOM,
            ..Self::default()
        }
    }

    pub(super) fn hear(&mut self, packet: &Packet) {
        assert_eq!(packet.ports(), self.ports);
        self.host_room = packet.header.buf_alloc;
        self.host_taken = packet.header.fwd_cnt;
    }

    pub(super) fn credit(&self) -> u32 {
        self.host_room - self.sent.wrapping_sub(self.host_taken)
    }

    pub(super) fn header(&self, op: Op) -> Header {
        Header {
            from_cid: CID.into(),
            to_cid: HOST_CID,
            from_port: self.ports.guest,
            to_port: self.ports.host,
            kind: STREAM,
            op: op as u16,
            buf_alloc: self.room,
            fwd_cnt: self.taken,
            ..Header::default()
        }
    }
}

#[derive(Debug)]
pub(super) struct Guest {
    pub(super) rx: Ring,
    pub(super) tx: Ring,
    pub(super) memory: Memory,
    /// Buffers by their first descriptor.
    buffers: Vec<u64>,
    next_out: u64,
    /// Packets that the device has not given back.
    under_way: u64,
    /// Packets that came while something else was waited for.
    pub(super) waiting: VecDeque<Packet>,
}

impl Guest {
    /// Sets the device up, and gives it all buffers.
    pub(super) fn start(driver: &Driver) -> Self {
        let mut guest = Self::starve(driver);
        guest.feed(BUFFERS);
        guest
    }

    /// Sets the device up without a buffer.
    pub(super) fn starve(driver: &Driver) -> Self {
        let mut rings = driver.start(EVENT_IDX).into_iter();
        let mut ring = || rings.next().expect("three queues");
        let (rx, tx) = (ring(), ring());
        Self {
            rx,
            tx,
            memory: driver.memory.clone(),
            buffers: vec![0; 256],
            next_out: 0,
            under_way: 0,
            waiting: VecDeque::new(),
        }
    }

    /// Gives the device so many buffers.
    pub(super) fn feed(&mut self, buffers: u64) {
        for number in 0..buffers {
            self.give(FREE + number * BUFFER);
        }
        self.rx.kick();
    }

    fn give(&mut self, at: u64) {
        let head = self.rx.add(&[], &[buffer(at, BUFFER as u32)]);
        self.buffers[usize::from(head)] = at;
    }

    /// The next packet, if one is there.
    pub(super) fn poll(&mut self) -> Option<Packet> {
        let next = self.waiting.pop_front();
        next.or_else(|| self.rx.take().map(|used| self.unpack(used)))
    }

    /// The next packet.
    pub(super) fn hear(&mut self) -> Packet {
        match self.waiting.pop_front() {
            Some(packet) => packet,
            None => {
                let used = self.rx.wait();
                self.unpack(used)
            }
        }
    }

    fn unpack(&mut self, used: crate::devices::virtio::driver::Used) -> Packet {
        let at = self.buffers[usize::from(used.head)];
        let mut bytes = vec![0; used.len as usize];
        let from = GuestAddress(at);
        self.memory.read_slice(&mut bytes, from).expect("in RAM");
        self.give(at);
        self.rx.kick();
        let (header, data) = bytes.split_first_chunk::<HEADER>().expect("a header");
        let header = Header::from_bytes(header);
        assert_eq!(header.len as usize, data.len());
        assert_eq!(header.to_cid, u64::from(CID));
        Packet {
            header,
            data: data.to_vec(),
        }
    }

    /// The next packet of this op; others wait.
    pub(super) fn hear_op(&mut self, op: Op) -> Packet {
        let mut others = VecDeque::new();
        loop {
            let packet = self.hear();
            if packet.op() == op {
                others.append(&mut self.waiting);
                self.waiting = others;
                return packet;
            }
            others.push_back(packet);
        }
    }

    /// Sends a packet.
    pub(super) fn say(&mut self, header: Header, data: &[u8]) {
        while self.tx.take().is_some() {
            self.under_way -= 1;
        }
        // In order: the one that is waited for is the one whose place is wanted.
        if self.under_way == OUTS {
            self.tx.wait();
            self.under_way -= 1;
        }
        self.under_way += 1;
        let at = OUT + self.next_out % OUTS * OUT_SIZE;
        self.next_out += 1;
        let header = Header {
            len: data.len() as u32,
            ..header
        };
        self.put(at, &header.to_bytes());
        self.put(at + HEADER as u64, data);
        let mut buffers = vec![buffer(at, HEADER as u32)];
        if !data.is_empty() {
            buffers.push(buffer(at + HEADER as u64, data.len() as u32));
        }
        self.tx.add(&buffers, &[]);
        self.tx.kick();
    }

    /// Waits until the device has heard everything.
    pub(super) fn heard(&mut self) {
        while self.under_way > 0 {
            self.tx.wait();
            self.under_way -= 1;
        }
    }

    pub(super) fn put(&self, at: u64, bytes: &[u8]) {
        let at = GuestAddress(at);
        self.memory.write_slice(bytes, at).expect("in RAM");
    }

    /// Sends an empty packet of a connection.
    pub(super) fn tell(&mut self, stream: &Stream, op: Op) {
        self.say(stream.header(op), &[]);
    }

    /// Sends data.
    pub(super) fn send(&mut self, stream: &mut Stream, data: &[u8]) {
        self.say(stream.header(Op::Data), data);
        stream.sent = stream.sent.wrapping_add(data.len() as u32);
    }

    pub(super) fn shut(&mut self, stream: &Stream, flags: u32) {
        let header = Header {
            flags,
            ..stream.header(Op::Shutdown)
        };
        self.say(header, &[]);
    }

    /// Accepts the connection that a host program asks for.
    pub(super) fn accept(&mut self, port: u32) -> Stream {
        let packet = self.hear_op(Op::Request);
        assert_eq!(packet.header.from_cid, HOST_CID);
        assert_eq!(packet.header.to_port, port);
        let mut stream = Stream::new(packet.ports());
        stream.hear(&packet);
        self.tell(&stream, Op::Response);
        stream
    }

    /// Connects to a host program.
    pub(super) fn connect(&mut self, host: u32, guest: u32) -> Stream {
        let mut stream = Stream::new(Ports { host, guest });
        self.tell(&stream, Op::Request);
        let packet = self.hear_op(Op::Response);
        stream.hear(&packet);
        stream
    }

    /// The next data of a connection, taken at once.
    pub(super) fn data(&mut self, stream: &mut Stream) -> Vec<u8> {
        let packet = self.hear_op(Op::Data);
        stream.hear(&packet);
        stream.taken = stream.taken.wrapping_add(packet.header.len);
        packet.data
    }
}
