//! A process that runs the guest from one swap to the next.
#![allow(unsafe_code)] // file descriptors inherited by number

use std::fs::File;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::path::PathBuf;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::Args;

use crate::Entry;
use crate::devices::Devices;
use crate::machine::Machine;
use crate::{boot, memory, wire};

/// What the conductor tells a worker.
pub(crate) const SWAP: u8 = b'S';
/// A line for the serial port follows.
pub(crate) const TYPE: u8 = b'T';
/// The end.
pub(crate) const QUIT: u8 = b'Q';
/// What a worker tells: ready, and the TSC's kHz follows.
pub(crate) const READY: u8 = b'r';
/// The guest's table is at the address that follows.
pub(crate) const TABLE: u8 = b't';
/// The guest runs; the time from the kick follows.
pub(crate) const RUNNING: u8 = b'g';

const TICK: Duration = Duration::from_millis(20);

/// A worker's command line.
#[derive(Args, Debug)]
pub(crate) struct Job {
    #[arg(long)]
    memory: RawFd,
    #[arg(long)]
    control: RawFd,
    #[arg(long)]
    before: Option<RawFd>,
    #[arg(long)]
    after: RawFd,
    #[arg(long)]
    vcpus: usize,
    #[arg(long)]
    show: bool,
    #[arg(long)]
    kernel: PathBuf,
    #[arg(long)]
    cmdline: String,
    #[arg(long, value_enum)]
    entry: Entry,
}

/// Runs until told to quit.
pub(crate) fn run(job: &Job) -> Result<()> {
    let (control, after) = (inherited(job.control), inherited(job.after));
    let memfd = File::from(inherited(job.memory));
    let memory = memory::map(&memfd)?;
    let devices = Devices::new(job.show);
    let machine = match job.before {
        None => {
            let entry = boot::load(&memory, &job.kernel, &job.cmdline, job.entry)?;
            let machine = Machine::new(&memory, job.vcpus, devices, |index, fd| match index {
                0 => boot::enter(fd, &memory, entry),
                _ => Ok(()),
            })?;
            tell(&control, READY, machine.tsc_khz.into())?;
            machine.boot()?;
            machine
        }
        Some(before) => {
            memory::populate(&memfd, &memory)?;
            let machine = Machine::new(&memory, job.vcpus, devices, |_, _| Ok(()))?;
            tell(&control, READY, machine.tsc_khz.into())?;
            let state = wire::unpack(&wire::get(inherited(before))?)?;
            let kicked_ns = state.vm.kicked_ns;
            let running_ns = machine.give(state)?;
            tell(&control, RUNNING, running_ns - kicked_ns)?;
            machine
        }
    };
    obey(&machine, &control, &after)
}

fn obey(machine: &Machine, control: &OwnedFd, after: &OwnedFd) -> Result<()> {
    let mut told_table = 0;
    loop {
        if let Some(error) = machine.failure() {
            return Err(error);
        }
        let table = machine.devices.table.load(Relaxed);
        if table != told_table {
            told_table = table;
            tell(control, TABLE, table)?;
        }
        if machine.devices.ended.load(Relaxed) {
            bail!("the guest powered off");
        }
        if !wire::wait(control, TICK)? {
            continue;
        }
        let message = wire::get(control)?;
        match message.split_first() {
            Some((&SWAP, _)) => wire::put(after, &wire::pack(&machine.take()?))?,
            Some((&TYPE, line)) => machine.devices.type_line(&String::from_utf8_lossy(line)),
            Some((&QUIT, _)) => return Ok(()),
            _ => bail!("an unknown message"),
        }
    }
}

fn tell(control: &OwnedFd, what: u8, value: u64) -> Result<()> {
    let mut message = vec![what];
    message.extend_from_slice(&value.to_le_bytes());
    wire::put(control, &message).context("tell the conductor")
}

fn inherited(fd: RawFd) -> OwnedFd {
    // SAFETY: the conductor left us this descriptor, and named it once.
    unsafe { OwnedFd::from_raw_fd(fd) }
}
