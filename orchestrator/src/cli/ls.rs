//! `stillpoint ls`

use std::process::ExitCode;

use super::{Desk, format, say, say_json};
use crate::api::VmView;
use crate::model::Problem;

pub(super) async fn run(desk: &Desk) -> Result<ExitCode, Problem> {
    let vms: Vec<VmView> = desk.api.get("/v1/vms").await?;
    if desk.json {
        say_json(&vms)?;
    } else if vms.is_empty() {
        say("no guests; `stillpoint run NAME --kernel K` starts one")?;
    } else {
        let rows: Vec<Vec<String>> = vms.iter().map(row).collect();
        let head = [
            "NAME", "STATE", "CPUS", "MEMORY", "RELEASE", "SWAPS", "PID", "SINCE", "",
        ];
        say(&format::table(&head, &[2, 3, 5, 6], &rows))?;
    }
    Ok(ExitCode::SUCCESS)
}

fn row(vm: &VmView) -> Vec<String> {
    let reason = vm.reason.as_deref().unwrap_or_default();
    vec![
        vm.name.to_string(),
        vm.state.to_string(),
        vm.spec.cpus.to_string(),
        format::size(vm.spec.memory.size),
        vm.release.clone(),
        vm.swaps.to_string(),
        vm.process
            .as_ref()
            .map_or("-".into(), |process| process.pid.to_string()),
        format::ago(vm.changed_at_unix_ns),
        reason.lines().next().unwrap_or_default().to_owned(),
    ]
}
