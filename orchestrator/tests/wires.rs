//! Guests' wires, in network namespaces of the test's own: each guest is a namespace at the other end of a
//! veth pair, which stands for its tap, and asks with `curl`.

mod daemon;
mod wire;

use std::io::{Read, Write};
use std::net::TcpStream;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use daemon::until;
use serde_json::Value;
use wire::{
    NAME, curl, curl_within, daemon, guest, is_inside, run, settled_network, sh, until_as_before,
    until_served,
};

const ONE_ADDRESS: (&str, &str) = ("10.0.0.2", "52:54:00:00:00:02");

#[test]
fn two_guests_of_one_address_are_two_guests() {
    if !is_inside("two_guests_of_one_address_are_two_guests") {
        return;
    }
    for number in [1, 2] {
        guest(number, ONE_ADDRESS.0, ONE_ADDRESS.1);
        sh(&format!(
            "ip -n g{number} route add 169.254.169.254 dev eth0"
        ));
    }
    let before = settled_network();
    let daemon = daemon();
    run(&daemon, "one", "t1");
    run(&daemon, "two", "t2");
    for _ in 0..3 {
        until_served(1, "one");
        until_served(2, "two");
    }
    let events = "http://169.254.169.254/metadata/scheduledevents?api-version=2020-07-01";
    until("one listens", || curl(1, events).is_some());
    let mut swap = daemon.cli(&["swap", "vmm", "one", "--to", "next"]);
    let mut swap = swap
        .stdout(std::process::Stdio::null())
        .spawn()
        .expect("stillpoint");
    let mut seen = Value::Null;
    until("one sees its event", || {
        seen = curl(1, events)
            .and_then(|text| serde_json::from_str(&text).ok())
            .unwrap_or_default();
        seen["Events"][0]["EventStatus"] == "Scheduled"
    });
    let others = curl(2, events).expect("an answer");
    assert!(others.contains("\"Events\":[]"), "{others}");
    let id = seen["Events"][0]["EventId"].as_str().expect("an id");
    let approve = format!("-d{{\"StartRequests\":[{{\"EventId\":\"{id}\"}}]}}");
    let post = |guest: &str| {
        let curl = [
            "netns",
            "exec",
            guest,
            "curl",
            "-s",
            "-m",
            "3",
            "-f",
            "-H",
            "Metadata:true",
        ];
        let mut command = Command::new("ip");
        command
            .args(curl)
            .args([&approve, events])
            .status()
            .expect("ip")
            .success()
    };
    assert!(!post("g2"), "another's event can't be approved");
    until("the approval is taken", || post("g1"));
    assert!(swap.wait().expect("wait").success());
    until_served(1, "one");
    daemon.ask(&["stop", "one", "--now"]).good();
    until("its wire is gone", || curl(1, NAME).is_none());
    until_served(2, "two");
    daemon.ask(&["stop", "two", "--now"]).good();
    until_as_before(&before);
}

