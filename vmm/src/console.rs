//! The console behind the serial port: a log file, and any number of viewers on a socket.
//!
//! ```text
//! vCPU thread ── Output::push ──▶ Buffer ──▶ console thread ──▶ console.log, viewers
//!                                (memory)       ▲
//!                                               └── viewers' input ──▶ SerialPort::receive
//! ```
//!
//! The buffer is the only thing shared. [`Buffer::freeze`] takes its lock once: if the console
//! thread is between two writes, nothing is in flight and no thread has to be woken; if it is in
//! the middle of one, the freeze waits for it up to a deadline, and the swap is called off when a
//! slow disk would make the pause longer. Output that is not written yet travels in the saved
//! state; viewers' sockets and the log travel beside it.
//!
//! Each viewer is sent output as fast as it reads. What it has not had yet is still among the
//! bytes kept for viewers who come later; one that falls behind by more than those loses some.

use std::collections::VecDeque;
use std::fs::File;
use std::io::Write;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, poll};
use rustix::net::{RecvFlags, SendFlags, SocketFlags};
use stillpoint_state::{Saved, StateError, Unclaimed, sections};

use crate::devices::serial::SerialPort;

/// Output kept for viewers who come later or read slowly, bytes.
const REPLAY: usize = 64 << 10;
/// Output that may wait for the console thread; what a guest writes beyond it, faster than the
/// log takes it, pushes out the oldest, and the log says so.
const PENDING: usize = 1 << 20;
/// The most viewers at a time; their sockets travel in one message of a handover.
pub const MAX_VIEWERS: usize = 16;
/// How long viewers may take to read the last of it when the guest has ended.
const LAST_WORDS: Duration = Duration::from_millis(200);

#[derive(Debug, Default)]
struct State {
    pending: VecDeque<u8>,
    replay: VecDeque<u8>,
    dropped: u64,
    /// Input the UART has not taken yet.
    input: VecDeque<u8>,
    /// From saved state: how far behind each viewer is that comes beside it.
    behind: Vec<usize>,
    frozen: bool,
    in_flight: bool,
    closed: bool,
}

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    idle: Condvar,
    wake: Option<OwnedFd>,
}

/// The output buffer.
#[derive(Clone, Debug, Default)]
pub struct Buffer(Arc<Shared>);

/// The guest's end of the buffer.
#[derive(Debug)]
pub struct Output(Arc<Shared>);

