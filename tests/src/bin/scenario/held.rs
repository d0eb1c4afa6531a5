//! A swap of the host's kernel that stops in its middle: one guest stands still, and it waits for another, whose VMM is
//! stopped. So there is time for things to go wrong.

use std::process::{Child, Stdio};
use std::time::Duration;

use anyhow::{Context, bail};
use rustix::process::{Pid, Signal, kill_process};
use stillpoint_tests::daemon::Daemon;
use stillpoint_tests::patience::wait_for;

use crate::stages;

/// Longer than anything takes where nobody ends it.
const LONG: Duration = Duration::from_secs(60);

/// A swap that waits for a guest whose VMM is stopped.
pub(crate) struct Held {
    command: Child,
    pub(crate) stopped: u32,
}

impl Held {
    /// Begins it, with the VMM of `stopped` stopped; returns as soon as `is_far` says that it is far enough.
    pub(crate) fn begin(
        daemon: &Daemon,
        into: &str,
        stopped: &str,
        mut is_far: impl FnMut() -> anyhow::Result<bool>,
    ) -> anyhow::Result<Self> {
        let stopped = daemon.vmm_pid(stopped)?;
        signal(stopped, Signal::STOP)?;
        let [image, initrd] = stages::kernel(into)?.map(|path| path.display().to_string());
        let swap = [
            "--json",
            "swap",
            "kernel",
            "--kernel",
            &image,
            "--initrd",
            &initrd,
            "--budget",
            "30s",
            "--no-notice",
            "a cell",
            // Of the one that is stopped it would wait in vain.
            "--no-rehearsal",
        ];
        let mut command = daemon.command(&swap);
        command.stdout(Stdio::piped()).stderr(Stdio::null());
        let mut command = command.spawn()?;
        wait_for("the first guest to be stored", LONG, || {
            if let Some(status) = command.try_wait()? {
                bail!("the swap ended with {status}");
            }
            Ok(is_far()?.then_some(()))
        })?;
        Ok(Self { command, stopped })
    }

    pub(crate) fn go_on(&self) -> anyhow::Result<()> {
        signal(self.stopped, Signal::CONT)
    }

    /// Waits for the command's end, however it ends.
    pub(crate) fn end(mut self) -> anyhow::Result<()> {
        self.command.wait()?;
        Ok(())
    }
}

pub(crate) fn signal(pid: u32, signal: Signal) -> anyhow::Result<()> {
    let pid = Pid::from_raw(i32::try_from(pid)?).context("a pid")?;
    Ok(kill_process(pid, signal)?)
}
