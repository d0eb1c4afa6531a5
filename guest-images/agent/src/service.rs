//! The service: listens, and answers each connection on a thread of its own.
//!
//! Whatever a host sends is answered or refused; nothing of it ends the service or panics. What
//! it can occupy is bounded: connections, programs, probes, bytes (`protocol`).

mod clocks;
mod correct;
pub(crate) mod events;
mod gaps;
mod hooks;
mod jobs;
mod kernel;
mod program;
pub(crate) mod relay;
mod tend;
mod tsc;

use std::io::{self, Read, Write};
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use anyhow::Context;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde::Serialize;
use serde_json::Value;
use stillpoint_agent::protocol::{
    Answer, Code, Done, Ended, MAX_CONNECTIONS, MAX_JOBS, Problem, Program, Progress, Request,
    Shutdown, Started,
};
use stillpoint_agent::wire::{self, Lines};
use vsock::{VMADDR_CID_ANY, VsockListener};

use correct::Corrections;
use gaps::Probe;
use jobs::Jobs;
use program::{Full, Job};

/// Probes for gaps at once; each has a thread on every CPU.
const MAX_PROBES: usize = 4;
/// A poll waits no longer: whoever asked may be gone, and holds one of the connections.
const LONGEST_WAIT: Duration = Duration::from_secs(60);

/// Where to listen.
#[derive(Debug)]
pub(crate) enum Door {
    /// A vsock port.
    Vsock(u32),
    /// A Unix socket at this path, which must not be there yet.
    Unix(PathBuf),
}

/// What the service works by.
#[derive(Debug)]
pub(crate) struct Settings {
    /// Where to listen.
    pub(crate) door: Door,
    /// Directory with `before` and `after`.
    pub(crate) hooks: PathBuf,
    /// Whether PID 1 is our own, and told to end by signals.
    pub(crate) init: bool,
}

/// Listens for ever. Without vsock it says so and ends well: there is nothing to listen on.
pub(crate) fn run(settings: Settings) -> anyhow::Result<()> {
    let service = Arc::new(Service::new(&settings));
    match &settings.door {
        Door::Vsock(port) => {
            let listener = match VsockListener::bind_with_cid_port(VMADDR_CID_ANY, *port) {
                Ok(listener) => listener,
                Err(error) => {
                    say!("up, but deaf: vsock port {port}: {error}");
                    return Ok(());
                }
            };
            say!("up, on vsock port {port}");
            loop {
                // A failed accept is one connection's, or passes (too many open files).
                match listener.accept() {
                    Ok((stream, _)) => service.attend(stream),
                    Err(error) => complain(&error),
                }
            }
        }
        Door::Unix(path) => {
            let listener = UnixListener::bind(path)
                .with_context(|| format!("listening on {}", path.display()))?;
            say!("up, on {}", path.display());
            loop {
                match listener.accept() {
                    Ok((stream, _)) => service.attend(stream),
                    Err(error) => complain(&error),
                }
            }
        }
    }
}

fn complain(error: &io::Error) {
    say!("a connection could not be accepted: {error}");
    std::thread::sleep(Duration::from_millis(100));
}

/// What all connections share.
#[derive(Debug)]
struct Service {
    hooks: PathBuf,
    init: bool,
    connections: AtomicUsize,
    programs: Jobs<Arc<Job>>,
    probes: Jobs<Probe>,
    corrections: Corrections,
}

impl Service {
    fn new(settings: &Settings) -> Self {
        Self {
            hooks: settings.hooks.clone(),
            init: settings.init,
            connections: AtomicUsize::new(0),
            programs: Jobs::new("programs", MAX_JOBS),
            probes: Jobs::new("probes", MAX_PROBES),
            corrections: Corrections::default(),
        }
    }

