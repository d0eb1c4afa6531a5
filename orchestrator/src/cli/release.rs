//! `stillpoint release`

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use hyper::Method;

use super::dry::{self, Dry};
use super::{Desk, format, io_problem, path_part, progress, say, say_json};
use crate::agent::binaries::manifest_of;
use crate::api::{NewPin, NewRelease, Verification, VmView};
use crate::model::{Code, Pin, Problem, Release, Signer, VMM, validate_minimum};

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, clap::Subcommand)]
enum Verb {
    /// Copies a VMM binary into the store as a release, if its manifest is signed by a key that the
    /// daemon trusts.
    Add(Add),
    /// Lists releases.
    Ls,
    /// Verifies signature and digest of a release, or of all; exits 1 if one must not be run.
    Verify {
        /// Its version [all].
        #[arg(id = "release", value_name = "VERSION")]
        version: Option<String>,
    },
    /// Sets, shows or takes away the least version that may be run.
    Pin {
        /// That version [shows the pin].
        #[arg(id = "release", value_name = "VERSION")]
        version: Option<String>,
        /// Takes the pin away.
        #[arg(long, conflicts_with = "release")]
        none: bool,
        #[command(flatten)]
        dry: Dry,
    },
    /// Removes a release that runs no guest.
    Rm {
        /// Its version.
        #[arg(id = "release", value_name = "VERSION")]
        version: String,
        #[command(flatten)]
        dry: Dry,
    },
    /// Prints the manifest of a binary, to be signed by `minisign -S`; needs no daemon, and runs the
    /// binary.
    Manifest {
        /// The binary.
        path: PathBuf,
        /// Version of the release [what it says itself].
        #[arg(long = "as", value_name = "VERSION")]
        named: Option<String>,
        /// An argument to append to its command line; may be given again.
        #[arg(long = "arg", value_name = "ARG", allow_hyphen_values = true)]
        args: Vec<String>,
    },
}

#[derive(Debug, clap::Args)]
struct Add {
    /// The binary.
    path: PathBuf,
    /// Version to add it under [what its manifest says, or it says itself].
    #[arg(long = "as", value_name = "VERSION")]
    named: Option<String>,
    /// An argument to append to its command line; may be given again.
    #[arg(long = "arg", value_name = "ARG", allow_hyphen_values = true)]
    args: Vec<String>,
    /// Its signed manifest [PATH.json].
    #[arg(long, value_name = "FILE", conflicts_with = "unsigned")]
    manifest: Option<PathBuf>,
    /// The manifest's signature, by minisign [MANIFEST.minisig].
    #[arg(long, value_name = "FILE", conflicts_with = "unsigned")]
    signature: Option<PathBuf>,
    /// Add it without a signature; it is shown as unsigned ever after.
    #[arg(long)]
    unsigned: bool,
}

pub(super) async fn run(desk: &Desk, args: Args) -> Result<ExitCode, Problem> {
    match args.verb {
        Verb::Add(new) => add(desk, new).await,
        Verb::Ls => ls(desk).await,
        Verb::Verify { version } => verify(desk, version).await,
        Verb::Pin { version, none, dry } if dry.dry_run => would_pin(desk, version, none),
        Verb::Pin { version, none, .. } => pin(desk, version, none).await,
        Verb::Rm { version, dry } if dry.dry_run => would_rm(desk, &version).await,
        Verb::Rm { version, .. } => rm(desk, &version).await,
        Verb::Manifest { path, named, args } => {
            let text = manifest_of(&path, named, args)?;
            say(&String::from_utf8_lossy(&text))?;
            Ok(ExitCode::SUCCESS)
        }
    }
}

fn absolute(path: &Path) -> Result<PathBuf, Problem> {
    std::path::absolute(path)
        .map_err(|e| io_problem(format_args!("make {} absolute", path.display()), &e))
}

/// Who signed it, for people.
fn signer(signed_by: Option<&Signer>) -> String {
    signed_by.map_or("unsigned".into(), |signer| signer.key_id.clone())
}

