//! Tests over real taps, each in a process and a network namespace of its own.

mod commands;
mod frames;
mod offloads;
mod refusals;
mod swaps;

use std::net::{Ipv4Addr, UdpSocket};
use std::process::Command;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use stillpoint_control::spec::NetSpec;
use vm_memory::{Bytes, GuestAddress};

use super::tap::Tap;
use super::{HEADER, Net};
use crate::devices::virtio::driver::{Driver, FREE, PATIENCE, Ring, Used, buffer};
use crate::memory::Memory;

/// The machine's address, as its spec has it.
const MAC: [u8; 6] = [0x02, 0, 0, 0, 0, 0x02];
/// The tap's own address, on the host's side.
const HOST_MAC: [u8; 6] = [0x02, 0, 0, 0, 0, 0x01];
const HOST: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 1);
const GUEST: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 2);
const PORT: u16 = 7077;

/// `VIRTIO_NET_F_MRG_RXBUF`.
const MERGE: u64 = 1 << 15;
/// `VIRTIO_NET_F_CTRL_VQ`.
const COMMANDS: u64 = 1 << 17;

/// Set in the process in which a test runs.
const INSIDE: &str = "STILLPOINT_TEST_NETWORK";

/// A tap `t0` at 10.77.0.1, beside which 10.77.0.2 is known to live, and nothing that sends by itself.
const ONE_TAP: &str = "
    ip tuntap add dev t0 mode tap
    ip link set t0 address 02:00:00:00:00:01
    ip addr add 10.77.0.1/24 dev t0
    ip link set t0 up
    ip neigh add 10.77.0.2 lladdr 02:00:00:00:00:02 dev t0 nud permanent";

/// Runs `shell` in a network namespace of its own, and there, in another process, the test `name`
/// of `module` once more. Gives whether this is that process. Where no such namespace can be had
/// the test is skipped by name.
fn in_own_network(module: &str, name: &str, shell: &str) -> bool {
    if std::env::var_os(INSIDE).is_some() {
        return true;
    }
    let path = module.split_once("::").map_or(module, |(_, path)| path);
    let name = format!("{path}::{name}");
    let how = ["-nm", "-rnm"].into_iter().find(|how| {
        let tried = Command::new("unshare")
            .args([how, "ip", "tuntap", "add", "dev", "t0", "mode", "tap"])
            .output();
        tried.is_ok_and(|output| output.status.success())
    });
    let Some(how) = how else {
        eprintln!("SKIPPED {name}: no tap in a network namespace of our own to be had");
        return false;
    };
    // Frames that the host sends by itself would only be in the way.
    let quiet = "for f in /proc/sys/net/ipv6/conf/*/disable_ipv6; do echo 1 > $f; done";
    let script = format!("set -e\n{quiet}\n{shell}\nexec \"$@\"");
    let output = Command::new("unshare")
        .args([how, "sh", "-c", &script, "sh"])
        .arg(std::env::current_exe().expect("own path"))
        .args(["--exact", &name, "--nocapture"])
        .env(INSIDE, "1")
        .output()
        .expect("unshare");
    let said = String::from_utf8_lossy(&output.stdout);
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success() && said.contains("1 passed"),
        "{said}\n{error}"
    );
    false
}

/// Runs the rest of the test only in a network of its own, set up by the shell commands given.
macro_rules! own_network {
    ($name:literal, $shell:expr) => {
        if !super::in_own_network(module_path!(), $name, $shell) {
            return;
        }
    };
}
use own_network;

fn ip(arguments: &str) {
    let arguments = arguments.split_whitespace();
    let status = Command::new("ip").args(arguments).status().expect("ip");
    assert!(status.success());
}

fn spec(tap: &str, queue_pairs: u8) -> NetSpec {
    NetSpec {
        tap: tap.into(),
        mac: None,
        queue_pairs,
    }
}

