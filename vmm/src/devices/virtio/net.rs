//! Network device (virtio 1.2, section 5.1): Ethernet frames between a guest and a tap of its host.
//!
//! ```text
//!   guest's queues                                                     the host's tap
//!   0, 2, 4 ... ◀── receive.rs ── one frame, when there are buffers ◀── queue 0, 1, 2 ...
//!   1, 3, 5 ... ─── transmit.rs ─ one frame, at once or dropped ──────▶ (one file for each)
//!   the last    ─── control.rs ── MAC address, queues, offloads
//! ```
//!
//! All pairs of queues are served by the device's one thread. The tap keeps all its queues whatever
//! the guest uses of them: tap queue `i` leads into the guest's pair `i mod pairs in use`, so the
//! frames of one flow stay in order, and a guest that asks for fewer queues loses none.
//!
//! Nothing is ever in flight. Frames that come while the device stands still wait in the kernel,
//! where the tap keeps them (`receive.rs`).
//!
//! What the tap hands out (checksums left open, long frames) belongs to the interface. It is set
//! when the driver says what it takes, while this process owns the guest, and so it is right for a
//! successor too, which gets the same file: a restored device sets nothing.

mod control;
mod link;
mod offload;
mod receive;
pub mod tap;
mod transmit;

#[cfg(test)]
mod tests;

use rustix::io::Errno;
use stillpoint_state::contents::Kind as SectionKind;
use stillpoint_state::sections::VirtioNet;
use stillpoint_state::{Saved, Section, StateError, Unclaimed};
use virtio_bindings::virtio_net::*;

use super::poller::{Poller, Watch};
use super::queue::{Broken, Queues};
use super::{FIRST_TOKEN, Kind};
use crate::handover::lend::Lending;
use stillpoint_control::spec::MAX_QUEUE_PAIRS;
use tap::Tap;

/// Device type of a network card.
const NETWORK: u32 = 1;
/// Entries of each queue at most. 512 receive buffers of a page hold 32 of the longest frames.
const QUEUE_SIZE: u16 = 512;
/// Sizes of as many queues as there can be: two for each pair, and one for commands.
const QUEUE_SIZES: [u16; 2 * MAX_QUEUE_PAIRS as usize + 1] =
    [QUEUE_SIZE; 2 * MAX_QUEUE_PAIRS as usize + 1];

/// Bytes of the header before each frame, `struct virtio_net_hdr_v1` (virtio 1.2, 5.1.6).
const HEADER: usize = 12;
/// The longest frame with its header: 64 KiB of an offloaded packet, Ethernet's header, two VLAN
/// tags.
const MAX_FRAME: usize = HEADER + 14 + 2 * 4 + 65535;
/// The least MTU that a driver may be told (5.1.4.1).
const MIN_MTU: u16 = 68;

const fn bit(number: u32) -> u64 {
    1 << number
}

fn is_set(features: u64, number: u32) -> bool {
    features & bit(number) != 0
}

/// Work of one turn. A freeze waits for the turn that is under way, so it is kept short: some
/// 50 µs, whatever the frames' size.
#[derive(Debug, Default)]
struct Turn {
    frames: usize,
    bytes: usize,
}

impl Turn {
    fn add(&mut self, bytes: usize) {
        self.frames += 1;
        self.bytes += bytes;
    }

    fn is_over(&self) -> bool {
        self.frames >= 64 || self.bytes >= 256 << 10
    }
}

/// Frames that were dropped, for one direction.
#[derive(Debug, Default)]
struct Lost {
    frames: u64,
}

impl Lost {
    /// Counts one; says so for the first, the second, the fourth, and so on.
    fn note(&mut self, what: &str, error: Errno) {
        self.frames += 1;
        if self.frames.is_power_of_two() {
            let (frames, thread) = (self.frames, std::thread::current());
            // The thread has the device's name.
            let device = thread.name().unwrap_or_default();
            tracing::warn!(device, frames, %error, "{what}: frames were dropped");
        }
    }
}

