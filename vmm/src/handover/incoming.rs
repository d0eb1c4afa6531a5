//! The successor's side: adopt, load, take, run.
//!
//! Until the word is taken this process enters no vCPU and changes no byte of guest RAM, disk,
//! tap or socket; it only reads and builds its own things beside them.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::Sender;
use std::time::{Duration, Instant};

use stillpoint_control::ownership::{Epoch, Owner, Ownership, OwnershipError};
use stillpoint_control::report::SwapReport;
use stillpoint_control::secret::Secret;
use stillpoint_control::spec::{MachineSpec, SpecError};
use stillpoint_state::{StateError, Unclaimed};

use super::agree::{self, NoFormat};
use super::lend::Borrowed;
use super::measure::Evidence;
use super::{
    Adopted, Body, Channel, ChannelError, Loaded, OFFERED_FDS, Offer, Running, SPIN, State,
    out_of_turn,
};
use crate::boot::cpuid;
use crate::clock::page::Page;
use crate::clock::wall::WallClock;
use crate::console;
use crate::devices::virtio::backend;
use crate::doors::Doors;
use crate::event::Event;
use crate::faults::{self, Spoilt};
use crate::machine::build::{Blank, BuildError, Loaded as LoadedMachine};
use crate::machine::frozen::Guest;
use crate::machine::vcpus::Promise;
use crate::machine::{Machine, Timing};
use crate::memory::{GuestRam, MemoryError};
use crate::vcpu::VcpusError;
use crate::vcpu::hurry::Hurry;
use crate::vcpu::outside::Left;
use crate::{clock, warm};

/// How long the predecessor may take to make its offer, and to freeze after we have adopted.
const OFFER_PATIENCE: Duration = Duration::from_secs(60);
/// How long the state is waited for awake once it is announced: it takes a third of that.
const STATE_SPIN: Duration = Duration::from_micros(1500);
/// How long a successor that has loaded waits for the word: longer than the daemon is patient with
/// a predecessor that hangs (any budget, and a margin), or nobody would be there to take over.
const WORD_PATIENCE: Duration = Duration::from_secs(600);
/// Memory that is kept for what a process needs when it owns the guest: the stacks of its threads. One that
/// gets none from the kernel before it takes the guest must not take it to its grave.
const RESERVE: usize = 64 << 20;
/// How long the predecessor may take to tell its part of the report.
const TELL_PATIENCE: Duration = Duration::from_secs(2);
/// How long a vCPU may take to enter; after the take there is no way back, so this only bounds
/// how long a failure stays unseen.
const ENTER_PATIENCE: Duration = Duration::from_secs(10);

