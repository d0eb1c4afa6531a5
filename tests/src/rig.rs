//! The rig: a host of its own for a test, emulated by QEMU, with KVM inside.
//!
//! It boots a stock Debian kernel with an initramfs that holds our static programs, the kernel's
//! modules, guest images, and `rig-init`, which runs one command. What the command prints is seen
//! live and kept in a log; what it leaves in `/results` is brought out.
//!
//! Where this machine's KVM is hardware and nests, the host runs on it. Elsewhere QEMU translates
//! (TCG, with AMD's SVM and nested paging), slowly; and on a busy machine such a host may get no time
//! at all. One that says so, or never got to its init, is started once more, and that is said. So is one
//! that died without an answer, where a test wants it: no program of ours can kill a kernel.
//!
//! | module | what it holds |
//! |---|---|
//! | [`order`] | what the host's init is told, and answers |
//! | [`archive`] | the host's initramfs |
//! | [`crash`] | a host that crashes and keeps its memory |
//! | [`emulator`] | how QEMU is started |
//! | `sound` | what is mended in QEMU's emulation of SVM |
//! | [`watch`] | its console, followed to the end or the time limit |
//! | [`results`] | what comes out |
//! | `peer` | who is outside the host, for its guests to talk to |
//!
//! Everything of a run is in `target/rig/NAME/`: `console.log`, `qemu.log`, `results/`, and `first/`
//! with the log of a first run that stood still or died.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, bail};
use serde::de::DeserializeOwned;
use stillpoint_images::cache::Cache;
use stillpoint_images::packages::{FetchError, Kernel, Set, Unpacked};
use stillpoint_images::progress::Progress;
use stillpoint_images::qemu::Qemu;
use stillpoint_images::unpack::KernelFiles;

use crate::releases::root;

pub mod archive;
pub mod crash;
pub mod emulator;
pub mod order;
mod peer;
pub mod results;
mod sound;
pub mod watch;

use order::Order;
use peer::Peer;
use watch::{End, Watched};

/// A host to be emulated, and what it is to do.
#[derive(Clone, Debug)]
pub struct Rig {
    name: String,
    kernel: Kernel,
    cpus: u8,
    memory_mib: u32,
    scratch_mib: u32,
    carve_out_mib: u32,
    carve_out_later: bool,
    jumps: Vec<Jump>,
    files: Vec<(PathBuf, String)>,
    with_qemu: bool,
    with_peer: bool,
    order: Order,
    live: bool,
    again_if_it_dies: bool,
}

/// A kernel that the host can jump into.
#[derive(Clone, Debug)]
struct Jump {
    name: String,
    kernel: Kernel,
    command: Vec<String>,
    files: Vec<(PathBuf, String)>,
    /// What can be jumped into from there.
    next: Vec<Jump>,
}

/// What came of a command on an emulated host.
#[derive(Debug)]
pub struct Outcome {
    /// The command's exit status; of a signal, 128 more than its number.
    pub status: i32,
    /// What it left in `/results`, and the host's `dmesg.txt`.
    pub results: PathBuf,
    /// All that the host's console said.
    pub log: PathBuf,
    /// Whether a first host stood still or died, and this is the second's.
    pub retried: bool,
}

impl Outcome {
    /// What its console said, if the command succeeded; otherwise an error with what failed.
    pub fn succeeded(&self) -> anyhow::Result<String> {
        let console =
            std::fs::read_to_string(&self.log).with_context(|| self.log.display().to_string())?;
        if self.status != 0 {
            bail!(
                "status {} of the command on the emulated host; its console is in {}:\n{}",
                self.status,
                self.log.display(),
                watch::what_failed(&console)
            );
        }
        Ok(console)
    }

    /// The report that the command left, if it succeeded; otherwise an error as of [`Self::succeeded`].
    pub fn report<T: DeserializeOwned>(&self) -> anyhow::Result<T> {
        self.succeeded()?;
        let path = self.results.join("report.json");
        let report = std::fs::read(&path).with_context(|| path.display().to_string())?;
        Ok(serde_json::from_slice(&report)?)
    }
}

