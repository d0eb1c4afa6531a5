//! The laws of devices, and frames that flow while the device is exchanged.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use super::commands::command;
use super::*;
use crate::devices::Device;
use crate::devices::virtio::driver::EVENT_IDX;

const EVERYTHING: u64 = MERGE | COMMANDS | EVENT_IDX | 1 << 1 | 1 << 2 | 1 << 7 | 1 << 23;

fn saved(driver: &Driver) -> Vec<u8> {
    driver.stand_still(PATIENCE).expect("rest");
    // Beside the interrupt that a device raises when it is let go.
    driver.acknowledge();
    let saved = driver.saved();
    driver.device.resume();
    saved
}

#[test]
fn every_change_shows_in_the_saved_form_and_comes_back() {
    own_network!(
        "every_change_shows_in_the_saved_form_and_comes_back",
        &format!("{ONE_TAP}\nip link set t0 mtu 65521")
    );
    let mut driver = boot("t0", 1);
    let mut forms = vec![saved(&driver)];
    let (mut receiver, _, mut ring) = card(&driver, EVERYTHING);
    receiver.refill = false;
    type Change = fn(&Driver, &mut Receiver, &mut Ring);
    let changes: [Change; 4] = [
        |_, _, _| {},
        |driver, _, ring| assert!(command(driver, ring, 1, 1, &[2, 1, 1, 1, 1, 1])),
        |driver, _, ring| assert!(command(driver, ring, 5, 0, &[2, 0, 0, 0, 0, 0, 0, 0])),
        |_, receiver, _| {
            // 128 buffers of 1526 bytes: two long frames have room, the third is held.
            for _ in 0..2 {
                host_socket().send(&vec![7; 60_000]).expect("send");
                receiver.frame();
            }
            host_socket().send(&vec![7; 60_000]).expect("send");
            host_socket().send(&vec![7; 60_000]).expect("send");
            receiver.frame();
        },
    ];
    for change in changes {
        change(&driver, &mut receiver, &mut ring);
        let form = saved(&driver);
        driver = swap(driver);
        assert!(saved(&driver) == form, "round trip");
        assert!(
            forms.iter().all(|other| *other != form),
            "it changed nothing"
        );
        forms.push(form);
    }
    receiver.post(100);
    assert_eq!(receiver.frame().payload(), vec![7; 60_000]);
}

#[test]
fn frozen_means_silent_and_nothing_is_lost_by_it() {
    own_network!("frozen_means_silent_and_nothing_is_lost_by_it", ONE_TAP);
    let driver = boot("t0", 1);
    let host = host_socket();
    let (mut receiver, mut sender, _) = card(&driver, MERGE | EVENT_IDX);
    host.send(b"before").expect("send");
    assert_eq!(receiver.frame().payload(), b"before");
    driver.stand_still(PATIENCE).expect("rest");
    let _ = driver.interrupted();
    host.send(b"meanwhile").expect("send");
    let frame = [vec![0; HEADER], datagram(b"out")].concat();
    let at = GuestAddress(32 << 20);
    driver.memory.write_slice(&frame, at).expect("in RAM");
    sender.ring.add(&[buffer(at.0, frame.len() as u32)], &[]);
    sender.ring.kick();
    host.set_nonblocking(true).expect("nonblocking");
    assert_eq!(received(&host), None);
    assert!(receiver.ring.take().is_none() && sender.ring.take().is_none());
    assert!(!driver.interrupted());
    driver.device.resume();
    sender.ring.wait();
    host.set_nonblocking(false).expect("blocking");
    assert_eq!(received(&host).expect("a datagram"), b"out");
    assert_eq!(receiver.frame().payload(), b"meanwhile");
}

/// Stops all threads of a test when one of them panics.
struct Stop<'s>(&'s AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.store(true, Ordering::SeqCst);
        }
    }
}

/// A guest that sends every datagram back, until told to stop.
fn echo(mut receiver: Receiver, mut sender: Sender, stop: &AtomicBool) {
    let _stop = Stop(stop);
    let mut next = 0u64;
    while !stop.load(Ordering::SeqCst) {
        let Some(frame) = receiver.try_frame(Duration::from_millis(50)) else {
            continue;
        };
        let number = frame.payload()[..8].try_into().expect("8 bytes");
        assert_eq!(
            u64::from_le_bytes(number),
            next,
            "lost or doubled on the way in"
        );
        next += 1;
        sender.send(&datagram(frame.payload()));
    }
}

#[test]
fn no_frame_is_lost_or_doubled_by_swaps_while_they_flow() {
    own_network!(
        "no_frame_is_lost_or_doubled_by_swaps_while_they_flow",
        ONE_TAP
    );
    const SWAPS: u64 = 200;
    /// Fewer than the tap's queue and the socket's buffer hold.
    const UNDER_WAY: u64 = 64;
    for features in [MERGE | EVENT_IDX, 0] {
        let mut driver = boot("t0", 1);
        let host = host_socket();
        let (receiver, sender, _) = card(&driver, features);
        let stop = AtomicBool::new(false);
        let back = AtomicU64::new(0);
        let swapped = AtomicU64::new(0);
        // The device outlives the threads: it is given back, and not dropped in here.
        let _driver = std::thread::scope(|scope| {
            scope.spawn(|| echo(receiver, sender, &stop));
            scope.spawn(|| {
                let _stop = Stop(&stop);
                let mut sent = 0u64;
                while !stop.load(Ordering::SeqCst) {
                    if sent < back.load(Ordering::SeqCst) + UNDER_WAY {
                        let payload = [sent.to_le_bytes().to_vec(), vec![9; sent as usize % 1400]];
                        host.send(&payload.concat()).expect("send");
                        sent += 1;
                    } else {
                        std::thread::yield_now();
                    }
                }
            });
            scope.spawn(|| {
                let _stop = Stop(&stop);
                while swapped.load(Ordering::SeqCst) < SWAPS && !stop.load(Ordering::SeqCst) {
                    let payload = received(&host).expect("an echo");
                    let number = payload[..8].try_into().expect("8 bytes");
                    let expected = back.load(Ordering::SeqCst);
                    assert_eq!(u64::from_le_bytes(number), expected, "lost or doubled");
                    back.fetch_add(1, Ordering::SeqCst);
                }
                stop.store(true, Ordering::SeqCst);
            });
            let _stop = Stop(&stop);
            for number in 1..=SWAPS {
                driver = swap(driver);
                // Something must get through between two swaps.
                let seen = back.load(Ordering::SeqCst);
                let deadline = Instant::now() + PATIENCE;
                while back.load(Ordering::SeqCst) == seen {
                    assert!(
                        Instant::now() < deadline,
                        "nothing comes after swap {number}"
                    );
                    std::thread::yield_now();
                }
                swapped.store(number, Ordering::SeqCst);
            }
            driver
        });
        assert!(back.load(Ordering::SeqCst) > SWAPS);
    }
}
