//! When the host's side fails, is slow, or is a device of its own.

use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use super::*;

/// Longer than a device takes for anything when it is at work.
const A_WHILE: Duration = Duration::from_millis(200);

/// A device whose I/O waits until what comes with it is dropped.
fn stalled(file: &NamedTempFile) -> (Driver, Vec<std::sync::mpsc::Sender<()>>) {
    let blk = Blk::new(image(file, false));
    let stall = blk.image.pool.stall();
    (Driver::boot("disk0", Box::new(blk)), stall)
}

/// Tries to bring the device to rest until it has taken as many requests as that.
fn busy(driver: &Driver, in_flight: usize) {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let began = Instant::now();
        match driver.stand_still(Duration::from_millis(20)) {
            Err(busy) if busy.in_flight == in_flight => {
                assert!(
                    began.elapsed() < Duration::from_secs(5),
                    "a drain has an end"
                );
                return;
            }
            other => assert!(Instant::now() < deadline, "{other:?}"),
        }
        driver.device.resume();
    }
}

#[test]
fn a_slow_disk_ends_the_drain_and_keeps_its_requests() {
    let file = file(MIB);
    let (driver, stall) = stalled(&file);
    let ring = &mut driver.start(0)[0];
    put(&driver, HEADER, &header(VIRTIO_BLK_T_OUT, 1));
    put(&driver, DATA, &[9; 512]);
    let readable = [buffer(HEADER, 16), buffer(DATA, 512)];
    ring.add(&readable, &[buffer(STATUS, 1)]);
    ring.kick();
    busy(&driver, 1);
    // What comes during the drain is not taken, and its kick is seen by nobody.
    put(&driver, HEADER + 0x100, &header(VIRTIO_BLK_T_OUT, 2));
    let readable = [buffer(HEADER + 0x100, 16), buffer(DATA, 512)];
    ring.add(&readable, &[buffer(STATUS + 1, 1)]);
    ring.kick();
    assert_eq!(ring.try_wait(A_WHILE), None);
    let busy = driver.stand_still(PATIENCE).expect_err("it has one");
    assert_eq!(busy.in_flight, 1);
    // It was called off; the guest goes on, and so does its I/O.
    driver.device.resume();
    drop(stall);
    ring.wait();
    ring.wait();
    assert_eq!(get(&driver, STATUS, 2), [OK, OK]);
    assert_eq!(on_disk(&file, 512, 1024), [9; 1024]);
    driver.stand_still(PATIENCE).expect("at rest now");
}

#[test]
fn a_reset_waits_for_what_is_under_way() {
    let file = file(MIB);
    let (driver, stall) = stalled(&file);
    let ring = &mut driver.start(0)[0];
    put(&driver, HEADER, &header(VIRTIO_BLK_T_IN, 0));
    put(&driver, DATA, &[UNTOUCHED; 512]);
    ring.add(
        &[buffer(HEADER, 16)],
        &[buffer(DATA, 512), buffer(STATUS, 1)],
    );
    ring.kick();
    busy(&driver, 1);
    driver.device.resume();
    std::thread::scope(|scope| {
        let reset = scope.spawn(|| driver.write(0x70, 0));
        // Interrupt registers are there for a vCPU all the while.
        driver.acknowledge();
        assert!(!reset.is_finished());
        assert_eq!(get(&driver, DATA, 1), [UNTOUCHED]);
        drop(stall);
        reset.join().expect("reset");
    });
    // Whatever wrote there has written by now.
    assert_eq!(get(&driver, DATA, 1), [0]);
    assert_eq!(driver.status(), 0);
}

#[test]
fn no_driver_has_more_in_flight_than_the_queue_is_deep() {
    let file = file(MIB);
    let (driver, stall) = stalled(&file);
    let ring = &mut driver.start(EVENT_IDX)[0];
    put(&driver, HEADER, &header(VIRTIO_BLK_T_FLUSH, 0));
    ring.describe(0, buffer(HEADER, 16), NEXT, 1);
    ring.describe(1, buffer(STATUS, 1), WRITE, 0);
    // The same descriptors again and again, as fast as the device takes them.
    for _ in 0..256 {
        ring.make_available(0);
    }
    ring.kick();
    busy(&driver, 256);
    for _ in 0..200 {
        ring.make_available(0);
    }
    driver.device.resume();
    ring.kick_anyway();
    assert_eq!(ring.try_wait(A_WHILE), None);
    busy(&driver, 256);
    driver.device.resume();
    drop(stall);
    for _ in 0..456 {
        ring.wait();
    }
    assert!(!driver.has_failed());
}

