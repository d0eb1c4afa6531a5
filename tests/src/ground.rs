//! What this machine can do.

use std::fs::OpenOptions;
use std::io::Write;
use std::process::{Command, Stdio};

use anyhow::Context;

use crate::releases::Release;

/// Why there is no KVM to test on; `None` if there is.
pub fn no_kvm() -> Option<String> {
    let open = OpenOptions::new().read(true).write(true).open("/dev/kvm");
    open.err().map(|error| format!("/dev/kvm: {error}"))
}

/// Why a guest with an operating system can't be run here in useful time; `None` if it can. The
/// emulated host of the rig says by `STILLPOINT_LINUX` that it can.
pub fn no_fast_kvm() -> Option<String> {
    if let Some(reason) = no_kvm() {
        return Some(reason);
    }
    if is_emulated_host() {
        return None;
    }
    match kernel_speed() {
        Ok((true, _)) => None,
        Ok((false, found)) => Some(format!("this KVM emulates guest kernels: {found}")),
        Err(error) => Some(format!("{error:#}")),
    }
}

/// Whether this KVM leaves a guest's TSC where the host's is, whatever it is told.
pub fn ignores_tsc_offsets() -> anyhow::Result<bool> {
    Ok(doctor("TSC offset")?["status"] != "ok")
}

/// A finding of `stillpoint-vmm doctor`.
fn doctor(check: &str) -> anyhow::Result<serde_json::Value> {
    let output = Command::new(Release::Current.binary()?)
        .args(["doctor", "--json"])
        .output()?;
    let findings: Vec<serde_json::Value> = serde_json::from_slice(&output.stdout)?;
    let mut findings = findings.into_iter();
    findings
        .find(|finding| finding["check"] == check)
        .with_context(|| format!("`stillpoint-vmm doctor` does not tell of the {check}"))
}

/// How fast this KVM runs a guest's kernel, as `stillpoint-vmm doctor` finds: whether it is as
/// hardware does, and in words.
pub fn kernel_speed() -> anyhow::Result<(bool, String)> {
    let speed = doctor("guest kernel speed")?;
    let found = speed["found"].as_str().unwrap_or_default().to_owned();
    Ok((speed["status"] == "ok", found))
}

/// Why nothing can be run as another user; `None` if it can.
pub fn no_other_user() -> Option<String> {
    (!rustix::process::geteuid().is_root()).then(|| "only root can become another user".into())
}

/// Why the host can't be set up otherwise for a test; `None` if it can.
pub fn not_root() -> Option<String> {
    (!rustix::process::geteuid().is_root())
        .then(|| "only root can change the host's settings".into())
}

/// The word in brackets of a setting that shows its choices.
pub fn chosen(setting: &str) -> Option<&str> {
    let (_, rest) = setting.split_once('[')?;
    Some(rest.split_once(']')?.0)
}

/// A setting of this host's that is another until this is dropped.
#[derive(Debug)]
pub struct Setting {
    path: &'static str,
    before: String,
}

impl Setting {
    /// A number, by so much more.
    pub fn raise(path: &'static str, by: u64) -> anyhow::Result<Self> {
        let before = std::fs::read_to_string(path)
            .context(path)?
            .trim()
            .to_owned();
        let number: u64 = before.parse().context(path)?;
        Self::put(path, before, &(number + by).to_string())
    }

    /// One of several words, of which the file shows the chosen one in brackets.
    pub fn choose(path: &'static str, word: &str) -> anyhow::Result<Self> {
        let words = std::fs::read_to_string(path).context(path)?;
        let before = chosen(&words)
            .context("none of its words is chosen")?
            .to_owned();
        Self::put(path, before, word)
    }

    fn put(path: &'static str, before: String, now: &str) -> anyhow::Result<Self> {
        std::fs::write(path, now).context(path)?;
        Ok(Self { path, before })
    }
}

impl Drop for Setting {
    fn drop(&mut self) {
        if let Err(error) = std::fs::write(self.path, &self.before) {
            eprintln!("{} stays as it is: {error}", self.path);
        }
    }
}

/// Why there can be no mount namespace of our own; `None` if there can.
pub fn no_mount_namespace() -> Option<String> {
    let mount = ["-m", "mount", "-t", "tmpfs", "none", "/mnt"];
    let tried = Command::new("unshare")
        .args(mount)
        .stderr(Stdio::null())
        .status();
    match tried {
        Ok(status) if status.success() => None,
        Ok(status) => Some(format!("`unshare -m mount`: {status}")),
        Err(error) => Some(format!("unshare: {error}")),
    }
}

/// Says that the running test is skipped, and why: on standard error and, as a line of its own,
/// in the file that `STILLPOINT_SKIPPED` names.
pub fn skip(reason: &str) {
    let test = std::thread::current().name().unwrap_or("?").to_owned();
    let line = format!("SKIPPED {test}: {reason}\n");
    eprint!("{line}");
    if let Some(path) = std::env::var_os("STILLPOINT_SKIPPED") {
        let file = OpenOptions::new().append(true).create(true).open(path);
        // One write of one short line: tests in other processes append too.
        let _ = file.and_then(|mut file| file.write_all(line.as_bytes()));
    }
}

/// Skips the test by name, with the reason, when one of the things named (functions that give
/// the reason why it is missing) is missing on this machine.
#[macro_export]
macro_rules! needs {
    ($($missing:path),+ $(,)?) => {
        $(
            if let Some(reason) = $missing() {
                $crate::ground::skip(&reason);
                return Ok(());
            }
        )+
    };
}

/// Skips the test by name when this machine has no KVM.
#[macro_export]
macro_rules! needs_kvm {
    () => {
        $crate::needs!($crate::ground::no_kvm)
    };
}

/// CPU cores this process may use.
pub fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// Whether this is an emulated host of the rig, which says so to what it runs.
pub fn is_emulated_host() -> bool {
    std::env::var_os("STILLPOINT_LINUX").is_some()
}
