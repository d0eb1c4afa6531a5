//! A VMM process with its guest. How it is swapped is in [`crate::swap`].

use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::{Child, ExitStatus};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, ensure};
use stillpoint_carveout::layout::DIRECTORY;
use stillpoint_carveout::record;
use stillpoint_control::client::Client;
use stillpoint_control::clock::ClockSpec;
use stillpoint_control::ownership::{Owner, Ownership};
use stillpoint_control::spec::{CarveOutSpec, KernelSpec, MachineSpec, MemorySpec, Pages, Survive};

use crate::devices::Devices;
use crate::guest::Pulse;
use crate::patience::{self, PATIENCE};
use crate::releases::{self, Release};
use crate::start::{Manner, command, copy_for_all, start, wait_ready};

/// A guest to boot.
#[derive(Clone, Debug)]
pub struct Recipe {
    /// vCPUs.
    pub cpus: u8,
    /// RAM, MiB.
    pub memory_mib: u64,
    /// What its RAM lies in.
    pub pages: Pages,
    /// It is never swapped out.
    pub lock_memory: bool,
    /// The host's memory nodes that it comes from.
    pub memory_nodes: Vec<u16>,
    /// pulse's command line.
    pub cmdline: String,
    /// The release that boots it.
    pub release: Release,
    /// Another image than pulse as it was built.
    pub kernel: Option<PathBuf>,
    /// How all VMMs of this guest are started.
    pub manner: Manner,
    /// Its virtio devices.
    pub devices: Devices,
    /// Its clock.
    pub clock: ClockSpec,
    /// What its RAM lies in.
    pub ram: Ram,
}

/// What a guest's RAM lies in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Ram {
    /// A memfd, which ends with the kernel.
    #[default]
    Plain,
    /// A carve-out, a file in the guest's folder.
    Carved,
    /// A memfd that live update could keep: its record lies behind RAM.
    Kept,
}

impl Recipe {
    /// Pulse with this many vCPUs and this command line.
    pub fn pulse(cpus: u8, cmdline: &str) -> Self {
        let cmdline = format!("pulse {cmdline}");
        Self {
            cpus,
            memory_mib: 128,
            pages: Pages::default(),
            lock_memory: false,
            memory_nodes: Vec::new(),
            cmdline,
            release: Release::Current,
            kernel: None,
            manner: Manner::default(),
            devices: Devices::default(),
            clock: ClockSpec::default(),
            ram: Ram::default(),
        }
    }

    fn spec(&self, kernel: PathBuf) -> MachineSpec {
        MachineSpec {
            name: "pulse".into(),
            cpus: self.cpus,
            memory: MemorySpec {
                size: self.memory_mib << 20,
                pages: self.pages,
                lock: self.lock_memory,
                nodes: self.memory_nodes.clone(),
                ..MemorySpec::default()
            },
            kernel: KernelSpec {
                path: kernel,
                initrd: None,
                cmdline: self.cmdline.clone(),
            },
            disks: self.devices.disks.clone(),
            nets: self.devices.nets.clone(),
            vsock: self.devices.vsock,
            rng: self.devices.rng,
            clock: self.clock.clone(),
            blackout_budget: Duration::from_secs(5),
        }
    }
}

/// A running VMM.
#[derive(Debug)]
pub struct Vm {
    pub(crate) child: Child,
    pub(crate) dir: tempfile::TempDir,
    pub(crate) swaps: u64,
    pub(crate) manner: Manner,
    spec: MachineSpec,
    /// The guest's own notes.
    pub pulse: Arc<Pulse>,
    /// The ownership page, as the daemon holds it.
    pub ownership: Ownership,
}

impl Vm {
    /// Boots pulse and waits until it is up: its table is there.
    pub fn boot(recipe: &Recipe) -> anyhow::Result<Self> {
        Self::boot_in(tempfile::tempdir()?, recipe)
    }