/// Why the guest was not adopted.
#[derive(Debug, thiserror::Error)]
pub enum AdoptError {
    /// The predecessor.
    #[error("waiting for the predecessor's {what}: {source}")]
    Channel {
        /// For what.
        what: &'static str,
        /// What happened.
        source: ChannelError,
    },
    /// It offers something we can't read.
    #[error(transparent)]
    Format(#[from] NoFormat),
    /// Its offer lacks file descriptors.
    #[error("the offer came with {0} file descriptors, {OFFERED_FDS} belong to it")]
    Fds(usize),
    /// The spec.
    #[error(transparent)]
    Spec(#[from] SpecError),
    /// RAM.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The machine.
    #[error(transparent)]
    Build(#[from] BuildError),
    /// Saved state.
    #[error(transparent)]
    State(#[from] StateError),
    /// The state's memfd.
    #[error("cannot read the saved state: {0}")]
    Read(rustix::io::Errno),
    /// The word.
    #[error(transparent)]
    Ownership(#[from] OwnershipError),
    /// Entering.
    #[error(transparent)]
    Vcpus(#[from] VcpusError),
    /// Sockets and log.
    #[error("cannot serve the guest's sockets: {0}")]
    Doors(std::io::Error),
    /// No memory for the time after the take.
    #[error(
        "no memory left: {} MiB are kept for when the guest is taken; free some on the host",
        RESERVE >> 20
    )]
    Reserve,
    /// It died too early.
    #[error("the predecessor died before its saved state was complete: the guest died with it")]
    Unsealed,
    /// A fault that was injected.
    #[error("{0}")]
    Injected(&'static str),
}

/// A guest that was taken and runs.
#[derive(Debug)]
pub struct Arrived {
    /// The guest.
    pub guest: Guest,
    /// Its doors: control listener; console listener and log (a duplicate of the console's).
    pub doors: Doors,
    /// Its secret.
    pub secret: Option<Secret>,
    /// Its directory.
    pub dir: String,
    /// Swaps lived through, this one included.
    pub swaps: u64,
    /// Id of the swap.
    pub swap: String,
    /// What the report will be made of.
    pub evidence: Evidence,
}

struct Prepared {
    offer: Offer,
    /// Files of devices that nobody has taken yet.
    files: Borrowed,
    format: u32,
    blank: Blank,
    ownership: Ownership,
    state: OwnedFd,
    predecessor: OwnedFd,
    doors: [OwnedFd; 3],
    timing: Timing,
    /// See [`RESERVE`]. Never touched.
    reserve: Vec<u8>,
}

/// Adopts the guest that is offered on `channel`, and runs it. On an error before the take the
/// predecessor was told, and keeps it.
pub fn adopt(channel: &mut Channel, events: &Sender<Event>) -> Result<Arrived, AdoptError> {
    prepare(channel, events)
        .and_then(|prepared| take_over(prepared, channel))
        .inspect_err(|error| channel.refuse(&error.to_string()))
}

fn prepare(channel: &mut Channel, events: &Sender<Event>) -> Result<Prepared, AdoptError> {
    let failed = |source| AdoptError::Channel {
        what: "offer",
        source,
    };
    let (body, fds) = channel
        .receive(Instant::now() + OFFER_PATIENCE)
        .map_err(failed)?;
    let Body::Offer(offer) = body else {
        return Err(failed(out_of_turn(&body)));
    };
    let mut timing = Timing::start();
    let count = fds.len();
    let fds: [OwnedFd; OFFERED_FDS] = fds.try_into().map_err(|_| AdoptError::Fds(count))?;
    let [ram, ownership, state, predecessor, control, console, log] = fds;
    // Before anything is refused: who closes with packets unread takes its last word back with it.
    let mut files = await_files(channel, offer.files)?;
    let format = agree::on_format(&offer)?;
    let spec = MachineSpec::from_json(&offer.spec)?;
    let ram = Arc::new(GuestRam::adopt(ram, &spec.memory)?);
    let promise = Promise {
        cpuid: Some(cpuid::from_bytes(&offer.cpuid)?),
        tsc_khz: Some(offer.tsc_khz),
        tsc_offset: offer.tsc_offset,
        hold: offer.hold,
    };
    let plugs = backend::adopt(&spec, Path::new(&offer.dir), &mut files);
    let plugs = plugs.map_err(BuildError::from)?;
    let blank = Blank::new(&spec, &ram, events, plugs, promise, |_| Ok(()))?;
    timing.mark("build");
    let populated = ram.populate(|| !faults::is_spoilt(Spoilt::Populate));
    timing.mark("populate");
    let wanted = !faults::is_spoilt(Spoilt::Populate) && !faults::is_spoilt(Spoilt::PreFault);
    if blank.pre_fault(|| wanted) > 0 {
        timing.mark("pre-fault");
    }
    let ownership = Ownership::map(ownership)?;
    let mut reserve = Vec::new();
    reserve
        .try_reserve_exact(RESERVE)
        .map_err(|_| AdoptError::Reserve)?;
    warm::up_for(blank.vcpu_count());
    faults::reach(faults::Point::Adopt).map_err(AdoptError::Injected)?;
    let adopted = Adopted {
        format,
        populated,
        hold: offer.hold,
        ahead: true,
        awake: blank.may_stay_awake(),
    };
    channel
        .send(Body::Adopted(adopted), &[])
        .map_err(|source| AdoptError::Channel {
            what: "ear",
            source,
        })?;
    Ok(Prepared {
        offer,
        files,
        format,
        blank,
        ownership,
        state,
        predecessor,
        doors: [control, console, log],
        reserve,
        timing,
    })
}

/// Waits for the files of devices that belong to the offer.
fn await_files(channel: &mut Channel, count: u32) -> Result<Borrowed, AdoptError> {
    let failed = |source| AdoptError::Channel {
        what: "devices' files",
        source,
    };
    let mut files = Borrowed::default();
    while files.count() < count as usize {
        match channel
            .receive(Instant::now() + OFFER_PATIENCE)
            .map_err(failed)?
        {
            (Body::Files(part), fds) => files.add(part.names, fds),
            (other, _) => return Err(failed(out_of_turn(&other))),
        }
    }
    Ok(files)
}

fn take_over(mut prepared: Prepared, channel: &mut Channel) -> Result<Arrived, AdoptError> {
    let (len, viewers, hurry) = await_state(&mut prepared, channel)?;
    // From here to `enter` the guest stands still.
    let mut timing = Timing::start();
    faults::reach(faults::Point::Load).map_err(AdoptError::Injected)?;
    let bytes = read_state(&prepared.state, len)?;
    let unclaimed = Unclaimed::decode(&bytes)?;
    check_header(&unclaimed, &prepared)?;
    let epoch = Epoch(prepared.offer.epoch);
    let (machine, loaded) = prepared
        .blank
        .load(unclaimed, &mut prepared.files, OFFER_PATIENCE)?;
    let pages = pages_before(&machine, &loaded);
    let wall = wall_before(&machine, &loaded);
    timing.mark("load");
    faults::stands_still_since(|| {
        let cycles = clock::host_tsc().saturating_sub(loaded.pause.from_tsc);
        clock::duration(cycles, machine.tsc_khz())
    });
    faults::reach(faults::Point::Loaded).map_err(AdoptError::Injected)?;
    let took_ns = timing.marks.iter().map(|(_, d)| d.as_nanos()).sum::<u128>() as u64;
    // A predecessor that died meanwhile can't hear this; what is next shows it.
    let _ = channel.send(Body::Loaded(Loaded { took_ns }), &[]);
    let kicked_tsc = await_word(channel, &prepared.predecessor, &prepared.ownership, epoch)?;
    timing.mark("await");
    faults::reach(faults::Point::Taken).map_err(AdoptError::Injected)?;
    // The guest is ours. No error from here on may be answered by anything but carrying on or
    // ending: nobody else may run it again.
    let taken_tsc = clock::host_tsc();
    machine.tell_of_swap(loaded.has_disturbed_tsc());
    let entered = machine.enter(hurry, ENTER_PATIENCE)?;
    // By the vCPUs' own stamps: this thread leaves the cores to them first.
    let entering = clock::duration(entered.tsc.saturating_sub(taken_tsc), machine.tsc_khz());
    timing.marks.push(("enter", entering));
    faults::reach(faults::Point::Entered).map_err(AdoptError::Injected)?;
    let _ = channel.send(Body::Running(Running {}), &[]);
    let evidence = Evidence {
        kicked_tsc,
        left: Vec::new(),
        entered,
        loaded,
        pages,
        wall,
        brownout: std::mem::take(&mut prepared.timing.marks),
        blackout: timing.marks,
    };
    // The guest runs: now is the time for all that needs memory.
    drop(prepared.reserve);
    let owner = Owner::Taken(epoch);
    let guest = Guest::new(machine, prepared.ownership, owner);
    settle_in(guest, prepared.offer, prepared.doors, viewers, evidence)
}

/// Connects the running guest to its doors.
fn settle_in(
    mut guest: Guest,
    offer: Offer,
    doors: [OwnedFd; 3],
    viewers: Vec<OwnedFd>,
    evidence: Evidence,
) -> Result<Arrived, AdoptError> {
    let [control, listener, log] = doors;
    let doors = Doors {
        control,
        console: console::Doors {
            listener,
            log: File::from(log),
        },
    };
    doors.answer().map_err(AdoptError::Doors)?;
    let console = doors.console.try_clone().map_err(AdoptError::Doors)?;
    guest
        .machine
        .open_console(console, viewers)
        .map_err(AdoptError::Doors)?;
    Ok(Arrived {
        guest,
        doors,
        secret: Secret::from_bytes(&offer.secret),
        dir: offer.dir,
        swaps: offer.swaps + 1,
        swap: offer.swap,
        evidence,
    })
}

/// Waits until the saved state is there, in a hurry as soon as that may be what comes next; gives its
/// length, and the viewers' sockets.
fn await_state(
    prepared: &mut Prepared,
    channel: &mut Channel,
) -> Result<(u64, Vec<OwnedFd>, Hurry), AdoptError> {
    let failed = |source| AdoptError::Channel {
        what: "state",
        source,
    };
    let mut hurry = prepared.blank.hurry();
    let mut spin = SPIN;
    let heard = loop {
        let heard = channel
            .receive_from(&prepared.predecessor, spin, Instant::now() + OFFER_PATIENCE)
            .map_err(failed)?;
        match heard {
            // All of us: a thread that sleeps is woken in another's time, and maybe where that one works.
            Some((Body::Soon(_), _)) => {
                prepared.blank.stand_by(STATE_SPIN)?;
                spin = STATE_SPIN;
            }
            // Opened after the offer; the state follows.
            Some((Body::Files(part), fds)) => prepared.files.add(part.names, fds),
            Some((Body::Ahead(state), fds)) => {
                // The guest runs: this takes no core from it.
                drop(hurry);
                load_ahead(prepared, state, fds);
                hurry = prepared.blank.hurry();
            }
            heard => break heard,
        }
    };
    match heard {
        Some((Body::State(state), viewers)) => Ok((state.len, viewers, hurry)),
        Some((other, _)) => Err(failed(out_of_turn(&other))),
        // Dead. If it came as far as the seal, the state is complete, and ours to take.
        None => match prepared.ownership.read()? {
            Owner::Sealed(epoch) | Owner::Revoked(epoch) if epoch.0 == prepared.offer.epoch => {
                let stat = rustix::fs::fstat(&prepared.state).map_err(AdoptError::Read)?;
                Ok((u64::try_from(stat.st_size).unwrap_or(0), Vec::new(), hurry))
            }
            _ => Err(AdoptError::Unsealed),
        },
    }
}

/// Loads ahead what stands of a state that is not the last word. Nothing hangs on it: what fails here is
/// loaded, or fails, when the last word is.
fn load_ahead(prepared: &Prepared, state: State, fds: Vec<OwnedFd>) {
    let loaded = || {
        let Some(file) = fds.first() else {
            return Ok(());
        };
        let unclaimed = Unclaimed::decode(&read_state(file, state.len)?)?;
        if unclaimed.of().format != prepared.format {
            return Ok(());
        }
        Ok::<_, AdoptError>(prepared.blank.load_ahead(unclaimed, OFFER_PATIENCE)?)
    };
    if let Err(error) = loaded() {
        tracing::warn!(%error, "a state could not be loaded ahead of the freeze; all of it is loaded after");
    }
}

fn read_state(fd: &OwnedFd, len: u64) -> Result<Vec<u8>, AdoptError> {
    let len = usize::try_from(len).unwrap_or(usize::MAX);
    if len > stillpoint_state::codec::MAX_STATE {
        return Err(StateError::Container("larger than any state of ours").into());
    }
    let mut bytes = vec![0; len];
    let mut at = 0;
    while at < len {
        match rustix::io::pread(fd, &mut bytes[at..], at as u64).map_err(AdoptError::Read)? {
            0 => return Err(StateError::Container("cut off").into()),
            n => at += n,
        }
    }
    Ok(bytes)
}

fn check_header(state: &Unclaimed, prepared: &Prepared) -> Result<(), StateError> {
    let header = state.of();
    if header.format != prepared.format {
        return Err(StateError::Container(
            "not in the format that was agreed on",
        ));
    }
    if header.epoch != prepared.offer.epoch {
        return Err(StateError::Container("saved for another attempt"));
    }
    Ok(())
}

/// The guest's pvclock pages as the predecessor's KVM left them.
pub(crate) fn pages_before(machine: &Machine, loaded: &LoadedMachine) -> Vec<Option<Page>> {
    let page = |msr: u64| {
        let at = vm_memory::GuestAddress(msr & !1);
        (msr & 1 == 1)
            .then(|| Page::read(machine.ram().map(), at))
            .flatten()
    };
    loaded.system_time().map(page).collect()
}

/// The guest's wall clock structure, likewise.
pub(crate) fn wall_before(machine: &Machine, loaded: &LoadedMachine) -> Option<WallClock> {
    let at = vm_memory::GuestAddress(loaded.wall_clock());
    (loaded.wall_clock() != 0)
        .then(|| WallClock::read(machine.ram().map(), at))
        .flatten()
}

/// Waits until the guest is ours to take, and takes it. Gives the host TSC of the kick, 0 if the
/// predecessor died before it could say.
fn await_word(
    channel: &mut Channel,
    predecessor: &OwnedFd,
    ownership: &Ownership,
    epoch: Epoch,
) -> Result<u64, AdoptError> {
    let failed = |source| AdoptError::Channel {
        what: "word",
        source,
    };
    let mut kicked_tsc = 0;
    loop {
        let heard = channel
            .receive_from(predecessor, SPIN, Instant::now() + WORD_PATIENCE)
            .map_err(failed)?;
        match heard {
            Some((Body::GiveUp(give_up), _)) => {
                faults::reach(faults::Point::Take).map_err(AdoptError::Injected)?;
                kicked_tsc = give_up.kicked_tsc;
                match ownership.take(epoch) {
                    Ok(_) => return Ok(kicked_tsc),
                    // The daemon was quicker: it is about to kill the predecessor.
                    Err(OwnershipError::Lost {
                        found: Owner::Revoked(revoked),
                        ..
                    }) if revoked == epoch => {}
                    Err(error) => return Err(error.into()),
                }
            }
            Some((other, _)) => return Err(failed(out_of_turn(&other))),
            None => {
                ownership.take_from_dead(epoch)?;
                return Ok(kicked_tsc);
            }
        }
    }
}

/// Waits a little for the predecessor's part of the report, and for when each vCPU came to rest there; nothing but the
/// report hangs on it.
pub fn hear_predecessor(channel: &mut Channel) -> (Option<SwapReport>, Vec<Left>) {
    match channel.receive(Instant::now() + TELL_PATIENCE) {
        Ok((Body::Phases(phases), _)) => {
            let left = phases.out.iter().map(|out| Left {
                tsc: out.tsc,
                queued: Duration::from_nanos(out.queued_ns),
            });
            (serde_json::from_str(&phases.report).ok(), left.collect())
        }
        _ => (None, Vec::new()),
    }
}
