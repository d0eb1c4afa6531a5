//! Figures of Linux guests on emulated hosts: by the program `clock`, run there. pulse's own come with
//! them if they are wanted, as these hosts' KVM moves a guest's TSC where it is told to.

use std::time::Duration;

use anyhow::Context;
use serde::{Deserialize, Serialize};

use super::figures::{Figure, Part};
use crate::linux::images::Kernel;
use crate::rig::Rig;

/// How long a host may take in all.
const LIMIT: Duration = Duration::from_secs(3600);
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
    /// All there are for a host with this kernel: what takes long for a guest with the same.
    pub fn all(host: Kernel) -> Vec<Self> {
        let swaps = Kernel::ALL.map(|guest| Self::Linux(guest, Part::Swaps));
        let same = [Part::Pauses, Part::Ptp].map(|part| Self::Linux(host, part));
        let all = [Self::Pulse].into_iter().chain(swaps).chain(same);
        all.collect()
    }

    fn name(self) -> String {
        match self {
            Self::Pulse => "pulse".into(),
            Self::Linux(guest, part) => format!("{}-{}", guest.name(), word(part)),
        }
    }

    fn arguments(self) -> Vec<&'static str> {
        match self {
            Self::Pulse => vec!["--only", "pulse"],
            Self::Linux(guest, part) => [
                ["--only", "linux"],
                ["--guest", guest.name()],
                ["--of-guest", word(part)],
            ]
            .concat(),
        }
    }
}

/// A part as it is written.
fn word(part: Part) -> &'static str {
    match part {
        Part::Swaps => "swaps",
        Part::Pauses => "pauses",
        Part::Ptp => "ptp",
    }
}

/// Takes the figures of one portion on a host with this kernel.
pub fn figures_on(host: Kernel, portion: Portion, quick: bool) -> anyhow::Result<Vec<Figure>> {
    let mut command = vec!["clock", "--in-rig", host.name(), "--results", "/results"];
    command.extend(portion.arguments());
    command.extend(quick.then_some("--quick"));
    let name = format!("clock-{}-{}", host.name(), portion.name());
    let mut rig = Rig::new(&name, host).programs()?.again_if_it_dies();
    if let Portion::Linux(guest, part) = portion {
        rig = rig.images(guest, &["vmlinux", "initramfs"]);
        if part == Part::Ptp {
            rig = rig.archive("phc2sys");
        }
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
