//! The laws of a device, and swaps of it under load.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use super::*;

fn form(section: &sections::VirtioBlk, file: &NamedTempFile) -> Result<Vec<u8>, StateError> {
    let mut saved = Saved::default();
    saved.put("disk0", section).expect("put");
    let mut state = Unclaimed::decode(&saved.finish(3, "", "", 0)).expect("decode");
    let blk = Blk::restore(image(file, true), "disk0", &mut state)?;
    let mut again = Saved::default();
    blk.save("disk0", &mut again).expect("save");
    Ok(again.finish(3, "", "", 0))
}

#[test]
fn round_trip_and_every_field_changes_the_saved_form() {
    let file = file(MIB);
    let base = sections::VirtioBlk {
        size: MIB / 2,
        write_back: true,
    };
    let mut saved = Saved::default();
    saved.put("disk0", &base).expect("put");
    let saved = saved.finish(3, "", "", 0);
    assert_eq!(form(&base, &file).expect("a disk"), saved);
    let changes: [fn(&mut sections::VirtioBlk); 2] =
        [|s| s.size += 512, |s| s.write_back = !s.write_back];
    for change in changes {
        let mut section = base;
        change(&mut section);
        assert_ne!(form(&section, &file).expect("a disk"), saved, "{section:?}");
    }
    for size in [0, 511, 513, MIB + 512, u64::MAX] {
        form(&sections::VirtioBlk { size, ..base }, &file).expect_err("no such disk");
    }
}

#[test]
fn frozen_means_silent() {
    let file = file(MIB);
    let driver = boot(&file);
    let ring = &mut driver.start(0)[0];
    assert_eq!(ask(&driver, ring, VIRTIO_BLK_T_OUT, 0, &[1; 512], 0).0, OK);
    driver.stand_still(PATIENCE).expect("at rest");
    let _ = driver.interrupted();
    put(&driver, HEADER, &header(VIRTIO_BLK_T_OUT, 0));
    put(&driver, DATA, &[2; 512]);
    put(&driver, STATUS, &[UNTOUCHED]);
    let readable = [buffer(HEADER, 16), buffer(DATA, 512)];
    ring.add(&readable, &[buffer(STATUS, 1)]);
    ring.kick();
    let before = driver.saved();
    // Longer than the device takes when it is at work, by far.
    assert_eq!(ring.try_wait(Duration::from_millis(200)), None);
    assert_eq!(get(&driver, STATUS, 1), [UNTOUCHED]);
    assert_eq!(on_disk(&file, 0, 512), [1; 512]);
    assert_eq!(driver.saved(), before);
    driver.device.resume();
    ring.wait();
    assert_eq!(on_disk(&file, 0, 512), [2; 512]);
}

/// Bytes of a block, and how many there are.
const BLOCK_LEN: u32 = 4096;
const BLOCKS: u64 = 256;
/// Requests that the guest has under way.
const DEEP: u64 = 24;

/// A guest that writes and reads blocks at random. No block has two requests at once, so it always
/// knows what must be in each.
struct Load {
    ring: Ring,
    memory: crate::memory::Memory,
    random: u64,
    /// What was last acknowledged for each block.
    known: Vec<u64>,
    /// Of each lane: head, block, and what is written there, or `None` for a read.
    lanes: Vec<Option<(u16, u64, Option<u64>)>>,
    count: u64,
}

/// A block's content: its number, and that of the write.
fn content(block: u64, write: u64) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(BLOCK_LEN as usize);
    while bytes.len() < BLOCK_LEN as usize {
        bytes.extend((block << 32 | write).to_le_bytes());
    }
    bytes
}

impl Load {
    fn next(&mut self, below: u64) -> u64 {
        // xorshift64: any numbers do.
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random % below
    }

    fn at(lane: usize) -> u64 {
        FREE + lane as u64 * 0x2000
    }

