//! Figures of Linux guests on emulated hosts: by the program `clock`, run there. pulse's own come with
//! them if they are wanted, as these hosts' KVM moves a guest's TSC where it is told to.

use std::time::Duration;

use anyhow::Context;
use serde::{Deserialize, Serialize};

use super::figures::Figure;
use crate::linux::images::Kernel;
use crate::rig::Rig;

/// How long a host may take in all.
const LIMIT: Duration = Duration::from_secs(3600);
const QUICK_LIMIT: Duration = Duration::from_secs(1500);

/// What a run of `clock` leaves behind.
#[derive(Debug, Serialize, Deserialize)]
pub struct Report {
    /// The host's.
    pub kernel: String,
    /// CPU cores it had.
    pub cores: usize,
    /// What it took.
    pub seconds: u64,
    /// What was found.
    pub figures: Vec<Figure>,
}

/// Takes all figures, or with `only` one kind, on a host with this kernel.
pub fn figures_on(host: Kernel, quick: bool, only: Option<&str>) -> anyhow::Result<Vec<Figure>> {
    let mut command = vec!["clock", "--in-rig", host.name(), "--results", "/results"];
    if quick {
        command.push("--quick");
    }
    if let Some(only) = only {
        command.extend(["--only", only]);
    }
    let mut rig = Rig::new(&format!("clock-on-{}", host.name()), host).programs()?;
    for guest in Kernel::ALL {
        rig = rig.images(guest, &["vmlinux", "initramfs"]);
    }
    let limit = if quick { QUICK_LIMIT } else { LIMIT };
    let outcome = rig.command(&command).time_limit(limit).run()?;
    let path = outcome.results.join("report.json");
    let bytes = std::fs::read(&path)
        .with_context(|| format!("{}; see {}", path.display(), outcome.log.display()))?;
    let report: Report = serde_json::from_slice(&bytes)?;
    let named = report.figures.into_iter().map(|figure| Figure {
        name: format!("{} host, {}", host.name(), figure.name),
        ..figure
    });
    Ok(named.collect())
}
