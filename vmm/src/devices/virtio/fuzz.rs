//! Bodies of fuzz targets: a guest's RAM is whatever the fuzzer says, and a device works on it.
//! In builds for fuzzers only; the targets are in `vmm/fuzz`.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;

use virtio_queue::{Queue, QueueState};
use vm_memory::{Bytes, GuestAddress};

use super::queue::{self, Broken, Interrupt, Queues};
use super::vsock::Vsock;
use super::{Kind, rng::Rng};
use crate::irq::Line;
use crate::memory::Memory;

/// RAM of the guest.
const RAM: usize = 256 << 10;
/// Rings of a queue are this far apart.
const STRIDE: u64 = 0x3000;
/// Turns of a device: a driver that lies in one may be judged in the next.
const TURNS: usize = 4;

/// A guest's RAM, with `bytes` where its rings begin, and beyond.
fn ram(bytes: &[u8]) -> Option<Memory> {
    let memory = Memory::from_ranges(&[(GuestAddress(0), RAM)]).ok()?;
    let len = bytes.len().min(RAM);
    memory.write_slice(&bytes[..len], GuestAddress(0)).ok()?;
    Some(memory)
}

/// Queues whose rings lie one behind the other from address 0 on; the first bytes say how large they
/// are, and how far the device has come.
fn queues(bytes: &[u8], count: usize, memory: &Memory) -> Vec<Option<Queue>> {
    let of = |number: usize| {
        let said = |at: usize| bytes.get(number * 4 + at).copied().unwrap_or(0);
        let base = number as u64 * STRIDE;
        let state = QueueState {
            max_size: 256,
            next_avail: said(0).into(),
            next_used: said(1).into(),
            event_idx_enabled: said(2) & 1 == 1,
            size: 1 << (said(3) % 9),
            ready: true,
            desc_table: base + 0x10,
            avail_ring: base + 0x1010,
            used_ring: base + 0x2010,
        };
        queue::open(state, memory).ok()
    };
    (0..count).map(of).collect()
}

/// Lets `act` work with the queues until it fails, or has had its turns.
fn work(
    bytes: &[u8],
    count: usize,
    mut act: impl FnMut(&mut Queues<'_>, usize) -> Result<(), Broken>,
) {
    let Some(memory) = ram(bytes) else { return };
    let mut queues = queues(bytes, count, &memory);
    let interrupt = Interrupt::new(Line::loose());
    let (mut again, mut untold) = (0, 0);
    let mut queues = Queues {
        memory: &memory,
        queues: &mut queues,
        interrupt: &interrupt,
        again: &mut again,
        untold: &mut untold,
    };
    for queue in (0..TURNS).flat_map(|_| 0..count) {
        if act(&mut queues, queue).is_err() {
            return;
        }
    }
}

/// A ring: every chain is taken, read, written and given back.
pub fn rings(bytes: &[u8]) {
    work(bytes, 1, |queues, queue| {
        for _ in 0..64 {
            let Some(chain) = queues.pop(queue)? else {
                break;
            };
            let readable = queue::total(&chain.readable).min(4096);
            let mut request = vec![0; readable as usize];
            chain.read(queues.memory(), 0, &mut request)?;
            let writable = queue::total(&chain.writable).min(4096);
            chain.write(queues.memory(), 0, &vec![0xa5; writable as usize])?;
            let slices = queue::slices(queues.memory(), &chain.readable)?;
            assert!(slices.iter().map(|slice| slice.len() as u64).sum::<u64>() >= readable);
            queues.push(queue, chain.head, writable as u32)?;
            queues.signal(queue)?;
        }
        Ok(())
    });
    // A whole device on the same ring: it fills what it is given.
    let mut rng = Rng;
    work(bytes, 1, |queues, queue| rng.serve(queue, queues));
}

/// Packets of a socket device whose host programs are gone.
pub fn packets(bytes: &[u8]) {
    let dir = std::env::temp_dir();
    let Some(listener) = listener() else { return };
    let mut vsock = Vsock::new(42, listener, &dir.join("no-such-directory"));
    if vsock.start(0).is_err() {
        return;
    }
    work(bytes, 3, |queues, queue| vsock.serve(queue, queues));
    vsock.reset();
}

/// A socket at which nobody calls: it has no name.
fn listener() -> Option<OwnedFd> {
    use std::os::linux::net::SocketAddrExt;
    use std::sync::atomic::{AtomicU64, Ordering};
    static NUMBER: AtomicU64 = AtomicU64::new(0);
    let number = NUMBER.fetch_add(1, Ordering::Relaxed);
    let name = format!("stillpoint-fuzz-{}-{number}", std::process::id());
    let address = std::os::unix::net::SocketAddr::from_abstract_name(name).ok()?;
    let listener = UnixListener::bind_addr(&address).ok()?;
    listener.set_nonblocking(true).ok()?;
    Some(listener.into())
}
