//! The handover: how a guest moves from predecessor to successor.
//!
//! Over a `SOCK_SEQPACKET` socketpair that the daemon made; each packet is one [`Packet`].
//!
//! ```text
//!  predecessor                               successor
//!  (guest runs)                              (started by the daemon)
//!      │ ── Offer + fds, Files + fds ──────────▶ │  adopt: map RAM, build an own VM, populate
//!      │ ◀─────────────────────────── Adopted ── │
//!      │ ── Ahead + fd, if it was rehearsed ───▶ │  load what stands until something else is written
//!   drain                                        │
//!      │ ── Soon, if both may stay awake ──────▶ │  wait for the state awake
//!   freeze ══════════════ blackout ═════════════ │
//!   save, write the state memfd, seal it         │
//!      │ ── Files that were opened meanwhile ──▶ │
//!      │ ── State (+ viewers' sockets) ────────▶ │  load; align the clock
//!      │ ◀──────────────────────────── Loaded ── │
//!   give up  (ownership word: Sealed → GivenUp)  │
//!      │ ── GiveUp ────────────────────────────▶ │  take (GivenUp → Taken); late MSRs; run
//!      │ ══════════════ guest runs ═════════════ │
//!      │ ◀─────────────────────────── Running ── │
//!   retire ── Phases ──────────────────────────▶ │  measure, report
//! ```
//!
//! Either side may send `Refused` and close as long as the word is not taken. Whoever hears
//! nothing acts on the word alone:
//! * predecessor, before give-up: drops its guard, the guest runs on here;
//! * predecessor, after give-up: waits to the end of the budget, then reclaims; if the successor
//!   was quicker, the guest is there;
//! * successor: when the predecessor's pidfd says that it is dead and the state was sealed, it
//!   takes the guest; in every other case it exits.

pub mod agree;
pub mod correct;
mod hold;
pub mod incoming;
pub mod lend;
pub mod measure;
pub mod outgoing;
pub mod record;
pub mod recovery;
pub mod rehearsal;

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use prost::{Message, Oneof};
use rustix::event::{PollFd, PollFlags, poll};
use stillpoint_control::frame::{self, FrameError};
use stillpoint_state::contents::Contents;

/// How long a wait spins before it sleeps, for a word that is the other's next: waking up costs more than most answers take.
const SPIN: Duration = Duration::from_micros(100);
/// The same for an answer that takes as long as a load, where there is a core for it.
const LONG_SPIN: Duration = Duration::from_micros(300);
/// A process that has closed its end is dead, or about to say otherwise by its pidfd.
const DEATH_PATIENCE: Duration = Duration::from_secs(5);

/// What the predecessor offers. Beside it travel, in this order: guest RAM, ownership page, state
/// memfd, pidfd of the predecessor, control listener, console listener, console log.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct Offer {
    /// Id of the swap.
    #[prost(string, tag = "1")]
    pub swap: String,
    /// `MachineSpec` as JSON.
    #[prost(string, tag = "2")]
    pub spec: String,
    /// Number of this attempt.
    #[prost(uint64, tag = "3")]
    pub epoch: u64,
    /// CPUID entries (`struct kvm_cpuid_entry2` each), before each vCPU's own ids.
    #[prost(bytes = "vec", tag = "4")]
    pub cpuid: Vec<u8>,
    /// Guest TSC frequency, kHz.
    #[prost(uint32, tag = "5")]
    pub tsc_khz: u32,
    /// Formats of saved state the predecessor writes, preferred first.
    #[prost(uint32, repeated, tag = "6")]
    pub formats: Vec<u32>,
    /// The VM's secret; empty if it has none.
    #[prost(bytes = "vec", tag = "7")]
    pub secret: Vec<u8>,
    /// Swaps the guest has lived through.
    #[prost(uint64, tag = "8")]
    pub swaps: u64,
    /// The guest's directory.
    #[prost(string, tag = "9")]
    pub dir: String,
    /// TSC offset of vCPU 0 as far as the predecessor knows without stopping it.
    #[prost(int64, optional, tag = "10")]
    pub tsc_offset: Option<i64>,
    /// Files of devices that follow in packets of [`Files`], before anything else is said.
    #[prost(uint32, tag = "11")]
    pub files: u32,
    /// The guest's clocks are to leave out the pause. A successor that can't have it so refuses.
    #[prost(bool, tag = "12")]
    pub hold: bool,
    /// What the state will hold, in each of `formats`. Empty from a release that doesn't say: then
    /// only the state itself shows it.
    #[prost(message, repeated, tag = "13")]
    pub contents: Vec<Contents>,
}

/// Files of devices travel beside it, one for each name.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct Files {
    /// Their names, see [`lend`].
    #[prost(string, repeated, tag = "1")]
    pub names: Vec<String>,
}

/// Number of fds beside an offer.
pub const OFFERED_FDS: usize = 7;

