//! `scenario`: what is to be seen on a host, as one program that is run there: in the rig on the
//! emulated host, or by hand on a real one. It writes what it measured to a file, prints what it
//! does, and fails with the reason.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Parser, Subcommand};

mod cells;
mod debian;
mod held;
mod kernel;
mod kernel_rollout;
mod kexecs;
mod live_update;
mod parameters;
mod prepared;
mod pulse;
mod stages;
mod tour;

/// One scenario, run on this host with the programs of `STILLPOINT_ROOT`.
#[derive(Debug, Parser)]
struct Args {
    #[command(subcommand)]
    what: What,
    /// Where the report goes.
    #[arg(long, global = true, default_value = "/results")]
    results: PathBuf,
}

#[derive(Debug, Subcommand)]
enum What {
    /// Boot pulse under a real daemon, swap its VMM there and back, and see that nothing was lost.
    Pulse,
    /// The host's kernel swapped under pulse, in the emulated host.
    Kernel(kernel::Args),
    /// The same brought by a rollout, in the emulated host.
    KernelRollout(kernel_rollout::Args),
    /// Every change of the host in turn, under guests at work, in the emulated host.
    Tour(tour::Args),
    /// What can go wrong on the way to another kernel, in the emulated host.
    Cells(cells::Args),
    /// Guests whose memory live update keeps, under ten kexecs of the emulated host.
    LiveUpdate(live_update::Args),
    /// A host that boots by what `stillpoint host prepare` wrote, in the emulated host.
    Prepared(prepared::Args),
    /// Pairs of kexecs, one empty and one under guests, in the emulated host.
    Kexecs(kexecs::Args),
    /// Empty kexecs with one parameter more on their command line, in the emulated host.
    Parameters(parameters::Args),
}

fn main() -> ExitCode {
    let args = Args::parse();
    let told = match args.what {
        What::Pulse => pulse::tell(),
        What::Kernel(args) => kernel::tell(&args),
        What::KernelRollout(args) => kernel_rollout::tell(&args),
        What::Tour(args) => tour::tell(&args),
        What::Cells(args) => cells::tell(&args),
        What::Kexecs(args) => kexecs::tell(&args),
        What::Parameters(args) => parameters::tell(&args),
        What::Prepared(args) => prepared::tell(&args),
        What::LiveUpdate(args) => live_update::tell(&args),
    };
    match told.and_then(|report| write(&args.results, &report)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("scenario: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn write(results: &Path, report: &serde_json::Value) -> anyhow::Result<()> {
    std::fs::create_dir_all(results)?;
    Ok(std::fs::write(
        results.join("report.json"),
        serde_json::to_vec_pretty(report)?,
    )?)
}