/// The device.
#[derive(Debug)]
pub struct Net {
    tap: Tap,
    /// The address of the machine's spec.
    own_mac: [u8; 6],
    /// The address now: the driver may have set another.
    mac: [u8; 6],
    /// The interface's MTU at boot; 0 if it could not be told.
    mtu: u16,
    /// Features offered since boot. A successor offers the same, whatever its kernel could do.
    offered: u64,
    /// Of those, what the driver agreed to; none before it did.
    agreed: u64,
    /// `GUEST_*` features that are switched on.
    offloads: u64,
    /// Pairs of queues in use.
    active: usize,
    /// For each of the tap's queues the frame that had no room, or nothing.
    held: Vec<Vec<u8>>,
    /// For each of the tap's queues how long its next frame may be, by those before it.
    expected: Vec<usize>,
    /// Where the end of a frame goes that is longer than the buffers at hand.
    spill: Vec<u8>,
    lost_incoming: Lost,
    lost_outgoing: Lost,
}

impl Net {
    /// A fresh device. Asks the tap what it can do, so the guest must be ours.
    pub fn new(tap: Tap, mac: [u8; 6]) -> Self {
        let mtu = tap.mtu().filter(|&mtu| mtu >= MIN_MTU).unwrap_or(0);
        let mut offered = offload::offered(tap.probe())
            | bit(VIRTIO_NET_F_MAC)
            | bit(VIRTIO_NET_F_STATUS)
            | bit(VIRTIO_NET_F_MRG_RXBUF)
            | bit(VIRTIO_NET_F_CTRL_VQ)
            | bit(VIRTIO_NET_F_CTRL_MAC_ADDR)
            | bit(VIRTIO_NET_F_CTRL_GUEST_OFFLOADS);
        if mtu != 0 {
            offered |= bit(VIRTIO_NET_F_MTU);
        }
        if tap.pairs() > 1 {
            offered |= bit(VIRTIO_NET_F_MQ);
        }
        Self::with(tap, mac, mtu, offered)
    }

    fn with(tap: Tap, mac: [u8; 6], mtu: u16, offered: u64) -> Self {
        Self {
            own_mac: mac,
            mac,
            mtu,
            offered,
            agreed: 0,
            offloads: 0,
            active: 1,
            held: vec![Vec::new(); tap.pairs()],
            expected: vec![0; tap.pairs()],
            // One more than the longest frame, so that a longer one shows.
            spill: vec![0; MAX_FRAME + 1],
            lost_incoming: Lost::default(),
            lost_outgoing: Lost::default(),
            tap,
        }
    }

    /// From its section. `mac` is the address of the machine's spec.
    pub fn restore(
        tap: Tap,
        mac: [u8; 6],
        instance: &str,
        from: &mut Unclaimed,
    ) -> Result<Self, StateError> {
        let saved: VirtioNet = from.take(instance)?;
        let wrong = |problem: String| StateError::Value {
            section: VirtioNet::NAME,
            problem: format!("{instance}: {problem}"),
        };
        let mtu = u16::try_from(saved.mtu).map_err(|_| wrong(format!("MTU {}", saved.mtu)))?;
        let mut net = Self::with(tap, mac, mtu, saved.offered);
        let len = saved.mac.len();
        net.mac = saved
            .mac
            .try_into()
            .map_err(|_| wrong(format!("a MAC address of {len} bytes")))?;
        if saved.features & !saved.offered != 0 {
            let beyond = saved.features & !saved.offered;
            return Err(wrong(format!("features {beyond:#x} that were not offered")));
        }
        if saved.offloads & !offload::guest(saved.features) != 0 {
            return Err(wrong(format!("offloads {:#x}", saved.offloads)));
        }
        net.agreed = saved.features;
        net.offloads = saved.offloads;
        let pairs = net.tap.pairs();
        net.active = match usize::try_from(saved.active_pairs) {
            Ok(active) if (1..=pairs).contains(&active) => active,
            _ => return Err(wrong(format!("{} of {pairs} pairs", saved.active_pairs))),
        };
        if saved.held.len() != pairs || saved.held.iter().any(|frame| frame.len() > MAX_FRAME) {
            return Err(wrong("frames that can't have been held".into()));
        }
        net.held = saved.held;
        Ok(net)
    }

