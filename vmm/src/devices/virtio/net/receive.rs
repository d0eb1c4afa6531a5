//! Frames from the tap to the guest.
//!
//! A frame is taken from the tap only when buffers are at hand, and goes straight into them. The
//! tap's queue in the kernel is the only place where frames wait, and it stays with the interface
//! when the guest changes its VMM. Exactly one frame for each tap queue can be in between: *held*,
//! because it turned out longer than the buffers at hand, and there were no more. It travels with
//! the saved state.
//!
//! The tap is watched for edges, so frames for which there are no buffers wake nobody a second
//! time: the driver's next kick does.

use std::collections::VecDeque;

use rustix::io::Errno;
use vm_memory::VolatileSlice;
use vm_memory::bitmap::BS;

use super::{HEADER, Net, Turn, is_set, offload};
use crate::devices::virtio::queue::{Broken, Chain, Queues, slices, total};
use crate::memory::Memory;
use virtio_bindings::virtio_net::VIRTIO_NET_F_MRG_RXBUF;

/// Offset of `flags` and `num_buffers` in the header before each frame (virtio 1.2, 5.1.6).
const FLAGS: u64 = 0;
const NUM_BUFFERS: u64 = 10;
/// Ethernet's header, and two VLAN tags.
const ETHERNET: u64 = 14 + 2 * 4;
/// Payload of a frame on a wire that says nothing else.
const USUAL_MTU: u64 = 1500;
/// Most buffers that one read fills: `UIO_MAXIOV` is 1024, and one is ours.
const MAX_PARTS: usize = 1000;

/// Buffers taken from the ring that hold nothing yet, in the ring's order.
#[derive(Debug, Default)]
struct Room {
    chains: VecDeque<Chain>,
    bytes: u64,
}

impl Room {
    /// Takes buffers until there are `want` bytes, or `most` chains, or no more.
    fn fill(
        &mut self,
        want: u64,
        most: usize,
        queue: usize,
        queues: &mut Queues<'_>,
    ) -> Result<(), Broken> {
        while self.bytes < want && self.chains.len() < most {
            let Some(chain) = queues.pop(queue)? else {
                return Ok(());
            };
            let bytes = total(&chain.writable);
            if bytes < HEADER as u64 {
                return Err(Broken::Request("for a frame has no room for its header"));
            }
            self.bytes += bytes;
            self.chains.push_back(chain);
        }
        Ok(())
    }

    fn slices<'m>(&self, memory: &'m Memory) -> Result<Vec<VolatileSlice<'m, BS<'m, ()>>>, Broken> {
        let mut all = Vec::new();
        for chain in &self.chains {
            all.extend(slices(memory, &chain.writable)?);
        }
        all.truncate(MAX_PARTS);
        Ok(all)
    }

    /// Gives the first buffers to the driver: they hold a frame of `len` bytes.
    fn deliver(
        &mut self,
        mut len: u64,
        checksums: bool,
        queue: usize,
        queues: &mut Queues<'_>,
    ) -> Result<(), Broken> {
        let mut used = Vec::with_capacity(1);
        let mut first = None;
        while len > 0 {
            let Some(chain) = self.chains.pop_front() else {
                return Err(Broken::Bug("a frame is longer than its buffers".into()));
            };
            let bytes = total(&chain.writable);
            self.bytes -= bytes;
            used.push((chain.head, bytes.min(len) as u32));
            len -= bytes.min(len);
            first.get_or_insert(chain);
        }
        if let Some(first) = first {
            let memory = queues.memory();
            // The kernel leaves this one to us (`tun_put_user` skips what it does not know).
            first.write(memory, NUM_BUFFERS, &(used.len() as u16).to_le_bytes())?;
            if checksums {
                // It also says `DATA_VALID`, which this driver did not agree to (5.1.6.4.1).
                first.write(memory, FLAGS, &[0])?;
            }
        }
        queues.push_together(queue, &used)
    }

    /// Puts back what holds nothing.
    fn put_back(self, queue: usize, queues: &mut Queues<'_>) {
        for _ in self.chains {
            queues.put_back(queue);
        }
    }
}

