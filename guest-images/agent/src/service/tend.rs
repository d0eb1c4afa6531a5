//! The thread of a program that was started: moves its input and outputs, waits for its end,
//! kills it at its time limit.
//!
//! It must never hold the job's lock while it waits, and never read what it can't keep: a
//! program whose output nobody fetches waits in its own write, as it would for a slow terminal.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::process::Child;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use stillpoint_agent::protocol::MAX_OUTPUT;

use super::program::{Full, Job, State};

/// A program that ended may have left others behind that hold its outputs open. They are not
/// listened to any longer than this when they say nothing, and never beyond what the pipe could
/// hold when the program ended: all that it wrote itself is in that.
const LEFTOVERS: Duration = Duration::from_millis(300);

/// What the thread works with. The two outputs are `[stdout, stderr]`.
#[derive(Debug)]
pub(super) struct Tender {
    job: Arc<Job>,
    child: Child,
    /// None once the process was reaped.
    pidfd: Option<OwnedFd>,
    outputs: [Option<OwnedFd>; 2],
    /// Bytes that may still be read of each; bounded once the process was reaped.
    budget: [usize; 2],
    input: Option<(OwnedFd, Vec<u8>)>,
    /// First the time limit; after the end, until when leftovers are listened to.
    deadline: Option<Instant>,
    timed_out: bool,
}

impl Tender {
    /// Takes a program that was just started, its three streams piped.
    pub(super) fn new(
        job: &Arc<Job>,
        mut child: Child,
        input: Vec<u8>,
        deadline: Option<Instant>,
    ) -> io::Result<Self> {
        let opened = open(&mut child);
        let (pidfd, stdin, outputs) = match opened {
            Ok(opened) => opened,
            Err(error) => {
                let _ = child.kill();
                let _ = child.wait();
                return Err(error);
            }
        };
        Ok(Self {
            job: Arc::clone(job),
            child,
            pidfd: Some(pidfd),
            outputs,
            budget: [usize::MAX; 2],
            input: stdin.filter(|_| !input.is_empty()).map(|fd| (fd, input)),
            deadline,
            timed_out: false,
        })
    }

    /// Tends it to its end.
    pub(super) fn tend(mut self) {
        while self.pidfd.is_some() || self.outputs.iter().any(Option::is_some) {
            let listening = self.listening();
            let ready = self.wait(listening);
            self.feed();
            for (index, listening) in listening.into_iter().enumerate() {
                if listening {
                    self.take(index);
                }
            }
            if ready.ended {
                self.reap();
            }
            let over = self.deadline.is_some_and(|at| Instant::now() >= at);
            if over && self.pidfd.is_some() {
                self.timed_out = true;
                self.deadline = None;
                let _ = self.job.lock().kill(Signal::SIGKILL);
            } else if over && !ready.any {
                self.outputs = [None, None];
            }
        }
        self.job.lock().finished = true;
        self.job.tell();
    }

    /// Which outputs there is room for.
    fn listening(&self) -> [bool; 2] {
        let state = self.job.lock();
        let full = |bytes: &Vec<u8>| bytes.len() >= MAX_OUTPUT && self.job.full == Full::Wait;
        [
            self.outputs[0].is_some() && !full(&state.stdout),
            self.outputs[1].is_some() && !full(&state.stderr),
        ]
    }

    fn wait(&self, listening: [bool; 2]) -> Ready {
        let mut fds = vec![PollFd::new(&self.job.room, PollFlags::IN)];
        for (output, listening) in self.outputs.iter().zip(listening) {
            if let Some(fd) = output.as_ref().filter(|_| listening) {
                fds.push(PollFd::new(fd, PollFlags::IN));
            }
        }
        if let Some((fd, _)) = &self.input {
            fds.push(PollFd::new(fd, PollFlags::OUT));
        }
        if let Some(fd) = &self.pidfd {
            fds.push(PollFd::new(fd, PollFlags::IN));
        }
        // What a full buffer keeps from being read is not a leftover that stays silent.
        let held = self.pidfd.is_none() && self.outputs.iter().flatten().count() > heard(listening);
        let left = self.deadline.filter(|_| !held);
        let left = left.map(|at| at.saturating_duration_since(Instant::now()));
        let left = left.and_then(|left| Timespec::try_from(left).ok());
        let any = poll(&mut fds, left.as_ref()).is_ok_and(|ready| ready > 0);
        let ended = fds.last().is_some_and(|fd| !fd.revents().is_empty());
        let mut count = [0; 8];
        let _ = rustix::io::read(&self.job.room, &mut count);
        Ready {
            any: any || held,
            ended: ended && self.pidfd.is_some(),
        }
    }

