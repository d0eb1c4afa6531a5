//! Taps that can't be had, and saved state that can't be.

use super::*;
use crate::devices::Device;
use crate::devices::virtio::net::tap::TapError;
use stillpoint_state::sections::VirtioNet;
use stillpoint_state::{Saved, Unclaimed};

fn refusal(tap: &str, pairs: u8) -> String {
    Tap::open(&spec(tap, pairs))
        .expect_err("must be refused")
        .to_string()
}

#[test]
fn taps_that_can_not_be_had_are_refused_by_field() {
    const SHELL: &str = "
        ip tuntap add dev one mode tap
        ip tuntap add dev four mode tap multi_queue
        ip tuntap add dev routed mode tun
        ip link add br0 type bridge";
    own_network!("taps_that_can_not_be_had_are_refused_by_field", SHELL);
    let text = refusal("none", 1);
    assert!(
        text.contains("`nets.tap`") && text.contains("no interface `none`"),
        "{text}"
    );
    assert!(
        text.contains("ip tuntap add dev none mode tap user"),
        "{text}"
    );
    let missing = Command::new("ip").args(["link", "show", "none"]).output();
    assert!(!missing.expect("ip").status.success(), "it was made");
    assert!(refusal("none", 2).contains("mode tap multi_queue"));
    for other in ["lo", "br0", "routed"] {
        let text = refusal(other, 1);
        assert!(
            text.contains("`nets.tap`") && text.contains("another kind"),
            "{text}"
        );
    }
    let text = refusal("one", 2);
    assert!(
        text.contains("`nets.queue_pairs`") && text.contains("one queue"),
        "{text}"
    );
    for tap in ["one", "four"] {
        let first = Tap::open(&spec(tap, 1)).expect("free");
        let text = refusal(tap, 1);
        assert!(
            text.contains("`nets.tap`") && text.contains("another process"),
            "{text}"
        );
        drop(first);
        Tap::open(&spec(tap, 1)).expect("free again");
    }
}

#[test]
fn somebody_elses_tap_is_refused() {
    const SHELL: &str = "
        ip tuntap add dev theirs mode tap user 4242
        set -- setpriv --bounding-set -net_admin --inh-caps -net_admin \"$@\"";
    own_network!("somebody_elses_tap_is_refused", SHELL);
    let error = Tap::open(&spec("theirs", 1)).expect_err("must be refused");
    assert!(matches!(error, TapError::NotOurs { .. }), "{error}");
    let text = error.to_string();
    assert!(text.contains("uid 0 may not attach to `theirs`"), "{text}");
}

#[test]
fn a_host_without_taps_says_what_to_do() {
    const SHELL: &str = "
        ip tuntap add dev t0 mode tap
        mount -t tmpfs none /dev";
    own_network!("a_host_without_taps_says_what_to_do", SHELL);
    let text = refusal("t0", 1);
    assert!(
        text.contains("/dev/net/tun") && text.contains("modprobe tun"),
        "{text}"
    );
}

fn section(driver: &Driver) -> VirtioNet {
    driver.stand_still(PATIENCE).expect("rest");
    let mut state = Unclaimed::decode(&driver.saved()).expect("decode");
    driver.device.resume();
    state.take("net0").expect("its section")
}

#[test]
fn saved_state_that_can_not_be_is_refused() {
    own_network!("saved_state_that_can_not_be_is_refused", ONE_TAP);
    let driver = boot("t0", 1);
    let (_receiver, _, _) = card(&driver, MERGE);
    let good = section(&driver);
    let restore = |section: &VirtioNet| {
        let mut saved = Saved::default();
        saved.put("net0", section).expect("put");
        let mut state = Unclaimed::decode(&saved.finish(3, "", "", 0)).expect("decode");
        let tap = Tap::adopt(vec![rustix::pipe::pipe().expect("any file").0]);
        Net::restore(tap, MAC, "net0", &mut state).map(drop)
    };
    restore(&good).expect("as it was saved");
    type Change = fn(&mut VirtioNet);
    let changes: [Change; 9] = [
        |s| s.mac.truncate(5),
        |s| s.mtu = 1 << 16,
        |s| s.features = 1 << 60,
        |s| s.offloads = 1 << 1,
        |s| s.active_pairs = 0,
        |s| s.active_pairs = 2,
        |s| s.held.clear(),
        |s| s.held = vec![vec![0; 1 << 20]],
        |s| s.held.push(Vec::new()),
    ];
    for (number, change) in changes.iter().enumerate() {
        let mut bad = good.clone();
        change(&mut bad);
        let error = restore(&bad).expect_err("must be refused").to_string();
        assert!(error.contains("net0"), "{number}: {error}");
    }
}