/// The successor's VM stands and waits for state.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct Adopted {
    /// Format of saved state it wants.
    #[prost(uint32, tag = "1")]
    pub format: u32,
    /// Bytes of guest RAM it has populated.
    #[prost(uint64, tag = "2")]
    pub populated: u64,
    /// It knows of `Offer::hold`, and its host can do it.
    #[prost(bool, tag = "3")]
    pub hold: bool,
    /// It takes a state ahead of the freeze ([`Body::Ahead`]).
    #[prost(bool, tag = "4")]
    pub ahead: bool,
    /// Who waits for a word that is microseconds away may stay awake for it here, and keeps no vCPU of this guest from its
    /// core; and it wants to hear when that is ([`Body::Soon`]).
    #[prost(bool, tag = "5")]
    pub awake: bool,
}

/// The guest is about to stand still, so its state follows within a millisecond.
#[derive(Clone, Copy, PartialEq, Eq, Message)]
pub struct Soon {}

/// The state lies in the memfd, sealed. Console viewers' sockets travel beside it.
#[derive(Clone, Copy, PartialEq, Eq, Message)]
pub struct State {
    /// Bytes.
    #[prost(uint64, tag = "1")]
    pub len: u64,
}

/// Everything is loaded that may be loaded before the guest is the successor's.
#[derive(Clone, Copy, PartialEq, Eq, Message)]
pub struct Loaded {
    /// How long that took, ns.
    #[prost(uint64, tag = "1")]
    pub took_ns: u64,
}

/// The guest is the successor's to take.
#[derive(Clone, Copy, PartialEq, Eq, Message)]
pub struct GiveUp {
    /// Host TSC at the kick of the first vCPU.
    #[prost(fixed64, tag = "1")]
    pub kicked_tsc: u64,
}

/// The guest runs in the successor.
#[derive(Clone, Copy, PartialEq, Eq, Message)]
pub struct Running {}

/// The predecessor's part of the report, sent when nothing is urgent any more.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct Phases {
    /// `SwapReport` as JSON.
    #[prost(string, tag = "1")]
    pub report: String,
    /// When each vCPU came out of the guest, in order. Empty from a release that doesn't say.
    #[prost(message, repeated, tag = "2")]
    pub out: Vec<Out>,
}

/// A vCPU that came out of the guest.
#[derive(Clone, Copy, PartialEq, Eq, Message)]
pub struct Out {
    /// Host TSC when it did.
    #[prost(fixed64, tag = "1")]
    pub tsc: u64,
    /// What its thread then waited for a core until its state was saved, ns.
    #[prost(uint64, tag = "2")]
    pub queued_ns: u64,
}

/// One side can't go on.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct Refused {
    /// Why, for people.
    #[prost(string, tag = "1")]
    pub reason: String,
}

/// One packet.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct Packet {
    /// What it says.
    #[prost(oneof = "Body", tags = "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13")]
    pub body: Option<Body>,
}

/// What a packet says.
#[derive(Clone, PartialEq, Eq, Oneof)]
pub enum Body {
    /// See [`Offer`].
    #[prost(message, tag = "1")]
    Offer(Offer),
    /// See [`Adopted`].
    #[prost(message, tag = "2")]
    Adopted(Adopted),
    /// See [`State`].
    #[prost(message, tag = "3")]
    State(State),
    /// See [`Loaded`].
    #[prost(message, tag = "4")]
    Loaded(Loaded),
    /// See [`GiveUp`].
    #[prost(message, tag = "5")]
    GiveUp(GiveUp),
    /// See [`Running`].
    #[prost(message, tag = "6")]
    Running(Running),
    /// See [`Phases`].
    #[prost(message, tag = "7")]
    Phases(Phases),
    /// See [`Refused`].
    #[prost(message, tag = "8")]
    Refused(Refused),
    /// See [`Files`].
    #[prost(message, tag = "9")]
    Files(Files),
    /// See [`rehearsal::Rehearse`].
    #[prost(message, tag = "10")]
    Rehearse(rehearsal::Rehearse),
    /// See [`rehearsal::Rehearsed`].
    #[prost(message, tag = "11")]
    Rehearsed(rehearsal::Rehearsed),
    /// A state that is not the last word, in the memfd beside it: what of it stands until something else is
    /// written may be loaded while the guest runs on.
    #[prost(message, tag = "12")]
    Ahead(State),
    /// See [`Soon`].
    #[prost(message, tag = "13")]
    Soon(Soon),
}

/// Why the other side could not be heard or told.
#[derive(Debug, thiserror::Error)]
pub enum ChannelError {
    /// The socket.
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// Not a packet.
    #[error("a packet that is none of the handover's: {0}")]
    Decode(#[from] prost::DecodeError),
    /// It can't go on.
    #[error("{0}")]
    Refused(String),
    /// A packet of another kind than the protocol has here.
    #[error("the other side answers out of turn ({0})")]
    OutOfTurn(String),
}

/// One end of the handover socketpair.
#[derive(Debug)]
pub struct Channel {
    socket: OwnedFd,
    buffer: Vec<u8>,
}

impl Channel {
    /// Over this socket.
    pub fn new(socket: OwnedFd) -> Self {
        Self {
            socket,
            buffer: vec![0; frame::MAX_PACKET],
        }
    }

