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
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};

use stillpoint_control::ownership::{Epoch, Owner, Ownership};
use stillpoint_state::Unclaimed;

use super::desk::Desk;
use super::{ENTER_PATIENCE, Process, Start};
use crate::boot::cpuid;
use crate::clock;
use crate::devices::virtio::backend;
use crate::doors::Doors;
use crate::event::Event;
use crate::handover::incoming;
use crate::handover::lend::Borrowed;
use crate::handover::measure::{self, Evidence};
use crate::handover::record::{self, Found, Source, look};
use crate::machine::build::Blank;
use crate::machine::frozen::Guest;
use crate::machine::vcpus::Promise;
use crate::machine::{Machine, Timing};
use crate::memory::GuestRam;
use crate::vcpu::hurry::Hurry;

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
    record::consume(place)?;
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
        left: Vec::new(),
        entered,
        loaded,
        pages,
        wall,
        brownout: Vec::new(),
        blackout,
    };
    Ok((machine, evidence))
}
