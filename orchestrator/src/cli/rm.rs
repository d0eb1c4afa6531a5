//! `stillpoint rm`

use std::process::ExitCode;

use super::{Desk, say, say_json};
use crate::model::Problem;

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Name of the guest; it must be over.
    name: String,
}

pub(super) async fn run(desk: &Desk, args: Args) -> Result<ExitCode, Problem> {
    let name = super::path_part(&args.name)?;
    desk.api.delete(&format!("/v1/vms/{name}")).await?;
    if desk.json {
        say_json(&serde_json::json!({ "removed": name }))?;
    } else {
        say(&format!("{name} is forgotten"))?;
    }
    Ok(ExitCode::SUCCESS)
}
