//! PID 1 of an emulated host ([`stillpoint_tests::rig`]): mounts, loads modules, runs one command,
//! writes what it left in `/results` onto the results disk, and powers off.
//!
//! It never returns: a kernel whose init ends panics, which here is an end like another. What it says
//! begins with a mark, so that whoever follows the console knows how far it got.

use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use rustix::mount::{MountFlags, mount};
use rustix::system::{RebootCommand, finit_module, reboot};
use stillpoint_carveout::wall::tsc;
use stillpoint_images::programs::PROGRAMS;
use stillpoint_tests::rig::order::{
    ANSWER, Answer, CARVE_OUT, MARK, ORDER, Order, RESULTS_DISK, ROOT, SCRATCH_DISK, STAMPS,
    STILL_S, Stamps,
};

/// What it says besides what the command says.
fn say(text: &str) {
    println!("{MARK}{text}");
}

fn main() {
    if let Err(error) = live() {
        say(&format!("failed: {error:#}"));
    }
    rustix::fs::sync();
    if let Err(error) = reboot(RebootCommand::PowerOff) {
        say(&format!("powering off: {error}"));
    }
}

fn live() -> anyhow::Result<()> {
    let mut stamps = Stamps {
        init: tsc(),
        ..Stamps::default()
    };
    mount_all()?;
    load_modules()?;
    // A kernel that was swapped under nobody is complete here: what follows is ours.
    // Not kept: KVM's modules may be exchanged on this host, and whoever has it open is in the way.
    let opens = std::fs::File::open("/dev/kvm").is_ok();
    stamps.kvm = opens.then(tsc);
    let order: Order = serde_json::from_slice(&std::fs::read(ORDER).context(ORDER)?)?;
    keep_time(order.time_limit_s.map(Duration::from_secs));
    std::fs::create_dir_all("/results")?;
    busybox(&["ip", "link", "set", "lo", "up"])?;
    scratch(order.jumped)?;
    if order.carve_out {
        carve_out()?;
    }
    if !Path::new("/dev/kvm").exists() {
        say("there is no /dev/kvm on this host");
    }
    let up = std::fs::read_to_string("/proc/uptime").unwrap_or_default();
    say(&format!(
        "up after {} s",
        up.split('.').next().unwrap_or("?")
    ));
    stamps.command = tsc();
    std::fs::write(STAMPS, serde_json::to_vec(&stamps)?)?;
    let status = run(&order.command)?;
    say(&format!(
        "bringing out the results (the command ended with status {status})"
    ));
    bring_out(&Answer { status })?;
    say("powering off");
    Ok(())
}

fn mount_all() -> anyhow::Result<()> {
    let none = MountFlags::empty();
    for (kind, place) in [
        ("proc", "/proc"),
        ("sysfs", "/sys"),
        ("cgroup2", "/sys/fs/cgroup"),
        ("devtmpfs", "/dev"),
        ("devpts", "/dev/pts"),
        ("tmpfs", "/dev/shm"),
        ("tmpfs", "/run"),
        ("tmpfs", "/tmp"),
    ] {
        std::fs::create_dir_all(place).with_context(|| format!("creating {place}"))?;
        mount(kind, place, kind, none, None)
            .with_context(|| format!("mounting {kind} on {place}"))?;
    }
    Ok(())
}

/// In the order of `/modules.order`. Of KVM's two vendor modules the one that fits the CPU; the other
/// would only complain.
fn load_modules() -> anyhow::Result<()> {
    let cpu = std::fs::read_to_string("/proc/cpuinfo").context("/proc/cpuinfo")?;
    let has = |flag: &str| cpu.split_whitespace().any(|word| word == flag);
    for path in std::fs::read_to_string("/modules.order")
        .context("/modules.order")?
        .lines()
    {
        let fits = match Path::new(path).file_stem().and_then(|name| name.to_str()) {
            Some("kvm_amd") => has("svm"),
            Some("kvm_intel") => has("vmx"),
            _ => true,
        };
        let file = std::fs::File::open(path).with_context(|| path.to_owned())?;
        if let Err(error) = if fits {
            finit_module(&file, c"", 0)
        } else {
            Ok(())
        } {
            // Where it is missed, that shows better than here.
            say(&format!("loading {path}: {error}"));
        }
    }
    Ok(())
}

/// A thread that notices when this host got no time, and ends it when all others have forgotten it.
fn keep_time(limit: Option<Duration>) {
    let began = Instant::now();
    let forgotten = limit.map(|limit| limit + Duration::from_secs(60));
    std::thread::spawn(move || {
        loop {
            let before = Instant::now();
            std::thread::sleep(Duration::from_secs(1));
            let slept = before.elapsed().as_secs();
            if slept > STILL_S {
                say(&format!("the host stood still for {slept} s"));
            }
            if forgotten.is_some_and(|end| began.elapsed() > end) {
                say("nobody ended this host; powering off");
                let _ = reboot(RebootCommand::PowerOff);
            }
        }
    });
}

fn busybox(args: &[&str]) -> anyhow::Result<()> {
    let status = Command::new("/bin/busybox")
        .args(args)
        .status()
        .context("starting busybox")?;
    match status.success() {
        true => Ok(()),
        false => bail!("busybox {}: {status}", args.join(" ")),
    }
}