    /// Boots it in a directory of which `vm` is, or will be, the guest's.
    pub fn boot_in(dir: tempfile::TempDir, recipe: &Recipe) -> anyhow::Result<Self> {
        let mut kernel = match &recipe.kernel {
            Some(path) => path.clone(),
            None => releases::pulse()?,
        };
        if let Some(uid) = recipe.manner.uid {
            chown(dir.path(), Some(uid), Some(uid))?;
            kernel = copy_for_all(&kernel, dir.path())?;
        }
        let mut spec = recipe.spec(kernel);
        let place = match recipe.ram {
            Ram::Plain => None,
            Ram::Carved => Some(carve_out(dir.path(), &spec)?),
            Ram::Kept => Some(CarveOutSpec::memfd(
                spec.memory.size,
                record::room(spec.cpus),
            )),
        };
        if place.is_some() {
            spec.memory.survive = Survive::Kernel;
            spec.memory.carve_out = place;
        }
        let child = boot(recipe, &spec, dir.path())?;
        // From here on a failure ends the process by the drop of what holds it.
        let mut child = Held(Some(child));
        let (ram, ownership) = connect(&control(dir.path()))?.lend_guest()?;
        let pulse = Arc::new(Pulse::find_of(ram, &spec, PATIENCE)?);
        let ownership = Ownership::map(ownership)?;
        Ok(Self {
            child: child.0.take().context("a child")?,
            dir,
            swaps: 0,
            manner: recipe.manner,
            spec,
            pulse,
            ownership,
        })
    }

    /// Boots, and waits until all vCPUs are online.
    pub fn up(recipe: &Recipe) -> anyhow::Result<Self> {
        let vm = Self::boot(recipe)?;
        vm.pulse.wait_online(recipe.cpus.into())?;
        Ok(vm)
    }

    /// A client of the VMM that runs the guest now.
    pub fn client(&self) -> anyhow::Result<Client> {
        connect(&control(self.dir.path()))
    }

    /// A client that was let in, and can ask while the guest is handed over.
    pub fn onlooker(&self) -> anyhow::Result<Client> {
        let client = self.client()?;
        client.describe()?;
        Ok(client)
    }

    /// Path of the control socket.
    pub fn control(&self) -> PathBuf {
        control(self.dir.path())
    }

    /// The guest's directory.
    pub fn dir(&self) -> PathBuf {
        self.dir.path().join("vm")
    }

    /// What the guest has written to its console so far.
    pub fn console(&self) -> anyhow::Result<String> {
        Ok(std::fs::read_to_string(self.dir().join("console.log"))?)
    }

    /// The machine.
    pub fn spec(&self) -> &MachineSpec {
        &self.spec
    }

    /// Process id of the VMM that runs the guest.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// All vCPUs, by number.
    pub fn vcpus(&self) -> Vec<usize> {
        (0..usize::from(self.spec.cpus)).collect()
    }

