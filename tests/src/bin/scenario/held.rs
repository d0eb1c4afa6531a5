//! A swap of the host's kernel that stops in its middle: one guest stands still, and it waits for another, whose VMM was
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
    /// Begins it, and stops the VMM of `stopped` once `asks_no_more` of it until it is to stand still; returns as soon as
    /// `is_far` says that it is far enough.
    pub(crate) fn begin(
        daemon: &Daemon,
        into: &str,
        stopped: &str,
        mut asks_no_more: impl FnMut() -> anyhow::Result<bool>,
        mut is_far: impl FnMut() -> anyhow::Result<bool>,
    ) -> anyhow::Result<Self> {
        let stopped = daemon.vmm_pid(stopped)?;
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
        command.stdout(Stdio::piped()).stderr(Stdio::inherit());
        let mut command = command.spawn()?;
        let mut come_to = |what, is_there: &mut dyn FnMut() -> anyhow::Result<bool>| {
            wait_for(what, LONG, || {
                if let Some(status) = command.try_wait()? {
                    let said = command.stdout.take().map(std::io::read_to_string);
                    bail!(
                        "the swap ended with {status}: {}",
                        said.transpose()?.unwrap_or_default()
                    );
                }
                Ok(is_there()?.then_some(()))
            })
        };
        come_to("the swap to be under way", &mut asks_no_more)?;
        signal(stopped, Signal::STOP)?;
        come_to("the first guest to be stored", &mut is_far)?;
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
