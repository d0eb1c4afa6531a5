//! The bare-metal guest on a host of the matrix: a disk, sockets and entropy at work.

use std::io::{BufReader, Read, Write};
use std::os::unix::net::UnixStream;

use anyhow::{Context, ensure};
use stillpoint_guest_abi::pulse::Report;
use tempfile::NamedTempFile;

use super::acts::stand_still;
use super::host::GUEST;
use super::resident::Resident;
use crate::daemon::Daemon;
use crate::devices::check_disk;
use crate::furnished::{HOST_PORT, call, echo};
use crate::guest::Pulse;
use crate::patience::PATIENCE;
use crate::releases::pulse;

/// The vCPU that drives the disk.
const DISK: usize = 1;
/// The vCPU that speaks with the host.
const SOCKETS: usize = 2;
const VCPUS: usize = 3;
const UNDER_WAY: usize = 1000;

#[derive(Debug)]
pub(super) struct Bare {
    pulse: Pulse,
    image: NamedTempFile,
    call: BufReader<UnixStream>,
    number: u8,
}

/// Boots one.
pub(super) fn boot(daemon: &Daemon, release: &str) -> anyhow::Result<Box<dyn Resident>> {
    let image = NamedTempFile::new()?;
    image.as_file().set_len(16 << 20)?;
    let kernel = pulse()?.display().to_string();
    let cmdline = format!("pulse ram=2M gap_us=500 mode1=blk mode2=vsock port={HOST_PORT}");
    let disk = image.path().display().to_string();
    let cpus = VCPUS.to_string();
    let run = [
        "run",
        GUEST,
        "--release",
        release,
        "--cpus",
        &cpus,
        "--memory",
        "64M",
        "--kernel",
        &kernel,
        "--cmdline",
        &cmdline,
        "--disk",
        &disk,
        "--vsock",
        "--rng",
        "--budget",
        "1s",
    ];
    daemon.must(&run)?;
    let dir = daemon.guest_dir(GUEST);
    let _ = std::fs::remove_file(dir.join(format!("vsock.sock_{HOST_PORT}")));
    echo(&dir)?;
    let pulse = daemon.pulse(GUEST)?;
    pulse.wait_online(u32::try_from(VCPUS)?)?;
    let mut guest = Bare {
        pulse,
        image,
        call: call(&dir)?,
        number: 0,
    };
    guest.send()?;
    guest.is_whole(daemon)?;
    Ok(Box::new(guest))
}

impl Bare {
    /// Puts bytes on their way to the guest and back.
    fn send(&mut self) -> anyhow::Result<()> {
        self.number = self.number.wrapping_add(1);
        Ok(self.call.get_mut().write_all(&[self.number; UNDER_WAY])?)
    }
}

impl Resident for Bare {
    fn goes_on(&self, _: &Daemon) -> anyhow::Result<()> {
        let vcpus: Vec<usize> = (0..VCPUS).collect();
        self.pulse.wait_progress(&vcpus, 20).map(drop)
    }

    /// Every vCPU goes on, both devices work, what was under way came as it was sent, and nothing
    /// about the guest is wrong: counters, clocks, timers, RAM, and that it ran once. Its disk, looked at
    /// from outside while all of the VMM stands still, holds what the guest was told it holds.
    fn is_whole(&mut self, daemon: &Daemon) -> anyhow::Result<()> {
        let vcpus: Vec<usize> = (0..VCPUS).collect();
        let from = self.pulse.look()?;
        self.pulse.wait_progress(&vcpus, 20)?;
        let done = |r: &Report| (r.blk.reads + r.blk.writes + r.blk.flushes, r.vsock.rounds);
        let seen = self.pulse.wait("all devices at work", PATIENCE, |s| {
            done(&s.vcpus[DISK]).0 >= done(&from.vcpus[DISK]).0 + 20
                && done(&s.vcpus[SOCKETS]).1 > done(&from.vcpus[SOCKETS]).1
                || !s.faults().is_empty()
        })?;
        ensure!(seen.faults().is_empty(), "{:#?}", seen.faults());
        self.pulse.ran_once()?;
        let mut back = [0; UNDER_WAY];
        self.call
            .read_exact(&mut back)
            .context("the socket's bytes")?;
        ensure!(
            back == [self.number; UNDER_WAY],
            "what was under way changed"
        );
        let vmm = daemon.vmm_pid(GUEST)?;
        let still = stand_still(vmm)?;
        check_disk(&self.pulse, DISK, self.image.path())?;
        drop(still);
        self.send()
    }

    fn is_gone(self: Box<Self>) -> anyhow::Result<()> {
        let total = |pulse: &Pulse| anyhow::Ok(pulse.look()?.globals.total);
        let before = total(&self.pulse)?;
        std::thread::sleep(std::time::Duration::from_millis(20));
        ensure!(total(&self.pulse)? == before, "somebody runs it");
        check_disk(&self.pulse, DISK, self.image.path())?;
        Ok(())
    }
}
