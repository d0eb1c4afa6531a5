//! stillpoint-vmm: see the library for what it does. This file is its command line.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use clap::{Args, Parser, Subcommand};
use rustix::process::{Resource, getrlimit, setrlimit};
use stillpoint_control::clock::ClockSpec;
use stillpoint_control::message::Ready;
use stillpoint_control::secret::{self, Secret};
use stillpoint_control::spec::{CarveOutSpec, KernelSpec, MachineSpec, MemorySpec, parse_size};
use stillpoint_vmm::handover::{Channel, rehearsal};
use stillpoint_vmm::process::{End, Process, Source, Start};
use stillpoint_vmm::{doctor, release};
use tracing::Level;
use tracing_subscriber::filter::Targets;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

/// Runs one guest, and hands it over to a successor when asked to.
#[derive(Parser)]
#[command(name = "stillpoint-vmm", version = release::VERSION)]
struct Cli {
    #[command(subcommand)]
    command: Command,
    /// Fail at a point of the handover: POINT=crash|hang|fail|panic|stop|slow:MS|until:MS.
    #[cfg(feature = "fault-injection")]
    #[arg(long, global = true, value_name = "POINT=ACTION")]
    fault: Option<String>,
    /// Write what older releases can't read: section, field, or hidden-field.
    #[cfg(feature = "later")]
    #[arg(long, global = true, value_name = "HOW")]
    odd: Option<String>,
}

#[derive(Subcommand)]
enum Command {
    /// Boot a guest.
    Run(Run),
    /// Take a guest over from its predecessor (started by the daemon).
    Adopt(Adopt),
    /// Revive a guest from its record in what outlived the kernel (started by the daemon).
    Revive(Revive),
    /// Rehearse taking a guest over: nothing comes of it but the answer (started by the daemon).
    Rehearse(Rehearse),
    /// Say what this release is.
    Describe {
        /// As JSON.
        #[arg(long)]
        json: bool,
    },
    /// Look at this host's KVM.
    Doctor {
        /// As JSON.
        #[arg(long)]
        json: bool,
    },
}

#[derive(Args)]
struct Told {
    /// Where to say, once, that it runs or why not (one line of JSON).
    #[arg(long, value_name = "FD")]
    ready_fd: Option<RawFd>,
    /// Version of the release that this binary belongs to.
    #[arg(long, value_name = "VERSION")]
    release_version: Option<String>,
    /// Digest of this binary, as it was verified before it was started.
    #[arg(long, value_name = "HEX")]
    release_sha256: Option<String>,
}

#[derive(Args)]
struct Run {
    /// Machine spec as JSON; - for standard input. Instead of the flags below.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["name", "kernel"])]
    spec: Option<PathBuf>,
    /// Directory of the guest's sockets and log; made with mode 0700.
    #[arg(long, value_name = "DIR")]
    dir: PathBuf,
    /// Where to read the 32 bytes of the VM's secret.
    #[arg(long, value_name = "FD")]
    secret_fd: Option<RawFd>,
    /// Name of the machine.
    #[arg(long, default_value = "guest")]
    name: String,
    /// Number of vCPUs.
    #[arg(long, default_value_t = 1)]
    cpus: u8,
    /// Guest RAM, such as 256M or 2G.
    #[arg(long, default_value = "256M", value_parser = parse_size)]
    memory: u64,
    /// Kernel: ELF (PVH or 64-bit entry) or bzImage.
    #[arg(long, value_name = "FILE", required_unless_present = "spec")]
    kernel: Option<PathBuf>,
    /// Initial RAM disk.
    #[arg(long, value_name = "FILE")]
    initrd: Option<PathBuf>,
    /// Kernel command line.
    #[arg(long, default_value = "")]
    cmdline: String,
    #[command(flatten)]
    told: Told,
}

#[derive(Args)]
struct Adopt {
    /// Our end of the handover socketpair.
    #[arg(long, value_name = "FD")]
    handover_fd: RawFd,
    #[command(flatten)]
    told: Told,
}

#[derive(Args)]
struct Rehearse {
    #[command(flatten)]
    adopt: Adopt,
    /// The nonce by which the guest's record is looked at, where a jump of the host is rehearsed.
    #[arg(long)]
    nonce: Option<String>,
}

