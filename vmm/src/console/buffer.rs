//! What is shared between the guest, the console's thread and a freeze: bytes in memory.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::EventfdFlags;
use stillpoint_state::{Saved, StateError, Unclaimed, sections};

use super::viewer::Viewer;

/// Output kept for viewers who come later or read slowly, bytes.
pub(super) const REPLAY: usize = 64 << 10;
/// Output that may wait for the console thread; what a guest writes beyond it, faster than the
/// log takes it, pushes out the oldest, and the log says so.
const PENDING: usize = 1 << 20;

#[derive(Debug, Default)]
pub(super) struct State {
    pub(super) pending: VecDeque<u8>,
    pub(super) replay: VecDeque<u8>,
    pub(super) dropped: u64,
    /// Input the UART has not taken yet.
    pub(super) input: VecDeque<u8>,
    /// From saved state: how far behind each viewer is that comes beside it.
    pub(super) behind: Vec<usize>,
    pub(super) frozen: bool,
    pub(super) in_flight: bool,
    pub(super) closed: bool,
}

#[derive(Debug, Default)]
pub(super) struct Shared {
    pub(super) state: Mutex<State>,
    pub(super) idle: Condvar,
    pub(super) wake: Option<OwnedFd>,
}

/// The output buffer.
#[derive(Clone, Debug, Default)]
pub struct Buffer(pub(super) Arc<Shared>);

/// The guest's end of the buffer.
#[derive(Debug)]
pub struct Output(Arc<Shared>);

/// The output did not come to rest in time.
#[derive(Debug, thiserror::Error)]
#[error("the console log did not take its output within {0:?}")]
pub struct ConsoleStuck(Duration);

impl Shared {
    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn wake(&self) {
        if let Some(wake) = &self.wake {
            let _ = rustix::io::write(wake, &1u64.to_ne_bytes());
        }
    }
}

impl Output {
    /// Takes bytes the guest wrote. Never blocks on anything but a short lock.
    pub fn push(&self, bytes: &[u8]) {
        let mut state = self.0.lock();
        let was_empty = state.pending.is_empty();
        state.pending.extend(bytes);
        let over = state.pending.len().saturating_sub(PENDING);
        if over > 0 {
            state.pending.drain(..over);
            state.dropped += over as u64;
        }
        drop(state);
        if was_empty {
            self.0.wake();
        }
    }
}

impl Buffer {
    /// A buffer whose thread can be woken.
    pub fn new() -> std::io::Result<Self> {
        let flags = EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC;
        let wake = rustix::event::eventfd(0, flags)?;
        Ok(Self(Arc::new(Shared {
            wake: Some(wake),
            ..Shared::default()
        })))
    }

    /// One for the guest to write to.
    pub fn output(&self) -> Output {
        Output(Arc::clone(&self.0))
    }

    /// Brings the console to rest: on return nothing is being written, and nothing will be until
    /// [`Buffer::thaw`].
    pub fn freeze(&self, deadline: Instant) -> Result<(), ConsoleStuck> {
        let began = Instant::now();
        let mut state = self.0.lock();
        state.frozen = true;
        while state.in_flight {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                state.frozen = false;
                return Err(ConsoleStuck(began.elapsed()));
            }
            state = self
                .0
                .idle
                .wait_timeout(state, left)
                .map_or_else(|e| e.into_inner().0, |r| r.0);
        }
        Ok(())
    }

    /// Lets it go on.
    pub fn thaw(&self) {
        self.0.lock().frozen = false;
        self.0.wake();
    }

    /// Ends the console thread once all output is written.
    pub(super) fn close(&self) {
        self.0.lock().closed = true;
        self.0.wake();
    }

    /// Adds the console's section; only while frozen, so that no viewer comes or goes.
    pub fn save(&self, viewers: &[Arc<Viewer>], to: &mut Saved) -> Result<(), StateError> {
        let state = self.0.lock();
        let behind = |viewer: &Arc<Viewer>| u32::try_from(viewer.behind()).unwrap_or(u32::MAX);
        to.put(
            "",
            &sections::Console {
                replay: state.replay.iter().copied().collect(),
                pending: state.pending.iter().copied().collect(),
                viewers: u32::try_from(viewers.len()).unwrap_or(u32::MAX),
                input: state.input.iter().copied().collect(),
                behind: viewers.iter().map(behind).collect(),
            },
        )
    }

    /// Fills a new buffer from saved state; gives the number of viewers that travel beside it.
    pub fn load(&self, from: &mut Unclaimed) -> Result<usize, StateError> {
        let section: sections::Console = from.take("")?;
        let mut state = self.0.lock();
        state.replay = section.replay.into();
        state.pending = section.pending.into();
        state.input = section.input.into();
        state.behind = section.behind.iter().map(|&b| b as usize).collect();
        state.frozen = true;
        Ok(section.viewers as usize)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_freeze_waits_for_what_is_in_flight_but_not_for_ever() {
        let buffer = Buffer::new().expect("buffer");
        buffer
            .freeze(Instant::now())
            .expect("nothing in flight: at once");
        buffer.thaw();
        buffer.0.lock().in_flight = true;
        buffer
            .freeze(Instant::now() + Duration::from_millis(5))
            .expect_err("stuck");
        assert!(
            !buffer.0.lock().frozen,
            "a freeze that failed leaves it running"
        );
    }

    fn viewers() -> [Arc<Viewer>; 2] {
        let socket = || OwnedFd::from(std::os::unix::net::UnixDatagram::unbound().expect("socket"));
        [Viewer::new(socket(), 0), Viewer::new(socket(), 3)]
    }

    #[test]
    fn round_trip_of_output() {
        let buffer = Buffer::new().expect("buffer");
        buffer.output().push(b"not yet written");
        buffer.0.lock().replay.extend(b"before");
        buffer.freeze(Instant::now()).expect("freeze");
        let mut saved = Saved::default();
        buffer.save(&viewers(), &mut saved).expect("save");
        let bytes = saved.finish(2, "", "", 0);
        let again = Buffer::new().expect("buffer");
        let mut state = Unclaimed::decode(&bytes).expect("decode");
        assert_eq!(again.load(&mut state).expect("load"), 2);
        let mut saved = Saved::default();
        assert_eq!(again.0.lock().behind, [0, 3]);
        again.save(&viewers(), &mut saved).expect("save");
        assert_eq!(saved.finish(2, "", "", 0), bytes);
    }

    #[test]
    fn a_guest_that_floods_loses_the_oldest_and_is_bounded() {
        let buffer = Buffer::new().expect("buffer");
        let output = buffer.output();
        for _ in 0..40 {
            output.push(&[b'x'; 64 << 10]);
        }
        let state = buffer.0.lock();
        assert_eq!(state.pending.len(), PENDING);
        assert_eq!(state.dropped, (40 * (64 << 10) - PENDING) as u64);
    }
}
