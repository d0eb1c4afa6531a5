//! `make bench`: how long a guest stands still in a swap, beside the floor of this machine.
//!
//! Ours and the floor (the same KVM calls with nothing of ours around them, `stillpoint-floor`)
//! take turns on the same guest image with the same command line, so that what else the machine
//! does falls on both. The bench pins nothing and changes nothing
//! host-wide. A control beside
//! it looks at windows of the same length in which nobody swaps: that is the machine's noise.
//!
//! | module | what it holds |
//! |---|---|
//! | [`scene`] | what is measured: the machines |
//! | [`run`] | the order of it all |
//! | [`ours`], [`floor`], [`qemu`], [`control`] | a batch of swaps of ours, of the floor, of QEMU, and of none |
//! | [`brownout`] | what a guest loses after a swap |
//! | [`many`] | all guests of a host at once |
//! | [`light`] | what a VMM weighs |
//! | [`moment`] | a guest's TSC against the time of day |
//! | [`sample`] | what a batch gives |
//! | [`stats`] | quantiles, and how sure a ratio is |
//! | [`verdict`] | ratios and targets |
//! | [`environment`] | the machine it ran on |
//! | [`full`] | every machine there is, crossed |
//! | [`output`], [`table`], [`markdown`], [`picture`] | files, terminal, documentation, SVG |

mod brownout;
mod control;
mod environment;
mod floor;
mod full;
mod light;
mod many;
mod markdown;
mod moment;
mod ours;
mod output;
mod picture;
mod qemu;
mod run;
mod sample;
mod scene;
mod stats;
mod table;
mod verdict;

use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;
use stillpoint_tests::ground;

/// Swaps of each machine of the crossing.
const FULL_SWAPS: u32 = 10;

/// Measures how long a guest stands still in a swap, beside the floor of this machine.
#[derive(Debug, Parser)]
#[command(name = "stillpoint-bench")]
pub(crate) struct Options {
    /// Swaps of ours, and of the floor, for each machine.
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u32).range(2..=10_000))]
    swaps: u32,
    /// Swaps of the machine with 8 GiB; each takes seconds of preparation.
    #[arg(long, default_value_t = 30, value_parser = clap::value_parser!(u32).range(0..=10_000))]
    big_swaps: u32,
    /// Time for swaps of single guests, of all that is measured the most: on a busy machine there are fewer of them, and the
    /// output says so. The rest takes some four minutes.
    #[arg(long, default_value_t = 600, value_parser = clap::value_parser!(u64).range(1..))]
    seconds: u64,
    /// A small run, about a minute, without the machine with 8 GiB.
    #[arg(long)]
    quick: bool,
    /// Only this machine, of those that all are measured on (1vcpu-256m or 2vcpu-256m), only how a pause grows with vCPUs
    /// (vcpus), or only what a guest loses after swaps (brownout); and nothing else.
    #[arg(long, value_parser = [scene::BASE.id, scene::PAIR.id, run::GROWTH, run::AFTERWARDS])]
    only: Option<String>,
    /// RAM that is written after swaps, MiB.
    #[arg(long, default_value_t = 1024, value_parser = clap::value_parser!(u64).range(1..=65_536))]
    touched_mib: u64,
    /// Every machine there is, crossed: vCPUs, RAM, its pages, touched or not, busy or not. Takes an hour or more, and goes on
    /// where an earlier one was broken off.
    #[arg(long, conflicts_with_all = ["quick", "only", "json"])]
    full: bool,
    /// Only fetches the QEMU that is measured beside us.
    #[arg(long, exclusive = true)]
    fetch: bool,
    /// Prints the report as JSON instead of tables.
    #[arg(long)]
    json: bool,
}

fn main() -> ExitCode {
    let mut options = Options::parse();
    if options.quick {
        options.swaps = options.swaps.min(10);
        options.big_swaps = 0;
        options.seconds = options.seconds.min(60);
    }
    if let Some(reason) = ground::no_kvm() {
        eprintln!("bench: nothing to measure on: {reason}");
        return ExitCode::FAILURE;
    }
    match bench(&options) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn bench(options: &Options) -> anyhow::Result<()> {
    if options.fetch {
        let qemu = qemu::Peer::fetch().map_err(anyhow::Error::msg)?;
        println!("{}", qemu.version());
        return Ok(());
    }
    if options.full {
        return full::run(FULL_SWAPS, Duration::from_secs(options.seconds));
    }
    let before = environment::load();
    let measured = run::all(options)?;
    let report = verdict::report(&measured, environment::facts(before));
    let files = output::write(&report, &measured)?;
    if options.json {
        println!("{}", serde_json::to_string_pretty(&report)?);
    } else {
        print!("{}", table::render(&report));
        println!("\nwritten to {}:", files.dir.display());
        println!("  {}", files.names.join(", "));
    }
    Ok(())
}
