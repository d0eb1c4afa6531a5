//! A guest with all kinds of devices, all of them at work: a vCPU drives each, and counts what it is
//! owed. What a disk must hold, what a socket must bring back and which frames must come is checked
//! here; RAM, clocks, timers and whether anything ran twice is in what pulse counts by itself.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

use anyhow::{Context, ensure};
use stillpoint_control::spec::{DiskSpec, NetSpec, VsockSpec};
use stillpoint_guest_abi::pulse::Report;
use stillpoint_guest_abi::virtio::VSOCK_ECHO_PORT;
use tempfile::NamedTempFile;

use crate::console::Console;
use crate::devices::{Devices, check_disk};
use crate::patience::PATIENCE;
use crate::releases::Release;
use crate::vm::{Recipe, Vm};
use crate::wire::TAP;

/// The vCPU that drives the disk.
const DISK: usize = 1;
/// The vCPU that speaks with the host.
const SOCKETS: usize = 2;
/// The vCPU that sends frames where there is a wire, and draws entropy where there is none.
const THIRD: usize = 3;
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
    wired: bool,
    rounds: u8,
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
        let third = if wired { "net" } else { "rng" };
        let cmdline =
            format!("ram=2M gap_us=500 mode1=blk mode2=vsock port={HOST_PORT} mode3={third}");
        let recipe = Recipe::pulse(4, &cmdline);
        let vm = Vm::up(&Recipe {
            devices,
            release,
            ..recipe
        })?;
        echo(&vm.dir())?;
        let call = call(&vm.dir())?;
        let guest = Self {
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
        let third: Done = match self.wired {
            true => |r| r.net.received,
            false => |r| r.rng.bytes,
        };
        let disk: Done = |r| r.blk.reads + r.blk.writes + r.blk.flushes;
        vec![
            (DISK, 20, disk),
            (SOCKETS, 1, |r| r.vsock.rounds),
            (THIRD, 20, third),
        ]
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

    /// Ends it in order; what its disk holds is what it was told.
    pub fn end(self) -> anyhow::Result<()> {
        let command = format!("mode {DISK} spin");
        Console::open(&self.vm)?.ask(&command, &command)?;
        let vm = &self.vm;
        vm.pulse.wait("the disk let go", PATIENCE, |s| {
            s.vcpus[DISK].driver.slot == 0
        })?;
        check_disk(&vm.pulse, DISK, self.image.path())?;
        vm.is_well()?;
        self.vm.power_off()
    }
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

/// A connection to the guest's own echo.
pub fn call(dir: &Path) -> anyhow::Result<BufReader<UnixStream>> {
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
