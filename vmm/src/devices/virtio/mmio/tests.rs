//! The transport's laws, and what drivers do that none may do. The entropy device stands behind it:
//! it keeps nothing, so all that is saved is the transport's own.

use std::time::Duration;

use stillpoint_state::sections::{VirtioMmio as Section, VirtioQueue};
use stillpoint_state::{Saved, Unclaimed};

use super::*;
use crate::devices::virtio::driver::{
    Driver, EVENT_IDX, FREE, INDIRECT, NEXT, PATIENCE, RAM, Ring, VERSION_1, WRITE, buffer, memory,
    until,
};
use crate::devices::virtio::rng::Rng;

fn boot() -> Driver {
    Driver::boot("rng", Box::new(Rng))
}

fn started() -> (Driver, Ring) {
    let driver = boot();
    let ring = driver.start(0).remove(0);
    (driver, ring)
}

/// A request that the device answers as long as it works.
fn works(ring: &mut Ring) {
    ring.add(&[], &[buffer(FREE, 16)]);
    ring.kick();
    assert_eq!(ring.wait().len, 16);
}

/// The device fails by itself, says so, does nothing, and works again after a reset.
fn fails_and_recovers(driver: &Driver) {
    until("the device to fail", || driver.has_failed());
    assert_eq!(driver.acknowledge() & 2, 2, "the driver is told");
    let mut ring = driver.start(0).remove(0);
    assert!(!driver.has_failed());
    works(&mut ring);
}

#[test]
fn tells_what_it_is() {
    let driver = boot();
    let words: Vec<u32> = [0x00, 0x04, 0x08].map(|at| driver.read(at)).into();
    assert_eq!(words, [0x7472_6976, 2, 4]);
    assert_eq!(driver.offered(), VERSION_1 | EVENT_IDX | 1 << 28);
    assert_eq!(driver.read(0xb0), u32::MAX, "no shared memory");
    assert_eq!(driver.config(0, 8), [0; 8]);
    driver.write(0x30, 1);
    assert_eq!(driver.read(0x34), 0, "there is no queue 1");
}

#[test]
fn other_sizes_and_unknown_registers_do_nothing() {
    let driver = boot();
    let mut wide = [0xff; 8];
    driver.device.read(0x08, &mut wide);
    let mut odd = [0xff; 4];
    driver.device.read(0x0a, &mut odd);
    assert_eq!((wide, odd), ([0; 8], [0; 4]));
    driver.device.write(0x70, &[1]);
    driver.device.write(0x70, &[1, 0]);
    driver.write(0x1f8, u32::MAX);
    driver.device.write(u64::MAX, &[1; 4]);
    driver.write(0xfc, 7);
    assert_eq!(driver.status(), 0);
}

#[test]
fn features_that_were_not_offered_are_not_agreed_on() {
    let driver = boot();
    for features in [0, VERSION_1 | 1 << 20, 1 << 28] {
        driver.write(0x70, 0);
        driver.write(0x70, 3);
        for half in 0..2u32 {
            driver.write(0x24, half);
            driver.write(0x20, (features >> (32 * half)) as u32);
        }
        driver.write(0x70, 3 | 8);
        assert_eq!(driver.status(), 3, "{features:#x}");
        driver.write(0x70, 3 | 8 | 4);
        assert_eq!(driver.status() & 4, 0, "not without an agreement");
    }
}

/// A device that was set up with one word of its queue's registers changed.
fn with_register(register: u64, value: u32) -> Driver {
    let driver = boot();
    driver.start(0);
    let (low, high) = (driver.read(0x30), 0);
    driver.write(0x70, 0);
    driver.write(0x70, 3);
    driver.write(0x24, 1);
    driver.write(0x20, (VERSION_1 >> 32) as u32);
    driver.write(0x70, 3 | 8);
    driver.write(0x30, low);
    driver.write(0x38, 64);
    for (at, address) in [(0x80, 0x1000), (0x90, 0x5000), (0xa0, 0x7000)] {
        driver.write(at, address);
        driver.write(at + 4, high);
    }
    driver.write(register, value);
    driver.write(0x44, 1);
    driver.write(0x70, 3 | 8 | 4);
    driver
}

#[test]
fn rings_that_can_not_be_fail_the_device() {
    let beyond = RAM as u32;
    let cases = [
        (0x38, 0),
        (0x38, 3),
        (0x38, 128),
        (0x38, u32::MAX),
        (0x80, 0x1001),
        (0x90, 0x5001),
        (0xa0, 0x7002),
        (0x80, beyond - 16),
        (0x90, beyond - 2),
        (0xa0, beyond),
        (0xa4, u32::MAX),
        (0x84, 1),
    ];
    for (register, value) in cases {
        let driver = with_register(register, value);
        assert!(driver.has_failed(), "{register:#x} = {value:#x}");
        fails_and_recovers(&driver);
    }
}

