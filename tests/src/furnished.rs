//! A guest with all kinds of devices, all of them at work: a vCPU drives each, and counts what it is
//! owed. What a disk must hold, what a socket must bring back, which frames must come, that a viewer
//! of its console stays connected and that its vmclock counts swaps is checked here; RAM, clocks,
//! timers and whether anything ran twice is in what pulse counts by itself.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

use anyhow::{Context, ensure};
use stillpoint_control::clock::ClockSpec;
use stillpoint_control::spec::{DiskSpec, NetSpec, VsockSpec};
use stillpoint_guest_abi::pulse::Report;
use stillpoint_guest_abi::virtio::VSOCK_ECHO_PORT;
use stillpoint_vmm::devices::vmclock;
use tempfile::NamedTempFile;

use crate::console::Console;
use crate::devices::{Devices, check_disk};
use crate::patience::{PATIENCE, wait_for};
use crate::releases::Release;
use crate::vm::{Recipe, Vm};
use crate::wire::TAP;

/// The vCPU that drives the disk.
const DISK: usize = 1;
/// The vCPU that speaks with the host.
const SOCKETS: usize = 2;
/// The vCPU that draws entropy.
const ENTROPY: usize = 3;
/// The vCPU that sends frames where there is a wire.
const FRAMES: usize = 4;
/// Offset of the sequence in `struct vmclock_abi`.
const SEQUENCE: u64 = 12;
/// Port of the host to which the guest connects.
pub const HOST_PORT: u32 = 5000;
/// What is on its way over a swap.
const UNDER_WAY: usize = 1000;

/// What a device of a vCPU has done.
type Done = fn(&Report) -> u64;

/// The guest.
#[derive(Debug)]
pub struct Furnished {
    /// The VMM and its guest.
    pub vm: Vm,
    image: NamedTempFile,
    call: BufReader<UnixStream>,
    console: Console,
    wired: bool,
    rounds: u8,
    sequence: u32,
}

impl Furnished {
    /// Boots it, with a network interface if this process is beside a wire (`wire::is_beside`).
    pub fn boot(release: Release, wired: bool) -> anyhow::Result<Self> {
        let image = NamedTempFile::new()?;
        image.as_file().set_len(64 << 20)?;
        let disk = DiskSpec {
            path: image.path().to_owned(),
            read_only: false,
        };
        let net = NetSpec {
            tap: TAP.into(),
            mac: None,
            queue_pairs: 1,
        };
        let devices = Devices {
            disks: vec![disk],
            nets: if wired { vec![net] } else { Vec::new() },
            vsock: Some(VsockSpec { cid: 42 }),
            rng: true,
        };
        // Pulse counts its vCPUs by CPUID, in powers of two.
        let (cpus, frames) = match wired {
            true => (5, "online=5 mode4=net"),
            false => (4, ""),
        };
        let cmdline = format!(
            "ram=2M gap_us=500 duty=50 mode1=blk mode2=vsock port={HOST_PORT} mode3=rng {frames}"
        );
        let recipe = Recipe::pulse(cpus, &cmdline);
        let clock = ClockSpec {
            vmclock: true,
            ..ClockSpec::default()
        };
        let vm = Vm::up(&Recipe {
            devices,
            release,
            clock,
            ..recipe
        })?;
        echo(&vm.dir())?;
        let call = call(&vm.dir())?;
        let guest = Self {
            console: Console::open(&vm)?,
            sequence: sequence(&vm)?,
            vm,
            image,
            call,
            wired,
            rounds: 0,
        };
        guest.works()?;
        Ok(guest)
    }

    fn at_work(&self) -> Vec<(usize, u64, Done)> {
        let disk: Done = |r| r.blk.reads + r.blk.writes + r.blk.flushes;
        let mut devices: Vec<(usize, u64, Done)> = vec![
            (DISK, 20, disk),
            (SOCKETS, 1, |r| r.vsock.rounds),
            (ENTROPY, 20, |r| r.rng.bytes),
        ];
        if self.wired {
            devices.push((FRAMES, 20, |r| r.net.received));
        }
        devices
    }

    /// Waits until every device has done something more.
    pub fn works(&self) -> anyhow::Result<()> {
        let from = self.vm.pulse.look()?;
        let devices = self.at_work();
        let seen = self.vm.pulse.wait("all devices at work", PATIENCE, |s| {
            let done = |(vcpu, more, count): &(usize, u64, Done)| {
                count(&s.vcpus[*vcpu]) >= count(&from.vcpus[*vcpu]) + more
            };
            devices.iter().all(done) || !s.faults().is_empty()
        })?;
        ensure!(seen.faults().is_empty(), "{:#?}", seen.faults());
        Ok(())
    }

