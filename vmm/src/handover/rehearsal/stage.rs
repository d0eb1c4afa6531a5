//! The side of the throw-away process: builds the machine, loads the state, saves it again, and ends.
//! It owns no guest and runs none.

use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::fs::MemfdFlags;
use rustix::io::Errno;
use stillpoint_carveout::area::{Place, PlaceError};
use stillpoint_control::clock::Policy;
use stillpoint_control::spec::{MachineSpec, Pages, SpecError};
use stillpoint_state::{StateError, Unclaimed};

use super::super::agree::{self, NoFormat};
use super::super::lend::Borrowed;
use super::super::record::{self, LookError, Source};
use super::super::{Adopted, Body, Channel, ChannelError, Offer, State, out_of_turn};
use super::{REHEARSED_FDS, Rehearse, Rehearsed, compare};
use crate::boot::cpuid;
use crate::clock;
use crate::devices::virtio::backend;
use crate::machine::FreezeError;
use crate::machine::build::{Blank, BuildError};
use crate::machine::vcpus::Promise;
use crate::memory::{GuestRam, MemoryError};
use crate::vcpu::VcpusError;
use crate::{faults, release};

/// How long each word of the other side may take: it bounds all of it by itself, and closes.
const PATIENCE: Duration = Duration::from_secs(120);

