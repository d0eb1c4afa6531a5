//! A Debian guest at work lives through ten swaps: writes to its disk, speaks with the host, computes.

mod screen;

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use serde_json::Value;
use stillpoint_agent::protocol::{GapsSpec, Shutdown};
use stillpoint_tests::daemon::Daemon;
use stillpoint_tests::ground;
use stillpoint_tests::linux::images::{Files, Form, Kernel};
use stillpoint_tests::linux::network::{no_network_namespace, tap};
use stillpoint_tests::linux::workload::{InGuest, OnHost, verify_disk};
use stillpoint_tests::linux::{Linux, Recipe};
use stillpoint_tests::rig::Rig;

use crate::table::{self, Line, Moved, ms};
use screen::Screen;

const GUEST: &str = "web-1";
const SWAPS: usize = 10;
/// Both kernels are shown by the tests; the newer one boots sooner.
const KERNEL: Kernel = Kernel::Backports;
/// How long the emulated host may take for all of it.
const LIMIT: Duration = Duration::from_secs(600);

/// Why no Linux guest can be shown on this very host; `None` if it can.
pub(crate) fn missing() -> Option<String> {
    let images = Files::of(KERNEL).err().map(|error| error.to_string());
    images.or_else(no_network_namespace)
}

/// Tells the story here, or on an emulated host.
pub(crate) fn tell_anywhere() -> anyhow::Result<bool> {
    let Some(reason) = ground::no_fast_kvm() else {
        return tell();
    };
    println!("On an emulated host, since {reason}.\nIt boots; that takes some seconds.\n");
    let outcome = Rig::new("demo-linux", Kernel::Bookworm)
        .programs()?
        .images(KERNEL, &["vmlinux", "initramfs"])
        .command(&["demo", "--guest", "linux"])
        .time_limit(LIMIT)
        .live(true)
        .run()?;
    println!("The console of it all: {}", outcome.log.display());
    Ok(outcome.status == 0)
}

/// The story.
pub(crate) fn tell() -> anyhow::Result<bool> {
    let began = Instant::now();
    let dir = tempfile::Builder::new()
        .prefix("stillpoint-demo-")
        .tempdir()?;
    println!("A daemon of its own, in {}", dir.path().display());
    let daemon = Daemon::start_in_own_network(dir.path())?;
    let (guest, screen) = boot(&daemon, dir.path())?;
    let loads = Loads::start(&guest, &daemon, dir.path())?;
    let mut agent = guest.agent()?;
    let probe = agent.gaps_start(GapsSpec {
        duration_ms: 3_600_000,
        duty_percent: 20,
        threshold_us: 100,
    })?;
    println!(
        "\nIt writes to its disk and syncs, sends over its network, and computes. Meanwhile:\n"
    );
    let moved: Vec<Moved> = (0..SWAPS)
        .map(|_| one_swap(&daemon))
        .collect::<anyhow::Result<_>>()?;
    let gaps = agent.gaps_collect(probe.job, false)?;
    let longest = gaps.cpus.iter().filter_map(|cpu| cpu.longest.first());
    let longest = longest.map(|gap| Duration::from_nanos(gap.ns)).max();
    let mut lines = table::of_swaps(&moved, format!("{} of {SWAPS}", moved.len()));
    lines.push(Line::new(
        "longest time a program in the guest missed",
        longest.map_or("less than 0.1 ms".into(), ms),
        true,
    ));
    lines.extend(loads.finish(&guest)?);
    let disk = verify_disk(&dir.path().join("disk.img"), &dir.path().join("disk.out"))?;
    lines.push(Line::new(
        "the disk, looked at from the host",
        format!("{} durable blocks, {} lost", disk["durable"], disk["lost"]),
        disk["lost"] == 0,
    ));
    let complaints = guest.dmesg_is_clean();
    let text = complaints
        .as_ref()
        .map_or_else(|e| e.to_string(), |()| "none".to_owned());
    lines.push(Line::new(
        "complaints of the guest's kernel",
        text,
        complaints.is_ok(),
    ));
    println!("\n$ poweroff                     (in the guest)");
    agent.shutdown(Shutdown::Poweroff)?;
    guest.wait_off()?;
    drop(screen);
    Ok(table::print(&lines, began.elapsed()))
}

