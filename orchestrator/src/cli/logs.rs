//! `stillpoint logs`

use std::fs::File;
use std::io::{Read, Write};
use std::process::ExitCode;
use std::time::Duration;

use super::{Desk, io_problem, say_json};
use crate::api::VmView;
use crate::model::Problem;

/// Between two looks at a log that is followed.
const LOOK: Duration = Duration::from_millis(200);

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Name of the guest.
    name: String,
    /// What the serial console said, instead of what the VMM logged.
    #[arg(long)]
    console: bool,
    /// Goes on as more comes, until interrupted.
    #[arg(long, short)]
    follow: bool,
}

pub(super) async fn run(desk: &Desk, args: Args) -> Result<ExitCode, Problem> {
    desk.must_be_local("reading logs")?;
    let name = super::path_part(&args.name)?;
    let vm: VmView = desk.api.get(&format!("/v1/vms/{name}")).await?;
    let path = if args.console {
        vm.console_log
    } else {
        vm.vmm_log
    };
    let failed = |e: std::io::Error| io_problem(format_args!("read {path}"), &e);
    let mut file = File::open(&path).map_err(failed)?;
    if desk.json {
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes).map_err(failed)?;
        say_json(&serde_json::json!({ "path": path, "text": String::from_utf8_lossy(&bytes) }))?;
        return Ok(ExitCode::SUCCESS);
    }
    let mut buffer = vec![0; 64 << 10];
    loop {
        let len = file.read(&mut buffer).map_err(failed)?;
        if len > 0 {
            let mut out = std::io::stdout().lock();
            if out
                .write_all(&buffer[..len])
                .and_then(|()| out.flush())
                .is_err()
            {
                // The reader has enough.
                return Ok(ExitCode::SUCCESS);
            }
        } else if args.follow {
            tokio::time::sleep(LOOK).await;
        } else {
            return Ok(ExitCode::SUCCESS);
        }
    }
}
