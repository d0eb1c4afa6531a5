//! load: work for a guest that shows when something of it is lost.
//!
//! Each kind of load knows what it must find again: blocks of a disk, frames of a stream,
//! registers of a CPU. The last line on standard output is `{"report":{"load":...,"ok":...}}`
//! (for people, on a terminal, a sentence), and the exit status is non-zero if anything was
//! lost. SIGTERM ends a load before its time, in order. Whatever is random comes from a seed that the report tells.

mod block;
mod cpu;
mod disk;
mod echo;
mod endpoint;
mod frame;
mod journal;
mod pace;
mod registers;
mod report;
mod tcp;
mod term;
mod verify;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Loads a guest, and says what of it was lost.
#[derive(Parser)]
#[command(name = "load", version)]
struct Cli {
    /// Prints JSON on a terminal too.
    #[arg(long, global = true)]
    json: bool,
    #[command(subcommand)]
    kind: Kind,
}

#[derive(Subcommand)]
enum Kind {
    /// Writes blocks to a disk at random, and journals which are durable.
    Disk(disk::Args),
    /// Checks a disk against what its journal says is durable.
    Verify(verify::Args),
    /// Sends a stream of checked frames one way.
    #[command(subcommand)]
    Tcp(tcp::Verb),
    /// Sends a frame, waits for it to come back, and so on.
    Echo(echo::Args),
    /// Sends back what it is sent.
    EchoServe(echo::ServeArgs),
    /// Spins on CPUs, and checks that their registers stay as they are.
    Cpu(cpu::Args),
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    // A server that is not sending waits for whoever connects: SIGTERM just ends it.
    let ends_in_order = !matches!(cli.kind, Kind::EchoServe(_) | Kind::Verify(_));
    if ends_in_order && let Err(error) = term::heed() {
        eprintln!("load: cannot heed SIGTERM: {error}");
        return ExitCode::from(2);
    }
    let told = match cli.kind {
        Kind::Disk(args) => {
            // A journal on standard output is for a program to read, to its last line.
            let json = cli.json || args.journal == "-";
            disk::run(&args).and_then(|report| report::tell(&report, json))
        }
        Kind::Verify(args) => verify::run(&args).and_then(|report| report::tell(&report, cli.json)),
        Kind::Tcp(tcp::Verb::Send(args)) => {
            tcp::send(&args).and_then(|report| report::tell(&report, cli.json))
        }
        Kind::Tcp(tcp::Verb::Serve(args)) => tcp::serve(&args, cli.json),
        Kind::Echo(args) => echo::run(&args).and_then(|report| report::tell(&report, cli.json)),
        Kind::EchoServe(args) => echo::serve(&args, cli.json),
        Kind::Cpu(args) => cpu::run(&args).and_then(|report| report::tell(&report, cli.json)),
    };
    match told {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("load: {error:#}");
            ExitCode::from(2)
        }
    }
}
