//! Entropy device (virtio 1.2, section 5.4): the host kernel's random bytes.

use rustix::rand::{GetRandomFlags, getrandom};
use stillpoint_state::contents::Kind as SectionKind;
use stillpoint_state::{Saved, StateError, Unclaimed, sections};

use super::Kind;
use super::poller::Poller;
use super::queue::{Broken, Queues, total};
use crate::handover::lend::Lending;

/// Device type of an entropy source.
const ENTROPY: u32 = 4;
/// Bytes given for one request. The driver asks again if it wants more.
const MOST: usize = 4096;
/// Requests answered in one turn; the rest is for the next, so that a guest that asks without end
/// never holds the device's lock for long.
const TURN: usize = 64;

/// The device. It keeps nothing of its guest's.
#[derive(Debug, Default)]
pub struct Rng;

impl Rng {
    /// Takes its section, which only says that it was there.
    pub fn restore(instance: &str, from: &mut Unclaimed) -> Result<Self, StateError> {
        let sections::VirtioRng {} = from.take(instance)?;
        Ok(Self)
    }
}

impl Kind for Rng {
    fn device_type(&self) -> u32 {
        ENTROPY
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> &'static [u16] {
        &[64]
    }

    fn config(&self) -> Vec<u8> {
        Vec::new()
    }

    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    fn start(&mut self, _features: u64) -> Result<(), Broken> {
        Ok(())
    }

    fn reset(&mut self) {}

    fn watch(&mut self, _poller: &Poller) -> std::io::Result<()> {
        Ok(())
    }

    fn serve(&mut self, queue: usize, queues: &mut Queues<'_>) -> Result<(), Broken> {
        for _ in 0..TURN {
            let Some(chain) = queues.pop(queue)? else {
                return queues.signal(queue);
            };
            let want = usize::try_from(total(&chain.writable)).unwrap_or(MOST);
            let mut bytes = [0; MOST];
            // Urandom's pool is ready long before any guest runs: this neither waits nor fails.
            let got = getrandom(&mut bytes[..want.min(MOST)], GetRandomFlags::empty()).unwrap_or(0);
            chain.write(queues.memory(), 0, &bytes[..got])?;
            queues.push(queue, chain.head, u32::try_from(got).unwrap_or(0))?;
        }
        queues.signal(queue)?;
        queues.again(queue);
        Ok(())
    }

    fn takes_at_once(&self, _queue: usize) -> bool {
        true
    }

    fn ready(&mut self, _token: u64, _live: bool, _queues: &mut Queues<'_>) -> Result<(), Broken> {
        Ok(())
    }

    fn in_flight(&self) -> usize {
        0
    }

    fn section(&self) -> SectionKind {
        sections::VirtioRng::KIND
    }

    fn save(&self, instance: &str, to: &mut Saved) -> Result<(), StateError> {
        to.put(instance, &sections::VirtioRng {})
    }

    fn lend(&self, _instance: &str, _to: &mut Lending) -> std::io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::Device;
    use crate::devices::virtio::driver::{Driver, EVENT_IDX, FREE, PATIENCE, buffer};
    use vm_memory::{Bytes, GuestAddress};

    fn boot() -> Driver {
        Driver::boot("rng", Box::new(Rng))
    }

    #[test]
    fn gives_random_bytes_and_no_more_than_fit() {
        for features in [0, EVENT_IDX] {
            let driver = boot();
            let ring = &mut driver.start(features)[0];
            let head = ring.add(&[], &[buffer(FREE, 16), buffer(FREE + 64, 8000)]);
            ring.kick();
            let used = ring.wait();
            assert_eq!((used.head, used.len), (head, 4096));
            let mut bytes = [0u8; 16];
            let at = GuestAddress(FREE);
            driver.memory.read_slice(&mut bytes, at).expect("read");
            assert_ne!(bytes, [0; 16]);
            assert_eq!(driver.acknowledge(), 1);
        }
    }

    #[test]
    fn round_trip_and_requests_go_on_over_swaps() {
        for features in [0, EVENT_IDX] {
            let mut driver = boot();
            let ring = &mut driver.start(features)[0];
            driver.stand_still(PATIENCE).expect("rest");
            let saved = driver.saved();
            driver.device.resume();
            driver = driver.swap(|state, _| Box::new(Rng::restore("rng", state).expect("rng")));
            driver.stand_still(PATIENCE).expect("rest");
            // Beside the interrupt that a device raises when it is let go.
            driver.acknowledge();
            assert_eq!(driver.saved(), saved);
            driver.device.resume();
            for _ in 0..50 {
                ring.add(&[], &[buffer(FREE, 16)]);
                ring.kick();
                ring.wait();
                driver = driver.swap(|state, _| Box::new(Rng::restore("rng", state).expect("rng")));
            }
        }
    }

    #[test]
    fn frozen_means_silent() {
        let driver = boot();
        let ring = &mut driver.start(0)[0];
        driver.stand_still(PATIENCE).expect("rest");
        let _ = driver.interrupted();
        ring.add(&[], &[buffer(FREE, 16)]);
        ring.kick();
        assert!(ring.take().is_none() && !driver.interrupted());
        driver.device.resume();
        ring.wait();
    }
}
