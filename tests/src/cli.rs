//! The VMM's own command line, for what it refuses.

use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, ensure};

use crate::patience::{PATIENCE, wait_for};
use crate::releases::Release;

/// How a VMM ended that should not have run.
#[derive(Debug)]
pub struct Refusal {
    /// What it wrote to standard error.
    pub text: String,
    /// Its exit status.
    pub code: Option<i32>,
}

/// The current release's command line.
pub fn vmm() -> anyhow::Result<Command> {
    Ok(Command::new(Release::Current.binary()?))
}

/// Runs it with `input`; it must end by itself, and badly.
pub fn must_refuse(mut command: Command, input: &str) -> anyhow::Result<Refusal> {
    let errors = tempfile::tempfile()?;
    command
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(errors.try_clone()?);
    let mut child = command
        .spawn()
        .with_context(|| format!("starting {command:?}"))?;
    if let Some(mut stdin) = child.stdin.take() {
        // One that refuses before it reads has closed its end.
        let _ = stdin.write_all(input.as_bytes());
    }
    let ended = wait_for("the refusal", PATIENCE, || Ok(child.try_wait()?));
    let _ = child.kill();
    let _ = child.wait();
    let status = ended?;
    let mut text = String::new();
    std::io::Seek::rewind(&mut &errors)?;
    std::io::Read::read_to_string(&mut &errors, &mut text)?;
    ensure!(!status.success(), "it ended well, saying {text:?}");
    ensure!(!text.contains("panicked"), "{text}");
    let code = status.code();
    Ok(Refusal { text, code })
}

impl Refusal {
    /// It failed as programs fail, in one line of text that has all of `words`.
    pub fn says(&self, words: &[&str]) -> anyhow::Result<()> {
        ensure!(self.code == Some(1), "it ended with {:?}", self.code);
        let said = self
            .text
            .lines()
            .find_map(|line| line.strip_prefix("stillpoint-vmm: "))
            .with_context(|| format!("no error of its own in {:?}", self.text))?;
        for word in words {
            ensure!(said.contains(word), "{said:?} does not say {word:?}");
        }
        Ok(())
    }
}

/// Runs `stillpoint-vmm run` in `dir` with these further arguments; it must be refused.
pub fn boot_must_fail(dir: &Path, arguments: &[&str]) -> anyhow::Result<Refusal> {
    let mut command = vmm()?;
    command.arg("run").arg("--dir").arg(dir).args(arguments);
    must_refuse(command, "")
}