    /// The guest's queue that a queue of the tap leads into.
    fn receive_queue(&self, tap: usize) -> usize {
        2 * (tap % self.active)
    }

    /// The queue for commands: behind all pairs there can be, if the driver knows that there are
    /// several (5.1.2).
    fn control_queue(&self) -> usize {
        match is_set(self.agreed, VIRTIO_NET_F_MQ) {
            true => 2 * self.tap.pairs(),
            false => 2,
        }
    }
}

impl Kind for Net {
    fn device_type(&self) -> u32 {
        NETWORK
    }

    fn features(&self) -> u64 {
        self.offered
    }

    fn queue_sizes(&self) -> &'static [u16] {
        // The spec's validation knows the same limit.
        &QUEUE_SIZES[..(2 * self.tap.pairs() + 1).min(QUEUE_SIZES.len())]
    }

    fn config(&self) -> Vec<u8> {
        // `struct virtio_net_config` (5.1.4).
        let mut config = self.mac.to_vec();
        config.extend((VIRTIO_NET_S_LINK_UP as u16).to_le_bytes());
        config.extend((self.tap.pairs() as u16).to_le_bytes());
        config.extend(self.mtu.to_le_bytes());
        config
    }

    fn write_config(&mut self, _offset: u64, _data: &[u8]) {
        // Nothing there is the driver's to write: it sets its address by a command.
    }

    fn start(&mut self, features: u64) -> Result<(), Broken> {
        self.agreed = features & self.offered;
        self.offloads = offload::guest(self.agreed);
        let set = self.tap.set_offload(offload::flags(self.offloads));
        set.map_err(|error| Broken::Bug(format!("the tap takes no offloads: {error}")))?;
        // Frames that came for nobody, and long ones for a driver before this one.
        self.tap.empty();
        Ok(())
    }

    fn reset(&mut self) {
        self.mac = self.own_mac;
        self.agreed = 0;
        self.offloads = 0;
        self.active = 1;
        self.held.fill(Vec::new());
    }

    fn watch(&mut self, poller: &Poller) -> std::io::Result<()> {
        let mut queues = (FIRST_TOKEN..).zip(self.tap.queues());
        queues.try_for_each(|(token, queue)| poller.add(queue, token, Watch::IN | Watch::ET))
    }

    fn serve(&mut self, queue: usize, queues: &mut Queues<'_>) -> Result<(), Broken> {
        if queue == self.control_queue() {
            return self.control(queue, queues);
        }
        let pair = queue / 2;
        if queue % 2 == 1 && pair < self.tap.pairs() {
            return self.transmit(pair, queue, queues);
        }
        for tap in 0..self.tap.pairs() {
            if self.receive_queue(tap) == queue {
                self.receive(tap, queues)?;
            }
        }
        Ok(())
    }

    fn takes_at_once(&self, queue: usize) -> bool {
        queue == self.control_queue() || queue % 2 == 1
    }

    fn ready(&mut self, token: u64, live: bool, queues: &mut Queues<'_>) -> Result<(), Broken> {
        match usize::try_from(token - FIRST_TOKEN) {
            Ok(tap) if live && tap < self.tap.pairs() => self.receive(tap, queues),
            // The frame stays where it is until a driver is there.
            _ => Ok(()),
        }
    }

    fn in_flight(&self) -> usize {
        0
    }

    fn section(&self) -> SectionKind {
        VirtioNet::KIND
    }

    fn save(&self, instance: &str, to: &mut Saved) -> Result<(), StateError> {
        let section = VirtioNet {
            mac: self.mac.to_vec(),
            mtu: self.mtu.into(),
            offered: self.offered,
            features: self.agreed,
            offloads: self.offloads,
            active_pairs: self.active as u32,
            held: self.held.clone(),
        };
        to.put(instance, &section)
    }

    fn lend(&self, instance: &str, to: &mut Lending) -> std::io::Result<()> {
        let mut queues = self.tap.queues().enumerate();
        queues.try_for_each(|(number, queue)| to.offer(format!("{instance}/tap{number}"), queue))
    }
}
