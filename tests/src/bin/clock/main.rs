//! `make clock`: every promise about clocks, measured in full length, beside its bound.
//!
//! Takes one part after the other ([`parts`]), prints a table, writes `report.json` and `table.txt`, and
//! fails if a bound is broken or a part could not be carried out. What this machine can't show is a row
//! that says why. Linux guests run here where KVM is hardware; elsewhere in the rig, where
//! this very program runs with `--in-rig`, and its figures are brought out.

mod on_kvm;
mod parts;
mod table;

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use anyhow::Context;
use clap::Parser;
use stillpoint_tests::clocks::figures::{Figure, Part, Verdict};
use stillpoint_tests::clocks::rigged::{Portion, Report, figures_on};
use stillpoint_tests::linux::images::Kernel;
use stillpoint_tests::releases::root;
use stillpoint_tests::{ground, rig};

use parts::Parts;

/// Measures the guest's clock over swaps, and holds it against what is promised.
#[derive(Clone, Debug, Parser)]
struct Args {
    /// A twentieth of the swaps, and short pauses.
    #[arg(long)]
    quick: bool,
    /// Only figures of this kind.
    #[arg(long, value_name = "KIND")]
    only: Option<Only>,
    /// Only those of the bare-metal guest whose part has this in its name: swaps, periodic timer,
    /// latecomers, a long pause, differing TSCs, hold, negative controls.
    #[arg(long, value_name = "TEXT")]
    part: Option<String>,
    /// Only Linux guests with this kernel: bookworm, backports.
    #[arg(long, value_name = "KERNEL", value_parser = kernel)]
    guest: Option<Kernel>,
    /// Only this of what Linux guests show.
    #[arg(long, value_name = "PART")]
    of_guest: Option<Part>,
    /// Only what an emulated host with this kernel shows.
    #[arg(long, value_name = "KERNEL", value_parser = kernel)]
    host: Option<Kernel>,
    /// This is the rig's emulated host, with this kernel.
    #[arg(long, value_name = "KERNEL", value_parser = kernel)]
    in_rig: Option<Kernel>,
    /// Go on with a run that was interrupted: take over what it has measured, if the programs are the
    /// same.
    #[arg(long)]
    resume: bool,
    /// Where the report goes [target/clock].
    #[arg(long, value_name = "DIR")]
    results: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Only {
    /// Of the bare-metal guest.
    Pulse,
    /// Of Linux guests.
    Linux,
}

fn kernel(name: &str) -> Result<Kernel, String> {
    let found = Kernel::ALL.into_iter().find(|kernel| kernel.name() == name);
    found.ok_or_else(|| {
        let names = Kernel::ALL.map(Kernel::name);
        format!("`{name}` is none of {}", names.join(", "))
    })
}

fn main() -> ExitCode {
    match run(&Args::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("clock: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: &Args) -> anyhow::Result<bool> {
    let began = Instant::now();
    let dir = args.results.clone();
    let dir = dir.unwrap_or_else(|| root().join("target/clock"));
    let mut parts = Parts::new(&dir, args.resume, args.quick)?;
    if args.wants(Only::Pulse) && args.host.is_none() {
        match ground::no_kvm() {
            Some(why) => parts.note(Figure::skipped("everything on /dev/kvm", "", &why)),
            None => on_kvm::pulse(&mut parts, args),
        }
    }
    match ground::no_fast_kvm().filter(|_| args.in_rig.is_none()) {
        Some(why) => rigged(&mut parts, args, &why),
        None if args.wants(Only::Linux) => on_kvm::linux(&mut parts, args),
        None => {}
    }
    let figures = parts.figures();
    let table = format!("{}\n{}", table::of(&figures), parts.times());
    write!(std::io::stdout(), "{table}")?;
    let report = Report {
        kernel: rustix::system::uname().release().to_string_lossy().into(),
        cores: ground::cores(),
        seconds: began.elapsed().as_secs(),
        figures,
    };
    write_report(&dir, &report, &table)?;
    let count = |verdict| {
        report
            .figures
            .iter()
            .filter(|f| f.verdict == verdict)
            .count()
    };
    let (kept, broken) = (count(Verdict::Kept), count(Verdict::Broken));
    let skipped = count(Verdict::Skipped);
    println!("{kept} kept, {broken} broken, {skipped} skipped");
    Ok(broken == 0 && kept > 0)
}

impl Args {
    fn wants(&self, kind: Only) -> bool {
        self.only.is_none_or(|only| only == kind)
    }

    fn wants_guest(&self, kernel: Kernel) -> bool {
        self.wants(Only::Linux) && self.guest.is_none_or(|wanted| wanted == kernel)
    }

    fn wants_portion(&self, host: Kernel, portion: Portion) -> bool {
        let host_is_wanted = self.host.is_none_or(|wanted| wanted == host);
        // Parts are of what runs on this machine.
        let is_wanted = host_is_wanted && self.part.is_none();
        is_wanted
            && match portion {
                Portion::Pulse => {
                    let another = self.guest.is_some() || self.of_guest.is_some();
                    self.wants(Only::Pulse) && !another
                }
                Portion::Linux(guest, part) => {
                    self.wants_guest(guest) && self.of_guest.is_none_or(|wanted| wanted == part)
                }
            }
    }
}

/// On emulated hosts, or a row that says why not. `why` is why it isn't done on this machine itself.
fn rigged(parts: &mut Parts, args: &Args, why: &str) {
    let wanted = |host, portion: &Portion| args.wants_portion(host, *portion);
    let portions = Kernel::ALL.into_iter().flat_map(|host| {
        let portions = Portion::all(host).into_iter();
        portions.map(move |portion| (host, portion))
    });
    let portions: Vec<_> = portions
        .filter(|(host, portion)| wanted(*host, portion))
        .collect();
    if portions.is_empty() {
        return;
    }
    if let Some(missing) = rig::missing() {
        let why = format!("{why}; and {missing}");
        let name = "everything that takes an emulated host";
        parts.note(Figure::skipped(name, "", &why));
        return;
    }
    for (host, portion) in portions {
        let name = format!("{portion:?} on a host with {}", host.name());
        parts.take(&name, || figures_on(host, portion, args.quick));
    }
}

fn write_report(dir: &Path, report: &Report, table: &str) -> anyhow::Result<()> {
    let path = dir.join("report.json");
    std::fs::write(&path, serde_json::to_vec_pretty(report)?)
        .with_context(|| path.display().to_string())?;
    std::fs::write(dir.join("table.txt"), table)?;
    println!("{} s; {}", report.seconds, path.display());
    Ok(())
}
