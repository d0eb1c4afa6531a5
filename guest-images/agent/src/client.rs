//! A blocking client of an agent, over anything that reads and writes.
//!
//! One request at a time. Who must not wait for ever sets a read timeout on the stream before; a
//! client that timed out in the middle of an answer is of no more use.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use serde::de::DeserializeOwned;

use crate::protocol::{
    Answer, Clocks, Corrected, Correction, Dmesg, Done, Ended, Exit, Gaps, GapsSpec, Health, Hooks,
    Output, Problem, Program, Progress, Request, Shutdown, Started,
};
use crate::wire::{Line, Lines, write_line};

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum AskError {
    /// The connection failed.
    #[error("asking the guest's agent")]
    Stream(#[from] io::Error),
    /// The agent, its guest or the VMM ended the connection.
    #[error("the guest's agent ended the connection without an answer")]
    Closed,
    /// What came was no answer to what was asked.
    #[error("the guest's agent answered what is no answer: {said:.200}")]
    Garbled {
        /// What came.
        said: String,
        /// What is wrong with it.
        #[source]
        source: Option<serde_json::Error>,
    },
    /// The agent refused, or failed.
    #[error("the guest's agent refused: {0}")]
    Refused(Problem),
}

/// Connects to a port of a guest through the VMM's vsock socket: `CONNECT <port>` is answered
/// with `OK <port>`, and from then on the stream is the connection.
pub fn dial(socket: &Path, port: u32, patience: Duration) -> io::Result<UnixStream> {
    let mut stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(patience))?;
    writeln!(stream, "CONNECT {port}")?;
    // Byte by byte: what follows the newline is the connection's own.
    let mut line = Vec::new();
    let mut byte = [0];
    while line.len() < 64 && stream.read(&mut byte)? == 1 && byte != *b"\n" {
        line.extend_from_slice(&byte);
    }
    if !line.starts_with(b"OK ") {
        let text = format!("nothing in the guest listens on vsock port {port}");
        return Err(io::Error::new(io::ErrorKind::ConnectionRefused, text));
    }
    stream.set_read_timeout(None)?;
    Ok(stream)
}

/// A connection to an agent.
#[derive(Debug)]
pub struct Client<S> {
    lines: Lines<S>,
}

impl<S: Read + Write> Client<S> {
    /// A client over a stream that leads to an agent.
    pub fn new(stream: S) -> Self {
        Self {
            lines: Lines::new(stream),
        }
    }

    /// The stream, to set its timeouts.
    pub fn stream(&self) -> &S {
        self.lines.stream()
    }

    /// Asks, and waits for the answer; `T` is the shape that [`Request`] names for the request.
    pub fn ask<T: DeserializeOwned>(&mut self, request: &Request) -> Result<T, AskError> {
        write_line(self.lines.stream_mut(), request)?;
        let line = match self.lines.next_line()? {
            None => return Err(AskError::Closed),
            Some(Line::Whole(line)) => line,
            Some(Line::TooLong) => {
                let said = "a line that is too long".to_owned();
                return Err(AskError::Garbled { said, source: None });
            }
        };
        match serde_json::from_slice(&line) {
            Ok(Answer::Ok(answer)) => Ok(answer),
            Ok(Answer::Error(problem)) => Err(AskError::Refused(problem)),
            Err(error) => Err(AskError::Garbled {
                said: String::from_utf8_lossy(&line).into_owned(),
                source: Some(error),
            }),
        }
    }

    /// How the guest is.
    pub fn health(&mut self) -> Result<Health, AskError> {
        self.ask(&Request::Health)
    }

    /// Runs a program to its end.
    pub fn exec(&mut self, program: Program) -> Result<Ended, AskError> {
        self.ask(&Request::Exec(program))
    }

    /// Starts a program.
    pub fn start(&mut self, program: Program) -> Result<Started, AskError> {
        self.ask(&Request::Start(program))
    }

    /// What a started program printed since, and its end.
    pub fn poll(&mut self, job: u64, wait: Duration) -> Result<Progress, AskError> {
        self.ask(&Request::Poll {
            job,
            wait_ms: millis(wait),
        })
    }

    /// Polls a started program until it has ended; gives `each` what it prints meanwhile.
    pub fn follow(&mut self, job: u64, mut each: impl FnMut(&Output)) -> Result<Exit, AskError> {
        loop {
            let progress = self.poll(job, Duration::from_secs(5))?;
            each(&progress.output);
            if let Some(exit) = progress.exit {
                return Ok(exit);
            }
        }
    }

    /// Sends a signal to a started program.
    pub fn kill(&mut self, job: u64, signal: i32) -> Result<Done, AskError> {
        self.ask(&Request::Kill { job, signal })
    }

    /// The kernel's whole log, of lines at least as grave as `max_level`.
    pub fn dmesg(&mut self, max_level: u8) -> Result<Dmesg, AskError> {
        let mut all = Dmesg::default();
        loop {
            let after = all.lines.last().map(|line| line.seq);
            let part: Dmesg = self.ask(&Request::Dmesg { after, max_level })?;
            all.lines.extend(part.lines);
            if !part.more {
                return Ok(all);
            }
        }
    }

    /// How the clocks stand.
    pub fn clocks(&mut self) -> Result<Clocks, AskError> {
        self.ask(&Request::Clocks)
    }

    /// Moves the guest's wall clock.
    pub fn correct(&mut self, correction: Correction) -> Result<Corrected, AskError> {
        self.ask(&Request::Correct(correction))
    }

    /// Starts a probe for gaps.
    pub fn gaps_start(&mut self, spec: GapsSpec) -> Result<Started, AskError> {
        self.ask(&Request::GapsStart(spec))
    }

    /// Ends a probe for gaps, or with `wait` waits for its end, and tells what it found.
    pub fn gaps_collect(&mut self, job: u64, wait: bool) -> Result<Gaps, AskError> {
        self.ask(&Request::GapsCollect { job, wait })
    }

    /// Runs the hooks that go before a pause.
    pub fn pause_begin(&mut self, deadline: Duration) -> Result<Hooks, AskError> {
        self.ask(&Request::PauseBegin {
            deadline_ms: millis(deadline),
        })
    }

    /// Runs the hooks that go after a pause.
    pub fn pause_end(&mut self, deadline: Duration) -> Result<Hooks, AskError> {
        self.ask(&Request::PauseEnd {
            deadline_ms: millis(deadline),
        })
    }

    /// Powers off, or reboots.
    pub fn shutdown(&mut self, how: Shutdown) -> Result<Done, AskError> {
        self.ask(&Request::Shutdown { how })
    }
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}
