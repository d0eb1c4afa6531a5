//! PID 1 of a test image: what stands between the kernel and the service.
//!
//! ```text
//!   mounts ─▶ modules ─▶ network ─▶ power button ─▶ service, command ─▶ reap until told to end
//! ```
//!
//! The image is an initramfs with this program as `/init`, and `/modules.order`: paths of kernel
//! modules, one a line, in the order in which they are to be loaded. The kernel's command line
//! may say `agent.ip=10.0.0.2/24 agent.gw=10.0.0.1 agent.run="/bin/load cpu --seconds 9"`.
//!
//! PID 1 must never end and never panic: the kernel would. So whatever fails is told on the
//! console and gone on without. The service is a process of its own, for the same reason and so
//! that PID 1 can reap whatever comes. Signals mean what they mean to busybox's init: SIGUSR2
//! powers off, SIGTERM and SIGINT (Ctrl-Alt-Del) reboot, SIGUSR1 halts.

mod button;
mod child;
mod cmdline;
mod modules;
mod mounts;
mod network;

use std::io;
use std::os::unix::process::CommandExt;
use std::process::Child;
use std::time::{Duration, Instant};

use nix::sys::signal::{SigSet, Signal, kill};
use nix::unistd::Pid;
use rustix::process::{WaitOptions, WaitStatus, wait};
use rustix::system::{RebootCommand, reboot};

use cmdline::Cmdline;

/// Tells the service that this program is its PID 1.
pub(crate) const UNDER_INIT: &str = "--under-init";
/// How long processes have to end by themselves.
const PATIENCE: Duration = Duration::from_secs(2);
/// A service that ends sooner than this after its start would end again.
const SOON: Duration = Duration::from_secs(5);

/// Brings the guest up and never returns.
pub(crate) fn run() -> ! {
    // Blocked signals are kept for `wait`, even such as PID 1 would not get (kernel/signal.c,
    // `sig_ignored`). Before any thread and any child there is.
    let signals = SigSet::from_iter([
        Signal::SIGCHLD,
        Signal::SIGTERM,
        Signal::SIGINT,
        Signal::SIGUSR1,
        Signal::SIGUSR2,
    ]);
    let blocked = signals.thread_block();
    mounts::mount_all();
    // Only now is there a console to tell it on.
    report("blocking signals", blocked);
    report("keeping Ctrl-Alt-Del for us", reboot(RebootCommand::CadOff));
    let cmdline = Cmdline::read();
    modules::load_all();
    network::bring_up(cmdline.get("agent.ip"), cmdline.get("agent.gw"));
    button::watch();
    let mut init = Init::default();
    init.service();
    if let Some(command) = cmdline.get("agent.run") {
        init.command(command);
    }
    loop {
        match signals.wait() {
            Ok(Signal::SIGCHLD) => init.reap(),
            Ok(signal) => end(signal),
            Err(error) => {
                // There is no such error; but it must not become a loop that eats the CPU.
                say!("waiting for a signal: {error}");
                std::thread::sleep(SOON);
            }
        }
    }
}

fn report<E: std::fmt::Display>(what: &str, result: Result<(), E>) {
    if let Err(error) = result {
        say!("{what}: {error}");
    }
}

/// The children that are known by name.
#[derive(Default)]
struct Init {
    service: Option<(Child, Instant)>,
    command: Option<Child>,
}

impl Init {
    fn service(&mut self) {
        let started = child::command("/proc/self/exe")
            .arg0("stillpoint-agent")
            .arg(UNDER_INIT)
            .spawn();
        match started {
            Ok(child) => self.service = Some((child, Instant::now())),
            Err(error) => say!("starting the service: {error}"),
        }
    }

    /// Runs the command line's command, on the console. It is cut at spaces: one that wants
    /// more of a shell than that names a shell and a script.
    fn command(&mut self, text: &str) {
        let mut words = text.split_whitespace();
        let Some(program) = words.next() else {
            return;
        };
        match child::command(program).args(words).spawn() {
            Ok(child) => self.command = Some(child),
            Err(error) => say!("agent.run: {program}: {error}"),
        }
    }

    /// Reaps every child that has ended; one signal may stand for several.
    fn reap(&mut self) {
        while let Ok(Some((pid, status))) = wait(WaitOptions::NOHANG) {
            let pid = u32::try_from(pid.as_raw_nonzero().get()).unwrap_or_default();
            if self.command.take_if(|child| child.id() == pid).is_some() {
                say!("agent.run: ended {}", ending(status));
            }
            let Some((_, since)) = self.service.take_if(|(child, _)| child.id() == pid) else {
                continue;
            };
            if status.exit_status() == Some(0) {
                // It had nothing to listen on, and said so.
            } else if since.elapsed() < SOON {
                say!(
                    "the service ended {}, and so soon that it stays away",
                    ending(status)
                );
            } else {
                say!("the service ended {}, and is started again", ending(status));
                self.service();
            }
        }
    }
}

fn ending(status: WaitStatus) -> String {
    match (status.exit_status(), status.terminating_signal()) {
        (Some(code), _) => format!("with status {code}"),
        (None, Some(signal)) => format!("by signal {signal}"),
        (None, None) => "somehow".to_owned(),
    }
}

/// Ends every process, writes everything to the disks, and then the machine.
fn end(signal: Signal) -> ! {
    let (doing, command) = match signal {
        Signal::SIGUSR2 => ("powering off", RebootCommand::PowerOff),
        Signal::SIGUSR1 => ("halting", RebootCommand::Halt),
        _ => ("rebooting", RebootCommand::Restart),
    };
    say!("{doing}");
    let everybody = Pid::from_raw(-1);
    let _ = kill(everybody, Signal::SIGTERM);
    if !all_gone(PATIENCE) {
        let _ = kill(everybody, Signal::SIGKILL);
        all_gone(PATIENCE);
    }
    rustix::fs::sync();
    mounts::let_go();
    rustix::fs::sync();
    report(doing, reboot(command));
    // A kernel that can't: there is nothing left to do, and PID 1 must not end.
    loop {
        std::thread::sleep(SOON);
    }
}

/// Reaps until no child is left, or the time is over.
fn all_gone(patience: Duration) -> bool {
    let deadline = Instant::now() + patience;
    loop {
        match wait(WaitOptions::NOHANG) {
            Ok(Some(_)) => {}
            Ok(None) if Instant::now() >= deadline => return false,
            Ok(None) => std::thread::sleep(Duration::from_millis(10)),
            Err(rustix::io::Errno::INTR) => {}
            // ECHILD.
            Err(_) => return true,
        }
    }
}

/// A file of a few lines, of which it is no error not to be there.
fn lines_of(path: &str) -> Vec<String> {
    match std::fs::read_to_string(path) {
        Ok(text) => text.lines().map(str::to_owned).collect(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
        Err(error) => {
            say!("reading {path}: {error}");
            Vec::new()
        }
    }
}
