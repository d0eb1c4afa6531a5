//! An operator's command: in a process group of its own, its output in a file, its time bounded.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process_group};
use stillpoint_control::message::ProcessId;
use tokio::process::{Child, Command};
use tokio::time::Instant;

use crate::model::CommandEnd;

/// How long a command that overran may take to end in order before it is killed.
const GRACE: Duration = Duration::from_secs(2);
/// How much of the output is kept in the record, bytes.
const TAIL: u64 = 4096;

/// A command under way.
#[derive(Debug)]
pub(super) struct Running(Child);

impl Running {
    /// Starts it; what it prints goes to the end of `log`.
    pub(super) fn start(command: &[String], log: &Path) -> Result<Self, String> {
        let (program, args) = command.split_first().ok_or("nothing to run")?;
        let file = File::options()
            .create(true)
            .append(true)
            .mode(0o600)
            .open(log)
            .map_err(|e| format!("cannot open {}: {e}", log.display()))?;
        let errors = file.try_clone().map_err(|e| e.to_string())?;
        Command::new(program)
            .args(args)
            .stdin(Stdio::null())
            .stdout(file)
            .stderr(errors)
            .process_group(0)
            .spawn()
            .map(Self)
            .map_err(|e| format!("{program}: {e}"))
    }

    /// Its process.
    pub(super) fn id(&self) -> Option<ProcessId> {
        self.0.id().and_then(ProcessId::of)
    }

    /// Waits for its end. At the deadline it is told to end, and killed by something beside this:
    /// nobody waits for that.
    pub(super) async fn end_by(mut self, deadline: Instant) -> CommandEnd {
        match tokio::time::timeout_at(deadline, self.0.wait()).await {
            Ok(Ok(status)) => match (status.code(), status.signal()) {
                (Some(code), _) => CommandEnd::Exit(code),
                (None, Some(signal)) => CommandEnd::Signal(signal),
                (None, None) => CommandEnd::Unknown,
            },
            Ok(Err(_)) => CommandEnd::Unknown,
            Err(_) => {
                tokio::spawn(async move {
                    let group = self.0.id().and_then(group);
                    tell(group, Signal::TERM);
                    // Reaped here; its group may have members that outlive it.
                    let _ = tokio::time::timeout(GRACE, self.0.wait()).await;
                    tell(group, Signal::KILL);
                    let _ = self.0.wait().await;
                });
                CommandEnd::Overran
            }
        }
    }
}

fn group(pid: u32) -> Option<Pid> {
    i32::try_from(pid).ok().and_then(Pid::from_raw)
}

fn tell(group: Option<Pid>, signal: Signal) {
    if let Some(group) = group {
        // A group that is gone needs no telling.
        let _ = kill_process_group(group, signal);
    }
}

/// Ends a command that an earlier daemon started.
pub(super) async fn end_left_over(process: &ProcessId) {
    if !process.is_alive() {
        return;
    }
    let group = group(process.pid);
    tell(group, Signal::TERM);
    let deadline = Instant::now() + GRACE;
    while process.is_alive() && Instant::now() < deadline {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    if process.is_alive() {
        tell(group, Signal::KILL);
    }
}

/// The last of what was printed.
pub(super) fn tail(log: &Path) -> String {
    let read = || -> std::io::Result<Vec<u8>> {
        let mut file = File::open(log)?;
        let len = file.metadata()?.len();
        file.seek(SeekFrom::Start(len.saturating_sub(TAIL)))?;
        let mut bytes = Vec::new();
        file.take(TAIL).read_to_end(&mut bytes)?;
        Ok(bytes)
    };
    read().map_or_else(
        |error| format!("(cannot read {}: {error})", log.display()),
        |bytes| String::from_utf8_lossy(&bytes).into_owned(),
    )
}
