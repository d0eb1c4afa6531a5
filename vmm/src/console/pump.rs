//! The console's thread: output to the log and the viewers, viewers' input to the serial port.

use std::io::Write;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::net::{RecvFlags, SendFlags, SocketFlags};

use super::Doors;
use super::buffer::{REPLAY, Shared};
use super::viewer::{MAX_VIEWERS, Viewer, Viewers, list};
use crate::devices::serial::SerialPort;

/// How long viewers may take to read the last of it when the guest has ended.
const LAST_WORDS: Duration = Duration::from_millis(200);

pub(super) struct Pump {
    pub(super) shared: Arc<Shared>,
    pub(super) doors: Doors,
    pub(super) viewers: Viewers,
    pub(super) serial: Arc<SerialPort>,
}

impl Pump {
    pub(super) fn run(mut self) {
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
        if !crate::peer::may_enter(&viewer) {
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
