//! Starts a VMM process and waits for its word.
//!
//! ```text
//!  spawn ──▶ at the gate ──▶ (scope joined, process recorded) ──▶ let_go ──▶ ready
//!                └── dropped: the gate closes and the process ends without having run anything
//! ```

use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use command_fds::{CommandFdExt, FdMapping};
use stillpoint_control::message::Ready;
use tokio::io::AsyncReadExt;

use super::process::{Exit, HoldError, Process};

/// The fd at which a VMM says that it is ready.
pub const READY_FD: i32 = 3;
/// The fd at which it finds its secret, or its end of the handover socketpair.
pub const GIVEN_FD: i32 = 4;
/// The fd at which it finds its guest's memory, if that came from the kernel before.
pub const MEMORY_FD: i32 = 5;
/// Lines of a log that are shown for a process that died without a word.
const LAST_LINES: usize = 8;
/// What of the daemon's environment a VMM gets to see. Not `NOTIFY_SOCKET`: it is no part of
/// the service.
const ENVIRONMENT: [&str; 2] = ["STILLPOINT_LOG", "RUST_BACKTRACE"];

/// Why a process did not come up.
#[derive(Debug, thiserror::Error)]
pub enum SpawnError {
    /// It could not be started.
    #[error("cannot start the VMM's process: {0}")]
    Start(#[from] std::io::Error),
    /// Two fds for one number.
    #[error("cannot pass fds to the VMM: {0}")]
    Fds(#[from] command_fds::FdMappingCollision),
    /// It died at once.
    #[error("cannot watch the VMM's process: {0}")]
    Hold(#[from] HoldError),
    /// It said why.
    #[error("{0}")]
    Refused(String),
    /// It died without a word.
    #[error("the VMM {exit} before it was ready; the last it logged:\n{log}")]
    Crashed {
        /// How it ended.
        exit: Exit,
        /// The last lines of its log.
        log: String,
    },
    /// It said nothing.
    #[error("the VMM was not ready within {0:?} and was killed")]
    TooSlow(Duration),
    /// What it said is not what a VMM says.
    #[error("the VMM said something that is no message of ours ({0}); is the release a VMM?")]
    Malformed(String),
}

/// What to start.
#[derive(Debug)]
pub struct Job<'a> {
    /// The verified binary.
    pub binary: File,
    /// Its arguments.
    pub args: Vec<String>,
    /// Its secret (as a pipe) or its end of the handover socketpair; becomes [`GIVEN_FD`].
    pub given: OwnedFd,
    /// Its guest's memory, if that came from the kernel before; becomes [`MEMORY_FD`].
    pub memory: Option<OwnedFd>,
    /// Its log.
    pub log: &'a Path,
}

/// A process that waits at its gate.
#[derive(Debug)]
pub struct Gated {
    process: Process,
    gate: OwnedFd,
    ready: OwnedFd,
    log: LogTail,
}

/// A process that was let go.
#[derive(Debug)]
pub struct Started {
    process: Process,
    ready: OwnedFd,
    log: LogTail,
}

/// Starts the process and leaves it at its gate.
pub fn spawn(job: Job<'_>) -> Result<Gated, SpawnError> {
    let log = std::fs::OpenOptions::new()
        .create(true)
        .append(true)
        .mode(0o600)
        .open(job.log)?;
    let tail = LogTail {
        path: job.log.to_owned(),
        from: log.metadata()?.len(),
    };
    let (gate_in, gate) = std::io::pipe()?;
    let (ready, ready_in) = std::io::pipe()?;
    let memory = job.memory.map(|memory| FdMapping {
        parent_fd: memory,
        child_fd: MEMORY_FD,
    });
    let mut mappings = vec![
        FdMapping {
            parent_fd: ready_in.into(),
            child_fd: READY_FD,
        },
        FdMapping {
            parent_fd: job.given,
            child_fd: GIVEN_FD,
        },
    ];
    mappings.extend(memory);
    // The running daemon's own binary, even if another was installed in its place meanwhile.
    let mut command = Command::new("/proc/self/exe");
    command
        .arg("launch")
        .arg("--")
        .args(job.args)
        .env_clear()
        .envs(
            ENVIRONMENT
                .iter()
                .filter_map(|&key| Some((key, std::env::var_os(key)?))),
        )
        .stdin(Stdio::from(gate_in))
        .stdout(Stdio::from(job.binary))
        .stderr(Stdio::from(log))
        .fd_mappings(mappings)?;
    let child = command.spawn()?;
    // Dropping the command closes our copies of the child's ends.
    drop(command);
    Ok(Gated {
        process: Process::of_child(&child)?,
        gate: gate.into(),
        ready: ready.into(),
        log: tail,
    })
}

impl Gated {
    /// The process.
    pub fn process(&self) -> &Process {
        &self.process
    }

    /// Lets it become the VMM.
    pub fn let_go(self) -> Result<Started, SpawnError> {
        File::from(self.gate).write_all(b"g")?;
        Ok(Started {
            process: self.process,
            ready: self.ready,
            log: self.log,
        })
    }
}

impl Started {
    /// Waits until it is ready. When it is not, it is dead afterwards.
    pub async fn ready(self, patience: Duration) -> Result<Process, SpawnError> {
        let word = tokio::time::timeout(patience, read_all(self.ready)).await;
        let error = match word {
            Err(_) => SpawnError::TooSlow(patience),
            Ok(Err(error)) => SpawnError::Start(error),
            Ok(Ok(text)) if text.trim().is_empty() => {
                let exit = self.process.exit_soon().await;
                let log = self.log.last_lines();
                return Err(SpawnError::Crashed { exit, log });
            }
            Ok(Ok(text)) => match serde_json::from_str(text.trim()) {
                Ok(Ready::Yes) => return Ok(self.process),
                Ok(Ready::No { error }) => SpawnError::Refused(error),
                Err(_) => SpawnError::Malformed(text.chars().take(200).collect()),
            },
        };
        self.process.kill().await;
        Err(error)
    }
}

impl Process {
    /// A process that closed its ready fd without a word is dying; it is helped if it is slow.
    async fn exit_soon(&self) -> Exit {
        if self.ends_within(Duration::from_secs(2)).await {
            return self.exit();
        }
        self.kill().await
    }
}

async fn read_all(fd: OwnedFd) -> std::io::Result<String> {
    let mut pipe = tokio::net::unix::pipe::Receiver::from_owned_fd(fd)?;
    let mut text = String::new();
    pipe.read_to_string(&mut text).await?;
    Ok(text)
}

/// The last lines of a log, indented.
pub fn log_tail(path: &Path) -> String {
    let from = std::fs::metadata(path).map_or(0, |found| found.len().saturating_sub(16 << 10));
    let path = path.to_owned();
    LogTail { path, from }.last_lines()
}

/// What was logged since the process was started.
#[derive(Debug)]
struct LogTail {
    path: PathBuf,
    from: u64,
}

impl LogTail {
    fn last_lines(&self) -> String {
        self.read().map_or_else(
            |e| format!("  (the log {} can't be read: {e})", self.path.display()),
            |text| last_lines(&text),
        )
    }

    fn read(&self) -> std::io::Result<String> {
        let mut file = File::open(&self.path)?;
        file.seek(SeekFrom::Start(self.from))?;
        let mut bytes = Vec::new();
        file.take(1 << 20).read_to_end(&mut bytes)?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }
}

fn last_lines(text: &str) -> String {
    let lines: Vec<&str> = text
        .lines()
        .filter(|line| !line.trim().is_empty())
        .collect();
    if lines.is_empty() {
        return "  (nothing)".into();
    }
    let last = &lines[lines.len().saturating_sub(LAST_LINES)..];
    last.iter()
        .map(|line| format!("  {line}"))
        .collect::<Vec<_>>()
        .join("\n")
}