    /// Puts bytes on their way to the guest and back, of which some wait in the guest or in the
    /// VMM when the next swap comes.
    pub fn send(&mut self) -> anyhow::Result<()> {
        self.rounds = self.rounds.wrapping_add(1);
        Ok(self.call.get_mut().write_all(&[self.rounds; UNDER_WAY])?)
    }

    /// They are back, as they were.
    pub fn receive(&mut self) -> anyhow::Result<()> {
        let mut back = [0; UNDER_WAY];
        self.call
            .read_exact(&mut back)
            .context("the socket's bytes")?;
        ensure!(
            back == [self.rounds; UNDER_WAY],
            "what was under way changed"
        );
        Ok(())
    }

    /// Every vCPU goes on, every device works, and nothing about the guest is wrong.
    pub fn is_whole(&self) -> anyhow::Result<()> {
        self.vm.is_well().with_context(|| self.vm.log())?;
        self.works()
    }

    /// After a swap that moved it: what was on its way came, its console is where it was, its vmclock
    /// counted one swap, and it is whole.
    pub fn came_through(&mut self) -> anyhow::Result<()> {
        self.receive()?;
        let sequence = sequence(&self.vm)?;
        let before = std::mem::replace(&mut self.sequence, sequence);
        ensure!(
            sequence == before.wrapping_add(2),
            "the sequence of its vmclock went from {before} to {sequence}"
        );
        self.console.ask("ping", "pong")?;
        self.is_whole()
    }

    /// After a swap that did not move it: the same, and its vmclock counted none.
    pub fn stayed(&mut self) -> anyhow::Result<()> {
        self.receive()?;
        let sequence = sequence(&self.vm)?;
        ensure!(sequence == self.sequence, "its vmclock counted a swap");
        self.console.ask("ping", "pong")?;
        self.is_whole()
    }

    /// Ends it in order; what its disk holds is what it was told.
    pub fn end(mut self) -> anyhow::Result<()> {
        let command = format!("mode {DISK} spin");
        self.console.ask(&command, &command)?;
        let vm = &self.vm;
        vm.pulse.wait("the disk let go", PATIENCE, |s| {
            s.vcpus[DISK].driver.slot == 0
        })?;
        check_disk(&vm.pulse, DISK, self.image.path())?;
        vm.is_well()?;
        self.vm.power_off()
    }
}

/// The sequence in the guest's vmclock page, when nobody writes it.
fn sequence(vm: &Vm) -> anyhow::Result<u32> {
    let at = vmclock::PAGE.0 + SEQUENCE;
    wait_for("a vmclock page at rest", PATIENCE, || {
        let sequence = u32::from_le_bytes(vm.pulse.physical(at)?);
        Ok((sequence & 1 == 0).then_some(sequence))
    })
}

/// A host program that sends back what comes, on every connection.
pub fn echo(dir: &Path) -> anyhow::Result<()> {
    let listener = UnixListener::bind(dir.join(format!("vsock.sock_{HOST_PORT}")))?;
    std::thread::spawn(move || {
        for connection in listener.incoming().flatten() {
            std::thread::spawn(move || std::io::copy(&mut &connection, &mut &connection));
        }
    });
    Ok(())
}

/// A connection to the guest's own echo, when it listens: until its driver is there the device hangs up.
pub fn call(dir: &Path) -> anyhow::Result<BufReader<UnixStream>> {
    let mut last = None;
    let called = wait_for("the guest's echo to listen", PATIENCE, || {
        match call_once(dir) {
            Ok(stream) => Ok(Some(stream)),
            Err(error) => {
                last = Some(error);
                Ok(None)
            }
        }
    });
    called.with_context(|| format!("{last:?}"))
}

fn call_once(dir: &Path) -> anyhow::Result<BufReader<UnixStream>> {
    let mut stream = UnixStream::connect(dir.join("vsock.sock"))?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    writeln!(stream, "CONNECT {VSOCK_ECHO_PORT}")?;
    let mut stream = BufReader::new(stream);
    let mut answer = String::new();
    stream.read_line(&mut answer)?;
    ensure!(answer.starts_with("OK "), "the guest said {answer:?}");
    Ok(stream)
}