    /// Sends one packet.
    pub fn send(&self, body: Body, fds: &[BorrowedFd<'_>]) -> Result<(), ChannelError> {
        let packet = Packet { body: Some(body) }.encode_to_vec();
        Ok(frame::send(&self.socket, &packet, fds)?)
    }

    /// Receives one packet; [`FrameError::TimedOut`] when the deadline passes first.
    pub fn receive(&mut self, deadline: Instant) -> Result<(Body, Vec<OwnedFd>), ChannelError> {
        self.receive_awake(Duration::ZERO, deadline)
    }

    /// As [`Channel::receive`], and spins for so long before it sleeps.
    pub fn receive_awake(
        &mut self,
        spin: Duration,
        deadline: Instant,
    ) -> Result<(Body, Vec<OwnedFd>), ChannelError> {
        self.receive_beside(spin, deadline, None)
    }

    /// As [`Channel::receive`], from the process behind `pidfd`: `None` when it is dead and has
    /// left nothing unread. A closed socket alone proves nothing, and neither does an open one:
    /// others may hold a duplicate of its other end. Spins for so long before it sleeps.
    pub fn receive_from(
        &mut self,
        pidfd: &OwnedFd,
        spin: Duration,
        deadline: Instant,
    ) -> Result<Option<(Body, Vec<OwnedFd>)>, ChannelError> {
        match self.receive_beside(spin, deadline, Some(pidfd.as_fd())) {
            Err(ChannelError::Frame(FrameError::TimedOut))
                if wait_readable(pidfd, Instant::now()) =>
            {
                // It may have spoken between the last look at the socket and its death.
                match self.receive_beside(Duration::ZERO, Instant::now(), None) {
                    Err(ChannelError::Frame(FrameError::TimedOut | FrameError::Closed)) => Ok(None),
                    heard => heard.map(Some),
                }
            }
            Err(ChannelError::Frame(FrameError::Closed))
                if wait_readable(pidfd, Instant::now() + DEATH_PATIENCE) =>
            {
                Ok(None)
            }
            heard => heard.map(Some),
        }
    }

    fn receive_beside(
        &mut self,
        spin: Duration,
        deadline: Instant,
        beside: Option<BorrowedFd<'_>>,
    ) -> Result<(Body, Vec<OwnedFd>), ChannelError> {
        let (len, fds) = self.receive_bytes(spin, deadline, beside)?;
        match Packet::decode(&self.buffer[..len])?.body {
            Some(Body::Refused(Refused { reason })) => Err(ChannelError::Refused(reason)),
            Some(body) => Ok((body, fds)),
            None => Err(ChannelError::OutOfTurn("an empty packet".into())),
        }
    }

    fn receive_bytes(
        &mut self,
        spin: Duration,
        deadline: Instant,
        beside: Option<BorrowedFd<'_>>,
    ) -> Result<(usize, Vec<OwnedFd>), ChannelError> {
        let began = Instant::now();
        loop {
            match frame::try_receive(&self.socket, &mut self.buffer) {
                Err(FrameError::TimedOut) => {}
                other => return Ok(other?),
            }
            if began.elapsed() < spin {
                std::thread::yield_now();
                continue;
            }
            let socket = self.socket.as_fd();
            let spoken = match beside {
                None => wait_any(&[socket], deadline) == Some(0),
                Some(beside) => wait_any(&[socket, beside], deadline) == Some(0),
            };
            if !spoken {
                return Err(FrameError::TimedOut.into());
            }
        }
    }

    /// Tells the other side why we can't go on; it may be gone already.
    pub fn refuse(&self, reason: &str) {
        let _ = self.send(
            Body::Refused(Refused {
                reason: reason.to_owned(),
            }),
            &[],
        );
    }
}

/// Waits until `fd` can be read; false when the deadline passes first.
pub fn wait_readable(fd: impl AsFd, deadline: Instant) -> bool {
    wait_any(&[fd.as_fd()], deadline).is_some()
}

/// Waits until one of `fds` can be read; gives the first that can, `None` when the deadline
/// passes first.
fn wait_any(fds: &[BorrowedFd<'_>], deadline: Instant) -> Option<usize> {
    let mut polled: Vec<_> = fds
        .iter()
        .map(|fd| PollFd::new(fd, PollFlags::IN))
        .collect();
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = rustix::time::Timespec::try_from(left).unwrap_or_default();
        match poll(&mut polled, Some(&timeout)) {
            Ok(0) => return None,
            Ok(_) => return polled.iter().position(|fd| !fd.revents().is_empty()),
            Err(rustix::io::Errno::INTR) => {}
            Err(_) => return None,
        }
    }
}

fn out_of_turn(body: &Body) -> ChannelError {
    ChannelError::OutOfTurn(format!("{body:?}").chars().take(80).collect())
}
