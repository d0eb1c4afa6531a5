//! A disk as its driver sees it.

mod faults;
mod lock;
mod swaps;

use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};

use stillpoint_control::spec::DiskSpec;
use tempfile::NamedTempFile;
use virtio_bindings::virtio_blk::*;
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::devices::Device;
use crate::devices::virtio::driver::{
    Driver, EVENT_IDX, FREE, INDIRECT, NEXT, PATIENCE, Ring, WRITE, buffer,
};
use crate::handover::lend::Borrowed;

const MIB: u64 = 1 << 20;
const HEADER: u64 = FREE;
const STATUS: u64 = FREE + 0x800;
const DATA: u64 = FREE + 0x1000;

const OK: u8 = 0;
const IO_ERROR: u8 = 1;
const UNSUPPORTED: u8 = 2;
/// What no device writes.
const UNTOUCHED: u8 = 0xee;

fn file(len: u64) -> NamedTempFile {
    let file = NamedTempFile::new().expect("file");
    file.as_file().set_len(len).expect("size");
    file
}

fn spec(path: &Path, read_only: bool) -> DiskSpec {
    let path = path.to_owned();
    DiskSpec { path, read_only }
}

/// A child that another test is starting has our descriptors, and so our locks, until it is another program.
fn image(file: &NamedTempFile, read_only: bool) -> Image {
    let began = Instant::now();
    loop {
        match Image::open("web-1", "disk0", &spec(file.path(), read_only)) {
            Err(error) if began.elapsed() < Duration::from_secs(10) => {
                assert!(error.to_string().contains("lslocks"), "{error}");
                std::thread::sleep(Duration::from_millis(1));
            }
            opened => return opened.expect("image"),
        }
    }
}

fn boot(file: &NamedTempFile) -> Driver {
    Driver::boot("disk0", Box::new(Blk::new(image(file, false))))
}

/// What a successor does.
fn restore(path: &Path, state: &mut Unclaimed, files: &mut Borrowed) -> Result<Blk, StateError> {
    let fd = files.take("disk0/image").expect("the image came");
    let image = Image::adopt("web-1", "disk0", &spec(path, false), fd).expect("adopted");
    Blk::restore(image, "disk0", state)
}

fn swap(driver: Driver, path: &Path) -> Driver {
    driver.swap(|state, files| Box::new(restore(path, state, files).expect("restored")))
}

fn put(driver: &Driver, at: u64, bytes: &[u8]) {
    let at = GuestAddress(at);
    driver.memory.write_slice(bytes, at).expect("in RAM");
}

fn get(driver: &Driver, at: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    let at = GuestAddress(at);
    driver.memory.read_slice(&mut bytes, at).expect("in RAM");
    bytes
}

fn header(kind: u32, sector: u64) -> [u8; 16] {
    let mut header = [0; 16];
    header[..4].copy_from_slice(&kind.to_le_bytes());
    header[8..].copy_from_slice(&sector.to_le_bytes());
    header
}

/// One request with `out` behind its header and `room` for data; gives status, data, and the
/// bytes that the device says it has written.
fn ask(
    driver: &Driver,
    ring: &mut Ring,
    kind: u32,
    sector: u64,
    out: &[u8],
    room: u32,
) -> (u8, Vec<u8>, u32) {
    put(driver, HEADER, &header(kind, sector));
    put(driver, STATUS, &[UNTOUCHED]);
    let (mut readable, mut writable) = (vec![buffer(HEADER, 16)], Vec::new());
    if !out.is_empty() {
        put(driver, DATA, out);
        readable.push(buffer(DATA, out.len() as u32));
    }
    if room > 0 {
        put(driver, DATA, &vec![UNTOUCHED; room as usize]);
        writable.push(buffer(DATA, room));
    }
    writable.push(buffer(STATUS, 1));
    ring.add(&readable, &writable);
    ring.kick();
    let used = ring.wait();
    let data = get(driver, DATA, room as usize);
    (get(driver, STATUS, 1)[0], data, used.len)
}

