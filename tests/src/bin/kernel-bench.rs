//! `make bench-kernel`: what of a swap of the host's kernel is ours, measured on an emulated host, as JSON and
//! as a picture; with `--parameters`, what parameters of its command line are worth to the next kernel.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, ensure};
use clap::Parser;
use serde_json::Value;
use stillpoint_images::packages::Kernel;
use stillpoint_tests::parameters::Parameters;
use stillpoint_tests::releases::root;
use stillpoint_tests::rig::emulator::ground;
use stillpoint_tests::rig::{self, Rig, order};
use stillpoint_tests::shares::Shares;

/// Pairs of kexecs into one kernel: an empty one, and a swap under guests.
#[derive(Debug, Parser)]
struct Args {
    /// The kernel: bookworm (6.1) or backports (the newest in trixie-backports).
    #[arg(long, default_value = "bookworm")]
    kernel: Kernel,
    /// How many pairs.
    #[arg(long, default_value_t = 5)]
    pairs: usize,
    /// Without the Debian guest.
    #[arg(long)]
    no_debian: bool,
    /// How long all of it may take, in seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = 1200)]
    time_limit: u64,
    /// Where the report and the picture go.
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// The largest share of ours, of the middle pair, in percent.
    #[arg(long, default_value_t = 15.0)]
    most: f64,
    /// Only draw the report again that is there.
    #[arg(long)]
    draw: bool,
    /// Measure empty kexecs with one parameter more on the command line each, in place of swaps.
    #[arg(long)]
    parameters: bool,
    /// How often each parameter; below 6 nothing can be told from chance.
    #[arg(long, default_value_t = 6)]
    rounds: usize,
    /// Words to try, in place of the usual ones; those that begin with `-` are taken out of the base line.
    #[arg(long = "with", value_name = "WORDS", allow_hyphen_values = true)]
    with: Vec<String>,
    /// Words that every kexec has.
    #[arg(long, value_name = "WORDS", default_value = "")]
    also: String,
}

/// What is tried. `mitigations=off` is measured as a fact: nobody is to switch them off for this.
const WORDS: [&str; 9] = [
    "-quiet",
    "-console=ttyS0",
    "lpj=",
    "no_timer_check",
    "cryptomgr.notests",
    "audit=0 nmi_watchdog=0",
    "random.trust_cpu=on",
    "rcupdate.rcu_expedited=1",
    "mitigations=off",
];

fn main() -> ExitCode {
    match told(&Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("kernel-bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn told(args: &Args) -> anyhow::Result<()> {
    let out = args
        .out
        .clone()
        .unwrap_or_else(|| root().join("target/bench-kernel"));
    std::fs::create_dir_all(&out).with_context(|| out.display().to_string())?;
    if args.parameters {
        return parameters(args, &out);
    }
    let path = out.join("report.json");
    let shares = Shares::of(&kept(args, &path, measure)?)?;
    let picture = out.join("phases.svg");
    std::fs::write(&picture, shares.picture())?;
    print!("{}", shares.table());
    println!("{}, {}", path.display(), picture.display());
    let share = shares.median_share() * 100.0;
    ensure!(
        share <= args.most,
        "our share of the middle pair is {share:.1} %, and at most {} % are promised",
        args.most
    );
    Ok(())
}

/// What `measure` gives, which is kept; or, with `--draw`, what an earlier run kept.
fn kept(
    args: &Args,
    path: &Path,
    measure: impl FnOnce(&Args) -> anyhow::Result<Value>,
) -> anyhow::Result<Value> {
    if !args.draw {
        let mut report = measure(args)?;
        report["ground"] = ground().into();
        std::fs::write(path, serde_json::to_vec_pretty(&report)?)?;
    }
    let bytes = std::fs::read(path).with_context(|| path.display().to_string())?;
    Ok(serde_json::from_slice(&bytes)?)
}

fn measure(args: &Args) -> anyhow::Result<Value> {
    let pairs = args.pairs.to_string();
    let mut command = vec![
        "scenario",
        "kexecs",
        "--into",
        args.kernel.name(),
        "--pairs",
        &pairs,
    ];
    if !args.no_debian {
        command.push("--debian");
    }
    let rig = Rig::new("bench-kernel", args.kernel)
        .memory_mib(2560)
        .scratch_mib(512)
        .carve_out_mib(512)
        .scenario()?
        .jump(args.kernel.name(), args.kernel, &["scenario", "kexecs"])
        .images(Kernel::Backports, &["vmlinux", "initramfs"])
        .command(&command)
        .time_limit(Duration::from_secs(args.time_limit))
        .live(true);
    rig.run()?.report()
}

/// What is measured stays beside what is made of it.
fn parameters(args: &Args, out: &Path) -> anyhow::Result<()> {
    let measured = out.join("parameters-measured.json");
    let told = Parameters::of(&kept(args, &measured, measure_parameters)?)?;
    let path = out.join("parameters.json");
    std::fs::write(&path, serde_json::to_vec_pretty(&told)?)?;
    print!("{}", told.table());
    println!("{}", path.display());
    Ok(())
}

fn measure_parameters(args: &Args) -> anyhow::Result<Value> {
    let rounds = args.rounds.to_string();
    let mut command = vec![
        "scenario",
        "parameters",
        "--into",
        args.kernel.name(),
        "--rounds",
        &rounds,
        "--also",
        &args.also,
    ];
    let with = match args.with.is_empty() {
        true => WORDS.to_vec(),
        false => args.with.iter().map(String::as_str).collect(),
    };
    let with: Vec<_> = with.iter().map(|words| format!("--with={words}")).collect();
    command.extend(with.iter().map(String::as_str));
    // Nothing else is run there: the less there is to unpack, the less a kexec differs from the next.
    let scenario = rig::program("scenario")?;
    let rig = Rig::new("bench-parameters", args.kernel)
        .memory_mib(1536)
        .scratch_mib(256)
        .file(scenario, format!("{}/target/release/scenario", order::ROOT))
        .jump(args.kernel.name(), args.kernel, &["scenario", "parameters"])
        .command(&command)
        .time_limit(Duration::from_secs(args.time_limit))
        .live(true);
    rig.run()?.report()
}