/// The disk with this serial number.
fn disk(serial: &str) -> Option<PathBuf> {
    let disks = std::fs::read_dir("/sys/block").ok()?.flatten();
    let of = |path: PathBuf| std::fs::read_to_string(path.join("serial")).unwrap_or_default();
    disks
        .filter(|disk| of(disk.path()).trim() == serial)
        .map(|disk| Path::new("/dev").join(disk.file_name()))
        .next()
}

/// Turns memory that the kernel left alone into a device-dax, as `ndctl create-namespace --mode devdax`
/// does. Where that was done under the kernel before, what it wrote there is found, and it is there.
fn carve_out() -> anyhow::Result<()> {
    let soon = Instant::now() + Duration::from_secs(2);
    while !Path::new(CARVE_OUT).exists() && Instant::now() < soon {
        std::thread::sleep(Duration::from_millis(20));
        if Path::new("/sys/bus/nd/drivers/nd_pmem/namespace0.0").exists() {
            break;
        }
    }
    if Path::new(CARVE_OUT).exists() {
        return Ok(());
    }
    let set = |path: String, text: &str| {
        std::fs::write(&path, text).with_context(|| format!("writing {text:?} to {path}"))
    };
    let nd = "/sys/bus/nd";
    set(format!("{nd}/drivers/nd_pmem/unbind"), "namespace0.0")?;
    let seed = std::fs::read_to_string(format!("{nd}/devices/region0/dax_seed"));
    let seed = seed.context("the region's seed")?;
    let dax = format!("{nd}/devices/{}", seed.trim());
    let uuid = std::fs::read_to_string("/proc/sys/kernel/random/uuid")?;
    for (name, text) in [
        ("align", "2097152"),
        ("mode", "ram"),
        ("uuid", uuid.trim()),
        ("namespace", "namespace0.0"),
    ] {
        set(format!("{dax}/{name}"), text)?;
    }
    set(format!("{nd}/drivers/dax_pmem/bind"), seed.trim())?;
    if !Path::new(CARVE_OUT).exists() {
        bail!("there is no {CARVE_OUT}");
    }
    Ok(())
}

/// Mounts the scratch disk, if there is one, with a new file system, unless the kernel before used it.
fn scratch(as_it_is: bool) -> anyhow::Result<()> {
    let Some(disk) = disk(SCRATCH_DISK) else {
        return Ok(());
    };
    let disk = disk.display().to_string();
    if !as_it_is {
        busybox(&["mke2fs", "-F", &disk])?;
    }
    std::fs::create_dir_all("/scratch")?;
    mount(disk.as_str(), "/scratch", "ext4", MountFlags::empty(), None).context("mounting /scratch")
}

/// Runs the command to its end. Its children become init's when it dies, and end with the host.
fn run(command: &[String]) -> anyhow::Result<i32> {
    let (program, args) = command
        .split_first()
        .context("there is no command in the order")?;
    let shown: String = command.join(" ").chars().take(60).collect();
    say(&format!(
        "running {}",
        shown.lines().next().unwrap_or_default()
    ));
    let path = format!("{ROOT}/target/release:/{PROGRAMS}:/bin");
    let child = Command::new("/bin/busybox")
        .args(["env", program])
        .args(args)
        .env("PATH", path)
        .env("HOME", "/root")
        .env("TERM", "linux")
        .env("STILLPOINT_ROOT", ROOT)
        // An emulated host, with a KVM that runs Linux.
        .env("STILLPOINT_LINUX", "1")
        .spawn()
        .with_context(|| format!("starting {program}"))?;
    let pid = i32::try_from(child.id()).context("a pid")?;
    loop {
        // Any child: those that others left behind would stay as zombies.
        let options = rustix::process::WaitOptions::empty();
        match rustix::process::wait(options) {
            Ok(Some((ended, status))) if ended.as_raw_nonzero().get() == pid => {
                let status = std::process::ExitStatus::from_raw(status.as_raw());
                let signal = status.signal().map(|signal| 128 + signal);
                return Ok(status.code().or(signal).unwrap_or(255));
            }
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => bail!("waiting for {program}: {error}"),
        }
    }
}

/// Writes `/results` onto its disk, the answer last: with it, everything is there.
fn bring_out(answer: &Answer) -> anyhow::Result<()> {
    let dmesg = Command::new("/bin/busybox").arg("dmesg").output();
    std::fs::write(
        "/results/dmesg.txt",
        dmesg.map(|out| out.stdout).unwrap_or_default(),
    )?;
    let path = disk(RESULTS_DISK).context("the results disk is missing")?;
    let disk = std::fs::OpenOptions::new().write(true).open(&path);
    let disk = disk.with_context(|| format!("opening {}", path.display()))?;
    let mut archive = tar::Builder::new(std::io::BufWriter::with_capacity(1 << 20, disk));
    archive.follow_symlinks(false);
    archive
        .append_dir_all("", "/results")
        .context("writing the results")?;
    let text = serde_json::to_vec(answer)?;
    let mut header = tar::Header::new_gnu();
    header.set_size(text.len() as u64);
    header.set_mode(0o644);
    archive.append_data(&mut header, ANSWER, text.as_slice())?;
    let writer = archive.into_inner()?;
    let disk = writer.into_inner().map_err(|error| error.into_error())?;
    disk.sync_all().context("writing the results")
}
