//! How QEMU is started for a host.
//!
//! Not to be changed lightly, each cost a day: `EPYC-Milan` is a model whose SVM with nested paging
//! TCG has; `tsc=reliable`, because TCG's has no constant TSC and two CPUs would make the kernel call it
//! unstable, and every guest's clock with it; `tsc_early_khz`, because an emulated processor's TSC is this
//! machine's own, and a kernel that measures it by emulated timers, on a busy machine, finds whatever it
//! finds: 70 MHz for 2.6 GHz once, and a host whose clock ran 37 times too fast; `thread=multi`, one
//! thread for each CPU; and the plugin of `sound.c`, without which nested guests don't live long.

use std::fs::OpenOptions;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use stillpoint_images::qemu::Qemu;

use super::order::{RESULTS_DISK, SCRATCH_DISK};
use super::sound::PLUGIN;

/// What the model has and TCG has not: it would leave them out by itself, with a warning for each.
const NOT_IN_TCG: &[&str] = &[
    "pcid",
    "invpcid",
    "xsavec",
    "xsaves",
    "misalignsse",
    "osvw",
    "perfctr-core",
    "topoext",
    "fxsr-opt",
    "amd-ssbd",
    "amd-stibp",
    "clzero",
    "ibpb",
    "ibrs",
    "nrip-save",
];

/// A QEMU to be started.
#[derive(Debug)]
pub(super) struct Emulator<'a> {
    pub(super) qemu: &'a Qemu,
    pub(super) bzimage: &'a Path,
    pub(super) dir: &'a Path,
    pub(super) cpus: u8,
    pub(super) memory_mib: u32,
    pub(super) scratch: bool,
    pub(super) carve_out_mib: u32,
    pub(super) live_update: bool,
    pub(super) network: bool,
}

/// What switches live update on. The memory that the next kernel boots in, which nothing that is preserved may lie in, would be
/// a multiple of the initramfs: 2.1 of 2.5 GiB. And much of the memory is not counted yet when the first file system is
/// made: a tmpfs, of half of what is, might hold no initramfs.
const LIVE_UPDATE: &str = " kho=on liveupdate=on kho_scratch=320M,0,64M rootfstype=ramfs";

/// Where memory is left alone for a carve-out, MiB: behind what a kernel needs to start, and before the
/// initramfs, which QEMU puts at the end.
const CARVE_OUT_MIB: u32 = 640;

/// What carries the host on this machine, in words.
pub fn ground() -> String {
    match nested_kvm() {
        Ok(()) => "on this machine's KVM, nested".into(),
        Err(why) => format!("translated: {why}"),
    }
}

/// Whether this machine's KVM is hardware that nests; if not, why.
pub fn nested_kvm() -> Result<(), String> {
    let open = OpenOptions::new().read(true).write(true).open("/dev/kvm");
    open.map_err(|error| format!("/dev/kvm: {error}"))?;
    let nested = |module: &str| {
        std::fs::read_to_string(format!("/sys/module/{module}/parameters/nested")).ok()
    };
    let value = nested("kvm_intel").or_else(|| nested("kvm_amd"));
    nests(value.as_deref())
}

fn nests(value: Option<&str>) -> Result<(), String> {
    match value.map(str::trim) {
        Some("Y" | "1") => Ok(()),
        Some(value) => Err(format!("KVM's parameter `nested` is {value}")),
        None => Err("KVM here is neither kvm_intel nor kvm_amd".into()),
    }
}