#[derive(Args)]
struct Revive {
    /// The guest's place, as JSON: path, ram, record and record_len.
    #[arg(long, value_name = "JSON", value_parser = parse_place)]
    place: CarveOutSpec,
    /// The memfd that it lies in, if that is its own.
    #[arg(long, value_name = "FD")]
    memory_fd: Option<RawFd>,
    /// The nonce of the jump, as it is on this kernel's command line.
    #[arg(long)]
    nonce: String,
    /// Directory of the guest's sockets and log; made with mode 0700.
    #[arg(long, value_name = "DIR")]
    dir: PathBuf,
    /// Where to read the 32 bytes of the VM's secret.
    #[arg(long, value_name = "FD")]
    secret_fd: Option<RawFd>,
    #[command(flatten)]
    told: Told,
}

fn parse_place(text: &str) -> Result<CarveOutSpec, String> {
    serde_json::from_str(text).map_err(|error| error.to_string())
}

/// What is logged is as `STILLPOINT_LOG` says: a level, or `TARGET=LEVEL` with commas between. That much needs no
/// regular expressions, which would be a tenth of the program.
fn log_to_stderr() {
    let asked = std::env::var("STILLPOINT_LOG").ok();
    let targets = asked.and_then(|asked| asked.parse::<Targets>().ok());
    let lines = tracing_subscriber::fmt::layer()
        // A log that can't be written (a full disk) is no reason to panic beside a guest.
        .log_internal_errors(false)
        .with_writer(std::io::stderr);
    tracing_subscriber::registry()
        .with(lines)
        .with(targets.unwrap_or_else(|| Targets::new().with_default(Level::INFO)))
        .init();
}

fn main() -> ExitCode {
    // Executed by descriptor, the process would else be known by that descriptor's number.
    let _ = rustix::thread::set_name(c"stillpoint-vmm");
    let cli = Cli::parse();
    log_to_stderr();
    #[cfg(feature = "fault-injection")]
    if let Some(Err(error)) = cli.fault.as_deref().map(stillpoint_vmm::faults::arm) {
        eprintln!("stillpoint-vmm: {error}");
        return ExitCode::from(2);
    }
    #[cfg(feature = "later")]
    if let Some(Err(error)) = cli.odd.as_deref().map(stillpoint_state::later::be_odd) {
        eprintln!("stillpoint-vmm: {error}");
        return ExitCode::from(2);
    }
    allow_descriptors();
    let result = match cli.command {
        Command::Run(run) => boot(run),
        Command::Adopt(adopt) => take_over(adopt),
        Command::Revive(args) => revive(args),
        Command::Rehearse(args) => rehearse(args),
        Command::Describe { json } => describe(json),
        Command::Doctor { json } => examine(json),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("stillpoint-vmm: {}", explain(&error));
            ExitCode::FAILURE
        }
    }
}

/// Allows this process as many descriptors as it may have. A guest's connections need one each,
/// and for a moment of a handover two more.
fn allow_descriptors() {
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    if let Err(error) = setrlimit(Resource::Nofile, limit) {
        tracing::warn!(%error, "cannot raise the limit of file descriptors");
    }
}

/// A descriptor that was handed to us by number.
#[allow(unsafe_code)]
fn inherited(fd: RawFd) -> anyhow::Result<OwnedFd> {
    anyhow::ensure!(
        fd > 2,
        "file descriptor {fd} is not one of those handed over"
    );
    // SAFETY: checked to be open right below, and nothing in this process owns it yet.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    if let Err(error) = rustix::io::fcntl_setfd(&fd, rustix::io::FdFlags::CLOEXEC) {
        // Not ours to close: it isn't open.
        std::mem::forget(fd);
        return Err(error).context("a file descriptor on the command line");
    }
    Ok(fd)
}

/// Tells whoever started us, once.
fn tell(ready: Option<OwnedFd>, word: &Ready) {
    if let (Some(fd), Ok(line)) = (ready, serde_json::to_string(word)) {
        let _ = writeln!(File::from(fd), "{line}");
    }
}

/// Tells of a failure, and passes it on.
fn told<T>(ready: &mut Option<OwnedFd>, result: anyhow::Result<T>) -> anyhow::Result<T> {
    result.inspect_err(|error| {
        tell(
            ready.take(),
            &Ready::No {
                error: explain(error),
            },
        )
    })
}

/// An error and its causes, each said once: many of ours tell their cause themselves.
fn explain(error: &anyhow::Error) -> String {
    error.chain().fold(String::new(), |text, cause| {
        let cause = cause.to_string();
        match text.as_str() {
            "" => cause,
            said if said.contains(&cause) => text,
            said => format!("{said}: {cause}"),
        }
    })
}

fn boot(run: Run) -> anyhow::Result<()> {
    let mut ready = run.told.ready_fd.map(inherited).transpose()?;
    let start = start(&run);
    let started = start.and_then(|(spec, start)| Process::boot(&spec, &run.dir, start));
    let process = told(&mut ready, started)?;
    tell(ready, &Ready::Yes);
    process.run().map(drop)
}