/// What the packages give.
#[derive(Debug)]
pub(crate) struct Ingredients {
    pub(crate) kernel: KernelFiles,
    pub(crate) busybox: PathBuf,
    pub(crate) iproute: Unpacked,
    pub(crate) qemu: Qemu,
}

/// One of our programs as `make rig-static` builds them: for a host without libraries.
pub fn program(name: &str) -> anyhow::Result<PathBuf> {
    let path = root().join("target/static").join(name);
    if !path.is_file() {
        bail!("{} is not built; run `make rig-static`", path.display());
    }
    Ok(path)
}

impl Rig {
    /// A host with this kernel, 2 CPUs and 2 GiB. `name` names its folder below `target/rig`.
    pub fn new(name: &str, kernel: Kernel) -> Self {
        Self {
            name: name.to_owned(),
            kernel,
            cpus: 2,
            memory_mib: 2048,
            scratch_mib: 0,
            carve_out_mib: 0,
            carve_out_later: false,
            jumps: Vec::new(),
            files: Vec::new(),
            with_qemu: false,
            with_peer: false,
            order: Order::default(),
            live: std::env::var_os("STILLPOINT_RIG_LIVE").is_some(),
            again_if_it_dies: false,
        }
    }

    /// So many CPUs.
    #[must_use]
    pub fn cpus(mut self, cpus: u8) -> Self {
        self.cpus = cpus;
        self
    }

    /// So much memory.
    #[must_use]
    pub fn memory_mib(mut self, mib: u32) -> Self {
        self.memory_mib = mib;
        self
    }

    /// A disk of this size, mounted at `/scratch`: unlike a tmpfs it takes `O_DIRECT` on every kernel.
    #[must_use]
    pub fn scratch_mib(mut self, mib: u32) -> Self {
        self.scratch_mib = mib;
        self
    }

    /// So much memory that no kernel counts as its own, as a device-dax.
    #[must_use]
    pub fn carve_out_mib(mut self, mib: u32) -> Self {
        self.carve_out_mib = mib;
        self.order.carve_out = true;
        self
    }

    /// Kernels that are jumped into have one, by their command line; the first has none.
    #[must_use]
    pub fn carve_out_later(mut self) -> Self {
        self.carve_out_later = true;
        self
    }

    /// This kernel to jump into, and what is run there; image and initramfs lie in `/jump/NAME`. What
    /// the host has been given by then, its initramfs has too.
    #[must_use]
    pub fn jump<S: AsRef<str>>(mut self, name: &str, kernel: Kernel, words: &[S]) -> Self {
        self.jumps.push(Jump {
            name: name.to_owned(),
            kernel,
            command: words.iter().map(|word| word.as_ref().to_owned()).collect(),
            files: self.files.clone(),
            next: Vec::new(),
        });
        self
    }

    /// As [`Rig::jump`], to be jumped into from the kernel that was given last.
    #[must_use]
    pub fn then_jump<S: AsRef<str>>(self, name: &str, kernel: Kernel, words: &[S]) -> Self {
        let mut rig = self.jump(name, kernel, words);
        if let Some(next) = rig.jumps.pop()
            && let Some(before) = rig.jumps.last_mut()
        {
            before.next.push(next);
        }
        rig
    }

    /// A file of this machine, or a folder with all in it, at this place on the host.
    #[must_use]
    pub fn file(mut self, from: impl Into<PathBuf>, to: impl Into<String>) -> Self {
        self.files.push((from.into(), to.into()));
        self
    }

