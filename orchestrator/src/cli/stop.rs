//! `stillpoint stop`

use std::process::ExitCode;

use hyper::Method;

use super::{Desk, progress, say, say_json};
use crate::api::VmView;
use crate::model::Problem;

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Name of the guest.
    name: String,
}

pub(super) async fn run(desk: &Desk, args: Args) -> Result<ExitCode, Problem> {
    let name = super::path_part(&args.name)?;
    let waiting = progress::waiting(desk.json, &format!("stopping {name}"));
    let path = format!("/v1/vms/{name}/stop");
    let stopped: Result<VmView, Problem> = desk.api.send(Method::POST, &path, &()).await;
    waiting.finish_and_clear();
    let vm = stopped?;
    if desk.json {
        say_json(&vm)?;
    } else {
        say(&format!("{name} is {}", vm.state))?;
    }
    Ok(ExitCode::SUCCESS)
}