    fn begin(&mut self, lane: usize) {
        let taken = |lanes: &[Option<(u16, u64, _)>], block| {
            lanes.iter().flatten().any(|&(_, other, _)| other == block)
        };
        let mut block = self.next(BLOCKS);
        while taken(&self.lanes, block) {
            block = (block + 1) % BLOCKS;
        }
        self.count += 1;
        let write = (self.next(3) > 0).then_some(self.count);
        let (kind, bytes) = match write {
            Some(write) => (VIRTIO_BLK_T_OUT, content(block, write)),
            None => (VIRTIO_BLK_T_IN, vec![UNTOUCHED; BLOCK_LEN as usize]),
        };
        let at = Self::at(lane);
        let put = |at, bytes: &[u8]| self.memory.write_slice(bytes, GuestAddress(at));
        put(at, &header(kind, block * u64::from(BLOCK_LEN) / 512)).expect("in RAM");
        put(at + 16, &[UNTOUCHED]).expect("in RAM");
        put(at + 0x1000, &bytes).expect("in RAM");
        let (header, data) = (buffer(at, 16), buffer(at + 0x1000, BLOCK_LEN));
        let status = buffer(at + 16, 1);
        let head = match write {
            Some(_) => self.ring.add(&[header, data], &[status]),
            None => self.ring.add(&[header], &[data, status]),
        };
        self.lanes[lane] = Some((head, block, write));
    }

    fn end(&mut self, head: u16) {
        let lane = self.lanes.iter().position(|lane| {
            lane.as_ref()
                .is_some_and(|&(under_way, ..)| under_way == head)
        });
        let lane = lane.expect("what comes back is under way");
        let (_, block, write) = self.lanes[lane].take().expect("under way");
        let mut bytes = vec![0; BLOCK_LEN as usize];
        let at = Self::at(lane);
        let mut status = [0];
        let read = self.memory.read_slice(&mut status, GuestAddress(at + 16));
        read.expect("in RAM");
        assert_eq!(status, [OK], "block {block}");
        match write {
            Some(write) => self.known[block as usize] = write,
            None => {
                let at = GuestAddress(at + 0x1000);
                self.memory.read_slice(&mut bytes, at).expect("in RAM");
                let expected = content(block, self.known[block as usize]);
                assert!(bytes == expected, "block {block} is not what was written");
            }
        }
    }

    /// Works until it is told to stop, and until nothing is under way.
    fn run(mut self, stop: &AtomicBool, ended: &AtomicU64) -> Vec<u64> {
        loop {
            let go_on = !stop.load(Ordering::Relaxed);
            for lane in 0..self.lanes.len() {
                if go_on && self.lanes[lane].is_none() {
                    self.begin(lane);
                }
            }
            self.ring.kick();
            if self.lanes.iter().all(Option::is_none) {
                return self.known;
            }
            let used = self.ring.wait();
            self.end(used.head);
            ended.fetch_add(1, Ordering::Relaxed);
        }
    }
}

#[test]
fn nothing_is_lost_or_done_twice_over_200_swaps_under_load() {
    for features in [0, EVENT_IDX] {
        let file = file(BLOCKS * u64::from(BLOCK_LEN));
        for block in 0..BLOCKS {
            let at = block * u64::from(BLOCK_LEN);
            let bytes = content(block, 0);
            file.as_file().write_all_at(&bytes, at).expect("fill");
        }
        let mut driver = boot(&file);
        let mut rings = driver.start(features | bit(VIRTIO_BLK_F_FLUSH));
        let load = Load {
            ring: rings.remove(0),
            memory: driver.memory.clone(),
            random: 0x5eed,
            known: vec![0; BLOCKS as usize],
            lanes: (0..DEEP).map(|_| None).collect(),
            count: 0,
        };
        let (stop, ended) = (AtomicBool::new(false), AtomicU64::new(0));
        let known = std::thread::scope(|scope| {
            let guest = scope.spawn(|| load.run(&stop, &ended));
            for _ in 0..200 {
                driver = swap(driver, file.path());
                // Every swap has its I/O: the guest must get on between two.
                let so_far = ended.load(Ordering::Relaxed);
                while ended.load(Ordering::Relaxed) < so_far + DEEP / 2 && !guest.is_finished() {
                    std::thread::yield_now();
                }
            }
            stop.store(true, Ordering::Relaxed);
            guest.join().expect("the guest found what it wrote")
        });
        for (block, &write) in (0..).zip(&known) {
            let found = on_disk(&file, block * u64::from(BLOCK_LEN), BLOCK_LEN as usize);
            assert!(found == content(block, write), "block {block} on the disk");
        }
        assert!(ended.load(Ordering::Relaxed) > 200 * DEEP / 2);
    }
}
