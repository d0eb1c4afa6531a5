//! The side of the guest's VMM: asks, peeks, compares. Whatever goes wrong, the guest runs on here.

use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::fs::MemfdFlags;
use stillpoint_carveout::area::{Place, PlaceError};
use stillpoint_carveout::map::{Device, MapError};
use stillpoint_carveout::mark::Mark;
use stillpoint_control::clock::Policy;
use stillpoint_control::frame::{FrameError, MAX_FDS};
use stillpoint_control::rehearsal::{Rehearsal, Stage, Verdict};
use stillpoint_control::report::ReleaseName;
use stillpoint_state::likeness;

use super::super::lend::Lending;
use super::super::record::{self, Told};
use super::super::{Adopted, Body, Channel, ChannelError, Files, Offer, State, out_of_turn};
use super::{Rehearse, Rehearsed, compare, standins};
use crate::boot::cpuid;
use crate::machine::frozen::{Frozen, Guest, Peeked};
use crate::machine::{FreezeError, Machine};
use crate::memory::MemoryError;

/// How often the wait looks whether the guest has ended.
const GLANCE: Duration = Duration::from_millis(10);

/// A rehearsal as it was asked for.
#[derive(Debug)]
pub struct Errand {
    /// Whether the guest's state is saved for it.
    pub peek: bool,
    /// The longest that the guest may stand still.
    pub budget: Duration,
    /// The longest that all of it may take.
    pub patience: Duration,
    /// What the guest's clocks would make of the pause.
    pub clock: Policy,
    /// A jump of the host is rehearsed, if it is one.
    pub jump: Option<Jump>,
}

/// What of a record is not the guest's own.
#[derive(Debug)]
pub struct Jump {
    /// By which it is stored.
    pub nonce: String,
    /// This process's release.
    pub release: ReleaseName,
    /// Swaps that the guest has lived through.
    pub swaps: u64,
}

