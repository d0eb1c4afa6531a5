//! The workload against a disk of a few lines, sound and unsound.

use super::*;
use crate::ring::tests::Device;
use crate::ring::{Ring, Used};

const SECTORS: u64 = 1608;

/// What the disk does wrong.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Sin {
    None,
    DropsAWrite,
    TearsAWrite,
    WritesElsewhere,
    Repeats,
    FailsSome,
    NoStatus,
    LosesFlushed,
}

struct Model {
    device: Device,
    sin: Sin,
    random: Random,
    /// Sector contents, what a power cut leaves of them, and requests not done yet.
    cached: Vec<u8>,
    stable: Vec<u8>,
    held: Vec<crate::ring::tests::Request>,
}

#[expect(
    unsafe_code,
    reason = "buffers are found by their addresses, as a device would"
)]
fn area(buffer: (u64, u32, bool)) -> Area {
    // SAFETY: memory of the workload's, which lives as long as the test.
    unsafe { Area::new(buffer.0 as usize, buffer.1 as usize) }
}

impl Model {
    fn new(ring: &Ring, sin: Sin) -> Self {
        let empty = vec![0; SECTORS as usize * SECTOR];
        Self {
            device: Device::of(ring),
            sin,
            random: Random::new(5),
            cached: empty.clone(),
            stable: empty,
            held: Vec::new(),
        }
    }

    /// Does some of what is there to do, in any order.
    fn work(&mut self) {
        while let Some(request) = self.device.take() {
            self.held.push(request);
        }
        while !self.held.is_empty() && self.random.below(8) != 0 {
            let pick = self.random.below(self.held.len() as u64) as usize;
            let (head, buffers) = self.held.swap_remove(pick);
            self.serve(&buffers);
            self.device.give(head, 0);
            if self.sin == Sin::Repeats && self.random.below(50) == 0 {
                self.device.give(head, 0);
            }
        }
    }

    fn serve(&mut self, buffers: &[(u64, u32, bool)]) {
        let header = area(buffers[0]);
        let (status, data) = (
            area(buffers[buffers.len() - 1]),
            &buffers[1..buffers.len() - 1],
        );
        let mut at = header.get64(8) as usize * SECTOR;
        if self.sin == Sin::NoStatus && self.random.below(50) == 0 {
            return;
        }
        if self.sin == Sin::FailsSome && self.random.below(10) == 0 {
            return status.set8(0, 1);
        }
        match header.get32(0) {
            request::OUT => {
                let mut left = match (self.sin, self.random.below(200)) {
                    (Sin::DropsAWrite, 0) => 0,
                    (Sin::TearsAWrite, 0) => 700,
                    _ => usize::MAX,
                };
                if self.sin == Sin::WritesElsewhere && self.random.below(200) == 0 {
                    at = (at + 8 * SECTOR) % self.cached.len();
                }
                for buffer in data {
                    let len = (buffer.1 as usize).min(left);
                    area(*buffer).read(0, &mut self.cached[at..at + len]);
                    (at, left) = (at + len, left - len);
                }
            }
            request::IN => {
                for buffer in data {
                    let len = buffer.1 as usize;
                    area(*buffer).write(0, &self.cached[at..at + len]);
                    at += len;
                }
            }
            request::FLUSH if self.sin == Sin::LosesFlushed => {}
            request::FLUSH => self.stable.clone_from(&self.cached),
            request::WRITE_ZEROES => {
                let range = area(data[0]);
                let at = range.get64(0) as usize * SECTOR;
                self.cached[at..at + range.get32(8) as usize * SECTOR].fill(0);
            }
            kind => panic!("request {kind}"),
        }
        status.set8(0, 0);
    }

    /// Sectors that the table doesn't allow to be there after a power cut.
    fn not_allowed(&self, workload: &Workload) -> u64 {
        let counts = workload.counts();
        let mut found = 0;
        for block in 0..counts.blocks {
            for sector in (0..BLOCK_SECTORS).map(|n| block * counts.stride + n) {
                let word = |index: usize| {
                    let at = sector as usize * SECTOR + index * 8;
                    u64::from_le_bytes(self.stable[at..at + 8].try_into().expect("8"))
                };
                let content = disk::content(counts.run, sector, word);
                found += u64::from(!workload.entry(block).allows(content));
            }
        }
        found
    }
}

