//! `stillpoint console`
//!
//! The terminal is raw while the console is open, and is put back on every way out.

use std::io::{IsTerminal, Write};
use std::os::fd::AsFd;
use std::process::ExitCode;

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::termios::{OptionalActions, Termios};

use super::{Desk, io_problem};
use crate::api::VmView;
use crate::model::{Code, Problem, VmState};

/// Ctrl-], as telnet has it.
const ESCAPE: u8 = 0x1d;
/// How long the console may be silent after the end of a piped input.
const SILENCE: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 300_000_000,
};

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Name of the guest.
    name: String,
}

pub(super) async fn run(desk: &Desk, args: Args) -> Result<ExitCode, Problem> {
    desk.must_be_local("the console")?;
    let name = super::path_part(&args.name)?;
    let vm: VmView = desk.api.get(&format!("/v1/vms/{name}")).await?;
    if !vm.state.is_active() {
        let message = format!(
            "`{name}` is {}; `stillpoint logs --console {name}` shows what it said",
            vm.state
        );
        return Err(Problem::new(Code::NotRunning, message));
    }
    let path = vm.console_socket;
    let socket = std::os::unix::net::UnixStream::connect(&path)
        .map_err(|e| io_problem(format_args!("open the console at {path}"), &e))?;
    let terminal =
        RawTerminal::enter().map_err(|e| io_problem("put the terminal into raw mode", &e))?;
    if terminal.is_some() {
        notice(&format!("console of {name}; Ctrl-] q leaves"));
    }
    let end = copy(&socket);
    drop(terminal);
    let end = end.map_err(|e| io_problem("go on with the console", &e))?;
    if end == End::Closed {
        notice(&match state_now(desk, name).await {
            Some(state) => format!("the console closed; {name} is {state}"),
            None => "the console closed".to_owned(),
        });
    }
    Ok(ExitCode::SUCCESS)
}

async fn state_now(desk: &Desk, name: &str) -> Option<VmState> {
    let vm: VmView = desk.api.get(&format!("/v1/vms/{name}")).await.ok()?;
    Some(vm.state)
}

fn notice(text: &str) {
    // `\r`: the terminal may be raw. Nobody reads it if it can't be written.
    let _ = write!(std::io::stderr(), "[{text}]\r\n");
}

/// The terminal in raw mode; as it was when this is dropped.
struct RawTerminal(Termios);

impl RawTerminal {
    /// `None` if stdin is no terminal.
    fn enter() -> std::io::Result<Option<Self>> {
        let stdin = std::io::stdin();
        if !stdin.is_terminal() {
            return Ok(None);
        }
        let before = rustix::termios::tcgetattr(&stdin)?;
        let mut raw = before.clone();
        raw.make_raw();
        rustix::termios::tcsetattr(&stdin, OptionalActions::Flush, &raw)?;
        Ok(Some(Self(before)))
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        // Nothing is left to do if the terminal is gone.
        let _ = rustix::termios::tcsetattr(std::io::stdin(), OptionalActions::Flush, &self.0);
    }
}

/// Why copying ended.
#[derive(Debug, PartialEq, Eq)]
enum End {
    /// The user left, or the input ended.
    Left,
    /// The VMM closed the console.
    Closed,
}

/// Copies both ways.
fn copy(socket: &std::os::unix::net::UnixStream) -> std::io::Result<End> {
    let stdin = rustix::stdio::stdin();
    let mut escape = Escape::default();
    let mut input = true;
    let mut buffer = [0; 4096];
    loop {
        let mut fds = vec![PollFd::new(socket, PollFlags::IN)];
        if input {
            fds.push(PollFd::from_borrowed_fd(stdin, PollFlags::IN));
        }
        let patience = if input { None } else { Some(&SILENCE) };
        match rustix::event::poll(&mut fds, patience) {
            Err(rustix::io::Errno::INTR) => continue,
            Ok(0) => return Ok(End::Left),
            other => other?,
        };
        let from_guest = !fds[0].revents().is_empty();
        let from_user = fds.get(1).is_some_and(|fd| !fd.revents().is_empty());
        if from_guest {
            let len = rustix::io::read(socket.as_fd(), &mut buffer)?;
            if len == 0 {
                return Ok(End::Closed);
            }
            let mut out = std::io::stdout().lock();
            out.write_all(&buffer[..len])?;
            out.flush()?;
        }
        if from_user {
            let len = rustix::io::read(stdin, &mut buffer)?;
            let (bytes, left) = escape.filter(&buffer[..len]);
            (&*socket).write_all(&bytes)?;
            if left {
                return Ok(End::Left);
            }
            input = len > 0;
        }
    }
}

/// Finds the way out in what is typed: Ctrl-] q. Ctrl-] twice sends one.
#[derive(Debug, Default)]
struct Escape {
    pending: bool,
}

impl Escape {
    /// What goes to the guest, and whether the user leaves.
    fn filter(&mut self, typed: &[u8]) -> (Vec<u8>, bool) {
        let mut bytes = Vec::with_capacity(typed.len());
        for &byte in typed {
            match (std::mem::take(&mut self.pending), byte) {
                (true, b'q') => return (bytes, true),
                (false, ESCAPE) => self.pending = true,
                (true, ESCAPE) | (false, _) => bytes.push(byte),
                (true, _) => bytes.extend([ESCAPE, byte]),
            }
        }
        (bytes, false)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_way_out_is_found_across_reads() {
        let mut escape = Escape::default();
        assert_eq!(escape.filter(b"ab\x1d"), (b"ab".to_vec(), false));
        assert_eq!(escape.filter(b"q"), (vec![], true));
        assert_eq!(
            escape.filter(b"\x1dx\x1d\x1dq"),
            (b"\x1dx\x1dq".to_vec(), false)
        );
        assert_eq!(escape.filter(b"z\x1dqrest"), (b"z".to_vec(), true));
    }
}
