//! `make faults`: the crash matrix, cell by cell, printed as a table; and `make faults-random`.
//!
//! Runs itself once more in a mount namespace of its own, with a filesystem in memory for the daemon's
//! directories: some cells fill it to the last byte.

use std::io::Write;
use std::process::{Command, ExitCode};
use std::time::Instant;

use anyhow::ensure;
use clap::Parser;
use stillpoint_tests::matrix::{self, ACTS, Cell, Host, POINTS, SIDES};

/// Set in the process that is in the namespace.
const INSIDE: &str = "STILLPOINT_FAULTS_DIR";
const MOUNT: &str = "mount -t tmpfs -o size=1500m none \"$STILLPOINT_FAULTS_DIR\" && exec \"$@\"";

/// The crash matrix.
#[derive(Debug, Parser)]
struct Args {
    /// Only cells whose name (`point / process / act`) contains this; may be given several times.
    #[arg(long)]
    only: Vec<String>,
    /// Instead of the matrix so many swaps with random kills.
    #[arg(long)]
    random: Option<usize>,
    /// Their seed.
    #[arg(long)]
    seed: Option<u64>,
}

fn main() -> anyhow::Result<ExitCode> {
    let args = Args::parse();
    let Some(dir) = std::env::var_os(INSIDE) else {
        let dir = tempfile::tempdir()?;
        let status = Command::new("unshare")
            .args(["-m", "sh", "-c", MOUNT, "sh"])
            .arg(std::env::current_exe()?)
            .args(std::env::args_os().skip(1))
            .env(INSIDE, dir.path())
            .status()?;
        return Ok(if status.success() {
            ExitCode::SUCCESS
        } else {
            ExitCode::FAILURE
        });
    };
    let mut host = Host::start(dir.as_ref())?;
    let good = match args.random {
        Some(swaps) => random(&mut host, args.seed, swaps)?,
        None => all(&mut host, &args.only)?,
    };
    Ok(if good {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

fn random(host: &mut Host, seed: Option<u64>, swaps: usize) -> anyhow::Result<bool> {
    let seed = seed.unwrap_or_else(|| fastrand::u64(..));
    println!("{swaps} swaps with random kills; again by: make faults-random N={swaps} SEED={seed}");
    let began = Instant::now();
    let tally = matrix::random(host, seed, swaps)?;
    println!(
        "{} moved, {} kept, {} guests died with the process that owned them; {:.0} s",
        tally.moved,
        tally.kept,
        tally.crashed,
        began.elapsed().as_secs_f64()
    );
    Ok(true)
}

fn all(host: &mut Host, only: &[String]) -> anyhow::Result<bool> {
    let wanted = |cell: &Cell| {
        let name = cell.to_string();
        only.is_empty() || only.iter().any(|part| name.contains(part.as_str()))
    };
    let cells: Vec<Cell> = Cell::all().filter(wanted).collect();
    ensure!(!cells.is_empty(), "no cell has such a name");
    let (began, mut bad) = (Instant::now(), Vec::new());
    println!(
        "{:<10} {:<12} {}",
        "point",
        "process",
        ACTS.map(|(act, _)| format!("{act:<12}")).join("")
    );
    for (point, _) in POINTS {
        for (side, whom) in SIDES {
            let row: Vec<&Cell> = cells
                .iter()
                .filter(|c| c.point == point && c.whom == whom)
                .collect();
            if row.is_empty() {
                continue;
            }
            print!("{point:<10} {side:<12} ");
            for (_, act) in ACTS {
                let cell = row.iter().find(|cell| cell.act == act);
                let says = match cell.map(|cell| (cell, matrix::run(host, cell))) {
                    None => "–".to_owned(),
                    Some((_, Ok(verdict))) if verdict.is_good() => verdict.outcome,
                    Some((cell, Ok(verdict))) => {
                        let expected = verdict.expected.join(" or ");
                        bad.push(format!("{cell}: {}, and not {expected}", verdict.outcome));
                        format!("{}!", verdict.outcome)
                    }
                    Some((cell, Err(error))) => {
                        bad.push(format!("{cell}: {error:#}"));
                        host.forget();
                        "BROKEN".to_owned()
                    }
                };
                print!("{says:<12}");
                std::io::stdout().flush()?;
            }
            println!();
        }
    }
    println!(
        "{} cells, {} not as the specification says, {} guests, {:.0} s",
        cells.len(),
        bad.len(),
        host.boots,
        began.elapsed().as_secs_f64()
    );
    bad.iter().for_each(|what| println!("\n{what}"));
    Ok(bad.is_empty())
}
