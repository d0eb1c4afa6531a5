//! What PID 1 starts.
#![allow(unsafe_code)] // Only between fork and exec can a child's signal mask be made its own.

use std::io;
use std::os::unix::process::CommandExt;
use std::process::Command;

use nix::sys::signal::SigSet;

/// Where programs are looked up.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// A program that begins as a shell's child would: with the usual places, and with no signal
/// blocked. PID 1 has some blocked, and a mask is inherited by every program after it, none of
/// which would then end when told to.
pub(super) fn command(program: &str) -> Command {
    let mut command = Command::new(program);
    command.env("PATH", PATH).env("HOME", "/");
    // SAFETY: pthread_sigmask is async-signal-safe (POSIX 2.4.3), and nothing else happens here:
    // no allocation, no lock.
    unsafe {
        command.pre_exec(|| SigSet::empty().thread_set_mask().map_err(io::Error::from));
    }
    command
}

#[cfg(test)]
mod tests {
    use nix::sys::signal::Signal;

    use super::*;

    #[test]
    fn nothing_is_blocked_that_we_block() {
        let signals = SigSet::from_iter([Signal::SIGUSR1, Signal::SIGUSR2]);
        signals.thread_block().unwrap();
        let blocked = |mut command: Command| {
            let told = command.args(["SigBlk", "/proc/self/status"]).output();
            String::from_utf8(told.unwrap().stdout).unwrap()
        };
        assert_eq!(blocked(command("grep")), "SigBlk:\t0000000000000000\n");
        assert_ne!(
            blocked(Command::new("grep")),
            "SigBlk:\t0000000000000000\n",
            "a mask is inherited, or this test shows nothing"
        );
        signals.thread_unblock().unwrap();
    }
}
