//! A guest revived from its record, under the kernel that its host jumped into.
//!
//! ```text
//!  check the record ─▶ build, populate, load ─▶ consume (mark: Consumed) ─▶ late MSRs, enter
//!        │                     │                       └── from here on nobody runs it from the record
//!        └─────────────────────┴── an error: record and RAM stay as they are, for another try
//! ```
//!
//! Must never: write a byte of guest RAM, or enter a vCPU, before the mark says *consumed*. What
//! fails after that costs the guest, as a power cut would.

use std::collections::VecDeque;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};

use anyhow::{Context, bail, ensure};
use stillpoint_carveout::area::Place;
use stillpoint_carveout::layout::Extent;
use stillpoint_carveout::map::Device;
use stillpoint_carveout::mark::Mark;
use stillpoint_carveout::record::Record;
use stillpoint_control::ownership::{Epoch, Owner, Ownership};
use stillpoint_control::spec::{CarveOutSpec, MachineSpec};
use stillpoint_state::Unclaimed;

use super::desk::Desk;
use super::{ENTER_PATIENCE, Process, Start};
use crate::boot::cpuid;
use crate::devices::virtio::backend;
use crate::doors::Doors;
use crate::event::Event;
use crate::handover::incoming;
use crate::handover::lend::Borrowed;
use crate::handover::measure::{self, Evidence};
use crate::machine::build::Blank;
use crate::machine::frozen::Guest;
use crate::machine::vcpus::Promise;
use crate::machine::{Machine, Timing};
use crate::memory::GuestRam;
use crate::vcpu::hurry::Hurry;
use crate::{clock, release};

/// Which record.
#[derive(Debug)]
pub struct Source<'a> {
    /// Where the guest lies.
    pub at: &'a CarveOutSpec,
    /// Its memfd, if it lies in one.
    pub memory: Option<OwnedFd>,
    /// The jump's nonce.
    pub nonce: &'a str,
}

/// A record that was looked at, and may be run.
struct Found {
    device: Device,
    place: Place,
    record: Record,
    spec: MachineSpec,
}

impl Process {
    /// Revives a guest.
    pub fn revive(source: Source<'_>, dir: &Path, start: Start) -> anyhow::Result<Self> {
        let began_tsc = clock::host_tsc();
        let found = look(source, began_tsc)?;
        let doors = Doors::open(dir)?;
        let ownership = Ownership::create()?;
        let (sender, events) = channel();
        let (mut machine, evidence) = build(&found, dir, &sender, began_tsc)?;
        machine.open_console(doors.console.try_clone()?, Vec::new())?;
        let label = found.record.label;
        let guest = Guest::new(machine, ownership, Owner::Held(Epoch::default()));
        let swaps = label.swaps + 1;
        let desk = Desk::new(
            found.spec,
            start.release,
            start.secret,
            swaps,
            (&guest, dir),
        )?;
        desk.set_last_swap(&label.swap);
        let process = Self {
            guest,
            doors,
            desk,
            events,
            sender,
            waiting: VecDeque::new(),
            dir: dir.display().to_string(),
        };
        process.open()?;
        process.guest.machine.release_cpus();
        let swap = measure::Swap {
            id: &label.swap,
            us: process.desk.release(),
            dir,
        };
        let report = measure::report(&evidence, &process.guest.machine, Some(label.report), swap);
        process.desk.set_report(report);
        Ok(process)
    }
}

/// Checks all that can be checked before anything is made.
fn look(source: Source<'_>, now_tsc: u64) -> anyhow::Result<Found> {
    let device = match source.memory {
        Some(memory) => Device::of(&source.at.path, memory)?,
        None => Device::open(&source.at.path)?,
    };
    let extent = Extent {
        start: source.at.record,
        len: source.at.record_len,
    };
    let place = Place::of(&device, extent)?;
    match place.mark() {
        Mark::Stored => {}
        Mark::Consumed => bail!(
            "its record was consumed: the guest has run since, and what the record holds is of before"
        ),
        other => bail!("its record is marked as {other}, not as stored"),
    }
    let record = place.read()?;
    let label = &record.label;
    ensure!(
        label.nonce == source.nonce,
        "its record was stored for another jump than the one this kernel came by"
    );
    ensure!(
        release::FORMATS.contains(&label.format),
        "its state is in format {}, which this release does not read: add one that does, and try \
         again with `stillpoint adopt --retry`",
        label.format
    );
    ensure!(
        now_tsc > label.kicked_tsc,
        "the host's TSC was reset: it was {} when the guest was stopped, and is {now_tsc}; the guest's \
         clocks can't be carried on",
        label.kicked_tsc
    );
    let spec = MachineSpec::from_json(&label.spec).context("the spec in its record")?;
    ensure!(
        spec.memory.carve_out.as_ref() == Some(source.at),
        "its record says that its RAM lies elsewhere than the directory does"
    );
    Ok(Found {
        device,
        place,
        record,
        spec,
    })
}

/// Builds it, loads it, takes it, and lets it run.
fn build(
    found: &Found,
    dir: &Path,
    events: &Sender<Event>,
    began_tsc: u64,
) -> anyhow::Result<(Machine, Evidence)> {
    let Found {
        device,
        place,
        record,
        spec,
    } = found;
    let label = &record.label;
    let mut timing = Timing::start();
    let fd = device.as_fd().try_clone_to_owned()?;
    let ram = Arc::new(GuestRam::adopt(fd, &spec.memory)?);
    let plugs = backend::open(spec, dir)?;
    timing.mark("open");
    let promise = Promise {
        cpuid: Some(cpuid::from_bytes(&record.cpuid)?),
        tsc_khz: Some(label.tsc_khz),
        tsc_offset: label.tsc_offset,
        hold: label.hold,
    };
    let blank = Blank::new(spec, &ram, events, plugs, promise, |_| Ok(()))?;
    timing.mark("build");
    ram.populate(|| true);
    timing.mark("populate");
    let state = Unclaimed::decode(&record.state)?;
    let (machine, loaded) = blank.load(state, &mut Borrowed::default(), ENTER_PATIENCE)?;
    let pages = incoming::pages_before(&machine, &loaded);
    let wall = incoming::wall_before(&machine, &loaded);
    timing.mark("load");
    place.consume()?;
    timing.mark("take");
    // The guest is ours. Nobody runs it from the record again, whatever becomes of it here.
    machine.tell_of_swap(loaded.has_disturbed_tsc());
    let taken_tsc = clock::host_tsc();
    let entered = machine.enter(Hurry::default(), ENTER_PATIENCE)?;
    let khz = machine.tsc_khz();
    let entering = clock::duration(entered.tsc.saturating_sub(taken_tsc), khz);
    timing.marks.push(("enter", entering));
    // What the predecessor told of the blackout is the first of it; this process the last.
    let told = label.report.phases.iter().filter(|phase| phase.in_blackout);
    let told = told.map(|phase| phase.duration).sum();
    let away = clock::duration(began_tsc.saturating_sub(label.kicked_tsc), khz);
    let mut blackout = vec![("jump", away.saturating_sub(told))];
    blackout.append(&mut timing.marks);
    let evidence = Evidence {
        kicked_tsc: label.kicked_tsc,
        entered,
        loaded,
        pages,
        wall,
        brownout: Vec::new(),
        blackout,
    };
    Ok((machine, evidence))
}
