//! `rig`: an emulated host by hand: a command on it, or a shell.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Parser, Subcommand};
use stillpoint_images::packages::Kernel;
use stillpoint_tests::rig::Rig;

/// An emulated host with KVM inside, to try things on.
#[derive(Debug, Parser)]
struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Subcommand)]
enum What {
    /// Run one command there, and bring out what it leaves in /results.
    Run {
        #[command(flatten)]
        host: Host,
        /// Names the folder of this run below target/rig.
        #[arg(long, default_value = "by-hand")]
        name: String,
        /// How long all of it may take, in seconds.
        #[arg(long, value_name = "SECONDS", default_value_t = 300)]
        time_limit: u64,
        /// The command and its arguments.
        #[arg(last = true, required = true)]
        command: Vec<String>,
    },
    /// A shell there.
    Shell {
        #[command(flatten)]
        host: Host,
    },
}

#[derive(Debug, clap::Args)]
struct Host {
    /// The host's kernel: bookworm (6.1) or backports (the newest in trixie-backports).
    #[arg(long, default_value = "bookworm")]
    kernel: Kernel,
    #[arg(long, default_value_t = 2)]
    cpus: u8,
    /// The host's memory, in MiB.
    #[arg(long, value_name = "MIB", default_value_t = 3072)]
    memory: u32,
    /// A disk of so many MiB, mounted at /scratch.
    #[arg(long, value_name = "MIB", default_value_t = 0)]
    scratch: u32,
    /// So many MiB of memory that no kernel counts as its own, as /dev/dax0.0.
    #[arg(long, value_name = "MIB", default_value_t = 0)]
    carve_out: u32,
    /// A kernel to jump into, which lies in /jump/KERNEL there; it runs the words of --then.
    #[arg(long, value_name = "KERNEL", requires = "then")]
    jump: Vec<Kernel>,
    /// What is run after a jump, as one shell command.
    #[arg(long, value_name = "COMMAND")]
    then: Option<String>,
    /// A file or folder to bring there.
    #[arg(long = "file", value_name = "PATH:PATH-THERE")]
    files: Vec<String>,
    /// Guest images of this kernel, under /images there.
    #[arg(long = "images", value_name = "KERNEL")]
    images: Vec<Kernel>,
    /// An archive for guests' initramfs, of those that `make images` made.
    #[arg(long = "archive", value_name = "NAME")]
    archives: Vec<String>,
    /// QEMU too, as qemu-microvm.
    #[arg(long)]
    qemu: bool,
    /// With a network, and servers outside the host: where they are is in /rig/order.json there.
    #[arg(long)]
    peer: bool,
    /// None of our programs.
    #[arg(long)]
    bare: bool,
    /// Of our programs only those that a scenario needs: less to load for a kernel that is jumped into.
    #[arg(long, conflicts_with = "bare")]
    scenario: bool,
}

impl Host {
    fn rig(&self, name: &str) -> anyhow::Result<Rig> {
        let mut rig = Rig::new(name, self.kernel)
            .cpus(self.cpus)
            .memory_mib(self.memory)
            .scratch_mib(self.scratch);
        rig = match (self.bare, self.scenario) {
            (true, _) => rig,
            (false, true) => rig.scenario()?,
            (false, false) => rig.programs()?,
        };
        for file in &self.files {
            let (from, to) = file.rsplit_once(':').unwrap_or((file, file));
            rig = rig.file(PathBuf::from(from), to);
        }
        if self.carve_out > 0 {
            rig = rig.carve_out_mib(self.carve_out);
        }
        for &kernel in &self.jump {
            let then = self.then.as_deref().unwrap_or("true");
            rig = rig.jump(kernel.name(), kernel, &["sh", "-c", then]);
        }
        // Behind the jumps: no kernel that is jumped into boots a guest from its initramfs.
        for &kernel in &self.images {
            rig = rig.images(kernel, &["bzImage", "vmlinux", "initramfs", "release"]);
        }
        for name in &self.archives {
            rig = rig.archive(name);
        }
        if self.peer {
            rig = rig.with_peer();
        }
        Ok(if self.qemu { rig.with_qemu() } else { rig })
    }
}

fn main() -> ExitCode {
    let done = match Args::parse().what {
        What::Run {
            host,
            name,
            time_limit,
            command,
        } => run(&host, &name, Duration::from_secs(time_limit), &command),
        What::Shell { host } => shell(&host),
    };
    done.unwrap_or_else(|error| {
        eprintln!("rig: {error:#}");
        ExitCode::FAILURE
    })
}

fn run(host: &Host, name: &str, limit: Duration, command: &[String]) -> anyhow::Result<ExitCode> {
    let rig = host
        .rig(name)?
        .command(command)
        .time_limit(limit)
        .live(true);
    let outcome = rig.run()?;
    println!(
        "rig: status {}; results in {}, console in {}",
        outcome.status,
        outcome.results.display(),
        outcome.log.display()
    );
    Ok(ExitCode::from(u8::try_from(outcome.status).unwrap_or(255)))
}

fn shell(host: &Host) -> anyhow::Result<ExitCode> {
    host.rig("shell")?.shell()?;
    Ok(ExitCode::SUCCESS)
}