/// A range as DISCARD and WRITE_ZEROES want it.
fn range(sector: u64, sectors: u32, flags: u32) -> Vec<u8> {
    let mut range = sector.to_le_bytes().to_vec();
    range.extend(sectors.to_le_bytes());
    range.extend(flags.to_le_bytes());
    range
}

fn on_disk(file: &NamedTempFile, at: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    let file = file.as_file();
    file.read_exact_at(&mut bytes, at).expect("read");
    bytes
}

#[test]
fn reads_and_writes_go_where_they_should() {
    for features in [0, EVENT_IDX] {
        let file = file(MIB);
        let driver = boot(&file);
        let ring = &mut driver.start(features | bit(VIRTIO_BLK_F_FLUSH))[0];
        let bytes: Vec<u8> = (0..1536u32).map(|n| (n % 251) as u8).collect();
        let written = ask(&driver, ring, VIRTIO_BLK_T_OUT, 6, &bytes, 0);
        assert_eq!((written.0, written.2), (OK, 1));
        assert_eq!(on_disk(&file, 6 * 512, 1536), bytes);
        let read = ask(&driver, ring, VIRTIO_BLK_T_IN, 7, &[], 512);
        assert_eq!((read.0, read.2), (OK, 513));
        assert_eq!(read.1, bytes[512..1024]);
        assert_eq!(ask(&driver, ring, VIRTIO_BLK_T_FLUSH, 0, &[], 0).0, OK);
        // The last sector, and no byte beyond.
        let last = MIB / 512 - 1;
        assert_eq!(
            ask(&driver, ring, VIRTIO_BLK_T_OUT, last, &[7; 512], 0).0,
            OK
        );
        assert_eq!(on_disk(&file, MIB - 512, 512), [7; 512]);
        assert_eq!(file.as_file().metadata().expect("stat").len(), MIB);
    }
}

#[test]
fn a_request_may_be_cut_into_pieces_anyhow() {
    let file = file(MIB);
    let driver = boot(&file);
    let ring = &mut driver.start(0)[0];
    let bytes: Vec<u8> = (0..512u32).map(|n| n as u8).collect();
    put(&driver, HEADER, &header(VIRTIO_BLK_T_OUT, 2));
    put(&driver, HEADER + 16, &bytes);
    // The header in three, its last part together with the first data.
    let cuts = [(0, 5), (5, 6), (11, 100), (111, 1), (112, 416)];
    let readable = cuts.map(|(at, len)| buffer(HEADER + at, len));
    ring.add(&readable, &[buffer(STATUS, 1)]);
    ring.kick();
    ring.wait();
    assert_eq!(get(&driver, STATUS, 1), [OK]);
    assert_eq!(on_disk(&file, 1024, 512), bytes);
    // Status in the buffer of the data.
    put(&driver, HEADER, &header(VIRTIO_BLK_T_IN, 2));
    let writable = [buffer(DATA, 100), buffer(DATA + 0x1000, 413)];
    ring.add(&[buffer(HEADER, 16)], &writable);
    ring.kick();
    assert_eq!(ring.wait().len, 513);
    assert_eq!(get(&driver, DATA, 100), bytes[..100]);
    assert_eq!(get(&driver, DATA + 0x1000, 412), bytes[100..]);
    assert_eq!(get(&driver, DATA + 0x1000 + 412, 1), [OK]);
}

