//! What a guest finds of its host: TCP port 80 at 169.254.169.254, and what its owner opened. In network
//! namespaces of the test's own, each of which shows first that without a fence all of it can be reached.

mod daemon;
mod wire;

use std::io::{Read, Write};
use std::net::{
    IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6, TcpListener, TcpStream, UdpSocket,
};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use daemon::{Daemon, until};
use rustix::net::netdevice::name_to_index;
use rustix::net::sockopt::{Timeout, set_ipv6_multicast_loop, set_socket_timeout};
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, ipproto, recv, sendto,
    socket_with,
};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use wire::{daemon, guest, is_inside, sh, until_served};

const PATIENCE: Duration = Duration::from_secs(20);
/// How long nothing must come. What is dropped never comes; on a machine that is slow this only finds
/// less.
const SILENCE: Duration = Duration::from_millis(700);

/// Addresses of the host as a guest may try them: on the tap, on another interface, of the link.
const ADDRESSES: [&str; 5] = ["10.0.0.1", "192.0.2.7", "169.254.7.7", "fd00::1", "fe80::1"];
/// All that are on a link.
const ALL_NODES: &str = "ff02::1";

/// A service of the host, on all of its addresses: TCP and UDP, each counted.
struct Service {
    port: u16,
    tcp: Arc<AtomicUsize>,
    udp: Arc<AtomicUsize>,
}

impl Service {
    fn start(port: u16) -> Self {
        let listener = TcpListener::bind(("::", port)).expect("a port of the host");
        let port = listener.local_addr().expect("its number").port();
        let socket = UdpSocket::bind(("::", port)).expect("the same of UDP");
        let service = Self {
            port,
            tcp: Arc::default(),
            udp: Arc::default(),
        };
        let (tcp, udp) = (service.tcp.clone(), service.udp.clone());
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                tcp.fetch_add(1, Ordering::SeqCst);
                drop(stream);
            }
        });
        std::thread::spawn(move || {
            while socket.recv_from(&mut [0; 64]).is_ok() {
                udp.fetch_add(1, Ordering::SeqCst);
            }
        });
        service
    }

    fn counts(&self) -> (usize, usize) {
        (
            self.tcp.load(Ordering::SeqCst),
            self.udp.load(Ordering::SeqCst),
        )
    }
}

/// Does it where guest `guest` is.
fn in_guest<T: Send + 'static>(guest: u32, act: impl FnOnce() -> T + Send + 'static) -> T {
    let thread = std::thread::spawn(move || {
        let file = std::fs::File::open(format!("/run/netns/g{guest}")).expect("its namespace");
        move_into_link_name_space(file.as_fd(), Some(LinkNameSpaceType::Network))
            .expect("enter it");
        act()
    });
    thread.join().expect("it does not panic")
}

/// As a guest writes it; of the link, on its `eth0`. Only where the guest is.
fn address(text: &str, port: u16) -> SocketAddr {
    let socket = socket_with(
        AddressFamily::INET,
        SocketType::DGRAM,
        SocketFlags::CLOEXEC,
        None,
    );
    let eth0 = socket
        .and_then(|socket| name_to_index(socket, "eth0"))
        .expect("eth0");
    match text.parse::<IpAddr>().expect("an address") {
        IpAddr::V4(address) => SocketAddr::from((address, port)),
        IpAddr::V6(address) => SocketAddr::V6(SocketAddrV6::new(address, port, 0, eth0)),
    }
}

fn connects(guest: u32, host: &'static str, port: u16, patience: Duration) -> bool {
    in_guest(guest, move || {
        TcpStream::connect_timeout(&address(host, port), patience).is_ok()
    })
}

fn sends(guest: u32, host: &'static str, port: u16) {
    in_guest(guest, move || {
        let to = address(host, port);
        let any: IpAddr = match to {
            SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
            SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
        };
        let socket = UdpSocket::bind((any, 0)).expect("a socket");
        socket.set_broadcast(true).expect("broadcasts");
        // What can't even be sent does not arrive.
        let _ = socket.send_to(b"x", to);
    });
}