#[test]
fn a_guest_is_known_by_its_wire_whatever_it_says() {
    if !is_inside("a_guest_is_known_by_its_wire_whatever_it_says") {
        return;
    }
    guest(1, "10.0.0.2", "52:54:00:00:00:02");
    guest(2, "10.0.0.3", "52:54:00:00:00:03");
    // In a bridge, and knowing their gateway alone.
    sh("ip link add b0 type bridge
        ip link set t1 master b0
        ip link set t2 master b0
        ip link set b0 up
        ip address add 10.0.0.1/24 dev b0
        ip -n g1 route add default via 10.0.0.1
        ip -n g2 route add default via 10.0.0.1");
    let daemon = daemon();
    run(&daemon, "one", "t1");
    run(&daemon, "two", "t2");
    until_served(1, "one");
    until_served(2, "two");
    // The second takes the first one's addresses.
    sh("ip -n g2 address flush dev eth0
        ip -n g2 link set eth0 down
        ip -n g2 link set eth0 address 52:54:00:00:00:02 up
        ip -n g2 address add 10.0.0.2/24 dev eth0
        ip -n g2 route add default via 10.0.0.1
        ip -n g2 neighbour replace 10.0.0.1 lladdr $(cat /sys/class/net/b0/address) dev eth0");
    until_served(2, "two");
    until_served(1, "one");
    // Its neighbour says that the address is its own.
    sh("ip -n g2 address add 169.254.169.254/32 dev eth0");
    until_served(1, "one");
}

#[test]
fn there_is_one_port_and_nothing_of_the_host() {
    if !is_inside("there_is_one_port_and_nothing_of_the_host") {
        return;
    }
    guest(1, "10.0.0.2", "52:54:00:00:00:02");
    sh("ip -n g1 route add 169.254.169.254 dev eth0");
    let daemon = daemon();
    run(&daemon, "one", "t1");
    until_served(1, "one");
    let host = std::net::TcpListener::bind("0.0.0.0:0").expect("a port of the host");
    let port = host.local_addr().expect("its number").port();
    for port in [22, 443, port] {
        assert!(curl(1, &format!("http://169.254.169.254:{port}/")).is_none());
    }
    until_served(1, "one");
}

#[test]
fn a_daemon_that_starts_anew_serves_the_same_wires() {
    if !is_inside("a_daemon_that_starts_anew_serves_the_same_wires") {
        return;
    }
    guest(1, "10.0.0.2", "52:54:00:00:00:02");
    guest(2, "10.0.0.2", "52:54:00:00:00:02");
    for number in [1, 2] {
        sh(&format!(
            "ip -n g{number} route add 169.254.169.254 dev eth0"
        ));
    }
    // An operator's own filter on the second tap.
    sh("tc qdisc add dev t2 clsact
        ip link add sink type veth peer name drain
        ip link set sink up addrgenmode none
        ip link set drain up addrgenmode none
        tc filter add dev t2 ingress protocol ip pref 5 u32 match ip dst 192.0.2.1/32 \
           action mirred egress redirect dev sink");
    let before = settled_network();
    let mut daemon = daemon();
    run(&daemon, "one", "t1");
    run(&daemon, "two", "t2");
    until_served(1, "one");
    until_served(2, "two");
    for end in ["killed", "ended"] {
        if end == "killed" {
            daemon.kill();
        } else {
            assert!(daemon.terminate().success());
        }
        assert!(curl(1, NAME).is_none(), "nobody else answers");
        daemon.spawn();
        until_served(1, "one");
        until_served(2, "two");
    }
    for name in ["one", "two"] {
        daemon.ask(&["stop", name, "--now"]).good();
    }
    until_as_before(&before);
}

/// While the daemon is away a guest waits: its connection is made when the next one is there, without an
/// error. One that was open ends; it is not left to wait for what never comes.
#[test]
fn a_guest_waits_while_the_daemon_starts_anew() {
    if !is_inside("a_guest_waits_while_the_daemon_starts_anew") {
        return;
    }
    guest(1, ONE_ADDRESS.0, ONE_ADDRESS.1);
    sh("ip address add 10.0.0.1/24 dev t1
        ip -n g1 route add default via 10.0.0.1");
    let mut daemon = daemon();
    run(&daemon, "one", "t1");
    until_served(1, "one");
    let ask = |url: &str| {
        let mut curl = Command::new("ip");
        curl.args(["netns", "exec", "g1", "curl", "-sSf", "-m", "120"]);
        curl.args(["-H", "Metadata:true", url]);
        curl.stdout(std::process::Stdio::piped());
        curl.stderr(std::process::Stdio::null());
        curl.spawn().expect("curl")
    };
    let events = "http://169.254.169.254/metadata/scheduledevents?api-version=2020-07-01";
    for kills in [true, false] {
        until("it listens", || curl(1, events).is_some());
        let mut waiting = ask(&format!(
            "{events}&wait_for_change=true&last_etag=1&timeout_sec=300"
        ));
        std::thread::sleep(Duration::from_secs(1));
        assert!(waiting.try_wait().expect("curl").is_none(), "it waits");
        if kills {
            daemon.kill();
        } else {
            assert!(daemon.terminate().success());
        }
        let mut ended = None;
        until("what was open ends with the daemon", || {
            ended = waiting.try_wait().expect("curl");
            ended.is_some()
        });
        assert!(ended.is_some_and(|ended| !ended.success()));
        let mut asking = ask(NAME);
        std::thread::sleep(Duration::from_secs(1));
        assert!(
            asking.try_wait().expect("curl").is_none(),
            "no error meanwhile"
        );
        daemon.spawn();
        let answered = asking.wait_with_output().expect("curl");
        assert!(answered.status.success());
        assert_eq!(String::from_utf8_lossy(&answered.stdout), "one");
    }
}

/// Set in the process that floods.
const FLOOD: &str = "STILLPOINT_TEST_FLOOD";
const FLOOD_TIME: Duration = Duration::from_secs(6);

/// Everything a hostile guest can think of, at once; how many requests it sent.
fn flood() -> u64 {
    let end = Instant::now() + FLOOD_TIME;
    let sent = Arc::new(AtomicU64::new(0));
    let one =
        "GET /metadata/scheduledevents?api-version=2020-07-01 HTTP/1.1\r\nMetadata: true\r\n\r\n";
    let kinds: [Vec<u8>; 4] = [
        one.repeat(500).into_bytes(),
        // A body that never comes; a head that never ends; nothing.
        b"POST /metadata/scheduledevents?api-version=2020-07-01 HTTP/1.1\r\nMetadata: true\r\nContent-Length: 9999999\r\n\r\n{".to_vec(),
        format!("GET / HTTP/1.1\r\nX: {}", "x".repeat(1 << 20)).into_bytes(),
        Vec::new(),
    ];
    let threads: Vec<_> = (0..40)
        .map(|number| {
            // Most of them ask, the others sit.
            let bytes = kinds[if number % 2 == 0 { 0 } else { number / 2 % 4 }].clone();
            let sent = sent.clone();
            std::thread::spawn(move || {
                while Instant::now() < end {
                    let address = ([169, 254, 169, 254], 80).into();
                    let patience = Duration::from_millis(500);
                    let Ok(mut stream) = TcpStream::connect_timeout(&address, patience) else {
                        continue;
                    };
                    let _ = stream.set_write_timeout(Some(patience));
                    let _ = stream.set_read_timeout(Some(patience));
                    while Instant::now() < end && stream.write_all(&bytes).is_ok() {
                        if bytes.len() < 1000 {
                            // Sits on its connection.
                            let _ = stream.read(&mut [0]);
                            continue;
                        }
                        sent.fetch_add(500, Ordering::Relaxed);
                    }
                }
            })
        })
        .collect();
    for thread in threads {
        let _ = thread.join();
    }
    sent.load(Ordering::Relaxed)
}

fn resident_kib(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("status");
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:"))
        .expect("VmRSS");
    line.trim()
        .trim_end_matches(" kB")
        .parse()
        .expect("a number")
}

#[test]
fn a_guest_that_floods_harms_nobody_else() {
    if std::env::var_os(FLOOD).is_some() {
        println!("flood: {}", flood());
        return;
    }
    if !is_inside("a_guest_that_floods_harms_nobody_else") {
        return;
    }
    for number in [1, 2] {
        guest(number, ONE_ADDRESS.0, ONE_ADDRESS.1);
        sh(&format!(
            "ip -n g{number} route add 169.254.169.254 dev eth0"
        ));
    }
    let daemon = daemon();
    run(&daemon, "one", "t1");
    run(&daemon, "two", "t2");
    until_served(1, "one");
    until_served(2, "two");
    let before = resident_kib(daemon.pid());
    let flooding = Command::new("ip")
        .args(["netns", "exec", "g1"])
        .arg(std::env::current_exe().expect("this test"))
        .args([
            "--exact",
            "a_guest_that_floods_harms_nobody_else",
            "--nocapture",
        ])
        .env(FLOOD, "1")
        .stdout(std::process::Stdio::piped())
        .spawn()
        .expect("the flood");
    let end = Instant::now() + FLOOD_TIME;
    let (mut served, mut most, mut slowest) = (0, 0, Duration::ZERO);
    while Instant::now() < end {
        let asked = Instant::now();
        assert_eq!(
            curl_within(2, NAME, 20).as_deref(),
            Some("two"),
            "the other guest is served"
        );
        slowest = slowest.max(asked.elapsed());
        served += 1;
        daemon.show("one");
        most = most.max(resident_kib(daemon.pid()));
        // Within the other guest's own rate, also where answers come late and close together.
        std::thread::sleep(Duration::from_millis(300));
    }
    let output = flooding.wait_with_output().expect("the flood's end");
    let said = String::from_utf8_lossy(&output.stdout);
    let sent = said.lines().find_map(|line| line.split("flood: ").nth(1));
    let sent: u64 = sent.expect("a count").trim().parse().expect("a number");
    println!(
        "{sent} requests; the other guest asked {served} times, {slowest:?} at most; {before} KiB before, {most} KiB at most"
    );
    assert!(sent >= 10_000, "{sent} are no flood");
    assert!(
        served > 0 && slowest < Duration::from_secs(20),
        "{served} {slowest:?}"
    );
    assert!(most < before + 8 * 1024, "{before} KiB became {most} KiB");
    until_served(1, "one");
}
