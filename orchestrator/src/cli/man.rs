//! `stillpoint man`

use std::path::PathBuf;
use std::process::ExitCode;

use clap::CommandFactory;

use super::io_problem;
use crate::model::Problem;

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Where the pages go; it is made if it isn't there.
    dir: PathBuf,
}

pub(super) fn run(args: &Args) -> Result<ExitCode, Problem> {
    let failed = |e| {
        io_problem(
            format_args!("write man pages to {}", args.dir.display()),
            &e,
        )
    };
    std::fs::create_dir_all(&args.dir).map_err(failed)?;
    clap_mangen::generate_to(super::Args::command(), &args.dir).map_err(failed)?;
    Ok(ExitCode::SUCCESS)
}
