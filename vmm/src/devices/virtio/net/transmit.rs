//! Frames from the guest to the tap.
//!
//! A frame is sent at once or not at all: what the tap does not take is dropped and counted, as a
//! wire would. So nothing is ever in flight here, and a host interface that is down or full can
//! neither stop a guest nor fail its device. The kernel copies header and frame once and judges
//! its own copy; what it refuses is dropped too.

use rustix::io::Errno;

use super::{HEADER, MAX_FRAME, Net, Turn};
use crate::devices::virtio::queue::{Broken, Queues, slices, total};

impl Net {
    /// Sends what waits in a transmit queue, for one turn.
    pub(super) fn transmit(
        &mut self,
        tap: usize,
        queue: usize,
        queues: &mut Queues<'_>,
    ) -> Result<(), Broken> {
        let mut turn = Turn::default();
        while let Some(chain) = queues.pop(queue)? {
            let len = total(&chain.readable);
            let sent = if len > HEADER as u64 && len <= MAX_FRAME as u64 {
                let frame = slices(queues.memory(), &chain.readable)?;
                self.tap.write(tap, &frame)
            } else {
                Err(Errno::MSGSIZE)
            };
            if let Err(error) = sent {
                self.lost_outgoing.note("the tap took no frame", error);
            }
            queues.push(queue, chain.head, 0)?;
            turn.add(len.min(MAX_FRAME as u64) as usize);
            if turn.is_over() {
                queues.again(queue);
                break;
            }
        }
        queues.signal(queue)
    }
}
