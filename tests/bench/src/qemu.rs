//! QEMU beside us: the same guest image on its smallest machine, moved to a new QEMU process that takes its
//! RAM over (cpr-transfer, QEMU 10.0), and stopped and continued in place.
//!
//! The guest's gaps are read from its RAM, as ours are. A swap of QEMU's lasts from its `STOP` event to its
//! successor's `RESUME`: both carry the time of day, which is set against the guest's TSC here.

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use serde_json::{Value, json};
use stillpoint_images::cache::Cache;
use stillpoint_images::packages::Set;
use stillpoint_images::progress::Progress;
use stillpoint_images::qemu::Qemu;
use stillpoint_tests::guest::Pulse;
use stillpoint_tests::patience::{PATIENCE, wait_for};
use stillpoint_tests::releases;

use crate::moment::Epoch;
use crate::ours::pause;
use crate::sample::Sample;
use crate::scene::{Scene, WORK_MIB};

/// Guest RAM is a file there: both processes map it, and we read it.
const SHARED_MEMORY: &str = "/dev/shm";
/// The time between swaps varies as ours does.
const BETWEEN_MS: u64 = 40;
const SPREAD_MS: u64 = 21;
/// How far the times of two clocks may lie apart, ms.
const SLACK_MS: u64 = 1;

/// QEMU, if it can be had here.
#[derive(Debug)]
pub(crate) struct Peer(Qemu);

/// A guest in a QEMU. Fields are dropped in order, the process before its files.
#[derive(Debug)]
pub(crate) struct Guest {
    child: Child,
    monitor: Monitor,
    pulse: Pulse,
    dir: tempfile::TempDir,
    /// How many processes it has had.
    number: u32,
    scene: Scene,
    words: String,
    tsc_khz: u64,
}

/// A connection to a QEMU's monitor (QMP).
#[derive(Debug)]
struct Monitor {
    reader: BufReader<UnixStream>,
    events: Vec<Value>,
}

impl Peer {
    /// Fetches QEMU's packages, unless they are here; the reason if that is impossible.
    pub(crate) fn find() -> Result<Self, String> {
        Self::with(Progress::Silent)
    }

    /// The same, for a person who waits for it.
    pub(crate) fn fetch() -> Result<Self, String> {
        Self::with(Progress::People)
    }

    fn with(progress: Progress) -> Result<Self, String> {
        let cache = Cache::of_this_user().map_err(|error| error.to_string())?;
        let set = Set::Qemu.fetch(&cache, false, progress);
        let set = set.map_err(|error| format!("no packages of QEMU: {error:#}"))?;
        Ok(Self(Qemu::of(&set)))
    }

    /// What it calls itself.
    pub(crate) fn version(&self) -> String {
        let output = self.0.system().arg("--version").output();
        let text = output.map(|output| String::from_utf8_lossy(&output.stdout).into_owned());
        let text = text.unwrap_or_default();
        let first = text.lines().next().unwrap_or("QEMU of an unknown version");
        first.split(" (").next().unwrap_or(first).to_owned()
    }

    /// Boots the guest of this scene, and waits until it has touched its RAM.
    pub(crate) fn boot(&self, scene: &Scene, tsc_khz: u64) -> anyhow::Result<Guest> {
        let guest = self.boot_with(scene, &scene.words(), tsc_khz)?;
        guest.pulse.wait_touched(PATIENCE)?;
        Ok(guest)
    }

    /// Boots a guest with this command line beside `ram=`.
    pub(crate) fn boot_with(
        &self,
        scene: &Scene,
        words: &str,
        tsc_khz: u64,
    ) -> anyhow::Result<Guest> {
        let dir = tempfile::Builder::new()
            .prefix("stillpoint-bench-")
            .tempdir_in(SHARED_MEMORY)?;
        let child = self.start(scene, words, dir.path(), 0, false)?;
        let monitor = Monitor::connect(&monitor_of(dir.path(), 0))?;
        let pulse = Pulse::find(File::open(ram_of(dir.path()))?.into(), PATIENCE)?;
        pulse.wait_online(scene.vcpus.into())?;
        Ok(Guest {
            child,
            monitor,
            pulse,
            dir,
            number: 0,
            scene: *scene,
            words: words.to_owned(),
            tsc_khz,
        })
    }

