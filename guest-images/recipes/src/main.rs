//! `images`: fetches Debian's packages and makes the images that test guests boot.

use std::cell::Cell;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context;
use clap::Parser;
use stillpoint_images::cache::Cache;
use stillpoint_images::guest::{GuestRecipe, Made};
use stillpoint_images::packages::{Kernel, Set, Unpacked};
use stillpoint_images::programs::Programs;
use stillpoint_images::progress::Progress;

/// Fetch Debian's packages and make the images that test guests boot.
///
/// Packages come from the mirror that this machine's apt is set up for, verified by apt, and are
/// kept in STILLPOINT_CACHE (or stillpoint in your cache folder). A second run does nothing.
#[derive(Debug, Parser)]
#[command(version)]
struct Args {
    /// Only this kernel: bookworm (6.1) or backports (the newest in trixie-backports).
    #[arg(long = "kernel", value_name = "NAME")]
    kernels: Vec<Kernel>,
    /// A static program that becomes /init in the guest; without it the guest gets a shell.
    #[arg(long, value_name = "PATH")]
    agent: Option<PathBuf>,
    /// A static program that becomes /bin/load in the guest.
    #[arg(long, value_name = "PATH")]
    load: Option<PathBuf>,
    /// Where the images go, a folder for each kernel.
    #[arg(long, value_name = "FOLDER", default_value = "target/images")]
    out: PathBuf,
    /// Choose all packages anew: newer kernels may have come.
    #[arg(long)]
    refresh: bool,
    /// Instead of images: build the kernel with live update for emulated hosts, of Debian's source (20 minutes of
    /// CPU time, and 2.5 GB of the cache meanwhile).
    #[arg(long)]
    luo: bool,
    /// One JSON object a line on standard output.
    #[arg(long)]
    json: bool,
}

fn main() -> ExitCode {
    let args = Args::parse();
    let progress = match args.json {
        true => Progress::Programs,
        false => Progress::People,
    };
    match make(&args, progress) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let text = format!("{error:#}");
            match args.json {
                true => println!("{}", serde_json::json!({"event": "error", "error": text})),
                false => eprintln!("images: {text}"),
            }
            ExitCode::FAILURE
        }
    }
}

fn make(args: &Args, progress: Progress) -> anyhow::Result<()> {
    let cache = Cache::of_this_user()?;
    if args.luo {
        return luo(&cache, args.refresh, progress);
    }
    let idle = Cell::new(true);
    let fetch = |set: Set| -> anyhow::Result<Unpacked> {
        idle.set(idle.get() && !args.refresh && set.cached(&cache).is_some());
        Ok(set.fetch(&cache, args.refresh, progress)?)
    };
    let busybox = fetch(Set::Busybox)?.busybox();
    // Guests need none of these; whoever runs `make images` wants to go offline afterwards.
    fetch(Set::Qemu)?;
    fetch(Set::Iproute)?;
    fetch(Set::Etcd)?;
    let kernels = match args.kernels.as_slice() {
        [] => &Kernel::ALL,
        some => some,
    };
    for &kernel in kernels {
        let recipe = GuestRecipe {
            kernel: fetch(Set::Kernel(kernel))?.kernel()?,
            busybox: busybox.clone(),
            agent: args.agent.clone(),
            load: args.load.clone(),
        };
        let written = write(&recipe, &args.out.join(kernel.name()), progress)?;
        idle.set(idle.get() && !written);
    }
    for (set, program) in [
        (Set::Curl, "usr/bin/curl"),
        (Set::Phc2sys, "usr/sbin/phc2sys"),
    ] {
        let step = progress.step(&format!("image of {}", set.name()), None);
        let made = Programs::of(&fetch(set)?, &[program]).make(&args.out.join(set.name()))?;
        if let Made::Written(bytes) = made {
            step.done(&format!("{} MB", bytes / 1_000_000));
        }
        idle.set(idle.get() && made == Made::Already);
    }
    if idle.get() {
        progress.note(&format!(
            "images: all there in {}, nothing to do",
            args.out.display()
        ));
    }
    Ok(())
}

fn luo(cache: &Cache, refresh: bool, progress: Progress) -> anyhow::Result<()> {
    let built = stillpoint_images::luo::build(cache, refresh, progress)?;
    progress.note(&format!(
        "kernel {}: {}",
        built.release,
        built.bzimage.display()
    ));
    Ok(())
}

/// Whether anything had to be written.
fn write(recipe: &GuestRecipe, dir: &Path, progress: Progress) -> anyhow::Result<bool> {
    let step = progress.step(&format!("image {}", recipe.kernel.release), None);
    let made = recipe
        .make(dir)
        .with_context(|| format!("making {}", dir.display()))?;
    if let Made::Written(bytes) = made {
        step.done(&format!(
            "{}, initramfs {} MB",
            dir.display(),
            bytes / 1_000_000
        ));
    }
    Ok(made != Made::Already)
}