impl Emulator<'_> {
    /// Its console on standard output; nobody types.
    pub(super) fn batch(&self) -> Command {
        let mut command = self.common();
        command.args([
            "-chardev",
            "stdio,id=console,signal=off",
            "-serial",
            "chardev:console",
        ]);
        command.args(["-append", &self.cmdline()]);
        command.stdin(Stdio::null());
        command
    }

    /// Its console on this terminal, with QEMU's own keys behind Ctrl-a.
    pub(super) fn interactive(&self) -> Command {
        let mut command = self.common();
        command.args(["-chardev", "stdio,id=console,mux=on,signal=off"]);
        command.args(["-serial", "chardev:console", "-mon", "chardev=console"]);
        command.args(["-append", &self.cmdline()]);
        command
    }

    fn cmdline(&self) -> String {
        let carve_out = match self.carve_out_mib {
            0 => String::new(),
            mib => format!(" memmap={mib}M!{CARVE_OUT_MIB}M"),
        };
        let live_update = match self.live_update {
            true => LIVE_UPDATE,
            false => "",
        };
        let hardware = nested_kvm().is_ok();
        format!("{}{carve_out}{live_update}", cmdline(hardware))
    }

    fn common(&self) -> Command {
        let mut command = self.qemu.system();
        command.args([
            "-nodefaults",
            "-no-user-config",
            "-display",
            "none",
            "-no-reboot",
        ]);
        match nested_kvm() {
            Ok(()) => command.args(["-accel", "kvm", "-cpu", "host"]),
            Err(_) => {
                let plugin = format!("file={}", in_option(&self.dir.join(PLUGIN)));
                command.args(["-accel", "tcg,thread=multi", "-cpu", &tcg_cpu()]);
                command.args(["-plugin", &plugin])
            }
        };
        command.args([
            "-smp",
            &self.cpus.to_string(),
            "-m",
            &self.memory_mib.to_string(),
        ]);
        command.arg("-kernel").arg(self.bzimage);
        command.arg("-initrd").arg(self.dir.join("initramfs"));
        self.disk(&mut command, RESULTS_DISK, "results.raw");
        if self.scratch {
            self.disk(&mut command, SCRATCH_DISK, "scratch.raw");
        }
        if self.network {
            // QEMU's own: needs no right on this machine, and stays while the host jumps.
            command.args(["-netdev", "user,id=outside"]);
            command.args(["-device", "virtio-net-pci,netdev=outside,romfile="]);
        }
        command
    }

    /// A raw file as a virtio disk. What is on it ends with the run, so nothing waits for it to be safe.
    fn disk(&self, command: &mut Command, serial: &str, file: &str) {
        let path = in_option(&self.dir.join(file));
        command.args([
            "-drive",
            &format!("file={path},if=none,format=raw,cache=unsafe,id={serial}"),
        ]);
        command.args([
            "-device",
            &format!("virtio-blk-pci,drive={serial},serial={serial}"),
        ]);
    }
}

/// A file name in an option: a comma is doubled (QEMU's manual, "-drive").
fn in_option(path: &Path) -> String {
    path.display().to_string().replace(',', ",,")
}

/// The TSC's frequency, kHz, by this machine's clock.
fn tsc_khz() -> u64 {
    let (from, began) = stamp();
    std::thread::sleep(Duration::from_millis(100));
    let (to, ended) = stamp();
    let us = u64::try_from((ended - began).as_micros()).unwrap_or(u64::MAX);
    (to - from) * 1000 / us.max(1)
}

/// A reading of the TSC and the time at it: the tightest of some, as others lost their core between.
#[allow(unsafe_code)]
fn stamp() -> (u64, Instant) {
    // SAFETY: RDTSC reads a counter; every x86-64 processor has it.
    let tsc = || unsafe { std::arch::x86_64::_rdtsc() };
    let readings = (0..64).map(|_| {
        let (before, now, after) = (tsc(), Instant::now(), tsc());
        (after.saturating_sub(before), before, now)
    });
    let tightest = readings.min_by_key(|reading| reading.0);
    tightest.map_or((0, Instant::now()), |(width, tsc, now)| {
        (tsc + width / 2, now)
    })
}

fn tcg_cpu() -> String {
    let mut cpu = "EPYC-Milan,+svm,+npt".to_owned();
    for feature in NOT_IN_TCG {
        cpu.push_str(",-");
        cpu.push_str(feature);
    }
    cpu
}

/// `panic=-1` restarts at once, and `-no-reboot` makes that QEMU's end.
fn cmdline(hardware: bool) -> String {
    let clock = match hardware {
        true => String::new(),
        false => format!(" tsc=reliable tsc_early_khz={}", tsc_khz()),
    };
    format!("console=ttyS0 quiet panic=-1{clock}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_frequency_is_what_it_was_a_moment_ago() {
        let (first, second) = (tsc_khz(), tsc_khz());
        assert!(first > 100_000, "{first} kHz");
        assert!(first.abs_diff(second) * 1000 < first, "{first}, {second}");
    }

    #[test]
    fn only_a_kvm_that_nests_carries_the_host() {
        assert_eq!(nests(Some("Y\n")), Ok(()));
        assert_eq!(nests(Some("1")), Ok(()));
        assert!(nests(Some("N\n")).is_err_and(|why| why.contains('N')));
        assert!(nests(None).is_err());
        assert!(cmdline(false).contains("tsc=reliable") && !cmdline(true).contains("tsc"));
    }
}
