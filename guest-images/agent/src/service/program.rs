//! A program that was started, as those see it who ask for it.
//!
//! ```text
//!   running ──(process ends)──▶ ended ──(its outputs end, or stay silent)──▶ finished
//! ```
//!
//! A thread of its own tends it (`tend`); this is what that thread shares with those who ask.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, mpsc};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use rustix::event::{EventfdFlags, eventfd};
use stillpoint_agent::protocol::{
    Code, Ended, Exit, MAX_OUTPUT, Output, Problem, Program, Progress,
};

use super::tend::Tender;

/// What is done with output once [`MAX_OUTPUT`] bytes of it are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Full {
    /// It is thrown away and counted.
    Drop,
    /// The program waits until some is fetched.
    Wait,
}

/// A program that was started.
#[derive(Debug)]
pub(super) struct Job {
    pub(super) full: Full,
    state: Mutex<State>,
    changed: Condvar,
    /// Written to when there is room for output again.
    pub(super) room: OwnedFd,
}

/// What is known of it.
#[derive(Debug)]
pub(super) struct State {
    /// While it runs; it is its process group's leader.
    pub(super) process: Option<Pid>,
    pub(super) stdout: Vec<u8>,
    pub(super) stderr: Vec<u8>,
    pub(super) dropped: u64,
    pub(super) exit: Option<Exit>,
    /// It has ended and there is no more output to come.
    pub(super) finished: bool,
}

/// Starts a program, and the thread that tends it.
pub(super) fn start(program: &Program, full: Full) -> Result<Arc<Job>, Problem> {
    launch(program, full).map_err(|error| Problem {
        code: Code::Failed,
        text: format!("running {}: {error}", program.program),
    })
}

fn launch(program: &Program, full: Full) -> io::Result<Arc<Job>> {
    // The thread first: a process without one would have to be undone.
    let (send, receive) = mpsc::sync_channel::<Tender>(1);
    std::thread::Builder::new()
        .name("job".into())
        .spawn(move || receive.recv().map(Tender::tend))?;
    let room = eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?;
    let child = Command::new(&program.program)
        .args(&program.args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0)
        .spawn()?;
    let job = Arc::new(Job::new(full, &child, room));
    let limit = program.time_limit_ms.map(Duration::from_millis);
    let deadline = limit.and_then(|limit| Instant::now().checked_add(limit));
    let input = program.stdin.clone().unwrap_or_default().into_bytes();
    let tender = Tender::new(&job, child, input, deadline)?;
    // The thread waits for exactly this.
    let _ = send.send(tender);
    Ok(job)
}

impl Job {
    /// A job whose process was just started; `room` is an eventfd.
    pub(super) fn new(full: Full, child: &Child, room: OwnedFd) -> Self {
        let state = State {
            process: i32::try_from(child.id()).ok().map(Pid::from_raw),
            stdout: Vec::new(),
            stderr: Vec::new(),
            dropped: 0,
            exit: None,
            finished: false,
        };
        Self {
            full,
            state: Mutex::new(state),
            changed: Condvar::new(),
            room,
        }
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        // Whole between any two statements that hold the lock.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Something changed that others may wait for.
    pub(super) fn tell(&self) {
        self.changed.notify_all();
    }

    /// Waits for the end.
    pub(super) fn ended(&self) -> Ended {
        let state = self.lock();
        let state = self.changed.wait_while(state, |state| !state.finished);
        let mut state = state.unwrap_or_else(PoisonError::into_inner);
        let output = state.take_output();
        let exit = state.exit.unwrap_or(Exit::TimeLimit);
        Ended { exit, output }
    }

    /// What it printed, or its end; waits for one of them.
    pub(super) fn progress(&self, patience: Duration) -> Progress {
        let state = self.lock();
        let quiet = |state: &mut State| !state.finished && !state.has_output();
        let waited = self.changed.wait_timeout_while(state, patience, quiet);
        let (mut state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        let output = state.take_output();
        let _ = rustix::io::write(&self.room, &1_u64.to_ne_bytes());
        let exit = state.exit.filter(|_| state.finished);
        Progress { exit, output }
    }

    /// Sends a signal to its process group, if it still runs.
    pub(super) fn signal(&self, number: i32) -> Result<(), Problem> {
        let problem = |text| Problem {
            code: Code::Failed,
            text,
        };
        let signal = Signal::try_from(number)
            .map_err(|_| problem(format!("there is no signal {number}")))?;
        self.lock()
            .kill(signal)
            .map_err(|error| problem(format!("sending signal {number}: {error}")))
    }
}

impl State {
    /// Under the lock, so that the process is not reaped, nor its number anybody else's.
    pub(super) fn kill(&self, signal: Signal) -> io::Result<()> {
        match self.process {
            Some(process) => killpg(process, signal).map_err(io::Error::from),
            None => Ok(()),
        }
    }

    /// Reaps a process that has ended.
    pub(super) fn reap(&mut self, child: &mut Child, timed_out: bool) {
        let status = child.wait();
        self.process = None;
        self.exit = Some(match status {
            Ok(_) if timed_out => Exit::TimeLimit,
            Ok(status) => exit(status),
            // Somebody else reaped it: nothing is known but that it is gone.
            Err(_) => Exit::Code(-1),
        });
    }

    fn has_output(&self) -> bool {
        !self.stdout.is_empty() || !self.stderr.is_empty()
    }

    fn take_output(&mut self) -> Output {
        Output {
            stdout: take_text(&mut self.stdout, self.finished),
            stderr: take_text(&mut self.stderr, self.finished),
            dropped: std::mem::take(&mut self.dropped),
        }
    }
}

fn exit(status: ExitStatus) -> Exit {
    match (status.code(), status.signal()) {
        (Some(code), _) => Exit::Code(code),
        (None, Some(signal)) => Exit::Signal(signal),
        (None, None) => Exit::Code(-1),
    }
}

/// Takes what is text of `bytes`. A character whose last bytes have yet to come stays.
fn take_text(bytes: &mut Vec<u8>, all: bool) -> String {
    let whole = match std::str::from_utf8(bytes) {
        Err(error) if !all && error.error_len().is_none() => error.valid_up_to(),
        Ok(_) | Err(_) => bytes.len(),
    };
    // No more than three bytes stay; a buffer that is full of them is not one.
    debug_assert!(bytes.len() - whole <= 3 && bytes.len() <= MAX_OUTPUT);
    let rest = bytes.split_off(whole);
    let text = std::mem::replace(bytes, rest);
    String::from_utf8_lossy(&text).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_character_is_not_cut_in_two() {
        let mut bytes = "ab\u{fc}".as_bytes().to_vec();
        let last = bytes.pop().unwrap();
        assert_eq!(take_text(&mut bytes, false), "ab");
        bytes.push(last);
        assert_eq!(take_text(&mut bytes, false), "\u{fc}");
        let mut broken = b"a\xff\xc3".to_vec();
        assert_eq!(take_text(&mut broken, true), "a\u{fffd}\u{fffd}");
    }
}