/// Why it did not pass.
#[derive(Debug, thiserror::Error)]
enum Trouble {
    #[error("{0}")]
    Channel(#[from] ChannelError),
    #[error("{0}")]
    Freeze(#[from] FreezeError),
    #[error("{0}")]
    Memory(#[from] MemoryError),
    #[error("cannot give it stand-ins for the guest's files: {0}")]
    Standins(std::io::Error),
    #[error("cannot pass the guest's state: {0}")]
    State(rustix::io::Errno),
    #[error("it asks for state format {0}, which we don't write")]
    Format(u32),
    #[error(
        "the guest's RAM ends with the kernel, so it has no record: it was not started with `--survive kernel`"
    )]
    NoPlace,
    #[error("cannot store the guest's record: {0}")]
    Record(#[from] PlaceError),
    #[error("cannot make room for the guest's record: {0}")]
    Room(#[from] MapError),
    #[error(
        "it loaded the guest and left its record marked as {0}, not as consumed: by such a release a guest could be \
         run twice"
    )]
    NotConsumed(Mark),
    #[error("clock policy hold: {0}; use the policy advance")]
    Hold(&'static str),
    #[error("what it saved again is not the same state")]
    Differs,
    #[error("what it saved again can't be read: {0}")]
    Unreadable(#[from] stillpoint_state::StateError),
    #[error("the guest switched itself off or reset meanwhile")]
    GuestEnded,
}

struct Rehearsing<'a, E> {
    channel: &'a mut Channel,
    errand: &'a Errand,
    deadline: Instant,
    files: Lending,
    ended: E,
    told: Rehearsal,
}

/// Rehearses. `ended` is asked whether the guest has ended meanwhile.
pub fn rehearse(
    guest: &mut Guest,
    errand: &Errand,
    channel: &mut Channel,
    ended: impl FnMut() -> bool,
) -> Rehearsal {
    let began = Instant::now();
    let mut rehearsing = Rehearsing {
        channel,
        errand,
        deadline: began + errand.patience,
        files: Lending::default(),
        ended,
        told: Rehearsal::begin(),
    };
    let result = rehearsing.run(guest);
    let mut told = rehearsing.told;
    told.verdict = match &result {
        Ok(()) => Verdict::Passed,
        Err(Trouble::GuestEnded) => Verdict::CalledOff,
        Err(_) => Verdict::Failed,
    };
    told.reason = result.err().map(|trouble| trouble.to_string());
    told.took = began.elapsed();
    told
}

impl<E: FnMut() -> bool> Rehearsing<'_, E> {
    fn run(&mut self, guest: &mut Guest) -> Result<(), Trouble> {
        let began = Instant::now();
        let hold = self.errand.clock == Policy::Hold;
        if hold {
            super::super::hold::check(&guest.machine).map_err(Trouble::Hold)?;
        }
        let memfd = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let state = rustix::fs::memfd_create("stillpoint-peek", memfd).map_err(Trouble::State)?;
        let errand = self.errand;
        let jump = errand.jump.as_ref();
        let place = jump.map(|_| room(&guest.machine, &state)).transpose()?;
        self.ask(&guest.machine, &state)?;
        let Adopted {
            format, hold: can, ..
        } = match self.hear()? {
            (Body::Adopted(adopted), _) => adopted,
            (other, _) => return Err(out_of_turn(&other).into()),
        };
        self.told.build = began.elapsed();
        if hold && !can {
            return Err(Trouble::Hold(super::super::hold::NOT_KNOWN));
        }
        if !guest.machine.formats(self.errand.clock).contains(&format) {
            return Err(Trouble::Format(format));
        }
        self.told.state_format = format;
        if errand.peek {
            let before = match jump.zip(place.as_ref()) {
                Some((jump, place)) => self.peek_as_record(guest, jump, place)?,
                None => self.peek(guest, &state)?,
            };
            self.compare(&before)?;
            match place.map(|place| place.mark()) {
                None | Some(Mark::Consumed) => {}
                Some(other) => return Err(Trouble::NotConsumed(other)),
            }
            let bytes = before;
            guest.peeked = Some(Peeked { format, bytes });
        }
        self.told.stage = Stage::Done;
        Ok(())
    }

    /// Says what the machine is, and gives what it is to be built of.
    fn ask(&mut self, machine: &Machine, state: &OwnedFd) -> Result<(), Trouble> {
        machine.lend(&mut self.files).map_err(FreezeError::Lend)?;
        let is_record = self.errand.jump.is_some();
        let formats = match is_record {
            // Nobody is there to agree with.
            true => record::format_of(machine, self.errand.clock)
                .into_iter()
                .collect(),
            false => machine.formats(self.errand.clock),
        };
        let offer = Offer {
            spec: serde_json::to_string(machine.spec()).unwrap_or_default(),
            cpuid: cpuid::to_bytes(machine.cpuid()),
            tsc_khz: machine.tsc_khz(),
            contents: machine.contents(&formats),
            formats,
            files: u32::try_from(self.files.count()).unwrap_or(u32::MAX),
            tsc_offset: machine.tsc_offset(),
            hold: self.errand.clock == Policy::Hold,
            ..Offer::default()
        };
        let ram = machine.ram().read_only()?;
        let rehearse = Rehearse {
            offer: Some(offer),
            record: is_record,
        };
        let fds = [ram.as_fd(), state.as_fd()];
        self.channel.send(Body::Rehearse(rehearse), &fds)?;
        self.lend()
    }

    /// Stand-ins for what the devices have opened since the last time.
    fn lend(&mut self) -> Result<(), Trouble> {
        let files = standins::of(self.files.take_waiting()).map_err(Trouble::Standins)?;
        for part in files.chunks(MAX_FDS) {
            let names = part.iter().map(|(name, _)| name.clone()).collect();
            let fds: Vec<_> = part.iter().map(|(_, fd)| fd.as_fd()).collect();
            self.channel.send(Body::Files(Files { names }), &fds)?;
        }
        Ok(())
    }

    /// The guest stands still, for as long as its state is saved.
    fn peek(&mut self, guest: &mut Guest, state: &OwnedFd) -> Result<Vec<u8>, Trouble> {
        let (format, clock) = (self.told.state_format, self.errand.clock);
        let bytes = self.saved(guest, |frozen| frozen.save(format, clock))?;
        let mut at = 0;
        while at < bytes.len() {
            at += rustix::io::pwrite(state, &bytes[at..], at as u64).map_err(Trouble::State)?;
        }
        self.pass(&bytes)?;
        Ok(bytes)
    }

    /// The same, and its state goes where a record goes.
    fn peek_as_record(
        &mut self,
        guest: &mut Guest,
        jump: &Jump,
        place: &Place,
    ) -> Result<Vec<u8>, Trouble> {
        let (format, clock) = (self.told.state_format, self.errand.clock);
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        let told = Told {
            nonce: &jump.nonce,
            swap: &jump.nonce,
            release: &jump.release,
            swaps: jump.swaps,
            ceiling: self.errand.budget,
            wall_error_ns: None,
            started_at_unix_ns: now.map_or(0, |d| u64::try_from(d.as_nanos()).unwrap_or(0)),
        };
        let record = self.saved(guest, |frozen| record::save(frozen, format, clock, &told))?;
        place.store(&record)?;
        self.pass(&record.state)?;
        Ok(record.state)
    }

    /// What is saved of the guest while it stands still.
    fn saved<T>(
        &mut self,
        guest: &mut Guest,
        save: impl FnOnce(&mut Frozen<'_>) -> Result<T, FreezeError>,
    ) -> Result<T, Trouble> {
        self.told.stage = Stage::Peek;
        if (self.ended)() {
            return Err(Trouble::GuestEnded);
        }
        let peeked = guest.peek(self.errand.budget, save, &mut self.files);
        let (saved, stood) = match peeked {
            Ok(peeked) => peeked,
            Err((error, stood)) => {
                self.told.peek = stood;
                return Err(error.into());
            }
        };
        self.told.peek = stood;
        self.told.stage = Stage::Load;
        Ok(saved)
    }

    /// Says that the state is there.
    fn pass(&mut self, state: &[u8]) -> Result<(), Trouble> {
        let len = state.len() as u64;
        self.told.state_bytes = len;
        self.lend()?;
        Ok(self.channel.send(Body::State(State { len }), &[])?)
    }

    fn compare(&mut self, before: &[u8]) -> Result<(), Trouble> {
        let (rehearsed, fds) = match self.hear()? {
            (Body::Rehearsed(rehearsed), fds) => (rehearsed, fds),
            (other, _) => return Err(out_of_turn(&other).into()),
        };
        let Rehearsed {
            len,
            load_ns,
            without_late,
        } = rehearsed;
        self.told.load = Duration::from_nanos(load_ns);
        self.told.stage = Stage::Compare;
        let again = fds.first().map(|again| compare::read(again, len));
        let again = again
            .transpose()
            .map_err(Trouble::State)?
            .unwrap_or_default();
        self.told.differences = compare::differences(before, &again, without_late)?;
        let mut differences = self.told.differences.iter();
        match differences.all(|difference| likeness::is_kvms_own(difference)) {
            true => Ok(()),
            false => Err(Trouble::Differs),
        }
    }

    /// The next packet, or the guest's end.
    fn hear(&mut self) -> Result<(Body, Vec<OwnedFd>), Trouble> {
        loop {
            match self
                .channel
                .receive(self.deadline.min(Instant::now() + GLANCE))
            {
                Err(ChannelError::Frame(FrameError::TimedOut))
                    if Instant::now() < self.deadline => {}
                heard => return Ok(heard?),
            }
            if (self.ended)() {
                return Err(Trouble::GuestEnded);
            }
        }
    }
}

/// Makes room for the guest's record in this file, where it would lie in its memory's; the rest is a hole.
fn room(machine: &Machine, state: &OwnedFd) -> Result<Place, Trouble> {
    let at = machine.spec().memory.carve_out.as_ref();
    let at = at.ok_or(Trouble::NoPlace)?;
    rustix::fs::ftruncate(state, at.record + at.record_len).map_err(Trouble::State)?;
    let file = state
        .try_clone()
        .map_err(|_| Trouble::State(rustix::io::Errno::MFILE))?;
    Ok(record::place_of(at, &Device::of(&at.path, file)?)?)
}
