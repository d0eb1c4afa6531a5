//! What runs in the child between fork and the VMM.
//!
//! The daemon starts itself as `stillpointd launch -- ARGS...` with
//!
//! * stdin: the gate, a pipe. One byte lets it go; end of file (the daemon died or changed its
//!   mind) ends it. Meanwhile the daemon moves it into a scope of its own and records it.
//! * stdout: the verified binary, opened for reading.
//! * stderr: the VM's log, opened for appending.
//!
//! It leaves the daemon's session, puts /dev/null in place of gate and binary, and becomes the
//! binary by that very file description: nothing can be put in its place after its digest was
//! taken. Doing this in a program of its own, not between fork and exec, needs no unsafe code.

use std::ffi::OsString;
use std::io::Read;
use std::os::fd::AsRawFd;
use std::os::unix::process::CommandExt;
use std::process::Command;

use anyhow::{Context, bail};
use rustix::fs::{Mode, OFlags};

/// Waits at the gate, then becomes the binary; returns only an error, or at a closed gate.
pub fn launch(args: &[OsString]) -> anyhow::Result<()> {
    rustix::process::setsid().context("leave the daemon's session")?;
    let binary = rustix::io::fcntl_dupfd_cloexec(rustix::stdio::stdout(), 3)
        .context("keep the binary's fd")?;
    let mut byte = [0; 1];
    if std::io::stdin()
        .read(&mut byte)
        .context("wait at the gate")?
        == 0
    {
        bail!("the daemon ended before it let this process go");
    }
    let null = rustix::fs::open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())
        .context("open /dev/null")?;
    rustix::stdio::dup2_stdin(&null).context("replace stdin")?;
    rustix::stdio::dup2_stdout(&null).context("replace stdout")?;
    std::env::set_current_dir("/").context("leave the working directory")?;
    let error = Command::new(format!("/proc/self/fd/{}", binary.as_raw_fd()))
        .arg0("stillpoint-vmm")
        .args(args)
        .exec();
    Err(error).context("run the release's binary")
}
