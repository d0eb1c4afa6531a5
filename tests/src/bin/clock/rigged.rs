//! Figures of Linux guests on emulated hosts: on each host kernel, by this program, run there.
//! pulse's own come with them, as these hosts' KVM moves a guest's TSC where it is told to.

use std::time::Duration;

use anyhow::Context;
use stillpoint_tests::clocks::figures::Figure;
use stillpoint_tests::linux::images::Kernel;
use stillpoint_tests::rig::{self, Rig};

use crate::{Report, or_broken};

/// How long a host may take in all.
const LIMIT: Duration = Duration::from_secs(3600);
const QUICK_LIMIT: Duration = Duration::from_secs(1500);

/// Takes them, or says why not. `why` is why they are not taken on this machine itself.
pub(crate) fn figures(quick: bool, why: &str) -> Vec<Figure> {
    if let Some(missing) = rig::missing() {
        let why = format!("{why}; and {missing}");
        let name = "everything that takes a Linux guest";
        return vec![Figure::skipped(name, "", &why)];
    }
    let hosts = Kernel::ALL.into_iter();
    hosts
        .flat_map(|host| {
            let name = format!("on a host with {}", host.name());
            eprintln!("{name} ...");
            or_broken(&name, on(host, quick))
        })
        .collect()
}

fn on(host: Kernel, quick: bool) -> anyhow::Result<Vec<Figure>> {
    let mut command = vec!["clock", "--in-rig", host.name(), "--results", "/results"];
    if quick {
        command.push("--quick");
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
