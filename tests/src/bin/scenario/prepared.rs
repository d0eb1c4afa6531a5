//! A host that boots by what `stillpoint host prepare` wrote: without it no memory outlives the kernel, with it
//! a guest lies in memory that the next kernel leaves alone. Only for an emulated host: it boots anew, by kexec,
//! on the command line that GRUB would make of the written file, and its init makes the device that
//! `stillpoint-carve-out.service` makes.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, bail, ensure};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use stillpoint_tests::daemon::{Daemon, programs};
use stillpoint_tests::ground;
use stillpoint_tests::rig::crash;

use crate::stages;

const STATE: &str = "/scratch/prepared.json";
/// The root file system, as far as it outlives a boot.
const ROOT: &str = "/scratch/root";
const SIZE_MIB: u64 = 256;

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The kernel to boot, by its name below /jump.
    #[arg(long, value_name = "NAME", default_value = "bookworm")]
    into: String,
}

/// What the host was before.
#[derive(Debug, Serialize, Deserialize)]
struct State {
    words: String,
    memory_kib: u64,
}

pub(crate) fn tell(args: &Args) -> anyhow::Result<Value> {
    if let Some(reason) = ground::no_kvm() {
        bail!("{reason}");
    }
    match stages::kept::<State>(STATE)? {
        None => write(&args.into),
        Some(state) => booted(&state),
    }
}

/// `host prepare`, with what it says, and whether it is content.
fn prepare(more: &[&str]) -> anyhow::Result<(Value, bool)> {
    let mut command = Command::new(programs().join("stillpoint"));
    command.args(["--json", "host", "prepare", "--root", ROOT]);
    let output = command.args(more).output()?;
    let told = serde_json::from_slice(&output.stdout);
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    Ok((told.with_context(|| error)?, output.status.success()))
}

fn status<'a>(told: &'a Value, name: &str) -> &'a str {
    let checks = told["checks"].as_array().into_iter().flatten();
    let mut found = checks.filter(|check| check["check"] == name);
    found
        .next()
        .and_then(|check| check["status"].as_str())
        .unwrap_or("absent")
}

fn memory_kib() -> anyhow::Result<u64> {
    let text = std::fs::read_to_string("/proc/meminfo")?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemTotal:"));
    let number = line.and_then(|line| line.split_whitespace().next()?.parse().ok());
    number.context("/proc/meminfo tells no MemTotal")
}

fn in_root(path: &str) -> PathBuf {
    Path::new(ROOT).join(path)
}

/// What GRUB's scripts make of the files in this folder: they are shell, and so read.
fn grub_words() -> anyhow::Result<String> {
    let script = "GRUB_CMDLINE_LINUX=; for file in \"$1\"/*.cfg; do . \"$file\"; done; echo $GRUB_CMDLINE_LINUX";
    let mut command = Command::new("sh");
    command
        .args(["-euc", script, "sh"])
        .arg(in_root("etc/default/grub.d"));
    let output = command.output()?;
    ensure!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(String::from_utf8(output.stdout)?.trim().to_owned())
}

fn write(into: &str) -> anyhow::Result<Value> {
    stages::lay_out()?;
    std::fs::create_dir_all(ROOT)?;
    let (told, content) = prepare(&[])?;
    ensure!(
        !content && status(&told, "memory left alone") == "fail",
        "{told:#}"
    );
    let size = format!("{SIZE_MIB}M");
    prepare(&["--carve-out", &size])?;
    ensure!(!in_root("etc").exists(), "it wrote without being told to");
    let (told, content) = prepare(&["--carve-out", &size, "--write"])?;
    ensure!(content && told["written"] == true, "{told:#}");
    let words = grub_words()?;
    ensure!(
        words.starts_with(&format!("memmap={SIZE_MIB}M!")),
        "{words}"
    );
    println!("scenario: prepared, and booted anew with {words}");
    let line = std::fs::read_to_string("/proc/cmdline")?;
    let [image, initrd] = stages::kernel(into)?;
    let state = State {
        words: words.clone(),
        memory_kib: memory_kib()?,
    };
    stages::keep(STATE, &state)?;
    crash::into(&image, &initrd, &format!("{} {words}", line.trim()))?;
    bail!("the host is still here")
}

fn booted(state: &State) -> anyhow::Result<Value> {
    let line = std::fs::read_to_string("/proc/cmdline")?;
    ensure!(
        line.split_whitespace().any(|word| word == state.words),
        "{line}"
    );
    // Less by the carve-out, but for what kernels need for themselves, which is told anew at each boot.
    let gone = state.memory_kib.saturating_sub(memory_kib()?) >> 10;
    ensure!(
        gone > SIZE_MIB / 2,
        "the kernel has it: {gone} MiB are gone"
    );
    let (told, content) = prepare(&[])?;
    for name in ["memory left alone", "modules", "device", "service"] {
        ensure!(status(&told, name) == "ok", "{name}: {told:#}");
    }
    ensure!(content, "{told:#}");
    let modules = std::fs::read_to_string(in_root("etc/modules-load.d/stillpoint.conf"))?;
    for module in modules.lines() {
        ensure!(
            Path::new("/sys/module").join(module).is_dir(),
            "{module} is not loaded"
        );
    }
    let unit = in_root("etc/systemd/system/stillpointd.service.d/carve-out.conf");
    let unit = std::fs::read_to_string(unit)?;
    let device = unit
        .lines()
        .find_map(|line| line.strip_prefix("Environment=STILLPOINT_CARVE_OUT="));
    let device = device.with_context(|| unit.clone())?;
    std::fs::create_dir_all(stages::HOST)?;
    let daemon = Daemon::start_with(Path::new(stages::HOST), &["--carve-out", device])?;
    stages::add_release(&daemon)?;
    stages::run_pulse(&daemon, "pulse-1", &[])?;
    let shown = daemon.must(&["show", "pulse-1"])?;
    let rungs = shown["rungs"].as_array().into_iter().flatten();
    let mut kernel = rungs.filter(|rung| rung["check"] == "kernel");
    ensure!(
        kernel.next().is_some_and(|rung| rung["status"] == "ok"),
        "{shown:#}"
    );
    // What could be swapped now is: all that a jump needs is there.
    let check = stages::swap_kernel(
        &daemon,
        "bookworm",
        &["--no-notice", "a scenario", "--check"],
    )?;
    ensure!(check.success, "{}{:#}", check.error, check.json);
    println!("scenario: a guest runs in what was prepared, and could be taken along");
    Ok(
        json!({"words": state.words, "memory_gone_mib": gone, "prepared": told, "check": check.json}),
    )
}