/// Whether an echo request is answered in this time, by whomever.
fn pings(guest: u32, host: &'static str, patience: Duration) -> bool {
    in_guest(guest, move || {
        let to = address(host, 0);
        let (family, protocol, kind, reply) = match to {
            SocketAddr::V4(_) => (AddressFamily::INET, ipproto::ICMP, 8, 0),
            SocketAddr::V6(_) => (AddressFamily::INET6, ipproto::ICMPV6, 128, 129),
        };
        let flags = SocketFlags::CLOEXEC;
        let socket = socket_with(family, SocketType::RAW, flags, Some(protocol)).expect("a socket");
        // Not to oneself: a guest is of all nodes too.
        if to.is_ipv6() {
            set_ipv6_multicast_loop(&socket, false).expect("an option");
        }
        // Number 0x5350 twice; its checksum, which the kernel itself makes for IPv6.
        let [high, low] = (!(0xa6a0_u16.wrapping_add(u16::from(kind) << 8))).to_be_bytes();
        let request = [kind, 0, high, low, 0x53, 0x50, 0x53, 0x50];
        if sendto(&socket, &request, SendFlags::empty(), &to).is_err() {
            return false;
        }
        let end = Instant::now() + patience;
        while let Some(left) = end.checked_duration_since(Instant::now()) {
            let left = left.max(Duration::from_millis(1));
            set_socket_timeout(&socket, Timeout::Recv, Some(left)).expect("a time limit");
            let mut bytes = [0; 256];
            let Ok((length, _)) = recv(&socket, &mut bytes, RecvFlags::empty()) else {
                continue;
            };
            // Of IPv4 with its header.
            let at = if to.is_ipv4() { 20 } else { 0 };
            if bytes[..length].get(at) == Some(&reply) {
                return true;
            }
        }
        false
    })
}

/// A host with addresses of every kind, and guest 1 behind a tap that it routes, or in a bridge.
fn scene(bridged: bool) {
    guest(1, "10.0.0.2", "52:54:00:00:00:02");
    guest(2, "10.0.0.3", "52:54:00:00:00:03");
    let device = if bridged { "b0" } else { "t1" };
    if bridged {
        sh("ip link add b0 type bridge
            ip link set t1 master b0
            ip link set t2 master b0
            ip link set b0 addrgenmode none up");
    }
    sh(&format!(
        "ip link set lo up
         ip address add 10.0.0.1/24 dev {device}
         ip address add 169.254.7.7/16 dev {device}
         ip -6 address add fd00::1/64 dev {device} nodad
         ip -6 address add fe80::1/64 dev {device} nodad
         ip link add d0 type bridge
         ip address add 192.0.2.7/24 dev d0
         ip link set d0 up
         ip -n g1 -6 address add fd00::2/64 dev eth0 nodad
         ip -n g1 route add 169.254.0.0/16 dev eth0
         ip -n g1 route add default via 10.0.0.1"
    ));
}

fn run(daemon: &Daemon, name: &str, tap: &str, reach: &str) {
    let net = format!("tap={tap}");
    daemon
        .run_with(name, "good", &["--net", &net, "--reach", reach])
        .good();
}

/// All of the host that this guest finds.
fn found(service: &Service, guest: u32, patience: Duration) -> Vec<String> {
    let mut found = Vec::new();
    for address in ADDRESSES {
        let (_, before) = service.counts();
        sends(guest, address, service.port);
        if connects(guest, address, service.port, patience) {
            found.push(format!("tcp {address}"));
        }
        if pings(guest, address, patience) {
            found.push(format!("ping {address}"));
        }
        if service.counts().1 > before {
            found.push(format!("udp {address}"));
        }
    }
    found
}

/// There are many ways to all the addresses, and none of them is left.
fn a_scan_finds_one_port(bridged: bool) {
    scene(bridged);
    let service = Service::start(0);
    let mut open = Vec::new();
    until("an open host is found", || {
        open = found(&service, 1, PATIENCE);
        open.len() == ADDRESSES.len() * 3
    });
    assert!(pings(1, ALL_NODES, PATIENCE), "{open:?}");
    let (_, before) = service.counts();
    until("a frame with a tag is taken", || {
        sends_tagged([192, 0, 2, 7], service.port);
        service.counts().1 > before
    });
    let daemon = daemon();
    run(&daemon, "one", "t1", "none");
    until_served(1, "one");
    assert_eq!(found(&service, 1, SILENCE), [""; 0]);
    for port in [22, 53, 443, service.port] {
        assert!(!connects(1, "169.254.169.254", port, SILENCE), "{port}");
    }
    assert!(!pings(1, "169.254.169.254", SILENCE));
    assert!(connects(1, "169.254.169.254", 80, PATIENCE));
    if bridged {
        until("its neighbour says that it is there", || {
            pings(1, ALL_NODES, Duration::from_secs(1))
        });
    } else {
        assert!(
            !pings(1, ALL_NODES, SILENCE),
            "the host says that it is there"
        );
    }
    let before = service.counts();
    for to_many in ["255.255.255.255", "10.0.0.255", ALL_NODES] {
        sends(1, to_many, service.port);
    }
    sends_tagged([192, 0, 2, 7], service.port);
    std::thread::sleep(SILENCE);
    assert_eq!(service.counts(), before);
    the_host_reaches_its_guest();
    daemon.ask(&["stop", "one", "--now"]).good();
    until("the host is open again", || {
        connects(1, "192.0.2.7", service.port, Duration::from_secs(1))
    });
}

/// Sends a datagram to that address of the host in a frame with a tag of VLAN 0, which makes the same frame
/// of another.
fn sends_tagged(host: [u8; 4], port: u16) {
    let mac = sh("ip -n g1 neighbour show 10.0.0.1 dev eth0 | sed 's/.*lladdr //; s/ .*//'");
    let bytes = mac
        .trim()
        .split(':')
        .map(|byte| u8::from_str_radix(byte, 16));
    let mut frame: Vec<u8> = bytes.collect::<Result<_, _>>().expect("a MAC");
    frame.extend([0x52, 0x54, 0, 0, 0, 2, 0x81, 0, 0, 0, 8, 0]);
    // IPv4 with a checksum, and UDP without.
    let mut header = [
        0x45, 0, 0, 29, 0, 0, 0, 0, 64, 17, 0, 0, 10, 0, 0, 2, 0, 0, 0, 0,
    ];
    header[16..].copy_from_slice(&host);
    let words = header
        .chunks(2)
        .map(|word| u32::from(u16::from_be_bytes([word[0], word[1]])));
    let sum: u32 = words.sum();
    let sum = !u16::try_from((sum & 0xffff) + (sum >> 16)).expect("one carry");
    header[10..12].copy_from_slice(&sum.to_be_bytes());
    frame.extend(header);
    let [high, low] = port.to_be_bytes();
    frame.extend([0x12, 0x34, high, low, 0, 9, 0, 0, b'x']);
    let frame: String = frame.iter().map(|byte| format!("{byte:02x}")).collect();
    sh(&format!(
        "ip netns exec g1 python3 -c \"import socket
s = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
s.bind(('eth0', 0))
s.send(bytes.fromhex('{frame}'))\""
    ));
}

fn the_host_reaches_its_guest() {
    let port = in_guest(1, || {
        let listener = TcpListener::bind("10.0.0.2:0").expect("a port of the guest");
        let port = listener.local_addr().expect("its number").port();
        std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().expect("a connection");
            stream.write_all(b"hello").expect("said");
        });
        port
    });
    let mut stream = TcpStream::connect_timeout(&([10, 0, 0, 2], port).into(), PATIENCE);
    let mut said = String::new();
    let heard = stream
        .as_mut()
        .map(|stream| stream.read_to_string(&mut said));
    assert!(heard.is_ok(), "{heard:?}");
    assert_eq!(said, "hello");
}

