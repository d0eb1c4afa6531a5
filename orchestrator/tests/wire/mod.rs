//! Network namespaces of a test's own: each guest is a namespace at the other end of a veth pair, which stands
//! for its tap.
#![allow(dead_code)] // Each test file uses its own part.

use std::process::Command;
use std::time::{Duration, Instant};

use crate::daemon::{Daemon, until};

/// Set in the process that has namespaces of its own.
const INSIDE: &str = "STILLPOINT_TEST_WIRES";
pub(crate) const NAME: &str =
    "http://169.254.169.254/metadata/instance/compute/name?api-version=2021-12-13&format=text";

/// Runs the test `name` once more in namespaces of its own. Gives whether this is that process; in
/// the other one the test is done by then, or skipped.
pub(crate) fn is_inside(name: &str) -> bool {
    if std::env::var_os(INSIDE).is_some() {
        return true;
    }
    if let Some(reason) = missing() {
        skip(name, &reason);
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

/// Says that a test is skipped; it is counted as such.
pub(crate) fn skip(name: &str, reason: &str) {
    use std::io::Write;
    let line = format!("SKIPPED {name}: {reason}\n");
    eprint!("{line}");
    if let Some(path) = std::env::var_os("STILLPOINT_SKIPPED") {
        let file = std::fs::OpenOptions::new()
            .append(true)
            .create(true)
            .open(path);
        let _ = file.and_then(|mut file| file.write_all(line.as_bytes()));
    }
}

/// Why it can't be tested here.
pub(crate) fn missing() -> Option<String> {
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

pub(crate) fn sh(script: &str) -> String {
    let output = Command::new("sh")
        .args(["-ec", script])
        .output()
        .expect("sh");
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{script}: {error}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// A guest's namespace, with `eth0` at the other end of `tN`.
pub(crate) fn guest(number: u32, address: &str, mac: &str) {
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

/// What a guest is answered; `None` if it is not, within 3 s.
pub(crate) fn curl(guest: u32, url: &str) -> Option<String> {
    curl_within(guest, url, 3)
}

/// The same, within so many seconds.
pub(crate) fn curl_within(guest: u32, url: &str, seconds: u32) -> Option<String> {
    let seconds = seconds.to_string();
    let output = Command::new("ip")
        .args([
            "netns",
            "exec",
            &format!("g{guest}"),
            "curl",
            "-sS",
            "-m",
            &seconds,
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

pub(crate) fn until_served(guest: u32, name: &str) {
    until(&format!("g{guest} is served as {name}"), || {
        curl(guest, NAME).as_deref() == Some(name)
    });
}

/// Everything of this host's network that we could have changed. A link that goes while this looks
/// is no failure: whoever asks looks again.
pub(crate) fn network() -> String {
    sh(
        "ip -d link; ip address; ip route show table all; ip rule; sysctl -a 2>/dev/null | grep -E \
        'rp_filter|arp_|forwarding|proxy' || true; for dev in $(ls /sys/class/net); do \
        { tc qdisc show dev $dev; tc filter show dev $dev ingress; tc filter show dev $dev egress; } \
        2>/dev/null || echo gone: $dev; done",
    )
}

/// As [`network`], once links that were just made have settled.
pub(crate) fn settled_network() -> String {
    let mut last = network();
    until("the links have settled", || {
        std::thread::sleep(Duration::from_millis(100));
        let now = network();
        let settled = now == last && !now.contains("NO-CARRIER");
        last = now;
        settled
    });
    last
}

/// Waits until all is as it was.
pub(crate) fn until_as_before(before: &str) {
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        let now = network();
        if now == before {
            return;
        }
        if Instant::now() > deadline {
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
        std::thread::sleep(Duration::from_millis(50));
    }
}

pub(crate) fn run(daemon: &Daemon, name: &str, tap: &str) {
    daemon
        .run_with(name, "good", &["--net", &format!("tap={tap}")])
        .good();
}

pub(crate) fn daemon() -> Daemon {
    let daemon = Daemon::start();
    daemon.add("good", None);
    daemon.add("next", None);
    daemon
}