/// Why a rehearsal ended before its end.
#[derive(Debug, thiserror::Error)]
pub enum StageError {
    /// The guest's VMM.
    #[error("waiting for the {what} to rehearse with: {source}")]
    Channel {
        /// What.
        what: &'static str,
        /// What happened.
        source: ChannelError,
    },
    /// It offers something we can't read.
    #[error(transparent)]
    Format(#[from] NoFormat),
    /// File descriptors are missing.
    #[error("a rehearsal comes with {REHEARSED_FDS} file descriptors, this one with {0}")]
    Fds(usize),
    /// The spec.
    #[error(transparent)]
    Spec(#[from] SpecError),
    /// The view of RAM.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The machine.
    #[error(transparent)]
    Build(#[from] BuildError),
    /// Its vCPUs.
    #[error(transparent)]
    Vcpus(#[from] VcpusError),
    /// Saved state.
    #[error(transparent)]
    State(#[from] StateError),
    /// The record.
    #[error(transparent)]
    Look(#[from] LookError),
    /// The record's mark.
    #[error(transparent)]
    Place(#[from] PlaceError),
    /// Two stories of one machine.
    #[error("the guest's record tells of another machine than the one that runs: its {0}")]
    Another(&'static str),
    /// A record came, and no nonce to look for it by.
    #[error("a record is to be rehearsed with, and `--nonce` was not given")]
    NoNonce,
    /// It was loaded, and can't be saved again.
    #[error("saving it again: {0}")]
    Again(#[from] FreezeError),
    /// A fault that was injected.
    #[error("{0}")]
    Injected(&'static str),
    /// A memfd.
    #[error("passing the state: {0}")]
    Pass(#[from] Errno),
}

/// Rehearses what is asked for on `channel`; tells of its own failure there. `nonce` is that of the jump that
/// is rehearsed, if it is one.
pub fn perform(channel: &mut Channel, nonce: Option<&str>) -> Result<(), StageError> {
    build(channel, nonce)
        .and_then(|built| load(built, channel))
        .inspect_err(|error| channel.refuse(&error.to_string()))
}

struct Built {
    blank: Blank,
    files: Borrowed,
    state: OwnedFd,
    format: u32,
    offer: Offer,
    spec: MachineSpec,
    /// Whether the view of RAM may be written.
    takes_writes: bool,
    /// By which its record is to be found, if it has one.
    nonce: Option<String>,
}

fn wait(what: &'static str) -> impl FnOnce(ChannelError) -> StageError {
    move |source| StageError::Channel { what, source }
}

fn build(channel: &mut Channel, nonce: Option<&str>) -> Result<Built, StageError> {
    let heard = channel.receive(Instant::now() + PATIENCE);
    let (offer, is_record, fds) = match heard.map_err(wait("machine"))? {
        (
            Body::Rehearse(Rehearse {
                offer: Some(offer),
                record,
            }),
            fds,
        ) => (offer, record, fds),
        (other, _) => return Err(wait("machine")(out_of_turn(&other))),
    };
    let nonce = match is_record {
        true => Some(nonce.ok_or(StageError::NoNonce)?.to_owned()),
        false => None,
    };
    let count = fds.len();
    let fds: [OwnedFd; REHEARSED_FDS] = fds.try_into().map_err(|_| StageError::Fds(count))?;
    let [ram, state] = fds;
    let format = agree::on_format(&offer)?;
    let spec = MachineSpec::from_json(&offer.spec)?;
    let ram = Arc::new(GuestRam::view(ram, &spec.memory)?);
    let promise = Promise {
        cpuid: Some(cpuid::from_bytes(&offer.cpuid).map_err(StageError::State)?),
        tsc_khz: Some(offer.tsc_khz),
        tsc_offset: offer.tsc_offset,
        hold: offer.hold,
    };
    let mut files = Borrowed::default();
    while files.count() < offer.files as usize {
        files_of(channel, &mut files)?;
    }
    let plugs = backend::adopt(&spec, Path::new(""), &mut files).map_err(BuildError::from)?;
    if is_record {
        // After the jump they are opened by their paths.
        backend::would_open(&spec, &plugs).map_err(BuildError::from)?;
    }
    // Nobody hears of what this machine does: it does nothing.
    let (events, _) = std::sync::mpsc::channel();
    let blank = Blank::new(&spec, &ram, &events, plugs, promise, |_| Ok(()))?;
    let adopted = Adopted {
        format,
        populated: 0,
        hold: offer.hold,
        ahead: false,
        awake: false,
    };
    channel
        .send(Body::Adopted(adopted), &[])
        .map_err(wait("ear"))?;
    Ok(Built {
        blank,
        files,
        state,
        format,
        offer,
        takes_writes: ram.takes_writes(),
        spec,
        nonce,
    })
}

/// The state that came: as it is, or out of a record, which is looked at as at a revival.
fn state_of(built: &Built, len: u64) -> Result<(Unclaimed, Option<Place>), StageError> {
    let Some((nonce, at)) = built
        .nonce
        .as_ref()
        .zip(built.spec.memory.carve_out.as_ref())
    else {
        let bytes = compare::read(&built.state, len)?;
        return Ok((Unclaimed::decode(&bytes)?, None));
    };
    let file = built.state.try_clone().map_err(|_| Errno::MFILE)?;
    let source = Source {
        at,
        memory: Some(file),
        nonce,
    };
    let found = record::look(source, clock::host_tsc())?;
    let (label, offer) = (&found.record.label, &built.offer);
    let same = [
        ("spec", found.spec == built.spec),
        ("CPUID", found.record.cpuid == offer.cpuid),
        ("TSC frequency", label.tsc_khz == offer.tsc_khz),
        ("TSC offset", label.tsc_offset == offer.tsc_offset),
        ("clock policy", label.hold == offer.hold),
    ];
    if let Some((what, _)) = same.into_iter().find(|(_, same)| !same) {
        return Err(StageError::Another(what));
    }
    Ok((Unclaimed::decode(&found.record.state)?, Some(found.place)))
}

fn files_of(channel: &mut Channel, files: &mut Borrowed) -> Result<Option<State>, StageError> {
    let heard = channel.receive(Instant::now() + PATIENCE);
    match heard.map_err(wait("state"))? {
        (Body::Files(part), fds) => {
            files.add(part.names, fds);
            Ok(None)
        }
        (Body::State(state), _) => Ok(Some(state)),
        (other, _) => Err(wait("state")(out_of_turn(&other))),
    }
}

fn load(mut built: Built, channel: &mut Channel) -> Result<(), StageError> {
    let State { len } = loop {
        match files_of(channel, &mut built.files) {
            Ok(Some(state)) => break state,
            Ok(None) => {}
            // No state was to be rehearsed.
            Err(StageError::Channel {
                source: ChannelError::Frame(stillpoint_control::frame::FrameError::Closed),
                ..
            }) => return Ok(()),
            Err(error) => return Err(error),
        }
    };
    faults::reach(faults::Point::Rehearsing).map_err(StageError::Injected)?;
    let began = Instant::now();
    let (unclaimed, record) = state_of(&built, len)?;
    if unclaimed.of().format != built.format {
        let problem = "not in the format that was agreed on";
        return Err(StateError::Container(problem).into());
    }
    let epoch = unclaimed.of().epoch;
    let (machine, _) = built.blank.load(unclaimed, &mut built.files, PATIENCE)?;
    if let Some(place) = record {
        record::consume(&place)?;
    }
    // They write into our view, if it takes that. A huge page of it may not be had for that, and is not needed else.
    let huge = matches!(built.spec.memory.pages, Pages::Hugetlb2m | Pages::Hugetlb1g);
    let without_late = huge || !built.takes_writes;
    if !without_late {
        machine.load_rest(PATIENCE)?;
    }
    let load_ns = u64::try_from(began.elapsed().as_nanos()).unwrap_or(u64::MAX);
    let policy = match built.offer.hold {
        true => Policy::Hold,
        false => Policy::Advance,
    };
    let (saved, _) = machine.save(built.format, policy, Instant::now() + PATIENCE)?;
    let again = saved.finish(built.format, release::VERSION, &machine.spec().name, epoch);
    let file = rustix::fs::memfd_create("stillpoint-again", MemfdFlags::CLOEXEC)?;
    let mut at = 0;
    while at < again.len() {
        at += rustix::io::pwrite(&file, &again[at..], at as u64)?;
    }
    let rehearsed = Rehearsed {
        len: again.len() as u64,
        load_ns,
        without_late,
    };
    channel
        .send(Body::Rehearsed(rehearsed), &[file.as_fd()])
        .map_err(wait("ear"))?;
    // Clearing up takes kernel time, which the guest would miss: not before the other side is done.
    let _ = channel.receive(Instant::now() + PATIENCE);
    Ok(())
}