#[test]
fn a_scan_from_a_routed_tap_finds_one_port() {
    if is_inside("a_scan_from_a_routed_tap_finds_one_port") {
        a_scan_finds_one_port(false);
    }
}

#[test]
fn a_scan_from_a_bridged_tap_finds_one_port() {
    if is_inside("a_scan_from_a_bridged_tap_finds_one_port") {
        a_scan_finds_one_port(true);
    }
}

/// What the host forwards is not its own.
#[test]
fn others_are_reached_through_the_host() {
    if !is_inside("others_are_reached_through_the_host") {
        return;
    }
    scene(true);
    guest(3, "10.3.0.2", "52:54:00:00:00:04");
    sh("ip address add 10.3.0.1/24 dev t3
        ip -n g3 route add default via 10.3.0.1
        echo 1 >/proc/sys/net/ipv4/ip_forward");
    let daemon = daemon();
    run(&daemon, "one", "t1", "none");
    run(&daemon, "two", "t2", "none");
    run(&daemon, "three", "t3", "none");
    until_served(1, "one");
    until_served(3, "three");
    let second = Duration::from_secs(1);
    until("a neighbour in the bridge", || pings(1, "10.0.0.3", second));
    until("another network by the host's routes", || {
        pings(1, "10.3.0.2", second)
    });
    until("and from there", || pings(3, "10.0.0.2", second));
    for own in ["10.0.0.1", "10.3.0.1"] {
        assert!(!pings(3, own, SILENCE), "the host's own {own}");
    }
    // What is sent to many still comes to the neighbours.
    let heard = in_guest(2, || {
        UdpSocket::bind("0.0.0.0:9").expect("a port of the neighbour")
    });
    heard
        .set_read_timeout(Some(Duration::from_millis(100)))
        .expect("a time limit");
    until("a broadcast comes to the neighbour", || {
        sends(1, "10.0.0.255", 9);
        heard.recv_from(&mut [0; 8]).is_ok()
    });
}

/// A host may be a guest itself, with a metadata service at the same address, and secrets there. Its guests don't get as far, also
/// while their own way is not up.
#[test]
fn metadata_of_the_host_is_not_reached() {
    if !is_inside("metadata_of_the_host_is_not_reached") {
        return;
    }
    const SERVICE: &str = "169.254.169.254";
    scene(false);
    guest(3, "10.3.0.2", "52:54:00:00:00:04");
    sh("ip address add 10.3.0.1/24 dev t3
        ip -n g3 address add 169.254.169.254/32 dev eth0
        ip -n g3 route add default via 10.3.0.1
        ip route add 169.254.169.254/32 via 10.3.0.2
        ip -n g1 route add 169.254.169.254/32 via 10.0.0.1
        echo 1 >/proc/sys/net/ipv4/ip_forward");
    let listener = in_guest(3, || TcpListener::bind((SERVICE, 0)).expect("a port"));
    let port = listener.local_addr().expect("its address").port();
    let second = Duration::from_secs(1);
    until("the host's own service", || {
        connects(1, SERVICE, port, second)
    });
    let daemon = daemon();
    run(&daemon, "one", "t1", "none");
    until_served(1, "one");
    assert!(!connects(1, SERVICE, port, SILENCE), "by its way");
    // As between a guest's first instruction and its way.
    sh("tc qdisc delete dev t1 clsact");
    assert!(!connects(1, SERVICE, port, SILENCE), "without one");
    assert!(pings(1, "10.3.0.2", second), "all else as before");
}

/// What its owner opened a guest reaches, and no more; and what is opened for one is closed for another.
#[test]
fn what_is_opened_is_reached() {
    if !is_inside("what_is_opened_is_reached") {
        return;
    }
    scene(true);
    sh("ip -n g2 route add default via 10.0.0.1");
    let (dhcp, dns, own) = (Service::start(67), Service::start(53), Service::start(0));
    let other = Service::start(0);
    let daemon = daemon();
    run(
        &daemon,
        "one",
        "t1",
        &format!("dhcp,dns,ping,tcp/{}", own.port),
    );
    run(&daemon, "two", "t2", "none");
    until_served(1, "one");
    until("a lease is asked for", || {
        sends(1, "255.255.255.255", 67);
        sends(1, "10.0.0.1", 67);
        dhcp.counts().1 > 0
    });
    let second = Duration::from_secs(1);
    until("a name is asked for", || {
        sends(1, "10.0.0.1", 53);
        dns.counts().1 > 0
    });
    until("and by TCP", || connects(1, "10.0.0.1", 53, second));
    until("its own port", || connects(1, "10.0.0.1", own.port, second));
    until("a ping", || {
        pings(1, "10.0.0.1", second) && pings(1, "fd00::1", second)
    });
    assert!(
        !connects(1, "10.0.0.1", other.port, SILENCE),
        "what is not opened"
    );
    assert!(!connects(1, "10.0.0.1", 67, SILENCE), "DHCP is not TCP");
    sends(1, "10.0.0.1", own.port);
    let heard = dhcp.counts();
    sends(2, "255.255.255.255", 67);
    assert!(!connects(2, "10.0.0.1", own.port, SILENCE) && !pings(2, "10.0.0.1", SILENCE));
    assert_eq!((own.counts().1, dhcp.counts()), (0, heard));
    let said = daemon.run_with("x", "good", &["--reach", "tcp/0"]);
    assert!(!said.ok, "there is no port 0");
}

/// A daemon's end opens nothing, and its start is no gap: the guest tries all the while.
#[test]
fn no_gap_while_the_daemon_starts_anew() {
    if !is_inside("no_gap_while_the_daemon_starts_anew") {
        return;
    }
    scene(false);
    let service = Service::start(0);
    let mut daemon = daemon();
    daemon.add("taken", Some("crash-at-start"));
    run(&daemon, "one", "t1", "none");
    until_served(1, "one");
    let before = service.counts();
    let (port, over) = (service.port, Arc::new(AtomicBool::new(false)));
    let ended = over.clone();
    let flooding = std::thread::spawn(move || {
        in_guest(1, move || {
            let socket = UdpSocket::bind("0.0.0.0:0").expect("a socket");
            while !ended.load(Ordering::SeqCst) {
                let _ = socket.send_to(b"x", ("192.0.2.7", port));
                std::thread::sleep(Duration::from_micros(200));
            }
        });
    });
    for _ in 0..2 {
        daemon.kill();
        std::thread::sleep(SILENCE);
        daemon.spawn();
        until_served(1, "one");
    }
    // A VM that wants the same tap won't run, and opens nothing.
    let (code, _) = daemon
        .run_with("thief", "taken", &["--net", "tap=t1", "--reach", "all"])
        .bad();
    assert!(!code.is_empty());
    over.store(true, Ordering::SeqCst);
    flooding.join().expect("it does not panic");
    assert_eq!(service.counts(), before);
    // What ends while no daemon is there leaves nothing either.
    let pid = daemon.vmm_pid("one");
    daemon.kill();
    sh(&format!("kill -9 {pid}"));
    daemon.spawn();
    until("the host is open again", || {
        connects(1, "192.0.2.7", service.port, Duration::from_secs(1))
    });
    assert!(!sh("tc qdisc show dev t1").contains("clsact"));
}