#[test]
fn a_chain_that_lies_fails_the_device() {
    type Lie = fn(&mut Ring);
    let lies: [(&str, Lie); 11] = [
        ("outside RAM", |ring| {
            ring.describe(0, buffer(RAM, 16), WRITE, 0);
        }),
        ("across the end of RAM", |ring| {
            ring.describe(0, buffer(RAM - 8, 16), WRITE, 0);
        }),
        ("around the end of everything", |ring| {
            ring.describe(0, buffer(u64::MAX - 7, 16), WRITE, 0);
        }),
        ("of no bytes", |ring| {
            ring.describe(0, buffer(FREE, 0), WRITE, 0)
        }),
        ("a loop", |ring| {
            ring.describe(0, buffer(FREE, 8), WRITE | NEXT, 1);
            ring.describe(1, buffer(FREE, 8), WRITE | NEXT, 0);
        }),
        ("on to no descriptor", |ring| {
            ring.describe(0, buffer(FREE, 8), WRITE | NEXT, 999);
        }),
        ("readable after writable", |ring| {
            ring.describe(0, buffer(FREE, 8), WRITE | NEXT, 1);
            ring.describe(1, buffer(FREE, 8), 0, 0);
        }),
        ("an indirect table of an odd length", |ring| {
            ring.describe(0, buffer(FREE, 17), INDIRECT, 0);
        }),
        ("an indirect table outside RAM", |ring| {
            ring.describe(0, buffer(RAM + 4096, 16), INDIRECT, 0);
        }),
        ("an indirect table that is its own entry", |ring| {
            // The ring's own descriptor table: its entry 0 is indirect again.
            ring.describe(0, buffer(0x1000, 64), INDIRECT, 0);
        }),
        ("longer than 4 GiB", |ring| {
            for index in 0..63 {
                ring.describe(index, buffer(0, RAM as u32), WRITE | NEXT, index + 1);
            }
            ring.describe(63, buffer(0, RAM as u32), WRITE, 0);
        }),
    ];
    for (what, lie) in lies {
        let (driver, mut ring) = started();
        lie(&mut ring);
        ring.make_available(0);
        ring.kick_anyway();
        until(what, || driver.has_failed());
        fails_and_recovers(&driver);
    }
}

#[test]
fn an_available_ring_that_lies_fails_the_device() {
    let (driver, mut ring) = started();
    ring.make_available(64);
    ring.kick_anyway();
    fails_and_recovers(&driver);
    let (driver, ring) = started();
    ring.publish(65);
    ring.kick_anyway();
    fails_and_recovers(&driver);
}

#[test]
fn a_failed_device_stays_failed_over_a_swap() {
    let (driver, mut ring) = started();
    ring.make_available(64);
    ring.kick_anyway();
    until("the device to fail", || driver.has_failed());
    let driver = driver.swap(|state, _| Box::new(Rng::restore("rng", state).expect("rng")));
    assert!(driver.has_failed());
    fails_and_recovers(&driver);
}

#[test]
fn registers_of_a_queue_at_work_can_not_be_changed() {
    let (driver, mut ring) = started();
    driver.write(0x30, 0);
    for register in [0x38, 0x80, 0x84, 0x90, 0xa0] {
        driver.write(register, 0xffff);
    }
    works(&mut ring);
    driver.write(0x44, 0);
    assert_eq!(driver.read(0x44), 0);
    ring.add(&[], &[buffer(FREE, 16)]);
    ring.kick_anyway();
    assert!(
        ring.try_wait(Duration::from_millis(50)).is_none(),
        "it was taken away"
    );
    assert!(!driver.has_failed());
}

#[test]
fn an_interrupt_is_seen_until_it_is_acknowledged() {
    let (driver, mut ring) = started();
    works(&mut ring);
    assert_eq!(driver.read(0x60), 1);
    driver.write(0x64, 2);
    assert_eq!(driver.read(0x60), 1, "another bit was acknowledged");
    driver.write(0x64, 1);
    assert_eq!(driver.read(0x60), 0);
}

#[test]
fn a_kick_that_nobody_saw_is_made_good() {
    let (driver, mut ring) = started();
    driver.stand_still(PATIENCE).expect("rest");
    ring.add(&[], &[buffer(FREE, 16)]);
    // No kick at all: it fell between two machines.
    driver.device.resume();
    assert_eq!(ring.wait().len, 16);
}