#[test]
fn what_can_not_be_done_says_so_in_its_status() {
    let file = file(MIB);
    let driver = boot(&file);
    let ring = &mut driver.start(0)[0];
    let mut status = |kind, sector, out: &[u8], room| {
        let (status, data, len) = ask(&driver, ring, kind, sector, out, room);
        assert!(data.iter().all(|&byte| byte == UNTOUCHED), "kind {kind}");
        // A length that covers the status would cover data that was never written.
        assert_eq!(len, u32::from(room == 0), "kind {kind}");
        status
    };
    let end = MIB / 512;
    assert_eq!(status(VIRTIO_BLK_T_IN, end, &[], 512), IO_ERROR);
    assert_eq!(status(VIRTIO_BLK_T_IN, end - 1, &[], 1024), IO_ERROR);
    assert_eq!(status(VIRTIO_BLK_T_IN, u64::MAX / 512, &[], 512), IO_ERROR);
    assert_eq!(status(VIRTIO_BLK_T_IN, u64::MAX, &[], 512), IO_ERROR);
    assert_eq!(status(VIRTIO_BLK_T_IN, 0, &[], 511), IO_ERROR);
    assert_eq!(status(VIRTIO_BLK_T_OUT, end, &[1; 512], 0), IO_ERROR);
    assert_eq!(status(VIRTIO_BLK_T_OUT, 0, &[1; 100], 0), IO_ERROR);
    assert_eq!(status(VIRTIO_BLK_T_SCSI_CMD, 0, &[], 0), UNSUPPORTED);
    assert_eq!(status(0x1234_5678, 0, &[], 512), UNSUPPORTED);
    let mut ranges = |kind, bytes: &[u8]| status(kind, 0, bytes, 0);
    let (discard, zero) = (VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_WRITE_ZEROES);
    for kind in [discard, zero] {
        assert_eq!(ranges(kind, &[]), IO_ERROR);
        assert_eq!(ranges(kind, &[0; 15]), IO_ERROR);
        assert_eq!(ranges(kind, &range(end, 1, 0)), IO_ERROR);
        assert_eq!(ranges(kind, &range(u64::MAX, 1, 0)), IO_ERROR);
        assert_eq!(ranges(kind, &range(0, u32::MAX, 0)), IO_ERROR);
        assert_eq!(ranges(kind, &range(0, 1, 2)), UNSUPPORTED);
    }
    assert_eq!(ranges(discard, &range(0, 1, 1)), UNSUPPORTED);
    assert_eq!(ranges(discard, &[0; 16 * 17]), IO_ERROR);
    assert_eq!(ranges(zero, &[0; 16 * 2]), IO_ERROR);
    assert!(!driver.has_failed());
    assert_eq!(on_disk(&file, 0, MIB as usize), vec![0; MIB as usize]);
}

#[test]
fn space_is_given_back_and_zeroes_are_zeroes() {
    use std::os::unix::fs::MetadataExt;
    let file = file(MIB);
    let fill = || file.as_file().write_all_at(&vec![5; MIB as usize], 0);
    fill().expect("fill");
    let blocks = || file.as_file().metadata().expect("stat").blocks();
    let full = blocks();
    let driver = boot(&file);
    let ring = &mut driver.start(0)[0];
    let mut two = range(0, 512, 0);
    two.extend(range(1024, 512, 0));
    assert_eq!(ask(&driver, ring, VIRTIO_BLK_T_DISCARD, 0, &two, 0).0, OK);
    assert!(blocks() < full, "the host has its space back");
    assert_eq!(on_disk(&file, 512 * 512, 512 * 512), vec![5; 512 * 512]);
    for unmap in [0, 1] {
        fill().expect("fill");
        let zero = range(3, 1001, unmap);
        let done = ask(&driver, ring, VIRTIO_BLK_T_WRITE_ZEROES, 0, &zero, 0);
        assert_eq!(done.0, OK);
        assert_eq!(on_disk(&file, 3 * 512, 1001 * 512), vec![0; 1001 * 512]);
        assert_eq!(on_disk(&file, 0, 3 * 512), vec![5; 3 * 512]);
        assert_eq!(on_disk(&file, 1004 * 512, 512), vec![5; 512]);
    }
    assert_eq!(file.as_file().metadata().expect("stat").len(), MIB);
}

