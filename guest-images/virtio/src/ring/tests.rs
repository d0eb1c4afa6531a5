use super::*;
use crate::random::Random;

/// A device of a few lines: it takes requests, and gives back whichever the test says.
#[derive(Debug)]
pub(crate) struct Device {
    layout: Layout,
    seen: u16,
    given: u16,
}

/// A request as the device finds it: its head, and (address, length, it may write).
pub(crate) type Request = (u16, Vec<(u64, u32, bool)>);

impl Device {
    pub(crate) fn of(ring: &Ring) -> Self {
        Self {
            layout: *ring.layout(),
            seen: 0,
            given: 0,
        }
    }

    /// The next request.
    pub(crate) fn take(&mut self) -> Option<Request> {
        if self.layout.avail.get16(2) == self.seen {
            return None;
        }
        let at = 4 + 2 * usize::from(self.seen % self.layout.size);
        let head = self.layout.avail.get16(at);
        self.seen = self.seen.wrapping_add(1);
        let mut found = Vec::new();
        chain(self.layout.descriptors, head, &mut found);
        Some((head, found))
    }

    /// Gives one back.
    pub(crate) fn give(&mut self, head: u16, len: u32) {
        let at = 4 + 8 * usize::from(self.given % self.layout.size);
        self.layout.used.set32(at, head.into());
        self.layout.used.set32(at + 4, len);
        self.given = self.given.wrapping_add(1);
        self.layout.used.set16(2, self.given);
    }

    /// Wants to be kicked for the entry after `event`.
    fn set_event(&self, event: u16) {
        let at = 4 + 8 * usize::from(self.layout.size);
        self.layout.used.set16(at, event);
    }
}

#[expect(unsafe_code, reason = "an indirect table is found by its address")]
fn chain(table: Area, mut index: u16, found: &mut Vec<(u64, u32, bool)>) {
    loop {
        let at = usize::from(index) * DESCRIPTOR;
        let (address, len) = (table.get64(at), table.get32(at + 8));
        let flags = table.get16(at + 12);
        if flags & INDIRECT != 0 {
            // SAFETY: a table that the test made a moment ago.
            let indirect = unsafe { Area::new(address as usize, len as usize) };
            return chain(indirect, 0, found);
        }
        found.push((address, len, flags & WRITE != 0));
        if flags & NEXT == 0 {
            return;
        }
        index = table.get16(at + 14);
    }
}

fn buffers(n: usize) -> Vec<Buffer> {
    let buffer = |i| Buffer {
        address: 0x1000 * (i as u64 + 1),
        len: 10 + i as u32,
        device_writes: i > 0,
    };
    (0..n).map(buffer).collect()
}

fn ring(size: u16, event_idx: bool) -> Ring {
    Ring::new(&mut Area::of_test(8192), size, event_idx)
}

#[test]
fn requests_arrive_whole_and_come_back_once_in_any_order() {
    let mut random = Random::new(1);
    let mut ring = ring(16, false);
    let mut device = Device::of(&ring);
    let table = Area::of_test(1024);
    let (mut held, mut out, mut back) = (Vec::new(), 0u32, 0u32);
    // Far enough for every index to wrap.
    while back < 150_000 {
        let n = 1 + random.below(4) as usize;
        let token = (out % 1000) as u16;
        let added = if random.below(4) == 0 {
            ring.add_indirect(table, &buffers(n), token, 0)
        } else {
            ring.add(&buffers(n), token, 0)
        };
        if added.is_ok() {
            out += 1;
            assert!(ring.publish());
            let (head, found) = device.take().expect("what was published");
            let due: Vec<_> = buffers(n)
                .iter()
                .map(|b| (b.address, b.len, b.device_writes))
                .collect();
            assert_eq!(found, due);
            held.push((head, token));
        }
        if added.is_err() || random.below(3) == 0 {
            let (head, token) = held.swap_remove(random.below(held.len() as u64) as usize);
            device.give(head, 5);
            assert_eq!(ring.pop(), Some(Used::Done { token, len: 5 }));
            assert_eq!(ring.pop(), None);
            back += 1;
        }
        assert_eq!(usize::from(ring.outstanding()), held.len());
    }
    for (head, _) in held {
        device.give(head, 0);
        ring.pop();
    }
    assert_eq!(ring.free(), 16, "every descriptor came back");
}

#[test]
fn a_request_given_back_twice_is_found_out() {
    let mut ring = ring(8, false);
    let mut device = Device::of(&ring);
    ring.add(&buffers(3), 1, 0).expect("room");
    ring.publish();
    let (head, _) = device.take().expect("a request");
    device.give(head, 1);
    device.give(head, 1);
    device.give(500, 1);
    assert_eq!(ring.pop(), Some(Used::Done { token: 1, len: 1 }));
    assert_eq!(ring.pop(), Some(Used::NotOurs), "twice");
    assert_eq!(ring.pop(), Some(Used::NotOurs), "never given");
    assert_eq!(ring.free(), 8, "counted once");
}

#[test]
fn an_index_that_goes_back_is_found_out() {
    let mut ring = ring(8, false);
    let mut device = Device::of(&ring);
    for _ in 0..5 {
        ring.add(&buffers(1), 1, 0).expect("room");
        ring.publish();
        let (head, _) = device.take().expect("a request");
        device.give(head, 1);
        ring.pop();
    }
    // As a device would that was restored from older state.
    ring.layout().used.set16(2, 4);
    assert_eq!(ring.pop(), Some(Used::Torn));
    assert_eq!(ring.pop(), None);
}

#[test]
fn kicks_and_interrupts_are_asked_for_by_index() {
    let mut ring = ring(8, true);
    let mut device = Device::of(&ring);
    let add = |ring: &mut Ring| ring.add(&buffers(1), 0, 0).is_ok();
    device.set_event(0);
    assert!(add(&mut ring) && ring.publish(), "the entry it waits for");
    assert!(add(&mut ring) && !ring.publish(), "one after that");
    device.set_event(3);
    assert!(add(&mut ring) && !ring.publish(), "one before it");
    assert!(
        add(&mut ring) && add(&mut ring) && ring.publish(),
        "past it"
    );

    let event = |ring: &Ring| ring.layout().avail.get16(4 + 2 * 8);
    assert!(!ring.want_interrupt(true));
    assert_eq!(event(&ring), 0);
    let (head, _) = device.take().expect("a request");
    device.give(head, 0);
    assert!(ring.want_interrupt(true), "too late for an interrupt");
    ring.pop();
    assert!(!ring.want_interrupt(true));
    assert_eq!(event(&ring), 1);
}

#[test]
fn kicks_are_withheld_from_a_device_that_wants_none() {
    let mut ring = ring(8, false);
    ring.add(&buffers(1), 0, 0).expect("room");
    assert!(ring.publish());
    assert!(!ring.publish(), "nothing new");
    ring.layout().used.set16(0, 1);
    ring.add(&buffers(1), 0, 0).expect("room");
    assert!(!ring.publish());
}

#[test]
fn what_takes_too_long_counts_once() {
    let mut ring = ring(8, false);
    ring.add(&buffers(1), 0, 100).expect("room");
    ring.add(&buffers(1), 0, 150).expect("room");
    assert_eq!(ring.overdue(200, 100), 0);
    assert_eq!(ring.overdue(201, 100), 1);
    assert_eq!(ring.overdue(1000, 100), 1);
    assert_eq!(ring.overdue(2000, 100), 0);
}
