//! `stillpoint completions`

use std::process::ExitCode;

use clap::CommandFactory;

use super::say;
use crate::model::Problem;

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The shell.
    shell: clap_complete::Shell,
}

pub(super) fn run(args: &Args) -> Result<ExitCode, Problem> {
    let mut text = Vec::new();
    let mut command = super::Args::command();
    clap_complete::generate(args.shell, &mut command, "stillpoint", &mut text);
    say(&String::from_utf8_lossy(&text))?;
    Ok(ExitCode::SUCCESS)
}