fn boot<'d>(daemon: &'d Daemon, dir: &Path) -> anyhow::Result<(Linux<'d>, Screen)> {
    tap(daemon, "sp-demo0", "10.77.0.1/24")?;
    let image = dir.join("disk.img");
    std::fs::File::create(&image)?.set_len(64 << 20)?;
    println!("\nA Debian guest with 2 vCPUs, a disk, a network interface and a vsock device");
    println!(
        "$ stillpoint run {GUEST} --cpus 2 --memory 256M --disk disk.img --net tap=sp-demo0 --vsock \
         --rng \\\n      --kernel vmlinux --initrd initramfs --cmdline \"console=ttyS0 ...\"\n"
    );
    let mut recipe = Recipe::new(KERNEL, Form::Vmlinux, 2)
        .disk(&image)
        .net("sp-demo0", "10.77.0.2/24")
        .open();
    recipe.cmdline += " loglevel=6";
    let screen = Screen::follow(daemon.guest_dir(GUEST).join("console.log"));
    let guest = Linux::boot(daemon, GUEST, &recipe)?;
    let health = guest.health()?;
    println!("\nIt runs Linux {}.", health.kernel);
    Ok((guest, screen))
}

struct Loads {
    in_guest: Vec<InGuest>,
    stream: OnHost,
}

impl Loads {
    fn start(guest: &Linux<'_>, daemon: &Daemon, dir: &Path) -> anyhow::Result<Self> {
        let serve = ["tcp", "serve", "--addr", "10.77.0.1:0"];
        let (stream, address) = OnHost::listen(daemon, &serve, &dir.join("serve.out"))?;
        let start = |name: &'static str, args: &[&str]| {
            InGuest::start(guest, name, args, &dir.join(format!("{name}.out")))
        };
        let in_guest = vec![
            start(
                "disk",
                &["disk", "--device", "/dev/vda", "--duration", "3600"],
            )?,
            start(
                "tcp",
                &["tcp", "send", "--addr", &address, "--seconds", "3600"],
            )?,
            start("cpu", &["cpu", "--seconds", "3600"])?,
        ];
        Ok(Self { in_guest, stream })
    }

    fn finish(self, guest: &Linux<'_>) -> anyhow::Result<Vec<Line>> {
        for load in &self.in_guest {
            load.wind_up(guest)?;
        }
        let lines = self.in_guest.into_iter().map(|load| {
            let name = load.name();
            let report = load.finish()?;
            Ok(Line::new(
                title(name),
                in_words(name, &report),
                report["ok"] == true,
            ))
        });
        let lines = lines.collect();
        drop(self.stream);
        lines
    }
}

fn title(load: &str) -> &'static str {
    match load {
        "disk" => "writes to the disk",
        "tcp" => "frames over one TCP connection",
        _ => "registers and results on each CPU",
    }
}

fn in_words(load: &str, report: &Value) -> String {
    match load {
        "disk" => format!(
            "{} written, {} durable, {} wrong, {} I/O errors",
            report["writes"], report["durable"], report["wrong"], report["io_errors"]
        ),
        "tcp" => format!(
            "{} sent, {} lost, {} doubled, {} corrupt",
            report["received"]["frames"],
            report["received"]["lost"],
            report["received"]["doubled"],
            report["received"]["corrupt"]
        ),
        _ => format!("{} rounds, {} wrong", report["iterations"], report["wrong"]),
    }
}

fn one_swap(daemon: &Daemon) -> anyhow::Result<Moved> {
    let shown = daemon.must(&["show", GUEST])?;
    let to = shown["release"].as_str().context("its release")?.to_owned();
    let args = ["swap", "vmm", GUEST, "--to", &to];
    let answer = daemon.must(&[&args[..], &["--budget", "20s"]].concat())?;
    let moved = Moved::read(&to, &answer).with_context(|| format!("{answer:#}"))?;
    ensure!(answer["state"] == "moved", "{answer:#}");
    println!("$ stillpoint {:<32} {moved}", args.join(" "));
    Ok(moved)
}