#[test]
fn a_read_only_disk_is_not_written_to() {
    let file = file(MIB);
    let driver = Driver::boot("disk0", Box::new(Blk::new(image(&file, true))));
    let offered = driver.offered();
    assert_ne!(offered & bit(VIRTIO_BLK_F_RO), 0);
    assert_eq!(offered & bit(VIRTIO_BLK_F_DISCARD), 0);
    let ring = &mut driver.start(bit(VIRTIO_BLK_F_RO))[0];
    for (kind, out) in [
        (VIRTIO_BLK_T_OUT, vec![1; 512]),
        (VIRTIO_BLK_T_DISCARD, range(0, 1, 0)),
        (VIRTIO_BLK_T_WRITE_ZEROES, range(0, 1, 0)),
    ] {
        assert_eq!(ask(&driver, ring, kind, 0, &out, 0).0, IO_ERROR);
    }
    assert_eq!(ask(&driver, ring, VIRTIO_BLK_T_IN, 0, &[], 512).0, OK);
    assert_eq!(ask(&driver, ring, VIRTIO_BLK_T_FLUSH, 0, &[], 0).0, OK);
}

#[test]
fn the_configuration_describes_the_disk() {
    let file = file(MIB);
    let driver = boot(&file);
    assert_eq!(driver.read(8), BLOCK);
    let config = driver.config(0, 64);
    assert_eq!(config[..8], (MIB / 512).to_le_bytes());
    assert_eq!(config[12..16], 254u32.to_le_bytes());
    assert_eq!(config[20..24], 512u32.to_le_bytes());
    assert_eq!(config[24], 3, "eight logical blocks in a physical one");
    assert_eq!(config[32], 1, "write-back");
    assert_eq!(config[34..36], 1u16.to_le_bytes());
    assert_eq!(config[36..40], (1u32 << 21).to_le_bytes());
    assert_eq!(config[56], 1);
    let ring = &mut driver.start(0)[0];
    let (status, serial, len) = ask(&driver, ring, VIRTIO_BLK_T_GET_ID, 0, &[], 20);
    assert_eq!((status, len), (OK, 21));
    assert_eq!(serial, b"web-1-disk0\0\0\0\0\0\0\0\0\0");
    let (status, serial, _) = ask(&driver, ring, VIRTIO_BLK_T_GET_ID, 0, &[], 5);
    assert_eq!((status, &*serial), (OK, &b"web-1"[..]));
}

#[test]
fn the_cache_is_what_the_driver_chose() {
    let file = file(MIB);
    let driver = boot(&file);
    let write_back = || driver.config(32, 1)[0];
    driver.start(bit(VIRTIO_BLK_F_FLUSH));
    assert_eq!(write_back(), 1);
    // Without FLUSH a driver can't ask for durability, so it is always given.
    let ring = &mut driver.start(0)[0];
    assert_eq!(write_back(), 0);
    let through = ask(&driver, ring, VIRTIO_BLK_T_OUT, 0, &[1; 512], 0);
    assert_eq!(through.0, OK);
    driver.start(bit(VIRTIO_BLK_F_FLUSH) | bit(VIRTIO_BLK_F_CONFIG_WCE));
    assert_eq!(write_back(), 1, "a reset forgets");
    driver.device.write(0x100 + 32, &[0]);
    assert_eq!(write_back(), 0);
    let driver = swap(driver, file.path());
    assert_eq!(driver.config(32, 1), [0], "a successor knows");
}

/// With no EVENT_IDX a driver is told of all that it gets back, and of nothing else.
#[test]
fn a_kick_for_nothing_interrupts_nobody() {
    let file = file(MIB);
    let driver = boot(&file);
    let ring = &mut driver.start(0)[0];
    let mut read = || {
        assert_eq!(ask(&driver, ring, VIRTIO_BLK_T_IN, 0, &[], 512).0, OK);
        // It comes back a little before the interrupt.
        let deadline = Instant::now() + Duration::from_secs(10);
        while driver.acknowledge() != 1 {
            assert!(Instant::now() < deadline, "nobody was told");
        }
        ring.kick_anyway();
        std::thread::sleep(Duration::from_millis(10));
        assert_eq!(driver.acknowledge(), 0);
    };
    (0..4).for_each(|_| read());
}

