//! `stillpoint show`

use std::process::ExitCode;

use stillpoint_control::spec::{DiskSpec, format_mac};

use super::{Desk, format, safeguards, say, say_json};
use crate::api::VmView;
use crate::doctor::Status;
use crate::model::{Problem, SwapRecord};

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Name of the guest.
    name: String,
}

pub(super) async fn run(desk: &Desk, args: Args) -> Result<ExitCode, Problem> {
    let name = super::path_part(&args.name)?;
    let vm: VmView = desk.api.get(&format!("/v1/vms/{name}")).await?;
    if desk.json {
        say_json(&vm)?;
        return Ok(ExitCode::SUCCESS);
    }
    let swaps: Vec<SwapRecord> = desk.api.get(&format!("/v1/vms/{name}/swaps")).await?;
    say(&text(&vm, &swaps))?;
    Ok(ExitCode::SUCCESS)
}

fn text(vm: &VmView, swaps: &[SwapRecord]) -> String {
    let kernel = &vm.spec.kernel;
    let mut rows = vec![
        (
            "state",
            format!("{}, since {}", vm.state, format::ago(vm.changed_at_unix_ns)),
        ),
        ("wanted", format!("{:?}", vm.wanted).to_lowercase()),
        ("release", vm.release.clone()),
        ("vCPUs", vm.spec.cpus.to_string()),
        (
            "memory",
            format!(
                "{} of {} pages",
                format::size(vm.spec.memory.size),
                format!("{:?}", vm.spec.memory.pages).to_lowercase()
            ),
        ),
        ("kernel", kernel.path.display().to_string()),
        ("cmdline", kernel.cmdline.clone()),
        ("disks", disks(&vm.spec.disks)),
        ("blackout budget", format::time(vm.spec.blackout_budget)),
        ("swaps", vm.swaps.to_string()),
        ("console", vm.console_socket.clone()),
        ("log", vm.vmm_log.clone()),
    ];
    for (number, net) in vm.spec.nets.iter().enumerate() {
        let mac = format_mac(vm.spec.mac(number).unwrap_or_default());
        let several = match net.queue_pairs {
            1 => String::new(),
            pairs => format!(", {pairs} pairs of queues"),
        };
        rows.push(("network", format!("{} as {mac}{several}", net.tap)));
    }
    if let (Some(vsock), Some(socket)) = (&vm.spec.vsock, &vm.vsock_socket) {
        rows.push(("vsock", format!("CID {}, {socket}", vsock.cid)));
    }
    if vm.spec.rng {
        rows.push(("entropy", "yes".to_owned()));
    }
    if let Some(process) = &vm.process {
        rows.insert(3, ("pid", process.pid.to_string()));
    }
    if let Some(reason) = &vm.reason {
        rows.insert(1, ("reason", reason.replace('\n', "\n                   ")));
    }
    if let Some(last) = swaps.last() {
        rows.push((
            "last swap",
            match last.state.is_over() {
                true => format!("{} to {}: {}", last.id, last.to.version, last.state),
                false => format!(
                    "{} to {}: {}, at `{}`",
                    last.id, last.to.version, last.state, last.step
                ),
            },
        ));
    }
    for rung in &vm.rungs {
        let text = match rung.status {
            Status::Ok => format!("{}: {}", rung.check, rung.found),
            _ => format!("not {}: {}; {}", rung.check, rung.found, rung.remedy),
        };
        rows.push(("swaps of", text));
    }
    for line in safeguards::of_updatable(&vm.updatable) {
        rows.push(("updatable", line));
    }
    if !vm.updatable.is_empty() && safeguards::of_updatable(&vm.updatable).is_empty() {
        rows.push(("updatable", "yes".to_owned()));
    }
    rows.retain(|(key, value)| *key != "disks" || !value.is_empty());
    let mut text = format!("{}\n", vm.name);
    for (key, value) in rows {
        text.push_str(&format!("  {key:<17}{value}\n"));
    }
    text
}

/// One a line, below each other.
fn disks(disks: &[DiskSpec]) -> String {
    let line = |disk: &DiskSpec| match disk.read_only {
        true => format!("{}, read-only", disk.path.display()),
        false => disk.path.display().to_string(),
    };
    let lines: Vec<_> = disks.iter().map(line).collect();
    lines.join("\n                   ")
}