/// A device over the tap, which the host finds up: its carrier shows a moment after the opening.
fn boot(tap: &str, pairs: u8) -> Driver {
    let opened = Tap::open(&spec(tap, pairs)).expect("tap");
    let driver = Driver::boot("net0", Box::new(Net::new(opened, MAC)));
    let deadline = Instant::now() + PATIENCE;
    loop {
        let shown = Command::new("ip")
            .args(["-o", "link", "show", tap])
            .output();
        let shown = shown.expect("ip").stdout;
        if String::from_utf8_lossy(&shown).contains("state UP") {
            return driver;
        }
        assert!(Instant::now() < deadline, "the tap has no carrier");
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn swap(driver: Driver) -> Driver {
    driver.swap(|state, files| {
        let mut queues = files.take_all("net0/tap");
        queues.sort_by(|a, b| a.0.cmp(&b.0));
        let tap = Tap::adopt(queues.into_iter().map(|(_, queue)| queue).collect());
        Box::new(Net::restore(tap, MAC, "net0", state).expect("restore"))
    })
}

fn host_socket() -> UdpSocket {
    let socket = UdpSocket::bind((HOST, PORT)).expect("bind");
    socket.set_read_timeout(Some(PATIENCE)).expect("timeout");
    socket.connect((GUEST, PORT)).expect("a route to the guest");
    socket
}

/// A frame that came to the guest.
#[derive(Debug)]
struct Frame {
    header: [u8; HEADER],
    bytes: Vec<u8>,
    /// How many buffers it came in.
    buffers: usize,
}

impl Frame {
    fn payload(&self) -> &[u8] {
        &self.bytes[42..]
    }

    fn is_udp(&self) -> bool {
        self.bytes.len() >= 42 && self.bytes[12..14] == [8, 0] && self.bytes[23] == 17
    }
}

/// A receive queue from the driver's side.
#[derive(Debug)]
struct Receiver {
    ring: Ring,
    memory: Memory,
    base: u64,
    size: u32,
    /// Where the buffer of each descriptor is.
    places: Vec<u64>,
    posted: u64,
    free: Vec<u64>,
    /// Whether buffers go back into the ring as soon as they were read.
    refill: bool,
}

impl Receiver {
    fn new(memory: &Memory, ring: Ring, base: u64, count: u64, size: u32) -> Self {
        let mut receiver = Self {
            ring,
            memory: memory.clone(),
            base,
            size,
            places: vec![0; 1024],
            posted: 0,
            free: Vec::new(),
            refill: true,
        };
        receiver.post(count);
        receiver
    }

    fn post(&mut self, count: u64) {
        for _ in 0..count {
            let place = self.free.pop().unwrap_or_else(|| {
                self.posted += 1;
                self.base + (self.posted - 1) * u64::from(self.size)
            });
            let head = self.ring.add(&[], &[buffer(place, self.size)]);
            self.places[usize::from(head)] = place;
        }
        self.ring.kick();
    }

    /// The next UDP frame; waits for it by interrupt.
    fn frame(&mut self) -> Frame {
        self.try_frame(PATIENCE).expect("a frame")
    }

    fn try_frame(&mut self, patience: Duration) -> Option<Frame> {
        loop {
            let frame = self.any_frame(patience)?;
            if frame.is_udp() {
                return Some(frame);
            }
        }
    }

    fn any_frame(&mut self, patience: Duration) -> Option<Frame> {
        let first = self.ring.try_wait(patience)?;
        Some(self.read(first))
    }

    /// Reads a frame whose first buffer has come back.
    fn read(&mut self, mut used: Used) -> Frame {
        let mut header = [0; HEADER];
        let mut bytes = Vec::new();
        let mut buffers = 0;
        loop {
            let place = self.places[usize::from(used.head)];
            let mut part = vec![0; used.len as usize];
            let read = self.memory.read_slice(&mut part, GuestAddress(place));
            read.expect("in RAM");
            self.free.push(place);
            if buffers == 0 {
                header.copy_from_slice(&part[..HEADER]);
                part.drain(..HEADER);
            }
            bytes.extend(part);
            buffers += 1;
            if buffers == usize::from(u16::from_le_bytes([header[10], header[11]])) {
                break;
            }
            // A driver may rely on it: those of one frame come together.
            used = self.ring.take().expect("the whole of a frame at once");
        }
        if self.refill {
            self.post(buffers as u64);
        }
        Frame {
            header,
            bytes,
            buffers,
        }
    }
}

/// A transmit queue from the driver's side.
#[derive(Debug)]
struct Sender {
    ring: Ring,
    memory: Memory,
    base: u64,
}

impl Sender {
    fn new(memory: &Memory, ring: Ring, base: u64) -> Self {
        Self {
            ring,
            memory: memory.clone(),
            base,
        }
    }

    /// Sends a frame and waits until its buffer came back. Header and frame are in pieces of
    /// `piece` bytes.
    fn send_in(&mut self, header: [u8; HEADER], frame: &[u8], piece: usize) {
        let mut whole = header.to_vec();
        whole.extend(frame);
        let write = self.memory.write_slice(&whole, GuestAddress(self.base));
        write.expect("in RAM");
        let pieces = whole.chunks(piece).scan(self.base, |at, piece| {
            let here = *at;
            *at += piece.len() as u64;
            Some(buffer(here, piece.len() as u32))
        });
        self.ring.add(&pieces.collect::<Vec<_>>(), &[]);
        self.ring.kick();
        assert_eq!(self.ring.wait().len, 0);
    }

    fn send(&mut self, frame: &[u8]) {
        self.send_in([0; HEADER], frame, usize::MAX);
    }
}

/// Receiver, sender and the commands' ring of a device with one pair of queues.
fn card(driver: &Driver, features: u64) -> (Receiver, Sender, Ring) {
    let mut rings = driver.start(features).into_iter();
    let mut next = || rings.next().expect("three queues");
    let size = if features & MERGE != 0 {
        1526
    } else {
        66 << 10
    };
    let receiver = Receiver::new(&driver.memory, next(), FREE, 128, size);
    (
        receiver,
        Sender::new(&driver.memory, next(), 32 << 20),
        next(),
    )
}

/// A UDP datagram from the guest to the host, as a frame. Without a checksum, as IPv4 allows.
fn datagram(payload: &[u8]) -> Vec<u8> {
    let mut frame = ethernet_ip(17, 8 + payload.len());
    frame.extend(PORT.to_be_bytes());
    frame.extend(PORT.to_be_bytes());
    frame.extend(((8 + payload.len()) as u16).to_be_bytes());
    frame.extend([0, 0]);
    frame.extend(payload);
    frame
}

/// Ethernet's and IP's header from the guest to the host.
fn ethernet_ip(protocol: u8, len: usize) -> Vec<u8> {
    let mut frame = [HOST_MAC, MAC].concat();
    frame.extend([0x08, 0x00]);
    let mut ip = vec![0x45, 0];
    ip.extend(((20 + len) as u16).to_be_bytes());
    ip.extend([0, 0, 0x40, 0, 64, protocol, 0, 0]);
    ip.extend(GUEST.octets());
    ip.extend(HOST.octets());
    let sum = !sum(&ip);
    ip[10..12].copy_from_slice(&sum.to_be_bytes());
    frame.extend(ip);
    frame
}

/// The internet's checksum, not inverted.
fn sum(bytes: &[u8]) -> u16 {
    let words = bytes.chunks(2);
    let words = words.map(|word| u32::from(word[0]) << 8 | u32::from(*word.get(1).unwrap_or(&0)));
    let mut sum: u32 = words.sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

/// Whether a UDP frame's checksum is right.
fn checksum_is_right(frame: &Frame) -> bool {
    let mut all = frame.bytes[26..34].to_vec();
    all.extend([0, 17]);
    all.extend(&frame.bytes[38..40]);
    all.extend(&frame.bytes[34..]);
    sum(&all) == 0xffff
}

/// A host socket's next datagram, or `None` after a while.
fn received(socket: &UdpSocket) -> Option<Vec<u8>> {
    let mut bytes = vec![0; 1 << 16];
    let len = match socket.recv(&mut bytes) {
        Ok(len) => len,
        Err(error) => {
            let errno = Errno::from_io_error(&error);
            assert!(matches!(errno, Some(Errno::AGAIN)), "{error}");
            return None;
        }
    };
    bytes.truncate(len);
    Some(bytes)
}