#[test]
fn a_ring_that_lies_fails_the_device_and_no_more() {
    type Lie = fn(&Driver, &mut Ring);
    let lies: [Lie; 9] = [
        // No room for a status.
        |_, ring| _ = ring.add(&[buffer(HEADER, 16)], &[]),
        // A header cut short.
        |_, ring| _ = ring.add(&[buffer(HEADER, 15)], &[buffer(STATUS, 1)]),
        // No header.
        |_, ring| _ = ring.add(&[], &[buffer(STATUS, 1)]),
        // Data outside RAM, and wrapping around.
        |_, ring| _ = ring.add(&[buffer(1 << 40, 16)], &[buffer(STATUS, 1)]),
        |_, ring| _ = ring.add(&[buffer(u64::MAX - 3, 16)], &[buffer(STATUS, 1)]),
        // A loop.
        |_, ring| {
            ring.describe(0, buffer(HEADER, 16), NEXT, 0);
            ring.make_available(0);
        },
        // Readable after writable.
        |_, ring| {
            ring.describe(0, buffer(STATUS, 1), NEXT | WRITE, 1);
            ring.describe(1, buffer(HEADER, 16), 0, 0);
            ring.make_available(0);
        },
        // A table within a table.
        |driver, ring| {
            let mut table = (DATA + 16).to_le_bytes().to_vec();
            table.extend([16, 0, 0, 0, INDIRECT as u8, 0, 0, 0]);
            put(driver, DATA, &table);
            ring.describe(0, buffer(DATA, 16), INDIRECT, 0);
            ring.make_available(0);
        },
        // More requests than there is room for.
        |_, ring| ring.publish(30_000),
    ];
    let file = file(MIB);
    for (number, lie) in lies.iter().enumerate() {
        let driver = boot(&file);
        let ring = &mut driver.start(0)[0];
        lie(&driver, ring);
        ring.kick();
        driver.await_failure();
        assert_eq!(ring.take(), None, "lie {number}");
        assert_eq!(driver.acknowledge(), 2, "lie {number}: the driver is told");
        // It stands still for a swap, and lives again after a reset.
        let driver = swap(driver, file.path());
        assert!(driver.has_failed(), "lie {number}");
        let ring = &mut driver.start(0)[0];
        assert_eq!(ask(&driver, ring, VIRTIO_BLK_T_IN, 0, &[], 512).0, OK);
    }
}

#[test]
fn more_buffers_than_it_says_it_takes_are_an_error() {
    let file = file(MIB);
    let driver = boot(&file);
    let ring = &mut driver.start(0)[0];
    put(&driver, HEADER, &header(VIRTIO_BLK_T_IN, 0));
    let count: u32 = 600;
    let mut table = Vec::new();
    for n in 0..count {
        let (at, len, flags) = match n {
            0 => (HEADER, 16u32, NEXT),
            n if n == count - 1 => (STATUS, 1, WRITE),
            n => (DATA + u64::from(n) * 512, 512, NEXT | WRITE),
        };
        table.extend(at.to_le_bytes());
        table.extend(len.to_le_bytes());
        table.extend(flags.to_le_bytes());
        table.extend((n as u16 + 1).to_le_bytes());
    }
    let at = FREE + 0x10_0000;
    put(&driver, at, &table);
    ring.describe(0, buffer(at, table.len() as u32), INDIRECT, 0);
    ring.make_available(0);
    ring.kick();
    ring.wait();
    assert_eq!(get(&driver, STATUS, 1), [IO_ERROR]);
}
