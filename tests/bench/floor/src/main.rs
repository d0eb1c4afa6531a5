//! The floor: how short a swap of the process under a guest can be on this machine.
//!
//! Boots pulse by bare KVM calls, then passes it from process to process in the plain way: stop
//! every vCPU, read all state, one message, write all state, run. No saved format, no guard, no
//! clock work. What our VMM adds to that is ours to answer for.
//!
//! This process only conducts. It owns guest memory and reads pulse's log of gaps; *workers*
//! (this program again, by `worker`) run the guest one after the other.

mod boot;
mod conductor;
mod devices;
mod machine;
mod memory;
mod probe;
mod state;
mod vcpu;
mod wire;
mod worker;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand, ValueEnum};

#[derive(Debug, Parser)]
#[command(about = "Measures the shortest swap this machine allows")]
struct Cli {
    #[command(subcommand)]
    worker: Option<Role>,
    #[command(flatten)]
    bench: Bench,
}

#[derive(Debug, Subcommand)]
enum Role {
    /// Runs the guest for a conductor; not for use by hand.
    #[command(hide = true)]
    Worker(worker::Job),
}

/// What to measure.
#[derive(Args, Debug)]
struct Bench {
    /// The pulse image.
    #[arg(long, default_value = "pulse")]
    kernel: PathBuf,
    /// vCPUs of the guest.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=16))]
    vcpus: u8,
    /// Guest memory.
    #[arg(long, default_value_t = 256, value_parser = clap::value_parser!(u64).range(32..=15360))]
    ram_mib: u64,
    /// Swaps to do.
    #[arg(long, default_value_t = 20)]
    swaps: usize,
    /// Memory that the guest writes again and again.
    #[arg(long, default_value_t = 4)]
    touch_mib: u64,
    /// Where the JSON goes; standard output without it.
    #[arg(long)]
    out: Option<PathBuf>,
    /// Entry to boot by.
    #[arg(long, value_enum, default_value_t = Entry::Pvh)]
    entry: Entry,
    /// More words for the guest's command line.
    #[arg(long, default_value = "")]
    append: String,
    /// A command for pulse's serial console after the swaps; may be given again.
    #[arg(long)]
    command: Vec<String>,
    /// Shows the guest's serial output on standard error.
    #[arg(long)]
    serial: bool,
}

/// How the guest is entered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Entry {
    /// 32-bit, by the PVH note.
    Pvh,
    /// 64-bit, by the Linux boot protocol.
    Linux,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let done = match cli.worker {
        Some(Role::Worker(job)) => worker::run(&job),
        None => conductor::run(&cli.bench),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("floor: {error:#}");
            ExitCode::FAILURE
        }
    }
}
