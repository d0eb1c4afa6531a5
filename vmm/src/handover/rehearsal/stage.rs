//! The side of the throw-away process: builds the machine, loads the state, saves it again, and ends.
//! It owns no guest and runs none.

use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::fs::MemfdFlags;
use rustix::io::Errno;
use stillpoint_control::clock::Policy;
use stillpoint_control::spec::{MachineSpec, Pages, SpecError};
use stillpoint_state::{StateError, Unclaimed};

use super::super::agree::{self, NoFormat};
use super::super::lend::Borrowed;
use super::super::{Adopted, Body, Channel, ChannelError, Offer, State, out_of_turn};
use super::{REHEARSED_FDS, Rehearse, Rehearsed, compare};
use crate::boot::cpuid;
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

/// Rehearses what is asked for on `channel`; tells of its own failure there.
pub fn perform(channel: &mut Channel) -> Result<(), StageError> {
    build(channel)
        .and_then(|built| load(built, channel))
        .inspect_err(|error| channel.refuse(&error.to_string()))
}

struct Built {
    blank: Blank,
    files: Borrowed,
    state: OwnedFd,
    format: u32,
    offer: Offer,
    pages: Pages,
}

fn wait(what: &'static str) -> impl FnOnce(ChannelError) -> StageError {
    move |source| StageError::Channel { what, source }
}

fn build(channel: &mut Channel) -> Result<Built, StageError> {
    let heard = channel.receive(Instant::now() + PATIENCE);
    let (offer, fds) = match heard.map_err(wait("machine"))? {
        (Body::Rehearse(Rehearse { offer: Some(offer) }), fds) => (offer, fds),
        (other, _) => return Err(wait("machine")(out_of_turn(&other))),
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
    // Nobody hears of what this machine does: it does nothing.
    let (events, _) = std::sync::mpsc::channel();
    let blank = Blank::new(&spec, &ram, &events, plugs, promise, |_| Ok(()))?;
    let adopted = Adopted {
        format,
        populated: 0,
        hold: offer.hold,
        ahead: false,
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
        pages: spec.memory.pages,
    })
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
    let bytes = compare::read(&built.state, len)?;
    let unclaimed = Unclaimed::decode(&bytes)?;
    if unclaimed.of().format != built.format {
        let problem = "not in the format that was agreed on";
        return Err(StateError::Container(problem).into());
    }
    let epoch = unclaimed.of().epoch;
    let (machine, _) = built.blank.load(unclaimed, &mut built.files, PATIENCE)?;
    // They write into our view. A huge page of it may not be had for that, and is not needed else.
    let without_late = matches!(built.pages, Pages::Hugetlb2m | Pages::Hugetlb1g);
    if !without_late {
        machine.load_rest(PATIENCE)?;
    }
    let load_ns = u64::try_from(began.elapsed().as_nanos()).unwrap_or(u64::MAX);
    let policy = match built.offer.hold {
        true => Policy::Hold,
        false => Policy::Advance,
    };
    let saved = machine.save(built.format, policy, Instant::now() + PATIENCE)?;
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