/// The output did not come to rest in time.
#[derive(Debug, thiserror::Error)]
#[error("the console log did not take its output within {0:?}")]
pub struct ConsoleStuck(Duration);

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wake(&self) {
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
    fn close(&self) {
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

/// What the console writes to and hears from; all of it can travel to a successor.
#[derive(Debug)]
pub struct Doors {
    /// Socket that viewers connect to.
    pub listener: OwnedFd,
    /// The log, opened for appending.
    pub log: File,
}

impl Doors {
    /// Duplicates of both.
    pub fn try_clone(&self) -> std::io::Result<Self> {
        Ok(Self {
            listener: self.listener.try_clone()?,
            log: self.log.try_clone()?,
        })
    }
}

/// One who looks at the console.
#[derive(Debug)]
pub struct Viewer {
    socket: OwnedFd,
    /// Of the bytes kept, how many of the last it has not been sent. Changed by the console's
    /// thread alone, and only while that counts as in flight.
    behind: AtomicUsize,
}

impl Viewer {
    fn new(socket: OwnedFd, behind: usize) -> Arc<Self> {
        let behind = AtomicUsize::new(behind);
        Arc::new(Self { socket, behind })
    }

    fn behind(&self) -> usize {
        self.behind.load(Ordering::Relaxed)
    }

    fn set_behind(&self, behind: usize) {
        self.behind.store(behind, Ordering::Relaxed);
    }
}

impl AsFd for Viewer {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

type Viewers = Arc<Mutex<Vec<Arc<Viewer>>>>;

fn list(viewers: &Viewers) -> MutexGuard<'_, Vec<Arc<Viewer>>> {
    viewers.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The console: buffer, thread, viewers.
#[derive(Debug)]
pub struct Console {
    buffer: Buffer,
    viewers: Viewers,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Console {
    /// Starts the console's thread. `viewers` are those that came with a handover.
    pub fn start(
        buffer: Buffer,
        doors: Doors,
        viewers: Vec<OwnedFd>,
        serial: Arc<SerialPort>,
    ) -> std::io::Result<Self> {
        let behind = std::mem::take(&mut buffer.0.lock().behind);
        let behind = behind.into_iter().chain(std::iter::repeat(0));
        let viewers = viewers.into_iter().zip(behind);
        let viewers = viewers.map(|(socket, behind)| Viewer::new(socket, behind));
        let viewers = Arc::new(Mutex::new(viewers.collect()));
        let pump = Pump {
            shared: Arc::clone(&buffer.0),
            doors,
            viewers: Arc::clone(&viewers),
            serial,
        };
        let thread = std::thread::Builder::new()
            .name("console".into())
            .spawn(|| pump.run())?;
        Ok(Self {
            buffer,
            viewers,
            thread: Some(thread),
        })
    }

    /// The buffer, to freeze and save.
    pub fn buffer(&self) -> &Buffer {
        &self.buffer
    }

    /// The viewers.
    pub fn viewers(&self) -> Vec<Arc<Viewer>> {
        list(&self.viewers).clone()
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        // Frozen for good means that a successor has the output now: nothing to write here.
        let frozen = self.buffer.0.lock().frozen;
        self.buffer.close();
        if let Some(thread) = self.thread.take().filter(|_| !frozen) {
            let _ = thread.join();
        }
    }
}

struct Pump {
    shared: Arc<Shared>,
    doors: Doors,
    viewers: Viewers,
    serial: Arc<SerialPort>,
}

impl Pump {
    fn run(mut self) {
        loop {
            match self.take() {
                Some(chunk) => self.write(&chunk),
                None if self.shared.lock().closed => return self.last_words(),
                None => self.wait(),
            }
        }
    }

    /// Takes a chunk of output; from here to the end of `write` it is in flight.
    fn take(&self) -> Option<Vec<u8>> {
        let mut state = self.shared.lock();
        if state.frozen || state.pending.is_empty() {
            return None;
        }
        let mut chunk = Vec::new();
        if state.dropped > 0 {
            let lost = std::mem::take(&mut state.dropped);
            chunk.extend(format!("\n[console: {lost} bytes lost here]\n").bytes());
        }
        let take = state.pending.len().min(16 << 10);
        chunk.extend(state.pending.drain(..take));
        state.replay.extend(&chunk);
        let over = state.replay.len().saturating_sub(REPLAY);
        state.replay.drain(..over);
        state.in_flight = true;
        Some(chunk)
    }

    fn write(&mut self, chunk: &[u8]) {
        // A full disk costs the log, never the guest.
        let _ = self.doors.log.write_all(chunk);
        for viewer in list(&self.viewers).iter() {
            viewer.set_behind(viewer.behind() + chunk.len());
        }
        self.catch_up();
        self.land();
    }

    /// Sends each viewer what it has not had yet, as far as its socket takes it. In flight.
    fn catch_up(&self) {
        let viewers = list(&self.viewers).clone();
        for viewer in viewers.iter().filter(|v| v.behind() > 0) {
            let unread: Vec<u8> = {
                let kept = &self.shared.lock().replay;
                let had = kept.len().saturating_sub(viewer.behind());
                kept.iter().skip(had).copied().collect()
            };
            let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
            let sent = match rustix::net::send(viewer, &unread, flags) {
                Ok(sent) => sent,
                Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => 0,
                // Gone: its socket says so when it is read next.
                Err(_) => unread.len(),
            };
            viewer.set_behind(unread.len() - sent);
        }
    }

    /// As [`Pump::catch_up`], on its own: nothing while frozen.
    fn send_more(&self) {
        let mut state = self.shared.lock();
        if state.frozen {
            return;
        }
        state.in_flight = true;
        drop(state);
        self.catch_up();
        self.land();
    }

    /// The guest has ended: viewers get a moment to read the rest.
    fn last_words(&self) {
        let deadline = Instant::now() + LAST_WORDS;
        loop {
            self.send_more();
            let viewers = list(&self.viewers).clone();
            let behind = viewers.iter().filter(|v| v.behind() > 0);
            let mut fds: Vec<_> = behind.map(|v| PollFd::new(v, PollFlags::OUT)).collect();
            let left = deadline.saturating_duration_since(Instant::now());
            let timeout = rustix::time::Timespec::try_from(left).unwrap_or_default();
            if fds.is_empty() || left.is_zero() || poll(&mut fds, Some(&timeout)).is_err() {
                return;
            }
        }
    }

    fn land(&self) {
        self.shared.lock().in_flight = false;
        self.shared.idle.notify_all();
    }

    /// Offers waiting input to the UART. The buffer's lock is not held meanwhile: a vCPU that
    /// writes holds the UART's and wants the buffer's.
    fn feed(&self) {
        let mut state = self.shared.lock();
        if state.frozen || state.input.is_empty() {
            return;
        }
        let input: Vec<u8> = state.input.iter().copied().collect();
        state.in_flight = true;
        drop(state);
        let taken = self.serial.receive(&input);
        self.shared.lock().input.drain(..taken);
        self.land();
    }

    /// Waits for output, a viewer, or input.
    fn wait(&self) {
        let Some(wake) = &self.shared.wake else {
            return;
        };
        let viewers = list(&self.viewers).clone();
        let (frozen, full) = {
            let state = self.shared.lock();
            (state.frozen, !state.input.is_empty())
        };
        let wanted = |viewer: &Arc<Viewer>| {
            let input = if full {
                PollFlags::empty()
            } else {
                PollFlags::IN
            };
            let output = if viewer.behind() > 0 {
                PollFlags::OUT
            } else {
                PollFlags::empty()
            };
            input | output
        };
        let watched: Vec<_> = viewers
            .iter()
            .map(|viewer| (viewer, wanted(viewer)))
            .filter(|(_, flags)| !frozen && !flags.is_empty())
            .collect();
        let mut fds = vec![PollFd::new(wake, PollFlags::IN)];
        if !frozen {
            fds.push(PollFd::new(&self.doors.listener, PollFlags::IN));
        }
        fds.extend(watched.iter().map(|(v, flags)| PollFd::new(*v, *flags)));
        // Input that found the UART full is offered again soon; nothing tells us when it drains.
        let soon = rustix::time::Timespec {
            tv_sec: 0,
            tv_nsec: 5_000_000,
        };
        let timeout = (full && !frozen).then_some(&soon);
        if poll(&mut fds, timeout).is_err() {
            return;
        }
        let ready: Vec<PollFlags> = fds.iter().map(PollFd::revents).collect();
        drop(fds);
        let _ = rustix::io::read(wake, &mut [0; 8]);
        if !frozen && !ready[1].is_empty() {
            self.admit();
        }
        let ready = ready.iter().skip(2);
        for ((viewer, _), _) in watched
            .iter()
            .zip(ready)
            .filter(|(_, ready)| !full && ready.intersects(!PollFlags::OUT))
        {
            self.hear(viewer);
        }
        if viewers.iter().any(|viewer| viewer.behind() > 0) {
            self.send_more();
        }
        self.feed();
    }

    fn admit(&self) {
        // Under the lock of the buffer, as in `hear`: a freeze finds a new viewer either among
        // the others or still waiting at the listener, for whoever has the guest next.
        let state = self.shared.lock();
        if state.frozen {
            return;
        }
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let Ok(viewer) = rustix::net::accept_with(&self.doors.listener, flags) else {
            return;
        };
        if !crate::doors::peer_may_enter(&viewer) {
            return;
        }
        let mut viewers = list(&self.viewers);
        if viewers.len() == MAX_VIEWERS {
            let full = b"[console: too many viewers]\r\n";
            let _ = rustix::net::send(&viewer, full, SendFlags::DONTWAIT | SendFlags::NOSIGNAL);
            return;
        }
        viewers.push(Viewer::new(viewer, state.replay.len()));
        drop((viewers, state));
        self.send_more();
    }

    fn hear(&self, viewer: &Arc<Viewer>) {
        // Read under the lock of the buffer: a freeze finds the bytes either still in the socket
        // or in the buffer, never in this thread's hands.
        let mut state = self.shared.lock();
        if state.frozen {
            return;
        }
        let mut bytes = [0; 64];
        let room = bytes.len();
        match rustix::net::recv(viewer, &mut bytes[..room], RecvFlags::DONTWAIT) {
            Ok((_, 0)) | Err(rustix::io::Errno::CONNRESET) => {
                list(&self.viewers).retain(|other| !Arc::ptr_eq(other, viewer));
            }
            Ok((_, n)) => state.input.extend(&bytes[..n]),
            Err(_) => {}
        }
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
