//! virtio-net (section 5.1): frames with numbers, and what became of each.
//!
//! A frame is sent once, and should come back once (`stillpoint_guest_abi::frame`). A tap may drop
//! frames, so one that doesn't come back is counted and no fault; one that comes back twice or
//! changed is.

use stillpoint_guest_abi::frame::{self, HEAD, LONGEST, Owner, WINDOW};
use stillpoint_guest_abi::virtio::Net as Counts;

use crate::memory::Area;

/// Feature: the device has an address of its own.
pub const MAC: u64 = 1 << 5;
/// Feature: there is a queue for commands.
pub const CONTROL: u64 = 1 << 17;
/// Feature: there may be many pairs of queues.
pub const MULTIQUEUE: u64 = 1 << 22;

/// The command class and command that say how many pairs are used (5.1.6.5.5).
pub const SET_PAIRS: [u8; 2] = [4, 0];
/// What the device answers to a command it has done.
pub const CONTROL_OK: u8 = 0;

/// Bytes before each frame (5.1.6).
pub const HEADER: usize = 12;
/// Room for a header and the longest frame.
pub const BUFFER: usize = 2048;
const _: () = assert!(HEADER + LONGEST <= BUFFER);

/// The frames of a run.
#[derive(Debug)]
pub struct Frames {
    counts: Counts,
    run: u64,
    from: [u8; 6],
    next: u64,
    /// A bit for each of the latest [`WINDOW`] numbers: it has come back.
    back: [u64; (WINDOW / 64) as usize],
}

impl Frames {
    /// None sent yet. `run` is a number that no other run has.
    pub fn new(run: u64, from: [u8; 6], counts: Counts) -> Self {
        Self {
            counts,
            run,
            from,
            next: 0,
            back: [0; (WINDOW / 64) as usize],
        }
    }

    /// The counters.
    pub fn counts(&self) -> &Counts {
        &self.counts
    }

    /// Frames on their way: sent, not back, and not given up.
    pub fn under_way(&self) -> u64 {
        let back = |bits: &u64| u64::from(bits.count_ones());
        self.next.min(WINDOW) - self.back.iter().map(back).sum::<u64>()
    }

    /// Writes header and frame of the next number into a buffer, and gives their length.
    pub fn send(&mut self, buffer: Area) -> usize {
        let number = self.next;
        self.next += 1;
        self.counts.sent += 1;
        let (word, bit) = Self::place(number);
        if number >= WINDOW && self.back[word] & bit == 0 {
            self.counts.lost += 1;
        }
        self.back[word] &= !bit;
        let len = frame::length(number);
        buffer.part(0, HEADER).fill(0);
        let frame = buffer.part(HEADER, len);
        frame.write(0, &[0xff; 6]);
        frame.write(6, &self.from);
        for at in 12..len {
            frame.set8(at, frame::byte(self.run, number, at));
        }
        HEADER + len
    }

    /// Judges `len` bytes of header and frame that came in.
    pub fn receive(&mut self, buffer: Area, len: usize) {
        if len < HEADER || len > buffer.len() {
            self.counts.corrupted += 1;
            return;
        }
        // No offload was agreed on, nor that a frame may take more than one buffer (5.1.6.4.1):
        // nothing in the header but the count of buffers, which is 1.
        let plain = (0..10).all(|at| buffer.get8(at) == 0) && buffer.get8(10) == 1;
        if !plain || buffer.get8(11) != 0 {
            self.counts.bad_headers += 1;
        }
        let frame = buffer.part(HEADER, len - HEADER);
        let mut head = [0; HEAD];
        let there = frame.len().min(HEAD);
        frame.read(0, &mut head[..there]);
        match frame::owner(self.run, &head[..there]) {
            Owner::Foreign => self.counts.foreign += 1,
            Owner::Ours(number) => self.ours(number, frame),
        }
    }

