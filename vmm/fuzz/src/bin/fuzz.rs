//! The bounded run: every target for some seconds, by a mutator whose seed is printed. A finding is
//! printed with its seed and its bytes, and with `--replay` it is seen again.

use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;
use stillpoint_fuzz::mutate::run;
use stillpoint_fuzz::{TARGETS, Target, target};
use stillpoint_state::golden::from_text;

/// Runs the fuzz targets for a while.
#[derive(Debug, Parser)]
struct Args {
    /// Seconds for each target.
    #[arg(long, default_value_t = 10)]
    seconds: u64,
    /// Seed; without it, one by the clock.
    #[arg(long)]
    seed: Option<u64>,
    /// Only this target.
    #[arg(long)]
    only: Option<String>,
    /// Runs the target once, on the bytes in this file (as printed with a finding).
    #[arg(long, requires = "only")]
    replay: Option<std::path::PathBuf>,
    /// Writes the corpora below this directory, for cargo-fuzz, and ends.
    #[arg(long)]
    write_corpus: Option<std::path::PathBuf>,
}

fn main() -> anyhow::Result<ExitCode> {
    let args = Args::parse();
    if let Some(dir) = &args.write_corpus {
        for target in TARGETS {
            let dir = dir.join(target.name);
            std::fs::create_dir_all(&dir)?;
            for (number, bytes) in (target.corpus)().iter().enumerate() {
                std::fs::write(dir.join(format!("good-{number}")), bytes)?;
            }
        }
        return Ok(ExitCode::SUCCESS);
    }
    if let (Some(path), Some(only)) = (&args.replay, &args.only) {
        let bytes = from_text(&std::fs::read_to_string(path)?)?;
        if let Some(target) = target(only) {
            (target.run)(&bytes);
        }
        return Ok(ExitCode::SUCCESS);
    }
    let seed = args.seed.unwrap_or_else(|| fastrand::u64(..));
    println!("seed {seed}");
    let wanted = |t: &&Target| args.only.as_ref().is_none_or(|only| only == t.name);
    let mut clean = true;
    for target in TARGETS.iter().filter(wanted) {
        clean &= run(target, seed, Duration::from_secs(args.seconds));
    }
    Ok(if clean {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}