async fn add(desk: &Desk, add: Add) -> Result<ExitCode, Problem> {
    let path = absolute(&add.path)?;
    let waiting = progress::waiting(desk.json, &format!("adding {}", path.display()));
    let new = NewRelease {
        path,
        version: add.named,
        args: add.args,
        manifest: add.manifest.as_deref().map(absolute).transpose()?,
        signature: add.signature.as_deref().map(absolute).transpose()?,
        unsigned: add.unsigned,
    };
    let added = desk.api.send(Method::POST, "/v1/releases", &new).await;
    waiting.finish_and_clear();
    let release: Release = added?;
    if desk.json {
        say_json(&release)?;
        return Ok(ExitCode::SUCCESS);
    }
    let manifest = &release.manifest;
    let signed = release.signed_by.as_ref();
    let comment = signed.map_or(String::new(), |signer| format!(" ({})", signer.comment));
    say(&format!(
        "release {} of the {} is in the store\n  sha256  {}\n  signed  {}{comment}\n  state   reads \
         {:?}, writes {:?}",
        manifest.version,
        manifest.component,
        manifest.sha256,
        signer(signed),
        manifest.reads,
        manifest.writes
    ))?;
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
            signer(release.signed_by.as_ref()),
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
        "SIGNED BY",
        "ADDED",
        "ARGS",
    ];
    say(&format::table(&head, &[], &rows))?;
    Ok(ExitCode::SUCCESS)
}

async fn verify(desk: &Desk, version: Option<String>) -> Result<ExitCode, Problem> {
    let versions = match version {
        Some(version) => vec![version],
        None => {
            let releases: Vec<Release> = desk.api.get("/v1/releases").await?;
            releases.into_iter().map(|r| r.manifest.version).collect()
        }
    };
    let mut found: Vec<Verification> = Vec::new();
    for version in &versions {
        let path = format!("/v1/releases/{}/verification", path_part(version)?);
        found.push(desk.api.get(&path).await?);
    }
    if desk.json {
        say_json(&found)?;
    } else {
        for one in &found {
            let why = one.problem.as_ref();
            say(&match why {
                None => format!("{}: good, {}", one.version, signer(one.signed_by.as_ref())),
                Some(problem) => format!("{}: must not be run: {problem}", one.version),
            })?;
        }
    }
    Ok(match found.iter().all(|one| one.good) {
        true => ExitCode::SUCCESS,
        false => ExitCode::FAILURE,
    })
}

async fn pin(desk: &Desk, version: Option<String>, none: bool) -> Result<ExitCode, Problem> {
    let path = format!("/v1/pins/{VMM}");
    if none {
        desk.api.delete(&path).await?;
    } else if let Some(minimum) = version {
        let _: Pin = desk
            .api
            .send(Method::PUT, &path, &NewPin { minimum })
            .await?;
    }
    let pins: Vec<Pin> = desk.api.get("/v1/pins").await?;
    if desk.json {
        say_json(&pins)?;
        return Ok(ExitCode::SUCCESS);
    }
    let lines = pins.iter().map(|pin| {
        let (component, minimum) = (&pin.component, &pin.minimum);
        format!("{component}: nothing below {minimum} is run")
    });
    let lines: Vec<_> = lines.collect();
    say(&match lines.is_empty() {
        true => "nothing is pinned".into(),
        false => lines.join("\n"),
    })?;
    Ok(ExitCode::SUCCESS)
}

fn would_pin(desk: &Desk, version: Option<String>, none: bool) -> Result<ExitCode, Problem> {
    if let Some(version) = &version {
        validate_minimum(version)?;
    }
    dry::would(
        desk,
        &match (version, none) {
            (Some(minimum), _) => format!("nothing below {minimum} would be run"),
            (None, true) => "nothing would be pinned".into(),
            (None, false) => "nothing would change".into(),
        },
    )
}

async fn would_rm(desk: &Desk, version: &str) -> Result<ExitCode, Problem> {
    let path = format!("/v1/releases/{}/verification", path_part(version)?);
    // Whether there is such a one.
    let _: Verification = desk.api.get(&path).await?;
    let vms: Vec<VmView> = desk.api.get("/v1/vms").await?;
    if let Some(vm) = vms
        .iter()
        .find(|vm| vm.state.is_active() && vm.release == version)
    {
        let message = format!("release {version} runs `{}`: swap it first", vm.name);
        return Err(Problem::new(Code::StillRunning, message));
    }
    dry::would(desk, &format!("release {version} would be removed"))
}

async fn rm(desk: &Desk, version: &str) -> Result<ExitCode, Problem> {
    let path = format!("/v1/releases/{}", path_part(version)?);
    desk.api.delete(&path).await?;
    if desk.json {
        say_json(&serde_json::json!({ "removed": version }))?;
    } else {
        say(&format!("release {version} is removed"))?;
    }
    Ok(ExitCode::SUCCESS)
}
