//! The two sides of the demo: programs whose lines are shown as they come.

use std::io::{BufRead, BufReader, Read};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;

use anyhow::Context;
use stillpoint_tests::daemon::{Daemon, programs};
use stillpoint_tests::patience::PATIENCE;

/// Both sides. They end when this is dropped.
pub(crate) struct Sides {
    children: [Child; 2],
    guest: mpsc::Receiver<String>,
    hooks: PathBuf,
}

impl Sides {
    /// Begins to watch on the host and in the guest.
    pub(crate) fn open(daemon: &Daemon, dir: &Path) -> anyhow::Result<Self> {
        let hooks = dir.join("hooks.d");
        hook(&hooks, "before/10-drain", "echo draining >&2; sleep 2")?;
        hook(&hooks, "after/10-drain", ":")?;
        let mut host = daemon.command(&["events", "watch"]);
        let mut host = host
            .stdout(Stdio::piped())
            .spawn()
            .context("events watch")?;
        show("host ", host.stdout.take().context("its output")?, None);
        let agent = programs().join("stillpoint-agent");
        let mut guest = Command::new(agent);
        guest
            .arg("--events")
            .arg(daemon.guest_dir("web-1").join("vsock.sock_80"));
        guest.arg("--hooks").arg(&hooks).args(["--deadline", "10"]);
        let mut guest = guest.stderr(Stdio::piped()).spawn().context("the agent")?;
        let (lines, heard) = mpsc::channel();
        show(
            "guest",
            guest.stderr.take().context("its output")?,
            Some(lines),
        );
        let sides = Self {
            children: [host, guest],
            guest: heard,
            hooks,
        };
        sides.wait_guest("watching")?;
        Ok(sides)
    }

    /// Waits until the guest's side says something with this word.
    pub(crate) fn wait_guest(&self, word: &str) -> anyhow::Result<()> {
        loop {
            let line = self.guest.recv_timeout(PATIENCE);
            let line = line.with_context(|| format!("the guest never said {word:?}"))?;
            if line.contains(word) {
                return Ok(());
            }
        }
    }

    /// Makes a guest that never gets ready, or one that does.
    pub(crate) fn set_ready(&self, ready: bool) -> anyhow::Result<()> {
        let end = if ready {
            "exit 0"
        } else {
            "echo not now >&2; exit 1"
        };
        hook(&self.hooks, "before/10-drain", end)
    }
}

impl Drop for Sides {
    fn drop(&mut self) {
        for child in &mut self.children {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

fn hook(dir: &Path, name: &str, script: &str) -> anyhow::Result<()> {
    let path = dir.join(name);
    std::fs::create_dir_all(path.parent().context("a directory")?)?;
    std::fs::write(&path, format!("#!/bin/sh\n{script}\n"))?;
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755))?;
    Ok(())
}

fn show(side: &'static str, from: impl Read + Send + 'static, to: Option<mpsc::Sender<String>>) {
    std::thread::spawn(move || {
        for line in BufReader::new(from).lines().map_while(Result::ok) {
            let text = line.trim_start_matches("stillpoint-agent: ");
            println!("  {side} │ {text}");
            if let Some(to) = &to {
                // Who waits no longer has heard enough.
                let _ = to.send(line);
            }
        }
    });
}