    /// Our static programs and pulse, and what they are held to, where the harness expects them below
    /// [`order::ROOT`].
    pub fn programs(self) -> anyhow::Result<Self> {
        program("stillpointd")?;
        let built = root().join("target/static");
        let promises = "SPECIFICATION.md";
        let mut rig = self.file(root().join(promises), format!("{}/{promises}", order::ROOT));
        for name in ["compat", "current", "faulty", "pulse"] {
            let place = format!("target/releases/{name}");
            rig = rig.file(root().join(&place), format!("{}/{place}", order::ROOT));
        }
        for entry in std::fs::read_dir(&built).with_context(|| built.display().to_string())? {
            let (path, name) = entry.map(|entry| (entry.path(), entry.file_name()))?;
            if path.is_file() {
                let to = format!("{}/target/release/{}", order::ROOT, name.to_string_lossy());
                rig = rig.file(path, to);
            }
        }
        Ok(rig)
    }

    /// Those programs alone that a scenario needs: less to load for a kernel that is jumped into.
    pub fn scenario(self) -> anyhow::Result<Self> {
        let at = |place: &str| format!("{}/target/{place}", order::ROOT);
        let mut rig = self
            .file(root().join("target/releases/pulse"), at("releases/pulse"))
            .file(
                root().join("target/releases/current"),
                at("releases/current"),
            );
        for name in ["stillpoint", "stillpointd", "scenario", "load"] {
            rig = rig.file(program(name)?, at(&format!("release/{name}")));
        }
        Ok(rig)
    }

    /// Files of a guest's images, such as `bzImage` and `initramfs`, below `/images/KERNEL`.
    #[must_use]
    pub fn images(mut self, kernel: Kernel, names: &[&str]) -> Self {
        for name in names {
            let from = root().join("target/images").join(kernel.name()).join(name);
            self = self.file(
                from,
                format!("{}/target/images/{}/{name}", order::ROOT, kernel.name()),
            );
        }
        self
    }

    /// An archive for guests' initramfs.
    #[must_use]
    pub fn archive(self, name: &str) -> Self {
        let to = format!("{}/target/images/{name}", order::ROOT);
        self.file(crate::linux::images::archive(name), to)
    }

    /// QEMU too, as `/bin/qemu-microvm`: to see how another VMM does.
    #[must_use]
    pub fn with_qemu(mut self) -> Self {
        self.with_qemu = true;
        self
    }

    /// With a network, and servers outside the host ([`order::Outside`]).
    #[must_use]
    pub fn with_peer(mut self) -> Self {
        self.with_peer = true;
        self
    }

    /// What is to be run there.
    #[must_use]
    pub fn command<S: AsRef<str>>(mut self, words: &[S]) -> Self {
        self.order.command = words.iter().map(|word| word.as_ref().to_owned()).collect();
        self
    }

    /// How long all of it may take, the boot too.
    #[must_use]
    pub fn time_limit(mut self, limit: Duration) -> Self {
        self.order.time_limit_s = Some(limit.as_secs());
        self
    }

    /// Started once more also if the host's kernel panics or its processors reset, which is the
    /// emulator's doing and no program's. What the command itself answers is never asked for again.
    #[must_use]
    pub fn again_if_it_dies(mut self) -> Self {
        self.again_if_it_dies = true;
        self
    }

    /// Whether its console is shown as it comes.
    #[must_use]
    pub fn live(mut self, live: bool) -> Self {
        self.live = live;
        self
    }

    /// Where everything of this run is.
    pub fn dir(&self) -> PathBuf {
        root().join("target/rig").join(&self.name)
    }

    /// Boots the host, runs the command, brings out what it left.
    pub fn run(&self) -> anyhow::Result<Outcome> {
        let found = ingredients(self.kernel, Progress::Silent)?;
        let dir = self.dir();
        let _alone = self.alone()?;
        let _ = std::fs::remove_dir_all(&dir);
        std::fs::create_dir_all(&dir).with_context(|| dir.display().to_string())?;
        let watched = self.once(&found, &dir)?;
        let died = self.again_if_it_dies && watched.end == End::ByItself;
        if !((watched.stalled || died) && self.answer(&dir).is_err()) {
            return self.outcome(&dir, &watched, false);
        }
        let how = if watched.stalled {
            "stood still"
        } else {
            "died"
        };
        eprintln!(
            "rig {}: the emulated host {how} ({}); trying once more",
            self.name, watched.phase
        );
        let first = dir.join("first");
        std::fs::create_dir_all(&first)?;
        std::fs::rename(dir.join("console.log"), first.join("console.log"))?;
        let watched = self.once(&found, &dir)?;
        self.outcome(&dir, &watched, true)
    }