#[test]
fn an_image_that_was_cut_off_gives_errors() {
    let file = file(MIB);
    let driver = boot(&file);
    let ring = &mut driver.start(0)[0];
    file.as_file().set_len(1024).expect("cut");
    let (status, data, len) = ask(&driver, ring, VIRTIO_BLK_T_IN, 1, &[], 1024);
    // Its first sector is still there, and the length says no more than that.
    assert_eq!((status, len), (IO_ERROR, 512));
    assert_eq!(data[..512], [0; 512]);
    assert_eq!(ask(&driver, ring, VIRTIO_BLK_T_IN, 9, &[], 512).0, IO_ERROR);
    assert_eq!(ask(&driver, ring, VIRTIO_BLK_T_IN, 0, &[], 512).0, OK);
    assert!(!driver.has_failed());
    // A successor would show its guest another disk.
    driver.stand_still(PATIENCE).expect("at rest");
    let mut state = Unclaimed::decode(&driver.saved()).expect("decode");
    let mut lending = Lending::default();
    driver.device.lend(&mut lending).expect("lend");
    let refused = restore(file.path(), &mut state, &mut lending.arrive());
    let text = refused.expect_err("cut off").to_string();
    assert!(text.contains("disk0") && text.contains("1024"), "{text}");
}

#[test]
fn an_image_that_is_gone_works_on_and_one_that_has_grown_is_as_it_was() {
    let file = file(MIB);
    let driver = boot(&file);
    let ring = &mut driver.start(0)[0];
    file.as_file().set_len(2 * MIB).expect("grow");
    std::fs::remove_file(file.path()).expect("remove");
    let driver = swap(driver, file.path());
    let end = MIB / 512;
    assert_eq!(driver.config(0, 8), end.to_le_bytes());
    assert_eq!(ask(&driver, ring, VIRTIO_BLK_T_OUT, 0, &[1; 512], 0).0, OK);
    assert_eq!(
        ask(&driver, ring, VIRTIO_BLK_T_IN, end, &[], 512).0,
        IO_ERROR
    );
}

#[test]
fn what_the_host_refuses_is_the_guests_error() {
    let file = file(MIB);
    // A description that can't be written to, as if the host's disk could not.
    let fd = std::fs::File::open(file.path()).expect("open").into();
    let image = Image::adopt("web-1", "disk0", &spec(file.path(), false), fd).expect("adopted");
    let driver = Driver::boot("disk0", Box::new(Blk::new(image)));
    let ring = &mut driver.start(0)[0];
    for (kind, out) in [
        (VIRTIO_BLK_T_OUT, vec![1; 512]),
        (VIRTIO_BLK_T_DISCARD, range(0, 1, 0)),
        (VIRTIO_BLK_T_WRITE_ZEROES, range(0, 1, 1)),
    ] {
        assert_eq!(ask(&driver, ring, kind, 0, &out, 0).0, IO_ERROR, "{kind}");
    }
    assert_eq!(ask(&driver, ring, VIRTIO_BLK_T_IN, 0, &[], 512).0, OK);
    assert!(!driver.has_failed());
}

/// Where the test below runs again: the directory with the small filesystem.
const SMALL: &str = "STILLPOINT_TEST_SMALL_FILESYSTEM";

#[test]
fn a_full_filesystem_gives_errors_until_there_is_room() {
    let Some(small) = std::env::var_os(SMALL) else {
        return in_a_small_filesystem();
    };
    let file = NamedTempFile::new_in(small).expect("file");
    file.as_file().set_len(64 * MIB).expect("sparse");
    let driver = boot(&file);
    let ring = &mut driver.start(bit(VIRTIO_BLK_F_FLUSH))[0];
    let block = vec![3; 64 << 10];
    let mut write = |n: u64| ask(&driver, ring, VIRTIO_BLK_T_OUT, n * 128, &block, 0).0;
    let written = (0..64).take_while(|&n| write(n) == OK).count() as u64;
    assert!((4..=16).contains(&written), "{written} blocks of 64 KiB");
    assert_eq!(write(0), OK, "what has room already is written");
    assert_eq!(write(40), IO_ERROR);
    assert_eq!(on_disk(&file, 0, 512), [3; 512]);
    let discard = range(0, 256, 0);
    assert_eq!(
        ask(&driver, ring, VIRTIO_BLK_T_DISCARD, 0, &discard, 0).0,
        OK
    );
    assert_eq!(ask(&driver, ring, VIRTIO_BLK_T_OUT, 5120, &block, 0).0, OK);
    let driver = swap(driver, file.path());
    assert!(!driver.has_failed());
}