    fn start(
        &self,
        scene: &Scene,
        words: &str,
        dir: &Path,
        number: u32,
        waits: bool,
    ) -> anyhow::Result<Child> {
        let memory = format!("{}M", scene.memory_mib);
        let ram = ram_of(dir);
        let mut command: Command = self.0.system();
        command
            .args([
                "-M",
                "microvm,accel=kvm,memory-backend=ram0,aux-ram-share=on",
            ])
            .args([
                "-cpu",
                "host,-arch-capabilities",
                "-smp",
                &scene.vcpus.to_string(),
            ])
            .args(["-m", &memory, "-bios", "qboot.rom", "-object"])
            .arg(format!(
                "memory-backend-file,id=ram0,size={memory},mem-path={},share=on",
                ram.display()
            ))
            .arg("-kernel")
            .arg(releases::pulse()?)
            .args(["-append", &format!("ram={WORK_MIB}M {words}")])
            .args(["-nodefaults", "-no-user-config", "-display", "none"])
            .args(["-serial", "null", "-qmp"])
            .arg(format!(
                "unix:{},server=on,wait=off",
                monitor_of(dir, number).display()
            ));
        if waits {
            let main = format!("unix:{}", main_of(dir, number).display());
            let cpr = channel("cpr", &cpr_of(dir, number));
            command.args(["-incoming", &main, "-incoming", &cpr.to_string()]);
        }
        let log = File::create(dir.join(format!("qemu{number}.log")))?;
        command
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .context("start QEMU")
    }

    /// Moves the guest from process to process, so many times.
    pub(crate) fn transfers(&self, guest: &mut Guest, count: u32) -> anyhow::Result<Vec<Sample>> {
        (0..count)
            .map(|number| {
                pause(BETWEEN_MS + u64::from(number) * 7 % SPREAD_MS);
                self.transfer(guest)
            })
            .collect()
    }

    fn transfer(&self, guest: &mut Guest) -> anyhow::Result<Sample> {
        let (dir, next) = (guest.dir.path(), guest.number + 1);
        let mut child = self.start(&guest.scene, &guest.words, dir, next, true)?;
        let sockets = [main_of(dir, next), cpr_of(dir, next)];
        // The other one is there when this one has been heard.
        wait_for("QEMU's successor to listen", PATIENCE, || {
            Ok(listens(&sockets[1])?.then_some(()))
        })
        .inspect_err(|_| {
            let _ = child.kill();
        })?;
        let old = &mut guest.monitor;
        old.ask("migrate-set-parameters", json!({ "mode": "cpr-transfer" }))?;
        let channels = [channel("main", &sockets[0]), channel("cpr", &sockets[1])];
        old.ask("migrate", json!({ "channels": channels }))?;
        let mut new = Monitor::connect(&monitor_of(dir, next))?;
        wait_for("QEMU's successor to run", PATIENCE, || {
            let status = new.ask("query-status", json!({}))?;
            Ok((status["running"] == true).then_some(()))
        })?;
        let stopped = old.time_of("STOP")?;
        let resumed = new.time_of("RESUME")?;
        let sample = guest.gap_between(stopped, resumed)?;
        let _ = guest.monitor.ask("quit", json!({}));
        guest.child.wait()?;
        (guest.child, guest.monitor, guest.number) = (child, new, next);
        Ok(sample)
    }
}

/// Whether somebody listens there: the file comes first. To connect would be to be the one that is waited for.
fn listens(path: &Path) -> anyhow::Result<bool> {
    let sockets = std::fs::read_to_string("/proc/net/unix").context("read /proc/net/unix")?;
    // Num, RefCount, Protocol, Flags (of which this is __SO_ACCEPTCON), Type, St, Inode, Path.
    let mut lines = sockets
        .lines()
        .map(|line| line.split_ascii_whitespace().collect::<Vec<_>>());
    Ok(lines
        .any(|line| line.get(3) == Some(&"00010000") && line.get(7).map(Path::new) == Some(path)))
}

impl Guest {
    /// What the guest notes.
    pub(crate) fn pulse(&self) -> &Pulse {
        &self.pulse
    }

    /// The process that runs it.
    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Stops and continues it, so many times.
    pub(crate) fn stops(&mut self, count: u32) -> anyhow::Result<Vec<Sample>> {
        (0..count)
            .map(|number| {
                pause(BETWEEN_MS + u64::from(number) * 7 % SPREAD_MS);
                self.monitor.ask("stop", json!({}))?;
                self.monitor.ask("cont", json!({}))?;
                let stopped = self.monitor.time_of("STOP")?;
                let resumed = self.monitor.time_of("RESUME")?;
                self.gap_between(stopped, resumed)
            })
            .collect()
    }

