//! What a scenario in several stages has in common, each under another kernel of the host: what it keeps on
//! the scratch disk, the kernels to jump into, and when the host was how far.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use stillpoint_carveout::wall::{self, Carried, Point};
use stillpoint_control::client::Client;
use stillpoint_tests::daemon::{Answer, Daemon};
use stillpoint_tests::guest::Snapshot;
use stillpoint_tests::releases::{self, Release};
use stillpoint_tests::rig::crash;
use stillpoint_tests::rig::order::{CARVE_OUT, JUMPS, ROOT, STAMPS, Stamps};

/// Where the daemon lives, on a disk that every kernel has.
pub(crate) const HOST: &str = "/scratch/host";
/// Where kernels lie that any kernel can jump into, this one again among them: an initramfs can't hold
/// itself.
const KERNELS: &str = "/scratch/jump";
/// Where guests' images lie, which no kernel that is jumped into needs in its initramfs.
const IMAGES: &str = "/scratch/images";

/// On the first host: what later ones need is put where they find it.
pub(crate) fn lay_out() -> anyhow::Result<()> {
    for (from, to) in [
        (JUMPS.to_owned(), KERNELS),
        (format!("{ROOT}/target/images"), IMAGES),
    ] {
        if Path::new(&from).is_dir() {
            copy(Path::new(&from), Path::new(to))?;
        }
    }
    Ok(())
}

fn copy(from: &Path, to: &Path) -> anyhow::Result<()> {
    if from.is_dir() {
        std::fs::create_dir_all(to)?;
        for entry in std::fs::read_dir(from)? {
            let name = entry?.file_name();
            copy(&from.join(&name), &to.join(&name))?;
        }
        return Ok(());
    }
    let done = std::fs::copy(from, to);
    done.with_context(|| format!("{} to {}", from.display(), to.display()))?;
    Ok(())
}

/// On later hosts: guests' images, where the harness looks for them.
pub(crate) fn find_images() -> anyhow::Result<()> {
    let place = PathBuf::from(ROOT).join("target/images");
    if Path::new(IMAGES).is_dir() && !place.exists() {
        std::os::unix::fs::symlink(IMAGES, place)?;
    }
    Ok(())
}

/// Image and initramfs of a kernel to jump into.
pub(crate) fn kernel(name: &str) -> anyhow::Result<[PathBuf; 2]> {
    let folder = Path::new(KERNELS).join(name);
    let files = ["bzImage", "initramfs"].map(|file| folder.join(file));
    ensure!(
        files.iter().all(|file| file.is_file()),
        "there is no kernel to jump into in {}",
        folder.display()
    );
    Ok(files)
}

/// What an earlier stage kept, if one did.
pub(crate) fn kept<T: DeserializeOwned>(path: &str) -> anyhow::Result<Option<T>> {
    match std::fs::read(path) {
        Ok(bytes) => Ok(Some(
            serde_json::from_slice(&bytes).with_context(|| path.to_owned())?,
        )),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error).context(path.to_owned()),
    }
}

/// Keeps it for the next stage.
pub(crate) fn keep<T: Serialize>(path: &str, what: &T) -> anyhow::Result<()> {
    std::fs::write(path, serde_json::to_vec(what)?)?;
    rustix::fs::sync();
    Ok(())
}

/// A daemon with the host's carve-out; guests that came by a jump run when it answers.
pub(crate) fn daemon() -> anyhow::Result<Daemon> {
    std::fs::create_dir_all(HOST)?;
    Daemon::start_with(Path::new(HOST), &["--carve-out", CARVE_OUT])
}

/// A daemon that has only what the host's kernel gives it, and somebody who holds its descriptors.
pub(crate) fn daemon_without_carve_out() -> anyhow::Result<Daemon> {
    std::fs::create_dir_all(HOST)?;
    Daemon::start_with_fd_store(Path::new(HOST))
}

/// A daemon with these arguments after one that died while it adopted: as soon as one of these guests ran, of which no
/// more could be told. `held`: with somebody who holds its descriptors.
pub(crate) fn daemon_after_one_that_died_adopting(
    guests: &[&str],
    more: &[&str],
    held: bool,
) -> anyhow::Result<Daemon> {
    const GLANCE: Duration = Duration::from_millis(20);
    std::fs::create_dir_all(HOST)?;
    let host = Path::new(HOST);
    let runs = |name: &&str| {
        let socket = host.join("run/vms").join(name).join("control.sock");
        let vmm = Client::connect(&socket, GLANCE);
        vmm.is_ok_and(|vmm| vmm.hello(None).is_ok())
    };
    let seen = || guests.iter().any(runs);
    let daemon = Daemon::start_after_one_that_died(host, more, held, seen)?;
    let log = daemon.log();
    ensure!(
        log.contains("a daemon before this one revived it"),
        "it died before that or after it:\n{log}"
    );
    println!("scenario: the daemon died while it adopted, and the next one found who ran");
    Ok(daemon)
}

