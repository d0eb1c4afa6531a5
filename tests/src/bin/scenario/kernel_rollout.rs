//! The host's kernel brought by a rollout, told in two stages. Only for an emulated host: it jumps.
//!
//! 1. *leave*: guests are started, a rollout is, and the host jumps: daemon and driver are gone with the kernel.
//! 2. *arrive*: the next daemon adopts the guests, and dies over it; the one after that settles the order by what it finds,
//!    the rollout goes to its end, and nothing jumps once more.

use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use anyhow::{Context, bail, ensure};
use serde_json::{Value, json};
use stillpoint_tests::daemon::{Daemon, SOON};
use stillpoint_tests::ground;
use stillpoint_tests::patience::wait_for;
use stillpoint_tests::rig::order::{CARVE_OUT, JUMPS};

use crate::kernel::{goes_on, show, told};
use crate::stages::{
    HOST, add_release, bring_out_log, daemon_after_one_that_died_adopting, keep, kept, run_pulse,
};

/// What the stage before saw.
const SEEN: &str = "/scratch/seen.json";
/// Where every kernel of the host finds those that can be brought.
const BOOT: &str = "/scratch/boot";
const GUESTS: [&str; 2] = ["pulse-1", "pulse-2"];
const ARGUMENTS: [&str; 4] = ["--carve-out", CARVE_OUT, "--boot-dir", BOOT];
/// How long the host may be on its way.
const PATIENCE: std::time::Duration = std::time::Duration::from_secs(120);

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The kernel to bring, by its name below /jump; in the later stage it is known.
    #[arg(long, value_name = "NAME")]
    into: Option<String>,
}

pub(crate) fn tell(args: &Args) -> anyhow::Result<Value> {
    if let Some(reason) = ground::no_kvm() {
        bail!("{reason}");
    }
    let told = match &args.into {
        Some(kernel) => leave(kernel),
        None => arrive(),
    };
    told.with_context(|| {
        let log = Path::new(HOST).join("stillpointd.log");
        format!(
            "what was logged:\n{}",
            std::fs::read_to_string(log).unwrap_or_default()
        )
    })
}

fn daemon() -> anyhow::Result<Daemon> {
    std::fs::create_dir_all(HOST)?;
    Daemon::start_with(Path::new(HOST), &ARGUMENTS)
}

/// Lays a kernel out as its package would; its name.
fn lay_out(kernel: &str) -> anyhow::Result<String> {
    let folder = Path::new(JUMPS).join(kernel);
    let image = std::fs::read(folder.join("bzImage"))?;
    // Documentation/arch/x86/boot.rst: `kernel_version` is where its name is, less 0x200.
    let at = image.get(0x20e..0x210).context("no image of a kernel")?;
    let at = usize::from(u16::from_le_bytes([at[0], at[1]])) + 0x200;
    let text = image.get(at..).context("no image of a kernel")?;
    let name = text
        .split(|&byte| matches!(byte, 0 | b' '))
        .next()
        .context("no name")?;
    let name = String::from_utf8(name.to_vec())?;
    std::fs::create_dir_all(BOOT)?;
    std::fs::write(format!("{BOOT}/vmlinuz-{name}"), &image)?;
    std::fs::copy(
        folder.join("initramfs"),
        format!("{BOOT}/initrd.img-{name}"),
    )?;
    for file in [format!("vmlinuz-{name}"), format!("initrd.img-{name}")] {
        // Whatever it was in the archive that it came by.
        std::fs::set_permissions(format!("{BOOT}/{file}"), Permissions::from_mode(0o644))?;
    }
    Ok(name)
}

fn leave(kernel: &str) -> anyhow::Result<Value> {
    let name = lay_out(kernel)?;
    let daemon = daemon()?;
    add_release(&daemon)?;
    let mut guests = json!({});
    for guest in GUESTS {
        guests[guest] = told(&run_pulse(&daemon, guest, &[])?);
    }
    let rollout = [
        "rollout",
        "start",
        "--component",
        "kernel",
        "--to",
        &name,
        "--budget",
        "30s",
        "--detach",
    ];
    let back = daemon.stillpoint(&[&rollout[..], &SOON].concat())?;
    ensure!(
        !back.success && back.error.contains("has no way back"),
        "{}",
        back.error
    );
    show(daemon.command(&[
        "rollout",
        "plan",
        "--component",
        "kernel",
        "--to",
        &name,
        "--budget",
        "30s",
        "--no-roll-back",
    ]))?;
    keep(SEEN, &json!({ "guests": guests, "to": name }))?;
    println!("scenario: a rollout is started, and the host jumps into {name}");
    daemon.must(&[&rollout[..], &SOON, &["--no-roll-back"]].concat())?;
    wait_for("the jump", PATIENCE, || {
        let rollout = daemon.stillpoint(&["rollout", "show"])?;
        ensure!(
            rollout.success,
            "{}: the rollout is over, and the host still here",
            rollout.error
        );
        Ok(None::<()>)
    })?;
    bail!("the host is still here")
}

fn arrive() -> anyhow::Result<Value> {
    let before: Value = kept(SEEN)?.context("nothing was kept")?;
    let to = before["to"].as_str().context("a name")?;
    // Whoever adopts may die over it; then the next one settles the order, and nobody is run twice or left alone.
    let daemon = daemon_after_one_that_died_adopting(&GUESTS, &ARGUMENTS, false)?;
    let all = daemon.must(&["rollout", "ls"])?;
    let id = all[0]["id"].as_str().context("the rollout is known")?;
    let over = daemon.must(&["rollout", "watch", id])?;
    let rollout = &over["rollout"];
    ensure!(rollout["state"] == "finished", "{over:#}");
    let unit = &rollout["units"][0];
    ensure!(unit["phase"] == "done" && unit["tries"] == 1, "{unit:#}");
    // One jump, under the order's id; and its guests' parts are of the rollout.
    let changes = daemon.must(&["host", "changes"])?;
    let swaps = changes.as_array().context("changes")?;
    ensure!(
        swaps.len() == 1 && swaps[0]["id"] == unit["order"],
        "{changes:#}"
    );
    ensure!(swaps[0]["kernel"]["to"] == to, "{changes:#}");
    let hosts = daemon.must(&["host", "ls"])?;
    ensure!(hosts[0]["kernel"]["runs"] == to, "{hosts:#}");
    let mut longest = 0;
    for guest in GUESTS {
        goes_on(&daemon, guest, &before["guests"][guest])?;
        let report = daemon.must(&["report", guest])?;
        ensure!(report["rollout"] == rollout["id"], "{report:#}");
        longest = longest.max(
            report["report"]["blackout"]["host_ns"]
                .as_u64()
                .unwrap_or(0),
        );
    }
    ensure!(unit["blackout_ns"].as_u64() > Some(0), "{unit:#}");
    show(daemon.command(&["rollout", "show", id]))?;
    show(daemon.command(&["rollout", "history", id]))?;
    let again = [
        "rollout",
        "start",
        "--component",
        "kernel",
        "--to",
        to,
        "--budget",
        "30s",
        "--no-roll-back",
    ];
    let refused = daemon.stillpoint(&again)?;
    ensure!(
        !refused.success && refused.error.contains("already"),
        "{}",
        refused.error
    );
    bring_out_log()?;
    Ok(json!({ "rollout": rollout, "swap": swaps[0], "longest_ns": longest }))
}
