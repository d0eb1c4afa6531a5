//! Guests' wires, in network namespaces of the test's own: each guest is a namespace at the other end of a
//! veth pair, which stands for its tap, and asks with `curl`.

mod daemon;

use std::process::Command;

use daemon::{Daemon, until};
use serde_json::Value;

/// Set in the process that has namespaces of its own.
const INSIDE: &str = "STILLPOINT_TEST_WIRES";
const NAME: &str =
    "http://169.254.169.254/metadata/instance/compute/name?api-version=2021-12-13&format=text";

/// Runs the test `name` once more in namespaces of its own. Gives whether this is that process; in
/// the other one the test is done by then, or skipped.
fn is_inside(name: &str) -> bool {
    if std::env::var_os(INSIDE).is_some() {
        return true;
    }
    if let Some(reason) = missing() {
        // Past the capture of the test's output: it is counted.
        use std::io::Write;
        let line = format!("SKIPPED {name}: {reason}\n");
        let _ = std::io::stderr().write_all(line.as_bytes());
        return false;
    }
    let output = Command::new("unshare")
        .args(["-n", "-m", "sh", "-c"])
        .arg("mount -t tmpfs none /run && mount -t sysfs none /sys && exec \"$@\"")
        .arg("sh")
        .arg(std::env::current_exe().expect("this test"))
        .args(["--exact", name, "--nocapture"])
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

/// Why it can't be tested here.
fn missing() -> Option<String> {
    let try_it = "mount -t tmpfs none /run && ip netns add a && ip link add t0 type veth peer name u0 \
        && ip link add m0 link u0 type macvlan mode passthru && tc qdisc add dev t0 clsact && tc filter \
        add dev t0 ingress protocol ip pref 1 u32 match ip dst 1.2.3.4/32 action mirred egress redirect \
        dev u0 && command -v curl";
    let tried = Command::new("unshare")
        .args(["-n", "-m", "sh", "-c", try_it])
        .output();
    match tried {
        Ok(output) if output.status.success() => None,
        Ok(output) => Some(format!(
            "no taps to lead elsewhere, or no curl: {}",
            String::from_utf8_lossy(&output.stderr).trim()
        )),
        Err(error) => Some(format!("unshare: {error}")),
    }
}

fn sh(script: &str) -> String {
    let output = Command::new("sh")
        .args(["-ec", script])
        .output()
        .expect("sh");
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{script}: {error}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// A guest's namespace, with `eth0` at the other end of `tN`.
fn guest(number: u32, address: &str, mac: &str) {
    sh(&format!(
        "ip netns add g{number}
         ip link add t{number} type veth peer name eth0 netns g{number}
         ip link set t{number} addrgenmode none
         ip link set t{number} up
         ip -n g{number} link set lo up
         ip -n g{number} link set eth0 address {mac} up
         ip -n g{number} address add {address}/24 dev eth0"
    ));
}

/// What a guest is answered; `None` if it is not.
fn curl(guest: u32, url: &str) -> Option<String> {
    let output = Command::new("ip")
        .args([
            "netns",
            "exec",
            &format!("g{guest}"),
            "curl",
            "-sS",
            "-m",
            "3",
            "-f",
        ])
        .args(["-H", "Metadata: true", url])
        .output()
        .expect("ip");
    output
        .status
        .success()
        .then(|| String::from_utf8_lossy(&output.stdout).into_owned())
}

fn until_served(guest: u32, name: &str) {
    until(&format!("g{guest} is served as {name}"), || {
        curl(guest, NAME).as_deref() == Some(name)
    });
}

/// Everything of this host's network that we could have changed.
fn network() -> String {
    sh(
        "ip -d link; ip address; ip route show table all; ip rule; sysctl -a 2>/dev/null | grep -E \
        'rp_filter|arp_|forwarding|proxy' || true; for dev in $(ls /sys/class/net); do \
        tc qdisc show dev $dev; tc filter show dev $dev ingress; tc filter show dev $dev egress; done",
    )
}

/// Waits until all is as it was.
fn until_as_before(before: &str) {
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
    loop {
        let now = network();
        if now == before {
            return;
        }
        if std::time::Instant::now() > deadline {
            let lines = |a: &str, b: &str| -> Vec<String> {
                a.lines()
                    .filter(|line| !b.contains(line))
                    .map(str::to_owned)
                    .collect()
            };
            panic!(
                "more: {:#?}\nless: {:#?}",
                lines(&now, before),
                lines(before, &now)
            );
        }
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
}

fn run(daemon: &Daemon, name: &str, tap: &str) {
    daemon
        .run_with(name, "good", &["--net", &format!("tap={tap}")])
        .good();
}

fn daemon() -> Daemon {
    let daemon = Daemon::start();
    daemon.add("good", None);
    daemon.add("next", None);
    daemon
}

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
    let before = network();
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
    let ping = "ip netns exec g1 ping -c1 -W1 169.254.169.254";
    let pinged = Command::new("sh").args(["-c", ping]).output().expect("sh");
    assert!(!pinged.status.success());
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
        tc filter add dev t2 ingress protocol ip pref 5 u32 match ip dst 192.0.2.1/32 \
           action mirred egress redirect dev sink");
    let before = network();
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
