//! A host's console, followed to its end or to the time limit.

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use anyhow::Context;

use super::order::MARK;

/// What a kernel says that got no time to run in, and what the host's init says of it.
const STALLS: &[&str] = &[
    "kthread starved",
    "detected stalls",
    "soft lockup",
    "the host stood still",
];
/// How much of a console an error shows.
const TAIL: usize = 30;

/// How it ended.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum End {
    /// QEMU did.
    ByItself,
    /// It was ended: too long.
    TimeLimit(Duration),
}

/// What was seen.
#[derive(Debug)]
pub(super) struct Watched {
    pub(super) end: End,
    /// What it did last, in init's words.
    pub(super) phase: String,
    /// It says itself that it got no time, or it never got to its init.
    pub(super) stalled: bool,
    lines: Vec<String>,
}

impl std::fmt::Display for End {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::ByItself => write!(f, "ended without an answer"),
            Self::TimeLimit(limit) => write!(f, "was ended after its {} s", limit.as_secs()),
        }
    }
}

impl Watched {
    fn new() -> Self {
        Self {
            end: End::ByItself,
            phase: "booting".into(),
            stalled: false,
            lines: Vec::new(),
        }
    }

    /// The console's last lines; of a kernel that panicked the reason too, which comes before a long
    /// trace.
    pub(super) fn tail(&self) -> String {
        let (before, last) = self.lines.split_at(self.lines.len().saturating_sub(TAIL));
        let panic = before.iter().find(|line| line.contains("Kernel panic"));
        let shown: Vec<&str> = panic.into_iter().chain(last).map(String::as_str).collect();
        shown.join("\n")
    }

    fn line(&mut self, line: String) {
        if let Some((_, said)) = line.split_once(MARK) {
            self.phase = said.to_owned();
        }
        self.stalled |= STALLS.iter().any(|stall| line.contains(stall));
        self.lines.push(line);
    }

    fn over(mut self, end: End) -> Self {
        self.stalled |= end != End::ByItself && self.phase == "booting";
        self.end = end;
        self
    }
}

/// Starts it, and follows its console into `log`. It is over when this returns.
pub(super) fn follow(
    mut command: Command,
    log: &Path,
    limit: Option<Duration>,
    live: bool,
) -> anyhow::Result<Watched> {
    let deadline = limit.map(|limit| Instant::now() + limit);
    let errors = File::create(log.with_file_name("qemu.log"))?;
    let log = File::create(log).with_context(|| format!("creating {}", log.display()))?;
    let mut child = command
        .stdout(Stdio::piped())
        .stderr(errors)
        .spawn()
        .context("starting QEMU")?;
    let console = child.stdout.take().context("QEMU has no standard output")?;
    let (tell, lines) = channel();
    let reader =
        std::thread::spawn(move || read(console, log, live, |line| tell.send(line).is_ok()));
    let (seen, ended) = collect(&lines, deadline);
    let end = match limit {
        Some(limit) if !ended => End::TimeLimit(limit),
        _ => End::ByItself,
    };
    if end != End::ByItself {
        let _ = child.kill();
    }
    child.wait().context("waiting for QEMU")?;
    let _ = reader.join();
    Ok(seen.over(end))
}

/// Takes lines until there are no more (true) or the deadline comes.
fn collect(lines: &Receiver<String>, deadline: Option<Instant>) -> (Watched, bool) {
    // A year is no deadline, and no special case.
    let deadline = deadline.unwrap_or_else(|| Instant::now() + Duration::from_secs(365 * 86_400));
    let mut seen = Watched::new();
    while Instant::now() < deadline {
        match lines.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok(line) => seen.line(line),
            Err(RecvTimeoutError::Disconnected) => return (seen, true),
            Err(RecvTimeoutError::Timeout) => break,
        }
    }
    (seen, false)
}

fn read(console: impl Read, mut log: File, live: bool, mut take: impl FnMut(String) -> bool) {
    let mut console = BufReader::new(console);
    let mut bytes = Vec::new();
    while console
        .read_until(b'\n', &mut bytes)
        .is_ok_and(|read| read > 0)
    {
        let line = String::from_utf8_lossy(&bytes).trim_end().to_owned();
        bytes.clear();
        let _ = writeln!(log, "{line}");
        if live {
            eprintln!("{line}");
        }
        if !take(line) {
            return;
        }
    }
}

/// What a person wants to see of a command's console that failed: of a test program, what its failing
/// tests said; of any other, its last lines. Without the host kernel's own, which would crowd it out.
pub(super) fn what_failed(console: &str) -> String {
    const FAILURES: &str = "failures:";
    let lines: Vec<&str> = console
        .lines()
        .map(|line| line.trim_end_matches('\r'))
        .filter(|line| !line.contains("kvm") || !line.contains("Unhandled"))
        .collect();
    let mut parts = lines.split(|line| *line == FAILURES);
    let before = parts.next().unwrap_or_default();
    let shown = match parts.next() {
        Some(said) => said,
        None => before.split_at(before.len().saturating_sub(TAIL)).1,
    };
    shown.join("\n").trim().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_failed_is_what_failing_tests_said_or_the_end() {
        let test = "running 2 tests\ntest a ... [ 3.2] kvm [1]: vcpu0 Unhandled WRMSR(0x1d9)\nFAILED\n\n\
                    failures:\r\n\n---- a stdout ----\nit broke\n[ 3.2] kvm_amd: kvm [1]: vcpu0 Unhandled\n\
                    \n\nfailures:\n    a\n\ntest result: FAILED. 0 passed; 1 failed\n";
        assert_eq!(what_failed(test), "---- a stdout ----\nit broke");
        let long: Vec<String> = (0..100).map(|n| format!("line {n}")).collect();
        let shown = what_failed(&long.join("\n"));
        assert!(
            shown.starts_with("line 70\n") && shown.ends_with("line 99"),
            "{shown}"
        );
    }

    fn follow_shell(script: &str, limit: Duration) -> Watched {
        let dir = tempfile::tempdir().expect("a folder");
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        follow(command, &dir.path().join("console.log"), Some(limit), false).expect("followed")
    }

    #[test]
    fn the_phase_is_what_init_said_last() {
        let script = "echo kernel; echo 'rig-init: running x'; echo output";
        let seen = follow_shell(script, Duration::from_secs(20));
        assert_eq!(
            (seen.end, seen.phase.as_str(), seen.stalled),
            (End::ByItself, "running x", false)
        );
        assert_eq!(seen.lines, ["kernel", "rig-init: running x", "output"]);
    }

    #[test]
    fn one_that_takes_too_long_is_ended() {
        let seen = follow_shell(
            "echo 'rig-init: running'; exec sleep 600",
            Duration::from_millis(500),
        );
        assert!(matches!(seen.end, End::TimeLimit(_)), "{seen:?}");
        assert!(!seen.stalled, "the command may just be slow");
        let seen = follow_shell("exec sleep 600", Duration::from_millis(100));
        assert!(seen.stalled, "it never got to its init");
    }

    #[test]
    fn a_host_that_stood_still_says_so() {
        let starved = "echo 'rcu: rcu_sched kthread starved for 5252 jiffies!'";
        assert!(follow_shell(starved, Duration::from_secs(20)).stalled);
    }

    #[test]
    fn an_error_shows_the_last_lines_only() {
        let seen = follow_shell(
            "for n in $(seq 100); do echo $n; done",
            Duration::from_secs(20),
        );
        let tail = seen.tail();
        assert!(
            tail.starts_with("71\n") && tail.ends_with("\n100"),
            "{tail}"
        );
    }
}
