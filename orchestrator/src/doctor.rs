//! What this host can and can't do, each finding with its remedy. Works without a daemon.
//!
//! What concerns `/dev/kvm` is asked of a release (`stillpoint-vmm doctor --json`): nothing here
//! opens it.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

mod checks;

/// How good a finding is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Status {
    /// As it should be.
    Ok,
    /// It works, but costs something.
    Warn,
    /// It does not work.
    Fail,
}

impl std::fmt::Display for Status {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(match self {
            Self::Ok => "ok",
            Self::Warn => "warn",
            Self::Fail => "FAIL",
        })
    }
}

/// One finding.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Check {
    /// What was looked at.
    pub check: String,
    /// How good it is.
    pub status: Status,
    /// What was found.
    pub found: String,
    /// What to do about it, and what it costs to leave it; empty when all is well.
    #[serde(default)]
    pub remedy: String,
}

impl Check {
    /// All is well.
    pub fn ok(check: &str, found: impl Into<String>) -> Self {
        Self::new(check, Status::Ok, found, "")
    }

    /// A finding.
    pub fn new(check: &str, status: Status, found: impl Into<String>, remedy: &str) -> Self {
        Self {
            check: check.into(),
            status,
            found: found.into(),
            remedy: remedy.into(),
        }
    }
}

/// How the daemon is reached, and where it keeps things.
#[derive(Clone, Debug)]
pub struct Surroundings {
    /// The run directory.
    pub run_dir: PathBuf,
    /// The state directory.
    pub state_dir: PathBuf,
    /// Whether the daemon answers; else why not.
    pub daemon: Result<(), String>,
    /// A VMM to ask about KVM.
    pub vmm: Option<PathBuf>,
}

/// Everything, as the command asks for it.
pub async fn of_host(surroundings: &Surroundings) -> Vec<Check> {
    let mut found = of_vmm(surroundings.vmm.as_deref()).await;
    found.push(checks::directory("run directory", &surroundings.run_dir));
    found.push(checks::directory(
        "state directory",
        &surroundings.state_dir,
    ));
    found.push(match &surroundings.daemon {
        Ok(()) => Check::ok("daemon", "answers"),
        Err(why) => Check::new(
            "daemon",
            Status::Warn,
            why,
            "start it: `stillpointd &`, or `systemctl start stillpointd`",
        ),
    });
    found.push(checks::sqlite());
    found.extend(checks::host());
    found
}

/// What the daemon finds; `store` is whether its store answers.
pub async fn of_daemon(vmm: Option<PathBuf>, store: Result<(), String>) -> Vec<Check> {
    let mut found = of_vmm(vmm.as_deref()).await;
    found.push(match store {
        Ok(()) => Check::ok("store", "answers"),
        Err(why) => Check::new("store", Status::Fail, why, "see the daemon's log"),
    });
    found.extend(checks::host());
    found
}

/// What a release says about KVM.
async fn of_vmm(vmm: Option<&Path>) -> Vec<Check> {
    const REMEDY: &str = "add a release: `stillpoint release add PATH`";
    let Some(vmm) = vmm else {
        let found = "there is no release of the VMM to ask";
        return vec![Check::new("kvm", Status::Fail, found, REMEDY)];
    };
    match ask(vmm).await {
        Ok(found) => found,
        Err(why) => {
            let found = format!("{} does not say: {why}", vmm.display());
            vec![Check::new("kvm", Status::Fail, found, REMEDY)]
        }
    }
}

async fn ask(vmm: &Path) -> Result<Vec<Check>, String> {
    let asked = tokio::process::Command::new(vmm)
        .args(["doctor", "--json"])
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .output();
    let output = tokio::time::timeout(Duration::from_secs(10), asked)
        .await
        .map_err(|_| "it took longer than 10 s".to_owned())?
        .map_err(|e| e.to_string())?;
    // It may exit non-zero to say that something failed; what it prints says it better.
    serde_json::from_slice(&output.stdout).map_err(|e| format!("it prints no findings ({e})"))
}
