//! Speaks a VMM's part on the command line, the ready fd, the control socket and the handover
//! socketpair, and has no guest: with it the orchestrator is tested where there is no /dev/kvm.
//!
//! What it says of itself lies at the end of its own file, after `TOY:` (see `tests/daemon`), so
//! that two toys are really different releases. `--toy=FAULT` makes it misbehave.
#![allow(unsafe_code)] // Inherited fds are numbers; this is where they become owners.

mod handover;
mod serve;
mod standstill;

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{FromRawFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use anyhow::{Context, bail};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use stillpoint_control::message::Ready;
use stillpoint_control::ownership::{Epoch, Owner, Ownership};
use stillpoint_control::report::{ReleaseName, SwapReport};
use stillpoint_control::secret::Secret;
use stillpoint_control::spec::MachineSpec;

/// The toy's arguments, as `--key=value`.
#[derive(Clone, Debug)]
struct Flags(Vec<String>);

impl Flags {
    fn get(&self, key: &str) -> Option<&str> {
        let prefix = format!("--{key}=");
        self.0.iter().find_map(|arg| arg.strip_prefix(&prefix))
    }

    fn fd(&self, key: &str) -> anyhow::Result<Option<OwnedFd>> {
        let Some(number) = self.get(key) else {
            return Ok(None);
        };
        let number = number.parse().with_context(|| format!("--{key}"))?;
        // SAFETY: the parent passed this number as ours; each flag is read once.
        Ok(Some(unsafe { OwnedFd::from_raw_fd(number) }))
    }

    fn has_fault(&self, fault: &str) -> bool {
        self.0
            .iter()
            .any(|arg| arg.strip_prefix("--toy=") == Some(fault))
    }
}

/// What a toy runs.
struct Toy {
    flags: Flags,
    spec: MachineSpec,
    dir: PathBuf,
    secret: Secret,
    memory: OwnedFd,
    ownership: Ownership,
    control: OwnedFd,
    console: OwnedFd,
    release: ReleaseName,
    now: Mutex<Now>,
}

/// What changes.
struct Now {
    owner: Owner,
    swaps: u64,
    swapping: bool,
    /// The swap that it stands still for, and since when.
    standing: Option<(String, Instant)>,
    report: Option<SwapReport>,
}

/// A lock that a panic elsewhere does not spoil.
fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner)
}

fn main() -> anyhow::Result<()> {
    let mut args = std::env::args().skip(1);
    let verb = args.next().unwrap_or_default();
    let flags = Flags(args.collect());
    match verb.as_str() {
        "describe" => {
            println!("{}", marker()?);
            Ok(())
        }
        "doctor" => {
            println!(r#"[{{"check":"toy","status":"ok","found":"a toy","remedy":""}}]"#);
            Ok(())
        }
        "run" => run(flags),
        "adopt" => handover::adopt(flags),
        // With this a command ends that does not know its verb.
        "rehearse" => serve::leave(2),
        other => bail!("no verb {other:?}"),
    }
}

/// What lies at the end of the toy's own file.
fn marker() -> anyhow::Result<serde_json::Value> {
    let bytes = std::fs::read("/proc/self/exe")?;
    let tail = &bytes[bytes.len().saturating_sub(1024)..];
    let tail = String::from_utf8_lossy(tail);
    match tail.rsplit_once("TOY:") {
        Some((_, json)) => Ok(serde_json::from_str(json)?),
        None => Ok(serde_json::json!({
            "component": "vmm", "version": "0.0.1", "reads": [1], "writes": [1]
        })),
    }
}

fn say_ready(fd: Option<OwnedFd>, ready: &Ready) -> anyhow::Result<()> {
    if let Some(fd) = fd {
        writeln!(File::from(fd), "{}", serde_json::to_string(ready)?)?;
    }
    Ok(())
}

fn release(flags: &Flags) -> ReleaseName {
    ReleaseName {
        version: flags.get("release-version").unwrap_or_default().into(),
        sha256: flags.get("release-sha256").unwrap_or_default().into(),
    }
}

fn run(flags: Flags) -> anyhow::Result<()> {
    eprintln!("toy: run");
    let ready = flags.fd("ready-fd")?;
    if flags.has_fault("crash-at-start") {
        eprintln!("toy: crashing as told");
        std::process::abort();
    }
    let spec_path = flags.get("spec").context("--spec")?;
    let spec = MachineSpec::from_json(&std::fs::read_to_string(spec_path)?)?;
    if !spec.kernel.path.exists() {
        let error = format!("kernel {} is not there", spec.kernel.path.display());
        return say_ready(ready, &Ready::No { error });
    }
    let mut secret = Vec::new();
    let pipe = flags.fd("secret-fd")?.context("--secret-fd")?;
    File::from(pipe).take(32).read_to_end(&mut secret)?;
    let dir = PathBuf::from(flags.get("dir").context("--dir")?);
    let memory = rustix::fs::memfd_create("toy-ram", rustix::fs::MemfdFlags::CLOEXEC)?;
    rustix::fs::ftruncate(&memory, 1 << 20)?;
    std::fs::write(dir.join("console.log"), "hello from the toy\n")?;
    let toy = Toy {
        release: release(&flags),
        control: listen(&dir.join("control.sock"))?,
        console: UnixListener::bind(dir.join("console.sock"))?.into(),
        secret: Secret::from_bytes(&secret).context("32 bytes of secret")?,
        ownership: Ownership::create()?,
        memory,
        flags,
        spec,
        dir,
        now: Mutex::new(Now {
            owner: Owner::Held(Epoch(0)),
            swaps: 0,
            swapping: false,
            standing: None,
            report: None,
        }),
    };
    say_ready(ready, &Ready::Yes)?;
    serve::serve(Arc::new(toy))
}

fn listen(path: &std::path::Path) -> anyhow::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
    rustix::net::bind(&socket, &SocketAddrUnix::new(path)?)?;
    rustix::net::listen(&socket, 16)?;
    Ok(socket)
}
