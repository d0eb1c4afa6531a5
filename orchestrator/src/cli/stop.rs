//! `stillpoint stop`

use std::process::ExitCode;
use std::time::Duration;

use hyper::Method;

use super::dry::{self, Dry};
use super::{Desk, format, progress, say, say_json};
use crate::api::VmView;
use crate::model::Problem;

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Name of the guest.
    name: String,
    /// How long the guest may take to switch itself off after its power button was pressed. Then,
    /// or at once if it takes no note of the button, it is powered off.
    #[arg(long, value_name = "TIME", value_parser = format::parse_time, default_value = "30s")]
    grace: Duration,
    /// Power it off at once, as by pulling the plug.
    #[arg(long, conflicts_with = "grace")]
    now: bool,
    #[command(flatten)]
    dry: Dry,
}

pub(super) async fn run(desk: &Desk, args: Args) -> Result<ExitCode, Problem> {
    let name = super::path_part(&args.name)?;
    if args.dry.dry_run {
        let vm = dry::guest(desk, name).await?;
        let how = match args.now {
            true => "at once, as by pulling the plug".to_owned(),
            false => format!(
                "its power button first, and after {} by pulling the plug",
                format::time(args.grace)
            ),
        };
        return dry::would(
            desk,
            &format!("{name}, which is {}, would be ended: {how}", vm.state),
        );
    }
    let waiting = progress::waiting(desk.json, &format!("stopping {name}"));
    let grace = if args.now { 0 } else { args.grace.as_nanos() };
    let path = format!("/v1/vms/{name}/stop?grace_ns={grace}");
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