    /// Writes input as far as the program takes it.
    fn feed(&mut self) {
        let Some((fd, bytes)) = &mut self.input else {
            return;
        };
        match rustix::io::write(&*fd, bytes) {
            Ok(written) => drop(bytes.drain(..written)),
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => {}
            // It doesn't want any more; that is the program's own affair.
            Err(_) => bytes.clear(),
        }
        if bytes.is_empty() {
            self.input = None;
        }
    }

    /// Reads one output as far as there is something, and room.
    fn take(&mut self, index: usize) {
        let mut bytes = [0; 16 << 10];
        while let Some(fd) = &self.outputs[index] {
            if self.budget[index] == 0 {
                self.outputs[index] = None;
                return;
            }
            let room = self.room(index).min(bytes.len()).min(self.budget[index]);
            if room == 0 {
                return;
            }
            match rustix::io::read(fd, &mut bytes[..room]) {
                Ok(0) => self.outputs[index] = None,
                Ok(length) => {
                    self.budget[index] = self.budget[index].saturating_sub(length);
                    self.keep(index, &bytes[..length]);
                }
                Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::AGAIN) => return,
                Err(_) => self.outputs[index] = None,
            }
        }
    }

    fn room(&self, index: usize) -> usize {
        match self.job.full {
            Full::Drop => MAX_OUTPUT,
            Full::Wait => MAX_OUTPUT - output(&mut self.job.lock(), index).len(),
        }
    }

    fn keep(&self, index: usize, bytes: &[u8]) {
        let mut state = self.job.lock();
        let kept = output(&mut state, index);
        let fits = bytes.len().min(MAX_OUTPUT - kept.len());
        kept.extend_from_slice(&bytes[..fits]);
        state.dropped += (bytes.len() - fits) as u64;
        drop(state);
        self.job.tell();
    }

    fn reap(&mut self) {
        self.pidfd = None;
        self.input = None;
        self.job.lock().reap(&mut self.child, self.timed_out);
        for (output, budget) in self.outputs.iter().zip(&mut self.budget) {
            let size = output.as_ref().map(rustix::pipe::fcntl_getpipe_size);
            *budget = size.and_then(Result::ok).unwrap_or_default();
        }
        self.deadline = Instant::now().checked_add(LEFTOVERS);
    }
}

/// What a wait ended with.
struct Ready {
    /// Anything but time.
    any: bool,
    /// The process has ended.
    ended: bool,
}

fn heard(listening: [bool; 2]) -> usize {
    listening.into_iter().filter(|listening| *listening).count()
}

fn output(state: &mut State, index: usize) -> &mut Vec<u8> {
    match index {
        0 => &mut state.stdout,
        _ => &mut state.stderr,
    }
}

type Opened = (OwnedFd, Option<OwnedFd>, [Option<OwnedFd>; 2]);

fn open(child: &mut Child) -> io::Result<Opened> {
    let pid = Pid::from_child(child);
    let pidfd = pidfd_open(pid, PidfdFlags::empty())?;
    let stdin = child.stdin.take().map(OwnedFd::from);
    let stdout = child.stdout.take().map(OwnedFd::from);
    let stderr = child.stderr.take().map(OwnedFd::from);
    for fd in [&stdin, &stdout, &stderr].into_iter().flatten() {
        never_wait(fd.as_fd())?;
    }
    Ok((pidfd, stdin, [stdout, stderr]))
}

fn never_wait(fd: BorrowedFd<'_>) -> io::Result<()> {
    let flags = rustix::fs::fcntl_getfl(fd)? | rustix::fs::OFlags::NONBLOCK;
    Ok(rustix::fs::fcntl_setfl(fd, flags)?)
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use super::*;

    /// One that writes without end: it doesn't matter here whether it is the program or what
    /// the program left behind.
    #[test]
    fn no_more_is_read_after_the_end_than_the_pipe_held() {
        let mut child = Command::new("yes");
        child
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let child = child.spawn().unwrap();
        let room = rustix::event::eventfd(0, rustix::event::EventfdFlags::NONBLOCK).unwrap();
        let job = Arc::new(Job::new(Full::Drop, &child, room));
        let mut tender = Tender::new(&job, child, Vec::new(), None).unwrap();
        assert_eq!(tender.budget, [usize::MAX; 2]);
        // A first write has come, of far more than is read below.
        assert!(tender.wait([true, false]).any);
        tender.child.kill().unwrap();
        tender.reap();
        assert_eq!(tender.budget, [64 << 10; 2]);

        tender.budget[0] = 100;
        tender.take(0);
        assert!(tender.outputs[0].is_none());
        assert_eq!(job.lock().stdout.len(), 100);
    }
}