    fn ours(&mut self, number: u64, frame: Area) {
        let whole = number < self.next
            && frame.len() == frame::length(number)
            && (12..frame.len()).all(|at| frame.get8(at) == frame::byte(self.run, number, at));
        if !whole {
            self.counts.corrupted += 1;
            return;
        }
        if self.next - number > WINDOW {
            // Counted as lost; whether it also came before is forgotten.
            return;
        }
        let (word, bit) = Self::place(number);
        if self.back[word] & bit != 0 {
            self.counts.duplicated += 1;
        } else {
            self.back[word] |= bit;
            self.counts.received += 1;
        }
    }

    fn place(number: u64) -> (usize, u64) {
        let number = number % WINDOW;
        ((number / 64) as usize, 1 << (number % 64))
    }

    /// How many pairs of queues are in use.
    pub fn set_pairs(&mut self, pairs: u64) {
        self.counts.pairs = pairs;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frames() -> (Frames, Area) {
        let frames = Frames::new(3, [2, 0, 0, 0, 0, 1], Counts::default());
        (frames, Area::of_test(BUFFER))
    }

    /// As a device gives a frame back: its header says one buffer.
    fn back(frames: &mut Frames, buffer: Area, len: usize) {
        buffer.set8(10, 1);
        frames.receive(buffer, len);
    }

    #[test]
    fn each_comes_back_once() {
        let (mut frames, buffer) = frames();
        for _ in 0..3 * WINDOW {
            let len = frames.send(buffer);
            assert_eq!(frames.under_way(), 1);
            back(&mut frames, buffer, len);
            assert_eq!(frames.under_way(), 0);
        }
        let due = Counts {
            sent: 3 * WINDOW,
            received: 3 * WINDOW,
            ..Counts::default()
        };
        assert_eq!(*frames.counts(), due);
    }

    #[test]
    fn what_came_twice_changed_or_cut_is_found_out() {
        let (mut frames, buffer) = frames();
        let len = frames.send(buffer);
        back(&mut frames, buffer, len);
        back(&mut frames, buffer, len);
        assert_eq!(frames.counts().duplicated, 1);
        back(&mut frames, buffer, len - 1);
        assert_eq!(frames.counts().corrupted, 1, "cut");
        buffer.set8(len - 1, !buffer.get8(len - 1));
        back(&mut frames, buffer, len);
        assert_eq!(frames.counts().corrupted, 2, "changed");
        back(&mut frames, buffer, 3);
        assert_eq!(frames.counts().corrupted, 3, "no frame at all");
        assert_eq!(frames.counts().received, 1);
    }

    #[test]
    fn what_does_not_come_back_is_lost_when_the_window_has_passed() {
        let (mut frames, buffer) = frames();
        for n in 0..WINDOW + 10 {
            let len = frames.send(buffer);
            if n % 2 == 0 {
                back(&mut frames, buffer, len);
            }
        }
        assert_eq!(frames.counts().lost, 5);
        assert_eq!(frames.under_way(), WINDOW / 2);
    }

    #[test]
    fn others_and_their_headers() {
        let (mut frames, buffer) = frames();
        buffer.fill(0);
        back(&mut frames, buffer, HEADER + 60);
        assert_eq!(
            (frames.counts().foreign, frames.counts().bad_headers),
            (1, 0)
        );
        // A segment to be split, though no offload was agreed on.
        buffer.set8(1, 1);
        back(&mut frames, buffer, HEADER + 60);
        buffer.set8(1, 0);
        buffer.set8(10, 2);
        frames.receive(buffer, HEADER + 60);
        assert_eq!(frames.counts().bad_headers, 2);
    }

    #[test]
    fn a_number_never_sent_is_no_frame_of_ours() {
        let (mut sender, buffer) = frames();
        let (mut other, _) = frames();
        let len = sender.send(buffer);
        back(&mut other, buffer, len);
        assert_eq!(other.counts().corrupted, 1);
    }
}
