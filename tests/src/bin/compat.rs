//! `make compat`: every pair of releases both ways, a table of it, and refusals by name.
//!
//! The release before this one is built from its own sources: those of the tag before, or of any
//! revision (`--previous REV`). Until there is a tag, the kept builds stand for it: `compat` (0.1.0),
//! which knows format 1 alone, and `later` (0.9.0), to which this release is the previous one.

use std::process::{Command, ExitCode, Stdio};

use anyhow::{Context, ensure};
use clap::Parser;
use stillpoint_tests::compat::{Hop, furnished_to_and_fro, plain_to_and_fro, refused_by_name};
use stillpoint_tests::releases::{Release, root};
use stillpoint_tests::wire;

/// Swaps between releases, both ways.
#[derive(Debug, Parser)]
struct Args {
    /// The revision to take for the previous release [the latest tag before this tree].
    #[arg(long)]
    previous: Option<String>,
}

type Row = (&'static str, fn(bool) -> anyhow::Result<Vec<Hop>>);

const KEPT: [Row; 5] = [
    ("0.1.0 and this tree", |_| {
        plain_to_and_fro(Release::Compat, Release::Current)
    }),
    ("this tree and a later release", |wired| {
        furnished_to_and_fro(Release::Current, Release::Later, wired)
    }),
    ("a section that is not known", |_| {
        refused_by_name("section", &["journal"], false).map(|hop| vec![hop])
    }),
    ("a field that is not known", |_| {
        refused_by_name("field", &["serial", "900 (fifo_depth)"], false).map(|hop| vec![hop])
    }),
    ("a field that only the state shows", |_| {
        refused_by_name("hidden-field", &["serial", "field 900"], true).map(|hop| vec![hop])
    }),
];

const PREVIOUS: [Row; 2] = [
    ("the previous release and this tree", |wired| {
        furnished_to_and_fro(Release::Previous, Release::Current, wired)
    }),
    (
        "the previous release and this tree, without devices",
        |_| plain_to_and_fro(Release::Previous, Release::Current),
    ),
];

fn main() -> anyhow::Result<ExitCode> {
    let args = Args::parse();
    if !wire::is_inside() && wire::no_wire().is_none() {
        if let Some(revision) = previous(&args)? {
            build(&revision)?;
        }
        let status = wire::beside(&std::env::current_exe()?)
            .args(std::env::args_os().skip(1))
            .status()?;
        return Ok(match status.success() {
            true => ExitCode::SUCCESS,
            false => ExitCode::FAILURE,
        });
    }
    let revision = previous(&args)?;
    let rows = match &revision {
        Some(_) => [&PREVIOUS[..], &KEPT[..]].concat(),
        None => KEPT.to_vec(),
    };
    if !wire::is_inside() {
        println!("no wire can be made here: the guests have no network interface");
        revision.as_deref().map(build).transpose()?;
    }
    match &revision {
        Some(revision) => println!("previous: {revision}"),
        None => println!("no tag before this tree: the kept builds stand for the previous release"),
    }
    Ok(match run(&rows) {
        true => ExitCode::SUCCESS,
        false => ExitCode::FAILURE,
    })
}

/// Does every row; whether all were as they must be.
fn run(rows: &[Row]) -> bool {
    println!("{}", Hop::HEAD);
    let mut bad = Vec::new();
    for (name, row) in rows {
        match row(wire::is_inside()) {
            Ok(hops) => hops.iter().for_each(|hop| println!("{hop}")),
            Err(error) => bad.push(format!("{name}: {error:#}")),
        }
    }
    bad.iter().for_each(|what| println!("\n{what}"));
    println!(
        "{} of {} as they must be",
        rows.len() - bad.len(),
        rows.len()
    );
    bad.is_empty()
}

/// The revision that is the previous release.
fn previous(args: &Args) -> anyhow::Result<Option<String>> {
    if args.previous.is_some() {
        return Ok(args.previous.clone());
    }
    let tag = Command::new("git")
        .args([
            "describe",
            "--tags",
            "--abbrev=0",
            "--match",
            "v[0-9]*",
            "HEAD^",
        ])
        .current_dir(root())
        .stderr(Stdio::null())
        .output()?;
    let name = String::from_utf8(tag.stdout)?.trim().to_owned();
    Ok((tag.status.success() && !name.is_empty()).then_some(name))
}

/// Builds its VMM from its own sources, beside ours.
fn build(revision: &str) -> anyhow::Result<()> {
    let (root, place) = (root(), root().join("target/previous"));
    let sources = place.join("src");
    if sources.exists() {
        std::fs::remove_dir_all(&sources)?;
    }
    std::fs::create_dir_all(&sources)?;
    let mut archive = Command::new("git")
        .args(["archive", revision])
        .current_dir(&root)
        .stdout(Stdio::piped())
        .spawn()?;
    let tar = archive.stdout.take().context("git's output")?;
    let unpacked = Command::new("tar")
        .arg("x")
        .current_dir(&sources)
        .stdin(tar)
        .status()?;
    ensure!(
        archive.wait()?.success() && unpacked.success(),
        "git archive {revision}"
    );
    let built = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
        .args([
            "build",
            "--release",
            "--quiet",
            "--locked",
            "-p",
            "stillpoint-vmm",
        ])
        .arg("--target-dir")
        .arg(place.join("build"))
        .current_dir(&sources)
        .status()?;
    ensure!(built.success(), "the VMM of {revision} does not build");
    let releases = root.join("target/releases/previous");
    std::fs::create_dir_all(&releases)?;
    let binary = "stillpoint-vmm";
    std::fs::copy(
        place.join("build/release").join(binary),
        releases.join(binary),
    )?;
    Ok(())
}