fn full_section() -> Section {
    Section {
        device_type: 4,
        device_features_sel: 1,
        driver_features_sel: 1,
        driver_features: VERSION_1 | EVENT_IDX,
        queue_sel: 7,
        status: 15,
        interrupt_status: 1,
        failed: false,
        queues: vec![VirtioQueue {
            size: 64,
            ready: true,
            desc: 0x1000,
            avail: 0x5000,
            used: 0x7000,
            open: true,
            next_avail: 9,
            next_used: 8,
        }],
    }
}

fn bytes_of(section: &Section) -> Vec<u8> {
    let mut saved = Saved::default();
    saved.put("rng", section).expect("put");
    saved.finish(3, "", "", 0)
}

fn restored(section: &Section) -> Result<VirtioMmio, StateError> {
    let slot = Slot::loose("rng", 1, &memory());
    let mut state = Unclaimed::decode(&bytes_of(section)).expect("decode");
    VirtioMmio::restore(slot, Box::new(Rng), &mut state)
}

fn saved_section(device: &VirtioMmio) -> Section {
    let mut saved = Saved::default();
    device.save(&mut saved).expect("save");
    let bytes = saved.finish(3, "", "", 0);
    Unclaimed::decode(&bytes)
        .expect("decode")
        .take("rng")
        .expect("section")
}

#[test]
fn round_trip() {
    let device = restored(&full_section()).expect("restore");
    assert_eq!(saved_section(&device), full_section());
}

#[test]
fn every_field_changes_the_saved_form() {
    let changes: [fn(&mut Section); 15] = [
        |s| s.device_features_sel = 0,
        |s| s.driver_features_sel = 0,
        |s| s.driver_features = VERSION_1,
        |s| s.queue_sel = 0,
        |s| s.status = 3,
        |s| s.interrupt_status = 2,
        |s| s.failed = true,
        |s| s.queues[0].size = 32,
        |s| s.queues[0].ready = false,
        |s| s.queues[0].desc = 0x2000,
        |s| s.queues[0].avail = 0x8000,
        |s| s.queues[0].used = 0x9000,
        |s| {
            (
                s.queues[0].open,
                s.queues[0].next_avail,
                s.queues[0].next_used,
            ) = (false, 0, 0)
        },
        |s| s.queues[0].next_avail = 10,
        |s| s.queues[0].next_used = 9,
    ];
    for change in changes {
        let mut section = full_section();
        change(&mut section);
        let device = restored(&section).expect("restore");
        assert_eq!(saved_section(&device), section);
        assert_ne!(section, full_section());
    }
}

/// A hostile driver must not be able to pin its guest to one release: whatever it left in the
/// registers, a successor of the same release takes it in.
#[test]
fn whatever_a_driver_writes_can_be_handed_over() {
    const REGISTERS: [u64; 15] = [
        0x14, 0x20, 0x24, 0x30, 0x38, 0x44, 0x64, 0x70, 0x80, 0x84, 0x90, 0x94, 0xa0, 0xa4, 0x20,
    ];
    let mut random = fastrand::Rng::with_seed(0x5711);
    for run in 0..2000 {
        let driver = boot();
        if random.bool() {
            driver.start(0);
        }
        let mut written = Vec::new();
        for _ in 0..random.usize(1..24) {
            let register = REGISTERS[random.usize(..REGISTERS.len())];
            let value = match random.u8(..4) {
                0 => random.u32(..16),
                1 => random.u32(..) & 0xf000,
                2 => 1 << random.u32(..32),
                _ => random.u32(..),
            };
            driver.write(register, value);
            written.push(format!("{register:#x} <- {value:#x}"));
        }
        driver.stand_still(PATIENCE).expect("rest");
        let section = saved_section(&driver.device);
        if let Err(error) = restored(&section) {
            panic!("run {run}: {error} after {written:?}");
        }
    }
}

#[test]
fn state_that_can_not_be_is_refused_by_name() {
    let wrong: [fn(&mut Section); 6] = [
        |s| s.device_type = 2,
        |s| s.queues.clear(),
        |s| s.driver_features |= 1 << 20,
        |s| s.queues[0].size = 100,
        |s| s.queues[0].next_avail = 1 << 16,
        |s| s.queues[0].used = RAM,
    ];
    for change in wrong {
        let mut section = full_section();
        change(&mut section);
        let error = restored(&section).expect_err("must be refused").to_string();
        assert!(
            error.contains("virtio-mmio") && error.contains("rng"),
            "{error}"
        );
    }
}
