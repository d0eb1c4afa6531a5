//! `stillpoint rm`

use std::process::ExitCode;

use super::dry::{self, Dry};
use super::{Desk, say, say_json};
use crate::model::{Code, Problem};

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Name of the guest; it must be over.
    name: String,
    #[command(flatten)]
    dry: Dry,
}

pub(super) async fn run(desk: &Desk, args: Args) -> Result<ExitCode, Problem> {
    let name = super::path_part(&args.name)?;
    if args.dry.dry_run {
        let vm = dry::guest(desk, name).await?;
        if vm.state.is_active() {
            let message = format!("`{name}` is {}; stop it first", vm.state);
            return Err(Problem::new(Code::StillRunning, message));
        }
        return dry::would(
            desk,
            &format!("{name}, which is {}, would be forgotten", vm.state),
        );
    }
    desk.api.delete(&format!("/v1/vms/{name}")).await?;
    if desk.json {
        say_json(&serde_json::json!({ "removed": name }))?;
    } else {
        say(&format!("{name} is forgotten"))?;
    }
    Ok(ExitCode::SUCCESS)
}