    /// A shell on the host, at this terminal. The terminal is as it was afterwards.
    pub fn shell(&self) -> anyhow::Result<()> {
        let found = ingredients(self.kernel, Progress::People)?;
        let dir = self.dir();
        let _alone = self.alone()?;
        std::fs::create_dir_all(&dir).with_context(|| dir.display().to_string())?;
        let size = rustix::termios::tcgetwinsize(std::io::stdin()).ok();
        let mut rig = self
            .clone()
            .command(&order::shell(size.map(|size| (size.ws_row, size.ws_col))));
        rig.order.time_limit_s = None;
        rig.lay_out(&found, &dir)?;
        println!(
            "A shell on an emulated host ({}, {}).\nLeave it by `exit`, which powers the host off, \
             or at any moment by Ctrl-a x.\n",
            found.kernel.release,
            emulator::ground()
        );
        let before = rustix::termios::tcgetattr(std::io::stdin()).ok();
        let ended = rig.emulator(&found, &dir).interactive().status();
        if let Some(before) = before {
            let now = rustix::termios::OptionalActions::Now;
            let _ = rustix::termios::tcsetattr(std::io::stdin(), now, &before);
        }
        clear(&dir);
        ended.context("starting QEMU")?;
        Ok(())
    }

    /// Two runs of one name would write over each other; the lock is held until it is dropped.
    fn alone(&self) -> anyhow::Result<File> {
        let folder = root().join("target/rig");
        std::fs::create_dir_all(&folder).with_context(|| folder.display().to_string())?;
        let path = folder.join(format!("{}.lock", self.name));
        let file = File::create(&path).with_context(|| path.display().to_string())?;
        let busy = || format!("another run of the rig called {:?} is under way", self.name);
        file.try_lock().with_context(busy)?;
        Ok(file)
    }

    fn emulator<'a>(&self, found: &'a Ingredients, dir: &'a Path) -> emulator::Emulator<'a> {
        emulator::Emulator {
            qemu: &found.qemu,
            bzimage: &found.kernel.bzimage,
            dir,
            cpus: self.cpus,
            memory_mib: self.memory_mib,
            scratch: self.scratch_mib > 0,
            carve_out_mib: self.carve_out_mib,
            live_update: self.kernel == Kernel::Luo,
            network: self.with_peer,
        }
    }

    /// Writes what QEMU is given.
    fn lay_out(&self, found: &Ingredients, dir: &Path) -> anyhow::Result<()> {
        let mut files = self.files.clone();
        if self.with_qemu {
            files.extend(found.qemu.microvm());
        }
        for jump in &self.jumps {
            files.extend(self.lay_out_jump(jump, dir)?);
        }
        archive::write(&dir.join("initramfs"), found, &files, &self.order)?;
        sound::build(dir)?;
        results::make_disk(&dir.join("results.raw"), results::DISK_MIB)?;
        if self.scratch_mib > 0 {
            results::make_disk(&dir.join("scratch.raw"), self.scratch_mib)?;
        }
        Ok(())
    }

    /// Writes what the host jumps into; gives it as files of the host.
    fn lay_out_jump(&self, jump: &Jump, dir: &Path) -> anyhow::Result<[(PathBuf, String); 2]> {
        let found = ingredients(jump.kernel, Progress::Silent)?;
        let order = Order {
            command: jump.command.clone(),
            jumped: true,
            carve_out: self.order.carve_out || self.carve_out_later,
            ..self.order.clone()
        };
        let path = dir.join(format!("jump-{}", jump.name));
        let mut files = jump.files.clone();
        for next in &jump.next {
            files.extend(self.lay_out_jump(next, dir)?);
        }
        archive::write(&path, &found, &files, &order)?;
        let to = |file: &str| format!("{}/{}/{file}", order::JUMPS, jump.name);
        Ok([
            (path, to("initramfs")),
            (found.kernel.bzimage.clone(), to("bzImage")),
        ])
    }

