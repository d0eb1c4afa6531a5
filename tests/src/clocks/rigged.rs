//! Figures of Linux guests on emulated hosts: by the program `clock`, run there. pulse's own come with
//! them if they are wanted, as these hosts' KVM moves a guest's TSC where it is told to.

use std::time::Duration;

use anyhow::Context;
use serde::{Deserialize, Serialize};

use super::figures::{Figure, Part};
use crate::linux::images::Kernel;
use crate::rig::Rig;

/// How long a host may take in all.
const LIMIT: Duration = Duration::from_secs(2400);
const QUICK_LIMIT: Duration = Duration::from_secs(900);

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

/// What one host measures. Each has a host of its own, so that one that dies takes little with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Portion {
    /// Of the bare-metal guest.
    Pulse,
    /// Of a Linux guest with this kernel.
    Linux(Kernel, Part),
}

impl Portion {
    /// All there are for a host with this kernel: long pauses for a guest with the same.
    pub fn all(host: Kernel) -> Vec<Self> {
        let swaps = Kernel::ALL.map(|guest| Self::Linux(guest, Part::Swaps));
        let pauses = Self::Linux(host, Part::Pauses);
        [Self::Pulse, pauses].into_iter().chain(swaps).collect()
    }

    fn name(self) -> String {
        match self {
            Self::Pulse => "pulse".into(),
            Self::Linux(guest, Part::Swaps) => format!("{}-swaps", guest.name()),
            Self::Linux(guest, Part::Pauses) => format!("{}-pauses", guest.name()),
        }
    }

    fn arguments(self) -> Vec<&'static str> {
        match self {
            Self::Pulse => vec!["--only", "pulse"],
            Self::Linux(guest, part) => {
                let part = match part {
                    Part::Swaps => "swaps",
                    Part::Pauses => "pauses",
                };
                vec![
                    "--only",
                    "linux",
                    "--guest",
                    guest.name(),
                    "--of-guest",
                    part,
                ]
            }
        }
    }
}

/// Takes the figures of one portion on a host with this kernel.
pub fn figures_on(host: Kernel, portion: Portion, quick: bool) -> anyhow::Result<Vec<Figure>> {
    let mut command = vec!["clock", "--in-rig", host.name(), "--results", "/results"];
    command.extend(portion.arguments());
    command.extend(quick.then_some("--quick"));
    let name = format!("clock-{}-{}", host.name(), portion.name());
    let mut rig = Rig::new(&name, host).programs()?.again_if_it_dies();
    if let Portion::Linux(guest, _) = portion {
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