    /// The longest gap of each vCPU that overlaps this stretch of the host's time.
    fn gap_between(&self, from: Duration, to: Duration) -> anyhow::Result<Sample> {
        let looked = self.pulse.look()?.last_tsc;
        self.pulse.wait("gaps to be logged", PATIENCE, |seen| {
            seen.last_tsc
                .iter()
                .zip(&looked)
                .all(|(now, then)| now > then)
        })?;
        let slack = Duration::from_millis(SLACK_MS);
        let epoch = Epoch::of(&self.pulse, self.tsc_khz)?;
        let window = epoch.tsc(from.saturating_sub(slack))..epoch.tsc(to + slack);
        let longest = |vcpu: usize| {
            let gaps = self.pulse.gaps(vcpu)?;
            let within = gaps.iter().filter(|gap| {
                i128::from(gap.start) < window.end && window.start < i128::from(gap.end)
            });
            let cycles = within.map(|gap| gap.end.saturating_sub(gap.start)).max();
            anyhow::Ok(cycles.unwrap_or(0) * 1_000_000 / self.tsc_khz)
        };
        Ok(Sample {
            host_ns: u64::try_from((to.saturating_sub(from)).as_nanos())?,
            unqueued_ns: Vec::new(),
            guest_ns: (0..usize::from(self.scene.vcpus))
                .map(longest)
                .collect::<Result<_, _>>()?,
            phases: Vec::new(),
            brownout: Default::default(),
        })
    }

    /// What the guest found wrong. QEMU's own doing; its machine has no device that pulse would miss.
    pub(crate) fn is_whole(&self) -> anyhow::Result<()> {
        let looked = self.pulse.look()?;
        let errors: u64 = looked.vcpus.iter().map(|vcpu| vcpu.ram_errors).sum();
        ensure!(errors == 0, "the guest's RAM is not what it was in QEMU");
        Ok(())
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Monitor {
    fn connect(path: &Path) -> anyhow::Result<Self> {
        let stream = wait_for("QEMU's monitor", PATIENCE, || {
            Ok(UnixStream::connect(path).ok())
        })?;
        stream.set_read_timeout(Some(PATIENCE))?;
        let mut monitor = Self {
            reader: BufReader::new(stream),
            events: Vec::new(),
        };
        monitor.line().context("QEMU's greeting")?;
        monitor.ask("qmp_capabilities", json!({}))?;
        Ok(monitor)
    }

    fn line(&mut self) -> anyhow::Result<Value> {
        let mut line = String::new();
        let read = self.reader.read_line(&mut line).context("QEMU's monitor")?;
        ensure!(read > 0, "QEMU closed its monitor");
        Ok(serde_json::from_str(&line)?)
    }

    fn ask(&mut self, command: &str, arguments: Value) -> anyhow::Result<Value> {
        let asked = json!({ "execute": command, "arguments": arguments });
        self.reader
            .get_mut()
            .write_all(format!("{asked}\n").as_bytes())
            .context("QEMU's monitor")?;
        loop {
            let mut said = self.line()?;
            if said.get("event").is_some() {
                self.events.push(said);
            } else if let Some(error) = said.get("error") {
                bail!("QEMU refuses {command}: {error}");
            } else {
                return Ok(said["return"].take());
            }
        }
    }

    /// When this event came last; it is forgotten.
    fn time_of(&mut self, event: &str) -> anyhow::Result<Duration> {
        loop {
            let at = self.events.iter().rposition(|said| said["event"] == event);
            if let Some(at) = at {
                let said = self.events.remove(at);
                let number = |name: &str| said["timestamp"][name].as_u64();
                let (seconds, micros) = number("seconds")
                    .zip(number("microseconds"))
                    .with_context(|| format!("no time in {said}"))?;
                return Ok(Duration::from_secs(seconds) + Duration::from_micros(micros));
            }
            let said = self.line().with_context(|| format!("no {event} of QEMU"))?;
            self.events.push(said);
        }
    }
}

fn ram_of(dir: &Path) -> PathBuf {
    dir.join("ram")
}

fn monitor_of(dir: &Path, number: u32) -> PathBuf {
    dir.join(format!("monitor{number}"))
}

fn main_of(dir: &Path, number: u32) -> PathBuf {
    dir.join(format!("main{number}"))
}

fn cpr_of(dir: &Path, number: u32) -> PathBuf {
    dir.join(format!("cpr{number}"))
}

fn channel(kind: &str, path: &Path) -> Value {
    json!({
        "channel-type": kind,
        "addr": { "transport": "socket", "type": "unix", "path": path },
    })
}