    /// What the VMMs of this guest wrote to their logs.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.dir.path().join("vmm.log")).unwrap_or_default()
    }

    /// What the ownership word says.
    pub fn owner(&self) -> anyhow::Result<Owner> {
        Ok(self.ownership.read()?)
    }

    /// The guest goes on, on every vCPU, and nothing about it is wrong.
    pub fn is_well(&self) -> anyhow::Result<()> {
        let seen = self.pulse.wait_progress(&self.vcpus(), 20)?;
        ensure!(seen.faults().is_empty(), "{:#?}", seen.faults());
        self.pulse.ran_once()
    }

    /// Kills the VMM, and waits for its end.
    pub fn kill(&mut self) -> anyhow::Result<ExitStatus> {
        self.child.kill()?;
        Ok(self.child.wait()?)
    }

    /// Ends the VMM as a jump into another kernel does, and has the same release revive the guest from
    /// its record.
    pub fn revive(&mut self, nonce: &str) -> anyhow::Result<()> {
        let place = self.spec.memory.carve_out.clone();
        let place = place.context("its RAM ends with the kernel")?;
        // As the daemon holds it; what is in a carve-out is found by its path.
        let memory = match place.is_memfd() {
            true => Some(self.client()?.lend_guest()?.0),
            false => None,
        };
        self.kill()?;
        let (reader, writer) = std::io::pipe()?;
        let writer = OwnedFd::from(writer);
        let log = self.dir.path().join("vmm.log");
        let mut command = command(&Release::Current.binary()?, &log, self.manner)?;
        command.args(["revive", "--nonce", nonce, "--place"]);
        command.arg(serde_json::to_string(&place)?);
        command.arg("--dir").arg(self.dir());
        command
            .arg("--ready-fd")
            .arg(writer.as_raw_fd().to_string());
        let mut handed = vec![&writer];
        if let Some(memory) = &memory {
            command.arg("--memory-fd");
            command.arg(memory.as_raw_fd().to_string());
            handed.push(memory);
        }
        self.child = start(&mut command, &handed)?;
        drop(writer);
        wait_ready(reader, "the VMM that revives", &log)?;
        let (ram, ownership) = self.client()?.lend_guest()?;
        self.pulse = Arc::new(Pulse::find_of(ram, &self.spec, PATIENCE)?);
        self.ownership = Ownership::map(ownership)?;
        Ok(())
    }

    /// Kills the VMM, and gives the directory with all that it left behind.
    pub fn leave(mut self) -> anyhow::Result<tempfile::TempDir> {
        self.kill()?;
        Ok(std::mem::replace(&mut self.dir, tempfile::tempdir()?))
    }

    /// Switches the guest off and waits for the process.
    pub fn power_off(mut self) -> anyhow::Result<()> {
        self.client()?.power_off()?;
        let end = self.wait_end()?;
        ensure!(end.success(), "the VMM failed at its end:\n{}", self.log());
        Ok(())
    }

    /// Waits until the VMM has ended.
    pub fn wait_end(&mut self) -> anyhow::Result<ExitStatus> {
        patience::wait_end(&mut self.child, "the VMM's end")
    }

    /// Whether the VMM has ended, and how.
    pub fn ended(&mut self) -> anyhow::Result<Option<ExitStatus>> {
        Ok(self.child.try_wait()?)
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A process that ends with its owner.
struct Held(Option<Child>);

impl Drop for Held {
    fn drop(&mut self) {
        if let Some(child) = &mut self.0 {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// A carve-out with room for this machine and nothing else.
fn carve_out(dir: &Path, spec: &MachineSpec) -> anyhow::Result<CarveOutSpec> {
    let place = CarveOutSpec {
        path: dir.join("carve-out"),
        record: DIRECTORY,
        record_len: record::room(spec.cpus),
        ram: DIRECTORY + record::room(spec.cpus),
    };
    let file = std::fs::File::create(&place.path)?;
    file.set_len(place.ram + spec.memory.size)?;
    Ok(place)
}

/// Starts the process, and waits until it says that the guest runs.
fn boot(recipe: &Recipe, spec: &MachineSpec, dir: &Path) -> anyhow::Result<Child> {
    let spec_file = dir.join("spec.json");
    std::fs::write(&spec_file, serde_json::to_vec(spec)?)?;
    std::fs::set_permissions(&spec_file, PermissionsExt::from_mode(0o644))?;
    let (reader, writer) = std::io::pipe()?;
    let writer = OwnedFd::from(writer);
    let log = dir.join("vmm.log");
    let binary = binary(recipe.release, recipe.manner.uid, dir)?;
    let mut command = command(&binary, &log, recipe.manner)?;
    command.args(recipe.release.arguments()).arg("run");
    command.arg("--spec").arg(&spec_file);
    command.arg("--dir").arg(dir.join("vm"));
    command
        .arg("--ready-fd")
        .arg(writer.as_raw_fd().to_string());
    let child = start(&mut command, &[&writer])?;
    drop(writer);
    let mut child = Held(Some(child));
    wait_ready(reader, "the VMM", &log)?;
    child.0.take().context("a child")
}

/// A release's binary, where user `uid` can run it.
pub(crate) fn binary(release: Release, uid: Option<u32>, dir: &Path) -> anyhow::Result<PathBuf> {
    let built = release.binary()?;
    if uid.is_none() {
        return Ok(built);
    }
    let own = dir.join(release.version());
    std::fs::create_dir_all(&own)?;
    copy_for_all(&built, &own)
}

fn control(dir: &Path) -> PathBuf {
    dir.join("vm/control.sock")
}

fn connect(path: &Path) -> anyhow::Result<Client> {
    Client::connect(path, PATIENCE).context("the VMM's control socket")
}