    /// Answers a connection on a thread of its own, if there is room for one more.
    fn attend<S: Read + Write + Send + 'static>(self: &Arc<Self>, mut stream: S) {
        let place = Place::take(self);
        let Some(place) = place else {
            let text = format!("{MAX_CONNECTIONS} connections are open, and that is the bound");
            let code = Code::TooMany;
            let refusal = Answer::<()>::Error(Problem { code, text });
            let _ = wire::write_answer(&mut stream, &refusal);
            return;
        };
        let spawned = std::thread::Builder::new()
            .name("connection".into())
            .spawn(move || place.0.converse(stream));
        if let Err(error) = spawned {
            say!("no thread for a connection: {error}");
        }
    }

    /// Answers what comes until the other side ends, or can't be written to.
    fn converse(&self, stream: impl Read + Write) {
        let mut lines = Lines::new(stream);
        while let Ok(Some(line)) = lines.next_line() {
            let request = wire::decode(&line);
            let answer = match request.clone().and_then(|request| self.answer(request)) {
                Ok(answer) => Answer::Ok(answer),
                Err(problem) => Answer::Error(problem),
            };
            let written = wire::write_answer(lines.stream_mut(), &answer);
            // Only now: the guest may be gone before another word is written.
            if let Ok(Request::Shutdown { how }) = request {
                self.shut_down(how);
            }
            if written.is_err() {
                return;
            }
        }
    }

    fn answer(&self, request: Request) -> Result<Value, Problem> {
        match request {
            Request::Health => shaped(kernel::health(self.init).map_err(|error| failed(&error))?),
            Request::Exec(program) => shaped(self.exec(&program)?),
            Request::Start(program) => {
                let place = self.programs.reserve()?;
                let job = program::start(&program, Full::Wait)?;
                let job = place.fill(job);
                shaped(Started { job })
            }
            Request::Poll { job, wait_ms } => shaped(self.poll(job, wait_ms)?),
            Request::Kill { job, signal } => {
                self.programs.get(job)?.signal(signal)?;
                shaped(Done {})
            }
            Request::Dmesg { after, max_level } => {
                shaped(kernel::dmesg(after, max_level).map_err(|error| failed(&error))?)
            }
            Request::Clocks => shaped(clocks::read()),
            Request::Correct(correction) => {
                let made = self.corrections.make(&correction);
                shaped(made.map_err(|error| failed(&error))?)
            }
            Request::GapsStart(spec) => {
                let place = self.probes.reserve()?;
                let probe = Probe::start(spec).map_err(|error| failed(&error))?;
                let job = place.fill(probe);
                shaped(Started { job })
            }
            Request::GapsCollect { job, wait } => {
                let probe = self.probes.remove(job)?;
                shaped(probe.collect(wait))
            }
            Request::PauseBegin { deadline_ms } => {
                shaped(hooks::run(&self.hooks.join("before"), deadline_ms)?)
            }
            Request::PauseEnd { deadline_ms } => {
                shaped(hooks::run(&self.hooks.join("after"), deadline_ms)?)
            }
            Request::Shutdown { .. } => shaped(Done {}),
        }
    }

    fn exec(&self, program: &Program) -> Result<Ended, Problem> {
        let place = self.programs.reserve()?;
        let job = program::start(program, Full::Drop)?;
        let ended = job.ended();
        drop(place);
        Ok(ended)
    }

    fn poll(&self, id: u64, wait_ms: u64) -> Result<Progress, Problem> {
        let job = self.programs.get(id)?;
        let patience = Duration::from_millis(wait_ms).min(LONGEST_WAIT);
        let progress = job.progress(patience);
        if progress.exit.is_some() {
            // Another connection may have been told as well; the first one wins.
            let _ = self.programs.remove(id);
        }
        Ok(progress)
    }

    /// Our own PID 1 is told by the signals that busybox's is told by; other ones by the
    /// commands that distributions have for it.
    fn shut_down(&self, how: Shutdown) {
        let (signal, command) = match how {
            Shutdown::Poweroff => (Signal::SIGUSR2, "poweroff"),
            Shutdown::Reboot => (Signal::SIGTERM, "reboot"),
        };
        let begun = if self.init {
            kill(Pid::from_raw(1), signal).map_err(io::Error::from)
        } else {
            Command::new(command).status().map(drop)
        };
        if let Err(error) = begun {
            say!("{command}: {error}");
        }
    }
}

fn shaped(answer: impl Serialize) -> Result<Value, Problem> {
    serde_json::to_value(answer).map_err(|error| failed(&error))
}

fn failed(error: &dyn std::error::Error) -> Problem {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    Problem {
        code: Code::Failed,
        text,
    }
}

/// One of the connections that may be open; given back when dropped.
#[derive(Debug)]
struct Place(Arc<Service>);

impl Place {
    fn take(service: &Arc<Service>) -> Option<Self> {
        let place = Self(Arc::clone(service));
        let before = service.connections.fetch_add(1, Ordering::Relaxed);
        (before < MAX_CONNECTIONS).then_some(place)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.0.connections.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests;