/// Runs the test above once more, with a filesystem of 1 MiB that nobody else sees.
fn in_a_small_filesystem() {
    let dir = tempfile::tempdir().expect("dir");
    let mount = "mount -t tmpfs -o size=1m none \"$DIR\"";
    let unshared = |command: &str| {
        let mut unshare = Command::new("unshare");
        unshare.args(["-m", "sh", "-c", command]);
        unshare.env("DIR", dir.path()).env(SMALL, dir.path());
        unshare
    };
    let tried = unshared(mount).stderr(Stdio::null()).status();
    if !tried.is_ok_and(|status| status.success()) {
        eprintln!("SKIPPED blk: no mount namespace to be had, so no small filesystem");
        return;
    }
    let own = std::env::current_exe().expect("own path");
    let name =
        "devices::virtio::blk::tests::faults::a_full_filesystem_gives_errors_until_there_is_room";
    let run = format!("{mount} && exec \"$OWN\" --exact {name}");
    let output = unshared(&run).env("OWN", own).output().expect("run");
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success() && text.contains("1 passed"),
        "{text}"
    );
}

/// Names a block device whose content may be lost, at least 2 MiB.
const SCRATCH: &str = "STILLPOINT_TEST_SCRATCH_DEVICE";

#[test]
fn a_block_device_is_a_disk_too() {
    let Some(path) = std::env::var_os(SCRATCH) else {
        eprintln!("SKIPPED blk: {SCRATCH} names no block device whose content may be lost");
        return;
    };
    let wanted = spec(Path::new(&path), false);
    let open = || Image::open("web-1", "disk0", &wanted);
    let driver = Driver::boot("disk0", Box::new(Blk::new(open().expect("a device"))));
    // Opened for itself alone, so the kernel says so before any lock does.
    let text = open().expect_err("taken").to_string();
    assert!(text.contains("may be mounted"), "{text}");
    let size = driver.config(0, 8).try_into().map(u64::from_le_bytes);
    assert!(size.expect("8 bytes") >= 2 * MIB / 512);
    let ring = &mut driver.start(bit(VIRTIO_BLK_F_FLUSH))[0];
    let bytes = vec![6; 64 << 10];
    let mut ok = |kind, sector, out: &[u8], room| {
        let (status, data, _) = ask(&driver, ring, kind, sector, out, room);
        assert_eq!(status, OK, "kind {kind}");
        data
    };
    for unmap in [0, 1] {
        ok(VIRTIO_BLK_T_OUT, 128, &bytes, 0);
        ok(VIRTIO_BLK_T_FLUSH, 0, &[], 0);
        assert_eq!(ok(VIRTIO_BLK_T_IN, 128, &[], 64 << 10), bytes);
        // Pieces that are no multiple of its blocks have to be written.
        ok(VIRTIO_BLK_T_WRITE_ZEROES, 0, &range(129, 15, unmap), 0);
        assert_eq!(ok(VIRTIO_BLK_T_IN, 129, &[], 15 * 512), [0; 15 * 512]);
        assert_eq!(ok(VIRTIO_BLK_T_IN, 144, &[], 512), [6; 512]);
        ok(VIRTIO_BLK_T_WRITE_ZEROES, 0, &range(128, 128, unmap), 0);
        assert_eq!(ok(VIRTIO_BLK_T_IN, 128, &[], 64 << 10), vec![0; 64 << 10]);
        ok(VIRTIO_BLK_T_DISCARD, 0, &range(128, 128, 0), 0);
    }
    let driver = swap(driver, Path::new(&path));
    assert!(open().is_err() && !driver.has_failed());
}
