//! A guest's record, written and looked at: what a jump of its host and its rehearsal have in common.
//!
//! The bytes are `stillpoint-carveout`'s; here is what goes into them from a guest that stands still,
//! and what must be true of them before anything is made of them.
//!
//! Must never: say *stored* or *withdrawn*, which is for who has the guest that stands still.

use std::os::fd::OwnedFd;
use std::time::Duration;

use stillpoint_carveout::area::{Place, PlaceError};
use stillpoint_carveout::layout::Extent;
use stillpoint_carveout::map::{Device, MapError};
use stillpoint_carveout::mark::Mark;
use stillpoint_carveout::record::{Label, Record, RecordError};
use stillpoint_control::clock::Policy;
use stillpoint_control::report::{
    Blackout, ClockReceipt, Outcome, Phase, ReleaseName, Side, SwapReport, WallClock,
};
use stillpoint_control::spec::{CarveOutSpec, MachineSpec, SpecError};

use crate::boot::cpuid;
use crate::machine::frozen::Frozen;
use crate::machine::{FreezeError, Machine};
use crate::{faults, release};

/// What a record tells beside the guest's state.
#[derive(Clone, Debug)]
pub struct Told<'a> {
    /// The jump's nonce.
    pub nonce: &'a str,
    /// Id of the swap.
    pub swap: &'a str,
    /// The release that writes it.
    pub release: &'a ReleaseName,
    /// Swaps that the guest has lived through.
    pub swaps: u64,
    /// The longest that the pause may be.
    pub ceiling: Duration,
    /// The guest's wall clock less the host's, as its agent says.
    pub wall_error_ns: Option<i64>,
    /// When the swap was asked for.
    pub started_at_unix_ns: u64,
}

/// The format that a record of this machine is in: the newest that carries it.
pub fn format_of(machine: &Machine, policy: Policy) -> Option<u32> {
    machine.formats(policy).first().copied()
}

/// Saves a guest that stands still, as a record.
pub fn save(
    frozen: &mut Frozen<'_>,
    format: u32,
    policy: Policy,
    told: &Told<'_>,
) -> Result<Record, FreezeError> {
    let state = frozen.save(format, policy)?;
    let machine = frozen.machine();
    let label = Label {
        nonce: told.nonce.to_owned(),
        swap: told.swap.to_owned(),
        spec: serde_json::to_string(machine.spec()).unwrap_or_default(),
        release: told.release.clone(),
        format,
        tsc_khz: machine.tsc_khz(),
        tsc_offset: machine.tsc_offset(),
        hold: policy == Policy::Hold,
        kicked_tsc: frozen.kicked_tsc,
        swaps: told.swaps,
        report: report(frozen, told, (format, state.len() as u64)),
    };
    Ok(Record {
        label,
        cpuid: cpuid::to_bytes(machine.cpuid()),
        state,
    })
}

/// The report as far as this side can tell it.
fn report(
    frozen: &Frozen<'_>,
    told: &Told<'_>,
    (state_format, state_bytes): (u32, u64),
) -> SwapReport {
    let machine: &Machine = frozen.machine();
    let phase = |name: &str, in_blackout, duration| Phase {
        name: name.to_owned(),
        side: Side::Predecessor,
        in_blackout,
        duration,
    };
    let marks = frozen.timing.marks.iter();
    let marks = marks.map(|(name, duration)| phase(name, true, *duration));
    let wall_clock = WallClock {
        error_before_ns: told.wall_error_ns,
        ..WallClock::default()
    };
    SwapReport {
        swap: told.swap.to_owned(),
        vm: machine.spec().name.clone(),
        component: "kernel".into(),
        from: told.release.clone(),
        to: told.release.clone(),
        outcome: Outcome::Moved,
        reason: None,
        started_at_unix_ns: told.started_at_unix_ns,
        vcpus: u32::try_from(machine.vcpu_count()).unwrap_or(u32::MAX),
        memory_bytes: machine.ram().size(),
        state_format,
        state_bytes,
        budget: told.ceiling,
        margin: None,
        phases: std::iter::once(phase("drain", false, frozen.drained))
            .chain(marks)
            .collect(),
        blackout: Blackout::default(),
        clock: Some(ClockReceipt {
            wall_clock,
            ..ClockReceipt::default()
        }),
        recovery: Vec::new(),
        warnings: Vec::new(),
    }
}

/// The place of a guest's record in what its memory lies in.
pub fn place_of(at: &CarveOutSpec, device: &Device) -> Result<Place, MapError> {
    let extent = Extent {
        start: at.record,
        len: at.record_len,
    };
    Place::of(device, extent)
}

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
#[derive(Debug)]
pub struct Found {
    /// What it lies in.
    pub device: Device,
    /// Where.
    pub place: Place,
    /// It.
    pub record: Record,
    /// The machine that it is of.
    pub spec: MachineSpec,
}

/// Why it may not.
#[derive(Debug, thiserror::Error)]
pub enum LookError {
    /// What it lies in.
    #[error(transparent)]
    Map(#[from] MapError),
    /// It can't be read.
    #[error(transparent)]
    Record(#[from] RecordError),
    /// It was run.
    #[error(
        "its record was consumed: the guest has run since, and what the record holds is of before"
    )]
    Consumed,
    /// It is not stored.
    #[error("its record is marked as {0}, not as stored")]
    Mark(Mark),
    /// Another jump's.
    #[error("its record was stored for another jump than the one this kernel came by")]
    Nonce,
    /// It can't be read here.
    #[error(
        "its state is in format {0}, which this release does not read: add one that does, and try \
         again with `stillpoint adopt --retry`"
    )]
    Format(u32),
    /// Its clocks can't be carried on.
    #[error(
        "the host's TSC was reset: it was {kicked} when the guest was stopped, and is {now}; the guest's \
         clocks can't be carried on"
    )]
    Tsc {
        /// When the guest was stopped.
        kicked: u64,
        /// Now.
        now: u64,
    },
    /// Its spec.
    #[error("the spec in its record: {0}")]
    Spec(SpecError),
    /// Two places.
    #[error("its record says that its RAM lies elsewhere than the directory does")]
    Elsewhere,
}

/// Checks all that can be checked before anything is made.
pub fn look(source: Source<'_>, now_tsc: u64) -> Result<Found, LookError> {
    let device = match source.memory {
        Some(memory) => Device::of(&source.at.path, memory)?,
        None => Device::open(&source.at.path)?,
    };
    let place = place_of(source.at, &device)?;
    match place.mark() {
        Mark::Stored => {}
        Mark::Consumed => return Err(LookError::Consumed),
        other => return Err(LookError::Mark(other)),
    }
    let record = place.read()?;
    let label = &record.label;
    if label.nonce != source.nonce {
        return Err(LookError::Nonce);
    }
    if !release::FORMATS.contains(&label.format) {
        return Err(LookError::Format(label.format));
    }
    if now_tsc <= label.kicked_tsc {
        let kicked = label.kicked_tsc;
        return Err(LookError::Tsc {
            kicked,
            now: now_tsc,
        });
    }
    let spec = MachineSpec::from_json(&label.spec).map_err(LookError::Spec)?;
    if spec.memory.carve_out.as_ref() != Some(source.at) {
        return Err(LookError::Elsewhere);
    }
    Ok(Found {
        device,
        place,
        record,
        spec,
    })
}

/// The guest is about to be run from it: nobody else may, from here on.
pub fn consume(place: &Place) -> Result<(), PlaceError> {
    if faults::is_spoilt(faults::Spoilt::Mark) {
        return Ok(());
    }
    place.consume()
}
