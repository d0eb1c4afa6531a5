//! virtio devices, driven well by modes `blk`, `net`, `rng` and `vsock`, and badly by `hostile`.
//!
//! A vCPU drives one device, which nobody else drives meanwhile. Each turn of the vCPU's loop is a
//! turn here: what came back is judged, new requests are made, and nothing is waited for.

mod blk;
mod device;
mod hostile;
mod net;
mod rng;
mod vsock;
mod window;

use core::cell::UnsafeCell;

use stillpoint_guest_abi::pulse::{MAX_VCPUS, Mode};
use stillpoint_guest_virtio::memory::Area;

use crate::gaps::Gaps;
use crate::tsc;
use device::{Clock, Rest};

/// Memory for the device of each vCPU.
const ARENA: usize = 384 << 10;

#[repr(C, align(4096))]
struct Arenas(UnsafeCell<[[u8; ARENA]; MAX_VCPUS]>);

// SAFETY: reached through areas only, each by its own vCPU.
unsafe impl Sync for Arenas {}

static ARENAS: Arenas = Arenas(UnsafeCell::new([[0; ARENA]; MAX_VCPUS]));

/// A vCPU's memory for devices: what it had before is gone.
fn arena(vcpu: usize) -> Area {
    let base = ARENAS.0.get() as usize + vcpu * ARENA;
    // SAFETY: within the static, which nothing else reaches; a vCPU drives one device at a time,
    // and a device is reset before its memory is used anew.
    unsafe { Area::new(base, ARENA) }
}

/// Until a device that is not there, or failed, is looked for again: the guest's own time.
const RETRY_US: u64 = 500_000;
/// How long the end of a mode waits for requests in flight.
const FINISH_US: u64 = 10_000_000;

/// A device in use. There is one for each vCPU and nowhere else to put the largest of them.
#[expect(clippy::large_enum_variant, reason = "there is no heap")]
enum Task {
    Blk(blk::Blk),
    Net(net::Net),
    Rng(rng::Rng),
    Vsock(vsock::Vsock),
    Hostile(hostile::Hostile),
    /// There is none, or none that works.
    None(u64),
}

/// What a vCPU does with a device.
pub(crate) struct Driving {
    mode: Mode,
    vcpu: usize,
    clock: Clock,
    task: Task,
}

impl Driving {
    /// Finds a device for a mode.
    pub(crate) fn start(mode: Mode, vcpu: usize) -> Self {
        let mut driving = Self {
            mode,
            vcpu,
            clock: Clock::new(),
            task: Task::None(0),
        };
        driving.find();
        driving
    }

    fn find(&mut self) {
        let vcpu = self.vcpu;
        let found = match self.mode {
            Mode::Blk => blk::Blk::start(vcpu).map(Task::Blk),
            Mode::Net => net::Net::start(vcpu).map(Task::Net),
            Mode::Rng => rng::Rng::start(vcpu).map(Task::Rng),
            Mode::Vsock => vsock::Vsock::start(vcpu).map(Task::Vsock),
            _ => Some(Task::Hostile(hostile::Hostile::start(vcpu))),
        };
        self.task = found.unwrap_or(Task::None(self.clock.now()));
    }

    /// A turn.
    pub(crate) fn turn(&mut self, gaps: &mut Gaps) {
        let now = self.clock.tick();
        let works = match &mut self.task {
            Task::Blk(blk) => blk.turn(now, true),
            Task::Net(net) => net.turn(now),
            Task::Rng(rng) => rng.turn(now, true),
            Task::Vsock(vsock) => vsock.turn(now),
            Task::Hostile(hostile) => {
                hostile.turn(gaps);
                // What it took was our own doing, and no gap.
                gaps.resume(tsc::read());
                true
            }
            Task::None(since) => {
                if now - *since > tsc::cycles(RETRY_US) {
                    self.find();
                }
                true
            }
        };
        if !works {
            self.task = Task::None(now);
        }
    }

    /// Whether the vCPU should halt now, and until when.
    pub(crate) fn rest(&self) -> Option<Rest> {
        match &self.task {
            Task::Blk(blk) => blk.device().rest(),
            Task::Net(net) => net.device().rest(),
            Task::Rng(rng) => rng.device().rest(),
            Task::Vsock(vsock) => vsock.device().rest(),
            Task::Hostile(_) | Task::None(_) => None,
        }
    }

    /// The end of the mode: what is in flight comes back first, or the guest would not know what
    /// became of it.
    pub(crate) fn finish(mut self, gaps: &mut Gaps) {
        let begin = self.clock.tick();
        loop {
            let now = self.clock.tick();
            gaps.tick();
            let busy = match &mut self.task {
                Task::Blk(blk) => blk.turn(now, false) && blk.is_busy(),
                Task::Rng(rng) => rng.turn(now, false) && rng.is_busy(),
                _ => false,
            };
            if !busy || now - begin > tsc::cycles(FINISH_US) {
                return;
            }
        }
    }
}