impl Net {
    /// Takes what waits in one of the tap's queues, for one turn.
    pub(super) fn receive(&mut self, tap: usize, queues: &mut Queues<'_>) -> Result<(), Broken> {
        let queue = self.receive_queue(tap);
        if !queues.is_used(queue) {
            return Ok(());
        }
        let mut room = Room::default();
        let mut turn = Turn::default();
        loop {
            if turn.is_over() {
                queues.again(queue);
                break;
            }
            match self.receive_one(tap, queue, &mut room, queues)? {
                Some(bytes) => turn.add(bytes),
                None => break,
            }
        }
        room.put_back(queue, queues);
        queues.signal(queue)
    }

    /// Takes one frame. Gives its length, or `None` when there is none or no room for it.
    fn receive_one(
        &mut self,
        tap: usize,
        queue: usize,
        room: &mut Room,
        queues: &mut Queues<'_>,
    ) -> Result<Option<usize>, Broken> {
        if !self.held[tap].is_empty() {
            return self.deliver_held(tap, queue, room, queues);
        }
        // Without mergeable buffers a frame has one chain and no more.
        let merge = is_set(self.agreed, VIRTIO_NET_F_MRG_RXBUF);
        room.fill(self.want(tap), self.most_chains(), queue, queues)?;
        if room.chains.is_empty() {
            return Ok(None);
        }
        let memory = queues.memory();
        let slices = room.slices(memory)?;
        let direct: usize = slices.iter().map(VolatileSlice::len).sum();
        let len = match self.tap.read(tap, &slices, &mut self.spill) {
            Ok(len) => len,
            Err(Errno::AGAIN) => return Ok(None),
            Err(error) => {
                self.lost_incoming.note("the tap can't be read", error);
                return Ok(None);
            }
        };
        self.expect(tap, len);
        if len <= direct {
            room.deliver(len as u64, self.checksums(), queue, queues)?;
        } else if !merge || len == direct + self.spill.len() {
            self.lost_incoming
                .note("a frame is longer than its buffers", Errno::MSGSIZE);
        } else {
            let mut frame = Vec::with_capacity(len);
            for slice in slices {
                let at = frame.len();
                frame.resize(at + slice.len(), 0);
                slice.copy_to(&mut frame[at..]);
            }
            frame.extend_from_slice(&self.spill[..len - direct]);
            self.held[tap] = frame;
            return self.deliver_held(tap, queue, room, queues);
        }
        Ok(Some(len))
    }

    /// Gives the driver the frame that had no room, if it has room now.
    fn deliver_held(
        &mut self,
        tap: usize,
        queue: usize,
        room: &mut Room,
        queues: &mut Queues<'_>,
    ) -> Result<Option<usize>, Broken> {
        let len = self.held[tap].len();
        room.fill(len as u64, usize::MAX, queue, queues)?;
        if room.bytes < len as u64 {
            // All that this driver can ever offer at once.
            if room.chains.len() < queues.size(queue) {
                return Ok(None);
            }
            self.held[tap] = Vec::new();
            self.lost_incoming
                .note("a frame is longer than all buffers", Errno::MSGSIZE);
            return Ok(Some(len));
        }
        let frame = std::mem::take(&mut self.held[tap]);
        let mut rest = frame.as_slice();
        for chain in &room.chains {
            let here = total(&chain.writable).min(rest.len() as u64);
            let (now, later) = rest.split_at(here as usize);
            chain.write(queues.memory(), 0, now)?;
            rest = later;
        }
        room.deliver(len as u64, self.checksums(), queue, queues)?;
        Ok(Some(len))
    }

    /// Bytes of buffers to have at hand for the next frame. Where frames can be long they rarely
    /// all are, and buffers for the longest are some forty to be looked at; so as many as the
    /// frames before it needed. One that is longer all the same is copied once, see `spill`.
    fn want(&self, tap: usize) -> u64 {
        let wire = HEADER as u64 + ETHERNET + u64::from(self.mtu).max(USUAL_MTU);
        match offload::long_frames(self.offloads) {
            true => wire.max(self.expected[tap] as u64),
            false => wire,
        }
    }

    /// Learns from a frame: at once from a longer one, slowly from shorter ones.
    fn expect(&mut self, tap: usize, len: usize) {
        let expected = &mut self.expected[tap];
        *expected = len.max(*expected - expected.saturating_sub(len) / 8);
    }

    fn most_chains(&self) -> usize {
        match is_set(self.agreed, VIRTIO_NET_F_MRG_RXBUF) {
            true => usize::MAX,
            false => 1,
        }
    }

    /// Whether every frame must come with its checksum, and without a word about it.
    fn checksums(&self) -> bool {
        !offload::no_checksums(self.offloads)
    }
}