    fn once(&self, found: &Ingredients, dir: &Path) -> anyhow::Result<Watched> {
        // Until the host is over.
        let peer = self.with_peer.then(Peer::start).transpose()?;
        let mut rig = self.clone();
        rig.order.outside = peer.as_ref().map(Peer::outside);
        rig.lay_out(found, dir)?;
        let command = self.emulator(found, dir).batch();
        let limit = self.order.time_limit_s.map(Duration::from_secs);
        let watched = watch::follow(command, &dir.join("console.log"), limit, self.live)?;
        results::unpack(&dir.join("results.raw"), &dir.join("results"))?;
        clear(dir);
        Ok(watched)
    }

    fn answer(&self, dir: &Path) -> anyhow::Result<order::Answer> {
        results::answer(&dir.join("results"))
    }

    fn outcome(&self, dir: &Path, watched: &Watched, retried: bool) -> anyhow::Result<Outcome> {
        let log = dir.join("console.log");
        match (self.answer(dir), &watched.end) {
            (Ok(answer), End::ByItself) => Ok(Outcome {
                status: answer.status,
                results: dir.join("results"),
                log,
                retried,
            }),
            (_, end) => bail!(
                "rig {}: the emulated host {end} while {}{}; its console is in {}, and ended so:\n{}",
                self.name,
                watched.phase,
                if retried {
                    " (the second try: the first stood still or died)"
                } else {
                    ""
                },
                log.display(),
                watched.tail()
            ),
        }
    }
}

/// Removes what only QEMU needed; it is large.
fn clear(dir: &Path) {
    for name in ["initramfs", "results.raw", "scratch.raw", "sound.so"] {
        let _ = std::fs::remove_file(dir.join(name));
    }
    let left = std::fs::read_dir(dir).into_iter().flatten().flatten();
    for entry in left.filter(|entry| entry.file_name().as_encoded_bytes().starts_with(b"jump-")) {
        let _ = std::fs::remove_file(entry.path());
    }
}

pub(crate) fn ingredients(kernel: Kernel, progress: Progress) -> anyhow::Result<Ingredients> {
    let cache = Cache::of_this_user()?;
    Ok(Ingredients {
        kernel: Set::Kernel(kernel)
            .fetch(&cache, false, progress)?
            .kernel()?,
        busybox: Set::Busybox.fetch(&cache, false, progress)?.busybox(),
        iproute: Set::Iproute.fetch(&cache, false, progress)?,
        qemu: Qemu::of(&Set::Qemu.fetch(&cache, false, progress)?),
    })
}

/// Why there can be no rig with live update here, for [`crate::needs!`].
pub fn missing_luo() -> Option<String> {
    let not_built = |error: anyhow::Error| match error.downcast_ref::<FetchError>() {
        Some(FetchError::NotBuilt) => Some(error.to_string()),
        _ => None,
    };
    let kernel = ingredients(Kernel::Luo, Progress::Silent);
    missing().or_else(|| kernel.err().and_then(not_built))
}

/// Why there can be no rig here, for [`crate::needs!`]: packages that are neither in the cache nor
/// to be had. What else is wrong with them fails the test that finds it.
pub fn missing() -> Option<String> {
    let tried = Kernel::ALL.map(|kernel| ingredients(kernel, Progress::Silent));
    tried.into_iter().filter_map(Result::err).find_map(|error| {
        let fetching = error.downcast_ref::<FetchError>()?;
        let unreachable = matches!(fetching, FetchError::Mirror(_) | FetchError::Apt { .. });
        unreachable.then(|| format!("no packages for the rig: {error:#}"))
    })
}
