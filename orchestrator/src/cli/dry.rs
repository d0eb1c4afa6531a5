//! `--dry-run`: what a command would do, from what the daemon shows. Nothing is asked of it that changes anything.

use std::process::ExitCode;

use super::{Desk, say, say_json};
use crate::api::VmView;
use crate::model::{Code, Problem};

/// The flag, for commands that change something.
#[derive(Clone, Copy, Debug, clap::Args)]
pub(super) struct Dry {
    /// Only say what would be done.
    #[arg(long)]
    pub(super) dry_run: bool,
}

/// Says what would be done.
pub(super) fn would(desk: &Desk, text: &str) -> Result<ExitCode, Problem> {
    match desk.json {
        true => say_json(&serde_json::json!({ "would": text }))?,
        false => say(text)?,
    }
    Ok(ExitCode::SUCCESS)
}

/// The guest of that name.
pub(super) async fn guest(desk: &Desk, name: &str) -> Result<VmView, Problem> {
    desk.api
        .get(&format!("/v1/vms/{}", super::path_part(name)?))
        .await
}

/// The names of guests that run, those named or all; a guest that doesn't is a refusal, as it would be.
pub(super) async fn running(desk: &Desk, named: &[String]) -> Result<String, Problem> {
    let vms: Vec<VmView> = desk.api.get("/v1/vms").await?;
    let runs = |name: &str| {
        vms.iter()
            .any(|vm| vm.name.as_str() == name && vm.state.is_active())
    };
    if let Some(name) = named.iter().find(|name| !runs(name)) {
        let message = format!("`{name}` does not run; ask again when it is running");
        return Err(Problem::new(Code::NotRunning, message));
    }
    let all = vms
        .iter()
        .filter(|vm| vm.state.is_active())
        .map(|vm| vm.name.to_string());
    let names: Vec<_> = match named.is_empty() {
        true => all.collect(),
        false => named.to_vec(),
    };
    match names.is_empty() {
        true => Err(Problem::new(Code::NotRunning, "no guest runs on this host")),
        false => Ok(names.join(", ")),
    }
}