struct Outcome {
    counts: Counts,
    not_ours: u64,
    not_allowed: u64,
}

fn run(sin: Sin) -> Outcome {
    let mut memory = Area::of_test(512 << 10);
    let mut ring = Ring::new(&mut memory, 64, false);
    let disk = Disk {
        sectors: SECTORS,
        features: FLUSH | WRITE_ZEROES,
    };
    let mut workload = Workload::new(&mut memory, disk, 100, 11, Counts::default());
    let mut model = Model::new(&ring, sin);
    let (mut not_ours, mut not_allowed) = (0, 0);
    for turn in 0..2000 {
        while ring.free() >= MAX_BUFFERS {
            let Some(request) = workload.next_request() else {
                break;
            };
            ring.add(request.buffers(), request.token, 0).expect("room");
        }
        ring.publish();
        model.work();
        while let Some(used) = ring.pop() {
            match used {
                Used::Done { token, .. } => workload.complete(token),
                _ => not_ours += 1,
            }
        }
        if turn % 40 == 0 {
            not_allowed += model.not_allowed(&workload);
        }
    }
    Outcome {
        counts: *workload.counts(),
        not_ours,
        not_allowed,
    }
}

#[test]
fn a_sound_disk_is_found_sound() {
    let Outcome {
        counts,
        not_ours,
        not_allowed,
    } = run(Sin::None);
    assert!(counts.writes > 500 && counts.reads > 500, "{counts:?}");
    assert!(counts.flushes > 100 && counts.zeroings > 100, "{counts:?}");
    assert_eq!((counts.errors, counts.wrong, counts.bad_status), (0, 0, 0));
    assert_eq!((not_ours, not_allowed), (0, 0));
}

#[test]
fn a_write_that_was_dropped_torn_or_misplaced_is_found_out() {
    for sin in [Sin::DropsAWrite, Sin::TearsAWrite, Sin::WritesElsewhere] {
        let counts = run(sin).counts;
        assert!(counts.wrong > 0 && counts.wrong_sector > 0, "{counts:?}");
    }
}

#[test]
fn a_request_done_twice_is_found_out() {
    assert!(run(Sin::Repeats).not_ours > 0);
}

#[test]
fn a_request_without_status_is_found_out() {
    assert!(run(Sin::NoStatus).counts.bad_status > 0);
}

#[test]
fn a_flush_that_does_nothing_is_found_out_by_the_table() {
    assert!(run(Sin::LosesFlushed).not_allowed > 0);
}

#[test]
fn failed_requests_count_as_that_alone() {
    let Outcome {
        counts,
        not_allowed,
        ..
    } = run(Sin::FailsSome);
    assert!(counts.errors > 50, "{counts:?}");
    assert_eq!((counts.wrong, counts.bad_status, not_allowed), (0, 0, 0));
}

#[test]
fn a_disk_that_is_read_only_is_only_read() {
    let mut memory = Area::of_test(512 << 10);
    let disk = Disk {
        sectors: SECTORS,
        features: READ_ONLY | FLUSH,
    };
    let mut workload = Workload::new(&mut memory, disk, 100, 1, Counts::default());
    for _ in 0..1000 {
        let request = workload.next_request().expect("a request");
        assert_eq!(
            area((request.buffers()[0].address, 16, false)).get32(0),
            request::IN
        );
        workload.slots = [Slot::default(); DEPTH as usize];
    }
}

#[test]
fn a_disk_without_room_is_left_alone() {
    let disk = Disk {
        sectors: 7,
        features: 0,
    };
    let mut workload = Workload::new(&mut Area::of_test(128 << 10), disk, 9, 1, Counts::default());
    assert!(workload.next_request().is_none());
}
