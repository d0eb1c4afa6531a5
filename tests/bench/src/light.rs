//! What a VMM weighs: its memory beside the guest's, the time from its start to the guest's first instruction, the
//! CPU time that it takes while the guest sleeps. Ours beside QEMU's smallest machine with the same guest.

use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::Context;
use serde::Serialize;
use stillpoint_tests::guest::Pulse;
use stillpoint_tests::vm::{Recipe, Vm};

use crate::moment::Epoch;
use crate::ours::pause;
use crate::qemu::Peer;
use crate::run::progress;
use crate::scene::{BASE, WORK_MIB};

/// The guest's command line when it sleeps, and when it reads its TSC all the time.
const ASLEEP: &str = "mode=idle";
const AWAKE: &str = "mode=spin";
/// Boots of each kind.
const BOOTS: u32 = 10;
/// A guest that sleeps is watched for so long.
const ASLEEP_FOR: Duration = Duration::from_secs(2);
/// After boot: what is done once has been done.
const SETTLE_MS: u64 = 500;

/// Ours, and QEMU's if it is here.
#[derive(Debug, Default, Serialize)]
pub(crate) struct Light {
    /// Ours.
    pub(crate) ours: Weight,
    /// QEMU's.
    pub(crate) qemu: Option<Weight>,
}

/// What one kind of VMM weighs.
#[derive(Debug, Default, Serialize)]
pub(crate) struct Weight {
    /// From before the process is started to the guest's first instruction, ns.
    pub(crate) boot_ns: Vec<u64>,
    /// Resident memory that is not the guest's RAM, KiB.
    pub(crate) beside_kib: Vec<u64>,
    /// CPU time of all its threads while the guest sleeps, ns in each second.
    pub(crate) idle_ns: Vec<u64>,
}

impl Light {
    /// Boots and watches, in turns.
    pub(crate) fn measure(quick: bool, tsc_khz: u64, qemu: Option<&Peer>) -> anyhow::Result<Self> {
        let boots = if quick { 2 } else { BOOTS };
        let mut light = Self {
            qemu: qemu.map(|_| Weight::default()),
            ..Self::default()
        };
        for number in 0..boots {
            progress("starting VMMs", number, boots);
            light.ours.boot(tsc_khz, number == 0)?;
            if let (Some(qemu), Some(weight)) = (qemu, &mut light.qemu) {
                weight.boot_of(qemu, tsc_khz, number == 0)?;
            }
        }
        progress("starting VMMs", boots, boots);
        Ok(light)
    }
}

impl Weight {
    /// Ours, once; and once with a guest that sleeps.
    fn boot(&mut self, tsc_khz: u64, asleep: bool) -> anyhow::Result<()> {
        let mut recipe = Recipe::pulse(1, &format!("ram={WORK_MIB}M {AWAKE}"));
        // As QEMU is.
        recipe.manner.in_our_session = true;
        recipe.memory_mib = BASE.memory_mib;
        let began = now()?;
        let vm = Vm::boot(&recipe).context("a guest of ours")?;
        self.boot_ns.push(born(&vm.pulse, began, tsc_khz)?);
        self.beside_kib
            .push(beside_kib(vm.pid(), "memfd:stillpoint-ram")?);
        vm.power_off()?;
        if asleep {
            recipe.cmdline = format!("pulse ram={WORK_MIB}M {ASLEEP}");
            let vm = Vm::boot(&recipe).context("a guest of ours that sleeps")?;
            self.idle_ns.push(cpu_time_per_second(vm.pid())?);
        }
        Ok(())
    }

    /// QEMU's, the same.
    fn boot_of(&mut self, qemu: &Peer, tsc_khz: u64, asleep: bool) -> anyhow::Result<()> {
        let began = now()?;
        let guest = qemu.boot_with(&BASE, AWAKE, tsc_khz)?;
        self.boot_ns.push(born(guest.pulse(), began, tsc_khz)?);
        self.beside_kib.push(beside_kib(guest.pid(), "/ram")?);
        drop(guest);
        if asleep {
            let guest = qemu.boot_with(&BASE, ASLEEP, tsc_khz)?;
            self.idle_ns.push(cpu_time_per_second(guest.pid())?);
        }
        Ok(())
    }
}

fn now() -> anyhow::Result<Duration> {
    Ok(SystemTime::now().duration_since(UNIX_EPOCH)?)
}

/// From then to the guest's first instruction, ns.
fn born(pulse: &Pulse, began: Duration, tsc_khz: u64) -> anyhow::Result<u64> {
    let born = pulse.look()?.globals.born;
    let since = Epoch::of(pulse, tsc_khz)?.since(began, born);
    Ok(u64::try_from(since.as_nanos())?)
}

/// Resident pages of a process, but for those of mappings of the guest's RAM, KiB (`/proc/PID/smaps`).
fn beside_kib(pid: u32, ram: &str) -> anyhow::Result<u64> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/smaps"))?;
    let mut counts = true;
    let mut sum = 0;
    for line in text.lines() {
        if let Some(kib) = line.strip_prefix("Rss:") {
            let kib: u64 = kib.trim().trim_end_matches(" kB").parse()?;
            sum += if counts { kib } else { 0 };
        } else if line.as_bytes().first().is_some_and(u8::is_ascii_hexdigit) && line.contains('-') {
            let name = line.splitn(6, ' ').nth(5).unwrap_or_default();
            counts = !name.trim().trim_end_matches(" (deleted)").ends_with(ram);
        }
    }
    Ok(sum)
}

/// CPU time of all threads of a process, by the scheduler's account, ns in each second.
fn cpu_time_per_second(pid: u32) -> anyhow::Result<u64> {
    let spent = || {
        let threads = std::fs::read_dir(Path::new("/proc").join(pid.to_string()).join("task"))?;
        let mut sum = 0;
        for thread in threads {
            let text = std::fs::read_to_string(thread?.path().join("schedstat"))?;
            let first = text.split_whitespace().next().context("schedstat")?;
            sum += first.parse::<u64>()?;
        }
        anyhow::Ok(sum)
    };
    pause(SETTLE_MS);
    let before = spent()?;
    std::thread::sleep(ASLEEP_FOR);
    let spent = spent()?.saturating_sub(before);
    Ok(spent / ASLEEP_FOR.as_secs())
}
