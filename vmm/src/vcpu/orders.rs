//! What is said between the machine thread and a vCPU's thread.

use std::ops::Range;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, TryRecvError};
use std::time::{Duration, Instant};

use stillpoint_state::Unread;
use stillpoint_state::sections::Vcpu as VcpuSection;

use super::SavedVcpu;
use super::error::VcpuError;
use super::load::{LoadedVcpu, Pause};
use super::outside::Entry;
use super::placement::Home;
use crate::bus::Bus;

/// How long an answer, or the next order of a freeze, is spun for before the thread sleeps: a
/// wake-up costs more than most of the steps of a freeze.
pub(super) const SPIN: Duration = Duration::from_micros(300);

/// What a vCPU thread is told.
#[derive(Debug)]
pub(super) enum Order {
    /// Run on after a freeze that was called off.
    Run,
    /// Run on after a pause in place; of it this much counts as stolen. Answered by `Entering`.
    Resume { stolen: Duration },
    /// Come to rest; a kick follows.
    Park,
    /// Save, in this state format.
    Save { format: u32 },
    /// The next order comes soon: stay awake for it so long.
    StandBy(Duration),
    /// Fill the machine's second-level page tables for this range of guest-physical addresses.
    PreFault(Range<u64>),
    /// Load ahead what stands of it until the last word is loaded.
    LoadAhead(Unread<VcpuSection>),
    /// Load everything that changes nothing outside this process. The sender, which is never used, is
    /// dropped when no write to the TSC follows.
    Load(Unread<VcpuSection>, Pause, Sender<()>),
    /// This is a rehearsal: load the rest into a view of guest RAM, and run nothing.
    LoadRest,
    /// The guest is ours: load the rest and run, with exits going to this bus.
    Enter(Arc<Bus>),
    /// End the thread.
    Stop,
}

/// What it answers.
#[derive(Debug)]
pub(super) enum Answer {
    Ready(Result<Home, VcpuError>),
    Parked,
    Saved(Result<SavedVcpu, VcpuError>),
    PreFaulted(Result<(), VcpuError>),
    LoadedAhead(Result<(), VcpuError>),
    Loaded(Result<LoadedVcpu, VcpuError>),
    LoadedRest(Result<(), VcpuError>),
    Entering(Result<Entry, VcpuError>),
}

/// The other side has ended.
#[derive(Clone, Copy, Debug)]
pub(super) struct Gone;

/// Waits for a message: spins a little, then sleeps. `None` when the deadline passes.
pub(super) fn wait_for<T>(
    from: &Receiver<T>,
    spin: Duration,
    deadline: Instant,
) -> Result<Option<T>, Gone> {
    let spun = Instant::now();
    loop {
        match from.try_recv() {
            Ok(message) => return Ok(Some(message)),
            Err(TryRecvError::Disconnected) => return Err(Gone),
            Err(TryRecvError::Empty) if spun.elapsed() < spin => std::thread::yield_now(),
            Err(TryRecvError::Empty) => break,
        }
    }
    match from.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
        Ok(message) => Ok(Some(message)),
        Err(RecvTimeoutError::Timeout) => Ok(None),
        Err(RecvTimeoutError::Disconnected) => Err(Gone),
    }
}
