//! Commands of the driver (virtio 1.2, 5.1.6.5).
//!
//! A command that we don't know, that was not agreed on, or that makes no sense is answered with
//! an error and changes nothing. Receive filters are not offered: a guest gets what its tap gets.

use virtio_bindings::virtio_net::*;

use super::{Net, Turn, is_set, offload};
use crate::devices::virtio::queue::{Broken, Chain, Queues};
use crate::memory::Memory;

/// Command headers: class, then command.
const MAC_ADDRESS: [u32; 2] = [VIRTIO_NET_CTRL_MAC, VIRTIO_NET_CTRL_MAC_ADDR_SET];
const QUEUE_PAIRS: [u32; 2] = [VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET];
const OFFLOADS: [u32; 2] = [
    VIRTIO_NET_CTRL_GUEST_OFFLOADS,
    VIRTIO_NET_CTRL_GUEST_OFFLOADS_SET,
];

/// The command makes no sense.
struct Refused;

impl From<Broken> for Refused {
    fn from(_: Broken) -> Self {
        Self
    }
}

impl Net {
    /// Obeys the commands in the control queue.
    pub(super) fn control(&mut self, queue: usize, queues: &mut Queues<'_>) -> Result<(), Broken> {
        let mut turn = Turn::default();
        while let Some(chain) = queues.pop(queue)? {
            let pairs = self.active;
            let answer = match self.obey(&chain, queues.memory()) {
                Ok(()) => VIRTIO_NET_OK,
                Err(Refused) => VIRTIO_NET_ERR,
            };
            chain.write(queues.memory(), 0, &[answer as u8])?;
            queues.push(queue, chain.head, 1)?;
            if self.active != pairs {
                // Each of the tap's queues may lead into another of the guest's now.
                (0..self.tap.pairs()).for_each(|pair| queues.again(2 * pair));
            }
            turn.add(0);
            if turn.is_over() {
                queues.again(queue);
                break;
            }
        }
        queues.signal(queue)
    }

    fn obey(&mut self, chain: &Chain, memory: &Memory) -> Result<(), Refused> {
        let mut header = [0; 2];
        chain.read(memory, 0, &mut header)?;
        let agreed = |feature| match is_set(self.agreed, feature) {
            true => Ok(()),
            false => Err(Refused),
        };
        match header.map(u32::from) {
            MAC_ADDRESS => {
                agreed(VIRTIO_NET_F_CTRL_MAC_ADDR)?;
                let mut mac = [0; 6];
                chain.read(memory, 2, &mut mac)?;
                if mac[0] & 1 != 0 {
                    return Err(Refused);
                }
                self.mac = mac;
            }
            QUEUE_PAIRS => {
                agreed(VIRTIO_NET_F_MQ)?;
                let mut pairs = [0; 2];
                chain.read(memory, 2, &mut pairs)?;
                let pairs = usize::from(u16::from_le_bytes(pairs));
                if pairs == 0 || pairs > self.tap.pairs() {
                    return Err(Refused);
                }
                self.active = pairs;
            }
            OFFLOADS => {
                agreed(VIRTIO_NET_F_CTRL_GUEST_OFFLOADS)?;
                let mut wanted = [0; 8];
                chain.read(memory, 2, &mut wanted)?;
                let wanted = u64::from_le_bytes(wanted);
                if wanted & !offload::guest(self.agreed) != 0 {
                    return Err(Refused);
                }
                let set = self.tap.set_offload(offload::flags(wanted));
                set.map_err(|_| Refused)?;
                self.offloads = wanted;
            }
            _ => return Err(Refused),
        }
        Ok(())
    }
}
