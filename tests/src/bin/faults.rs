//! `make faults`: the crash matrix, cell by cell, printed as a table; `make faults-random`; `make budgets`.
//!
//! Runs itself once more in a mount namespace of its own, with a filesystem in memory for each host's
//! directories: some cells fill it to the last byte.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::Instant;

use anyhow::{Context, ensure};
use clap::Parser;
use stillpoint_tests::budget;
use stillpoint_tests::matrix::pool::{self, Told};
use stillpoint_tests::matrix::{ACTS, Cell, POINTS, SIDES};

/// Set in the process that is in the namespace.
const INSIDE: &str = "STILLPOINT_FAULTS_DIR";
/// Of the filesystem of each host: its releases, and some room.
const DISK: &std::ffi::CStr = c"size=900m";

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
    /// Instead of the matrix swaps around the limit of their budgets, in steps of 1 ms.
    #[arg(long)]
    budgets: bool,
    /// Hosts at once [one more than this machine has cores].
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..=64))]
    jobs: Option<u16>,
}

fn main() -> anyhow::Result<ExitCode> {
    let args = Args::parse();
    if args.budgets {
        return Ok(exit(budgets()?));
    }
    let Some(dir) = std::env::var_os(INSIDE) else {
        let dir = tempfile::tempdir()?;
        let status = Command::new("unshare")
            .arg("-m")
            .arg(std::env::current_exe()?)
            .args(std::env::args_os().skip(1))
            .env(INSIDE, dir.path())
            .status()?;
        // What it had to say it said, unless it had no time to.
        ensure!(
            status.code().is_some(),
            "it was ended by somebody: {status}"
        );
        return Ok(exit(status.success()));
    };
    let cores = || std::thread::available_parallelism().map_or(1, usize::from);
    let jobs = args.jobs.map_or_else(|| cores() + 1, usize::from);
    let dirs = disks(Path::new(&dir), jobs)?;
    let good = match args.random {
        Some(swaps) => random(&dirs, args.seed, swaps)?,
        None => all(&dirs, &args.only)?,
    };
    Ok(exit(good))
}

fn exit(good: bool) -> ExitCode {
    match good {
        true => ExitCode::SUCCESS,
        false => ExitCode::FAILURE,
    }
}

/// A filesystem for each host. They go with this process's namespace.
fn disks(dir: &Path, count: usize) -> anyhow::Result<Vec<PathBuf>> {
    let disk = |number: usize| {
        let path = dir.join(number.to_string());
        std::fs::create_dir(&path)?;
        let flags = rustix::mount::MountFlags::empty();
        rustix::mount::mount("none", &path, "tmpfs", flags, Some(DISK))
            .context("mounting a filesystem for the daemon's directories")?;
        Ok(path)
    };
    (0..count).map(disk).collect()
}

fn random(dirs: &[PathBuf], seed: Option<u64>, swaps: usize) -> anyhow::Result<bool> {
    // Short enough to be typed.
    let seed = seed.unwrap_or_else(|| fastrand::u64(..1 << 32));
    let jobs = dirs.len();
    println!(
        "{swaps} swaps with random kills on {jobs} hosts; again by: make faults-random N={swaps} \
         SEED={seed} JOBS={jobs}"
    );
    let began = Instant::now();
    let tally = pool::random_swaps(dirs, seed, swaps)?;
    println!(
        "{} moved, {} kept, {} guests died with the process that owned them; {} judged by what they \
         counted and by their disks; {:.0} s",
        tally.moved,
        tally.kept,
        tally.crashed,
        tally.moved + tally.kept + tally.crashed,
        began.elapsed().as_secs_f64()
    );
    Ok(true)
}

fn all(dirs: &[PathBuf], only: &[String]) -> anyhow::Result<bool> {
    let wanted = |cell: &Cell| {
        let name = cell.to_string();
        only.is_empty() || only.iter().any(|part| name.contains(part.as_str()))
    };
    let of = |point: &str, whom| {
        let cells = Cell::all().filter(wanted);
        cells
            .filter(|cell| cell.point == point && cell.whom == whom)
            .collect::<Vec<Cell>>()
    };
    let rows: Vec<Vec<Cell>> = POINTS
        .iter()
        .flat_map(|(point, _)| SIDES.map(|(_, whom)| of(point, whom)))
        .filter(|row| !row.is_empty())
        .collect();
    let cells: usize = rows.iter().map(Vec::len).sum();
    ensure!(cells > 0, "no cell has such a name");
    let began = Instant::now();
    let head = ACTS.map(|(act, _)| format!("{act:<12}")).join("");
    println!("{:<10} {:<12} {head}", "point", "process");
    let (mut bad, mut clocks) = (Vec::new(), 0);
    let boots = pool::rows(dirs, &rows, |row| {
        clocks += row.iter().filter(|(_, told)| has_clock(told)).count();
        print_row(&row, &mut bad);
    })?;
    println!(
        "{cells} cells, {} not as the specification says, {boots} guests on {} hosts, {:.0} s",
        bad.len(),
        dirs.len(),
        began.elapsed().as_secs_f64()
    );
    println!("kvmclock was measured after {clocks} of them, and is within its bound");
    bad.iter().for_each(|what| println!("\n{what}"));
    Ok(bad.is_empty())
}

fn has_clock(told: &anyhow::Result<stillpoint_tests::matrix::Verdict>) -> bool {
    told.as_ref()
        .is_ok_and(|verdict| verdict.clock_ns.is_some())
}

fn print_row(row: &[Told], bad: &mut Vec<String>) {
    let Some((first, _)) = row.first() else {
        return;
    };
    let side = SIDES.iter().find(|(_, whom)| *whom == first.whom);
    print!(
        "{:<10} {:<12} ",
        first.point,
        side.map_or("", |side| side.0)
    );
    for (_, act) in ACTS {
        let told = row.iter().find(|(cell, _)| cell.act == act);
        let says = match told {
            None => "–".to_owned(),
            Some((_, Ok(verdict))) if verdict.is_good() => verdict.outcome.clone(),
            Some((cell, Ok(verdict))) => {
                let expected = verdict.expected.join(" or ");
                bad.push(format!("{cell}: {}, and not {expected}", verdict.outcome));
                format!("{}!", verdict.outcome)
            }
            Some((cell, Err(error))) => {
                bad.push(format!("{cell}: {error:#}"));
                "BROKEN".to_owned()
            }
        };
        print!("{says:<12}");
    }
    println!();
    // Nobody is left to tell if it can't be printed.
    let _ = std::io::stdout().flush();
}

/// Every point, 10 ms to each side of its limit.
fn budgets() -> anyhow::Result<bool> {
    let began = Instant::now();
    println!(
        "{:<8} {:>9} {:>9} {:>9} {:>9} {:>9}  outcome",
        "point", "slow", "budget", "used", "reserve", "blackout"
    );
    let (mut steps, mut worst) = (0, std::time::Duration::ZERO);
    let mut ground = budget::Ground::prepare()?;
    for point in budget::POINTS {
        ground.sweep(point, -10..=10, |step| {
            println!("{step}");
            steps += 1;
            worst = worst.max(step.overdue());
        })?;
    }
    ground.end()?;
    println!(
        "{steps} swaps; none was frozen longer than its budget and {worst:?}, unless it was given up \
         within it; {:.0} s",
        began.elapsed().as_secs_f64()
    );
    Ok(true)
}