fn revive(args: Revive) -> anyhow::Result<()> {
    let mut ready = args.told.ready_fd.map(inherited).transpose()?;
    let secret = args.secret_fd.map(|fd| inherited(fd).and_then(read_secret));
    let revived = secret.transpose().and_then(|secret| {
        let release = release::name(args.told.release_version, args.told.release_sha256);
        let source = Source {
            at: &args.place,
            memory: args.memory_fd.map(inherited).transpose()?,
            nonce: &args.nonce,
        };
        Process::revive(source, &args.dir, Start { release, secret })
    });
    let process = told(&mut ready, revived)?;
    tell(ready, &Ready::Yes);
    process.run().map(drop)
}

fn start(run: &Run) -> anyhow::Result<(MachineSpec, Start)> {
    let spec = match &run.spec {
        Some(path) => MachineSpec::from_json(&read_spec(path)?)?,
        None => from_flags(run)?,
    };
    let secret = run
        .secret_fd
        .map(|fd| inherited(fd).and_then(read_secret))
        .transpose()?;
    let release = release::name(
        run.told.release_version.clone(),
        run.told.release_sha256.clone(),
    );
    Ok((spec, Start { release, secret }))
}

fn read_spec(path: &PathBuf) -> anyhow::Result<String> {
    if path.as_os_str() == "-" {
        return std::io::read_to_string(std::io::stdin()).context("machine spec: standard input");
    }
    std::fs::read_to_string(path).with_context(|| format!("machine spec: {}", path.display()))
}

fn from_flags(run: &Run) -> anyhow::Result<MachineSpec> {
    let spec = MachineSpec {
        name: run.name.clone(),
        cpus: run.cpus,
        memory: MemorySpec {
            size: run.memory,
            ..MemorySpec::default()
        },
        kernel: KernelSpec {
            path: run.kernel.clone().unwrap_or_default(),
            initrd: run.initrd.clone(),
            cmdline: run.cmdline.clone(),
        },
        disks: Vec::new(),
        nets: Vec::new(),
        vsock: None,
        rng: false,
        clock: ClockSpec::default(),
        blackout_budget: stillpoint_control::spec::DEFAULT_BUDGET,
    };
    spec.validate()?;
    Ok(spec)
}

fn read_secret(fd: OwnedFd) -> anyhow::Result<Secret> {
    let mut bytes = [0; secret::LEN];
    File::from(fd)
        .read_exact(&mut bytes)
        .context("the VM's secret")?;
    Secret::from_bytes(&bytes).context("the VM's secret")
}

fn take_over(adopt: Adopt) -> anyhow::Result<()> {
    let mut ready = adopt.told.ready_fd.map(inherited).transpose()?;
    let socket = told(&mut ready, inherited(adopt.handover_fd))?;
    tell(ready, &Ready::Yes);
    let release = release::name(adopt.told.release_version, adopt.told.release_sha256);
    match Process::adopt(socket, release)?.run()? {
        End::PoweredOff | End::Moved => Ok(()),
    }
}

fn rehearse(args: Rehearse) -> anyhow::Result<()> {
    let Rehearse { adopt, nonce } = args;
    let mut ready = adopt.told.ready_fd.map(inherited).transpose()?;
    let socket = told(&mut ready, inherited(adopt.handover_fd))?;
    tell(ready, &Ready::Yes);
    Ok(rehearsal::perform(
        &mut Channel::new(socket),
        nonce.as_deref(),
    )?)
}

fn describe(json: bool) -> anyhow::Result<()> {
    let text = if json {
        serde_json::to_string(&serde_json::json!({
            "component": "vmm",
            "version": release::VERSION,
            "reads": release::FORMATS,
            "writes": release::FORMATS,
        }))?
    } else {
        let formats = release::FORMATS;
        format!(
            "vmm {}: reads and writes state formats {formats:?}",
            release::VERSION
        )
    };
    Ok(writeln!(std::io::stdout(), "{text}")?)
}

fn examine(json: bool) -> anyhow::Result<()> {
    let findings = doctor::examine();
    let mut out = std::io::stdout();
    if json {
        writeln!(out, "{}", serde_json::to_string(&findings)?)?;
    } else {
        for finding in &findings {
            writeln!(
                out,
                "{:?}\t{}\t{}",
                finding.status, finding.check, finding.found
            )?;
        }
    }
    let failed = findings.iter().any(|f| f.status == doctor::Status::Fail);
    anyhow::ensure!(
        !failed,
        "this host can't run guests yet; see the failed checks"
    );
    Ok(())
}
