//! `stillpoint doctor`

use std::path::PathBuf;
use std::process::ExitCode;

use super::{Desk, format, say, say_json};
use crate::api::VmView;
use crate::daemon;
use crate::doctor::{self, Check, Status, Surroundings};
use crate::model::Problem;

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The daemon's state directory [root: /var/lib/stillpoint; others: ~/.local/state/stillpoint].
    #[arg(long, value_name = "DIR")]
    state_dir: Option<PathBuf>,
    /// The VMM to ask about KVM [the one beside this command, else the newest in the store].
    #[arg(long, value_name = "PATH")]
    vmm: Option<PathBuf>,
}

pub(super) async fn run(desk: &Desk, args: Args) -> Result<ExitCode, Problem> {
    let found = match desk.api.remote() {
        // What its daemon sees of another machine.
        Some(_) => desk.api.get("/v1/doctor").await?,
        None => here(desk, args).await,
    };
    if desk.json {
        say_json(&found)?;
    } else {
        say(&text(&found))?;
    }
    let failed = found.iter().any(|check| check.status == Status::Fail);
    Ok(if failed {
        ExitCode::FAILURE
    } else {
        ExitCode::SUCCESS
    })
}

async fn here(desk: &Desk, args: Args) -> Vec<Check> {
    let state_dir = args.state_dir.unwrap_or_else(daemon::default_state_dir);
    let vms: Result<Vec<VmView>, Problem> = desk.api.get("/v1/vms").await;
    let surroundings = Surroundings {
        run_dir: desk.run_dir.clone(),
        daemon: vms.map(drop).map_err(|problem| problem.message),
        vmm: args.vmm.or_else(beside).or_else(|| newest(&state_dir)),
        state_dir,
    };
    doctor::of_host(&surroundings).await
}

fn beside() -> Option<PathBuf> {
    let path = std::env::current_exe()
        .ok()?
        .with_file_name("stillpoint-vmm");
    path.exists().then_some(path)
}

/// Without the daemon the store can't be asked; what was put there last will do.
fn newest(state_dir: &std::path::Path) -> Option<PathBuf> {
    let releases = std::fs::read_dir(state_dir.join("releases")).ok()?;
    let binaries = releases
        .flatten()
        .map(|entry| entry.path().join("stillpoint-vmm"));
    let dated = binaries.filter_map(|path| {
        let changed = std::fs::metadata(&path).ok()?.modified().ok()?;
        Some((changed, path))
    });
    dated.max().map(|(_, path)| path)
}

fn text(found: &[Check]) -> String {
    let mut rows = Vec::new();
    for check in found {
        rows.push(vec![
            check.status.to_string(),
            check.check.clone(),
            check.found.clone(),
        ]);
        if check.status != Status::Ok && !check.remedy.is_empty() {
            rows.push(vec![
                String::new(),
                String::new(),
                format!("-> {}", check.remedy),
            ]);
        }
    }
    let mut text = format::table(&["", "CHECK", "FOUND"], &[], &rows);
    let count = |status| found.iter().filter(|check| check.status == status).count();
    let (warn, fail) = (count(Status::Warn), count(Status::Fail));
    text.push_str(&match (warn, fail) {
        (0, 0) => "all is well\n".to_owned(),
        (warn, 0) => format!("guests can run and be swapped here; {warn} things could be better\n"),
        (_, fail) => format!("{fail} things stand in the way\n"),
    });
    text
}