/// Adds the release that guests are run by.
pub(crate) fn add_release(daemon: &Daemon) -> anyhow::Result<()> {
    let release = Release::Current.binary()?.display().to_string();
    daemon.must(&["release", "add", "--unsigned", &release])?;
    Ok(())
}

/// Starts a bare-metal guest of two vCPUs in the carve-out.
pub(crate) fn run_pulse(daemon: &Daemon, name: &str, more: &[&str]) -> anyhow::Result<Snapshot> {
    let image = releases::pulse()?.display().to_string();
    let machine = ["--cpus", "2", "--memory", "64M", "--survive", "kernel"];
    let boot = ["--kernel", &image, "--cmdline", "pulse ram=16M duty=40"];
    daemon.must(&[&["run", name], &machine[..], &boot, more].concat())?;
    let pulse = daemon.pulse(name)?;
    pulse.wait_online(2)?;
    pulse.wait_progress(&[0, 1], 10)
}

/// What a guest of bare metal complains of. Not that a timer fired early: on an emulated host KVM itself does that,
/// now and then, swapped or not (`clocks/figures/swaps.rs`).
pub(crate) fn faults(seen: &Snapshot) -> Vec<String> {
    let mut faults = seen.faults();
    faults.retain(|fault| !fault.contains("timers early"));
    faults
}

/// Has the host jump under its guests; returns only if it is still there.
pub(crate) fn swap_kernel(daemon: &Daemon, into: &str, more: &[&str]) -> anyhow::Result<Answer> {
    let [image, initrd] = kernel(into)?.map(|path| path.display().to_string());
    let swap = [
        "swap", "kernel", "--kernel", &image, "--initrd", &initrd, "--budget", "30s",
    ];
    daemon.stillpoint(&[&swap[..], more].concat())
}

/// Jumps with nobody on the host; `keep` keeps from when on it counts. Returns only an error.
pub(crate) fn jump_empty<T>(
    into: &str,
    command_line: &str,
    keep: impl FnOnce(Line) -> anyhow::Result<()>,
) -> anyhow::Result<T> {
    let [image, initrd] = kernel(into)?;
    let early = wall::now();
    crash::load(&image, &initrd, command_line)?;
    // Nothing is left to be written but these few bytes.
    rustix::fs::sync();
    keep(Line::from(early))?;
    crash::jump()?;
    bail!("the host is still here")
}

/// The newest swap of the host.
pub(crate) fn last_swap(daemon: &Daemon) -> anyhow::Result<Value> {
    let swaps = daemon.must(&["host", "changes"])?;
    let swaps = swaps.as_array().into_iter().flatten();
    let newest = swaps.max_by_key(|swap| swap["asked_at_unix_ns"].as_u64());
    Ok(newest.context("no swap of the host is known")?.clone())
}

/// What the daemon logged, for who looks at it later.
pub(crate) fn bring_out_log() -> anyhow::Result<()> {
    std::fs::copy(
        Path::new(HOST).join("stillpointd.log"),
        "/results/stillpointd.log",
    )?;
    Ok(())
}

/// A line through two readings of TSC and wall clock of the kernel before, by which this one's are told.
#[derive(Clone, Copy, Debug, Serialize, serde::Deserialize)]
pub(crate) struct Line(Carried);

impl Line {
    /// From a reading of some time ago to now.
    pub(crate) fn from(early: Point) -> Self {
        let late = wall::now();
        Self(Carried { early, late })
    }

    /// From the line's end to this TSC.
    pub(crate) fn since(&self, tsc: u64) -> anyhow::Result<Duration> {
        self.between(self.0.late.tsc, tsc)
    }

    /// Between two readings of the TSC.
    pub(crate) fn between(&self, from: u64, to: u64) -> anyhow::Result<Duration> {
        let at = |tsc| self.0.real_ns_at(tsc).context("the readings make no line");
        let ns = at(to)? - at(from)?;
        Ok(Duration::from_nanos(
            u64::try_from(ns).context("the TSC went back")?,
        ))
    }
}

/// When this host's init was how far.
pub(crate) fn stamps() -> anyhow::Result<Stamps> {
    kept(STAMPS)?.context("this host's init left no stamps: it is an older one's")
}

/// How long this kernel has been up.
pub(crate) fn uptime() -> anyhow::Result<Duration> {
    let up = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    Ok(Duration::try_from(up)?)
}
