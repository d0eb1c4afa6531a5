//! `stillpoint release`

use std::path::PathBuf;
use std::process::ExitCode;

use hyper::Method;

use super::{Desk, format, io_problem, progress, say, say_json};
use crate::api::NewRelease;
use crate::model::{Problem, Release};

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, clap::Subcommand)]
enum Verb {
    /// Copies a VMM binary into the store as a release.
    Add {
        /// The binary.
        path: PathBuf,
        /// Version to add it under [what it says itself].
        #[arg(long = "as", value_name = "VERSION")]
        named: Option<String>,
        /// An argument to append to its command line; may be given again.
        #[arg(long = "arg", value_name = "ARG", allow_hyphen_values = true)]
        args: Vec<String>,
    },
    /// Lists releases.
    Ls,
}

pub(super) async fn run(desk: &Desk, args: Args) -> Result<ExitCode, Problem> {
    match args.verb {
        Verb::Add { path, named, args } => add(desk, path, named, args).await,
        Verb::Ls => ls(desk).await,
    }
}

async fn add(
    desk: &Desk,
    path: PathBuf,
    version: Option<String>,
    args: Vec<String>,
) -> Result<ExitCode, Problem> {
    let path = std::path::absolute(&path)
        .map_err(|e| io_problem(format_args!("make {} absolute", path.display()), &e))?;
    let waiting = progress::waiting(desk.json, &format!("adding {}", path.display()));
    let new = NewRelease {
        path,
        version,
        args,
    };
    let added = desk.api.send(Method::POST, "/v1/releases", &new).await;
    waiting.finish_and_clear();
    let release: Release = added?;
    if desk.json {
        say_json(&release)?;
    } else {
        let manifest = &release.manifest;
        say(&format!(
            "release {} of the {} is in the store\n  sha256  {}\n  state   reads {:?}, writes {:?}",
            manifest.version, manifest.component, manifest.sha256, manifest.reads, manifest.writes
        ))?;
    }
    Ok(ExitCode::SUCCESS)
}

async fn ls(desk: &Desk) -> Result<ExitCode, Problem> {
    let releases: Vec<Release> = desk.api.get("/v1/releases").await?;
    if desk.json {
        say_json(&releases)?;
        return Ok(ExitCode::SUCCESS);
    }
    let row = |release: &Release| {
        let manifest = &release.manifest;
        vec![
            manifest.component.clone(),
            manifest.version.clone(),
            format!("{:?}", manifest.reads),
            format!("{:?}", manifest.writes),
            manifest.sha256.chars().take(12).collect(),
            format::ago(release.added_at_unix_ns),
            manifest.args.join(" "),
        ]
    };
    let rows: Vec<_> = releases.iter().map(row).collect();
    let head = [
        "COMPONENT",
        "VERSION",
        "READS",
        "WRITES",
        "SHA256",
        "ADDED",
        "ARGS",
    ];
    say(&format::table(&head, &[], &rows))?;
    Ok(ExitCode::SUCCESS)
}
