//! A network of the test's own: a namespace in which the daemon and its VMMs live.

use std::process::{Command, Stdio};

use anyhow::{Context, ensure};

use crate::daemon::Daemon;

/// Why there can be no network namespace of our own; `None` if there can.
pub fn no_network_namespace() -> Option<String> {
    let tried = Command::new("unshare")
        .args(["-n", "true"])
        .stderr(Stdio::null())
        .status();
    match tried {
        Ok(status) if status.success() => None,
        Ok(status) => Some(format!("`unshare -n`: {status}")),
        Err(error) => Some(format!("unshare: {error}")),
    }
}

/// A command in the namespace of `daemon`, which was started with one of its own.
pub fn beside(daemon: &Daemon, program: &str, args: &[&str]) -> Command {
    let mut command = Command::new("nsenter");
    command.args(["-t", &daemon.pid().to_string(), "-n", program]);
    command.args(args).stdin(Stdio::null());
    command
}

fn must(mut command: Command) -> anyhow::Result<()> {
    let output = command
        .output()
        .with_context(|| format!("starting {command:?}"))?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(output.status.success(), "{command:?}: {said}");
    Ok(())
}

/// Makes a tap with an address for the host, in the daemon's namespace.
pub fn tap(daemon: &Daemon, name: &str, address: &str) -> anyhow::Result<()> {
    // iproute2 where it is; busybox, as on the emulated host, has another word for it.
    let made = must(beside(
        daemon,
        "ip",
        &["tuntap", "add", "dev", name, "mode", "tap"],
    ))
    .or_else(|_| must(beside(daemon, "tunctl", &["-t", name])));
    made.with_context(|| format!("making the tap {name}"))?;
    must(beside(daemon, "ip", &["addr", "add", address, "dev", name]))?;
    must(beside(daemon, "ip", &["link", "set", name, "up"]))
}
