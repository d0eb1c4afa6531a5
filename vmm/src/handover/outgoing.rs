//! The predecessor's side: offer, freeze, save, give up, retire.
//!
//! Everything up to `give_up` can be undone, and is, by the drop of the guard. Nothing between
//! freeze and give-up logs, allocates much, or waits without a deadline.

use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::fs::{FallocateFlags, MemfdFlags, SealFlags};
use stillpoint_control::clock::Policy;
use stillpoint_control::frame::{FrameError, MAX_FDS};
use stillpoint_control::message::Handover;
use stillpoint_control::ownership::Owner;
use stillpoint_control::recovery::Recovery;
use stillpoint_control::report::{
    Blackout, ClockReceipt, Margin, Outcome, Phase, ReleaseName, Side, SwapReport, WallClock,
};

use super::correct;
use super::hold;
use super::lend::Lending;
use super::recovery;
use super::{
    Body, Channel, ChannelError, Files, GiveUp, Loaded, Offer, Phases, State, out_of_turn,
};
use crate::boot::cpuid;
use crate::faults;
use crate::machine::frozen::{Frozen, GivenUp, Guest};
use crate::machine::{FreezeError, Machine};
use crate::vcpu::placement;
use crate::warm;

/// What follows give-up costs at least this much, however quick loading was.
const LEAST_RESERVE: Duration = Duration::from_millis(1);
/// The part of the budget that an entry measured earlier may claim: one that met a busy moment must not
/// keep its guest from every swap.
const ENTRY_SHARE: u32 = 4;
/// Between the last of the preparation and the freeze. Until the successor had adopted, it may have held a
/// core that a vCPU was waiting for, for a slice of the scheduler (some 3 ms); frozen at that moment, the
/// guest would see both as one pause.
const CALM: Duration = Duration::from_millis(5);
/// Bytes that a saved state has room for before the freeze: the machine's, and each vCPU's.
const ROOM: u64 = 16 << 10;
const ROOM_PER_VCPU: u64 = 12 << 10;
/// How often the wait for the successor looks whether the guest still wants to be swapped.
const GLANCE: Duration = Duration::from_millis(10);
/// The longest a predecessor stays when it has nothing left to do.
const LINGER: Duration = Duration::from_secs(1);
/// How long a successor that has the guest may take to say so.
const TELL_PATIENCE: Duration = Duration::from_secs(2);

/// A handover as it was asked for.
#[derive(Debug)]
pub struct Errand {
    /// Id of the swap.
    pub swap: String,
    /// This process's release.
    pub from: ReleaseName,
    /// The successor's.
    pub to: ReleaseName,
    /// Our end of the socketpair.
    pub socket: OwnedFd,
    /// Where the saved state goes.
    pub state: OwnedFd,
    /// Listeners and log: control, console, console log.
    pub doors: [OwnedFd; 3],
    /// The longest blackout.
    pub budget: Duration,
    /// The longest preparation.
    pub brownout: Duration,
    /// What the guest's clocks make of the pause.
    pub clock: Policy,
    /// The VM's secret.
    pub secret: Vec<u8>,
    /// Swaps lived through.
    pub swaps: u64,
    /// The guest's directory.
    pub dir: String,
    /// When it was asked for, nanoseconds since the Unix epoch.
    pub started_at_unix_ns: u64,
}

/// Why the guest stays.
#[derive(Debug, thiserror::Error)]
pub enum KeptReason {
    /// The successor could not be heard, or refused.
    #[error("{what}: {source}")]
    Channel {
        /// In which phase.
        what: &'static str,
        /// What happened.
        source: ChannelError,
    },
    /// The guest did not come to rest, or could not be saved.
    #[error("{0}")]
    Freeze(#[from] FreezeError),
    /// The state could not be written.
    #[error("cannot write the saved state: {0}")]
    State(rustix::io::Errno),
    /// The budget would have been broken.
    #[error(
        "the blackout budget of {budget:?} would have been broken: {used:?} were gone when the \
         successor had loaded, and what follows takes about {reserve:?}"
    )]
    Budget {
        /// Allowed.
        budget: Duration,
        /// Gone.
        used: Duration,
        /// Needed still.
        reserve: Duration,
    },
    /// The successor did not take the guest in time.
    #[error("the successor did not take the guest within the budget; it was taken back")]
    NotTaken,
    /// The guest ended, or wants to begin anew.
    #[error("the guest switched itself off or reset while the swap was prepared")]
    GuestEnded,
    /// The clock's policy can't be kept.
    #[error("clock policy hold: {0}; use the policy advance")]
    Hold(&'static str),
    /// Our own fds.
    #[error("cannot hand over a file descriptor: {0}")]
    Fds(std::io::Error),
}

/// A handover under way, as the report will tell it.
#[derive(Debug)]
struct Log {
    phases: Vec<Phase>,
    format: u32,
    state_bytes: u64,
    blackout: Duration,
    margin: Option<Margin>,
    lending: Lending,
    /// The guest's wall clock less the host's, as its agent says.
    wall_error_ns: Option<i64>,
    /// What the guest got done before.
    recovery: Vec<Recovery>,
}

impl Log {
    fn add(&mut self, name: &str, side: Side, in_blackout: bool, duration: Duration) {
        self.phases.push(Phase {
            name: name.to_owned(),
            side,
            in_blackout,
            duration,
        });
    }
}

/// Hands the guest over. `progress` hears of each phase before the freeze; `ended` is asked
/// whether the guest has ended meanwhile.
pub fn hand_over(
    guest: &mut Guest,
    errand: &Errand,
    channel: &mut Channel,
    mut progress: impl FnMut(&Phase),
    mut ended: impl FnMut() -> bool,
) -> Handover {
    let mut log = Log {
        phases: Vec::new(),
        format: 0,
        state_bytes: 0,
        blackout: Duration::ZERO,
        margin: None,
        lending: Lending::default(),
        wall_error_ns: None,
        recovery: Vec::new(),
    };
    let prepared = prepare(guest, errand, channel, &mut log, &mut ended);
    if let Some(phase) = log.phases.first() {
        progress(phase);
    }
    let result = prepared.and_then(|()| {
        // Whoever hears of the progress is at work for a moment, too.
        calm_down(guest, errand);
        blackout(guest, errand, channel, &mut log, &mut ended)
    });
    match result {
        Ok(()) => {
            let mut report = report(guest, errand, &log, Outcome::Moved, None);
            report.clock = Some(clock_before(&log));
            report.recovery = std::mem::take(&mut log.recovery);
            if let Ok(report) = serde_json::to_string(&report)
                && faults::reach(faults::Point::Retiring).is_ok()
            {
                let _ = channel.send(Body::Phases(Phases { report }), &[]);
            }
            Handover::Moved
        }
        // The word has the last say: if it speaks of somebody else, the guest is there, whatever
        // went wrong here.
        Err(_) if !guest.is_ours() => Handover::Moved,
        Err(reason) => {
            let text = reason.to_string();
            channel.refuse(&text);
            let report = report(guest, errand, &log, Outcome::Kept, Some(text));
            Handover::Kept {
                report: Box::new(report),
            }
        }
    }
}

/// Our part of the receipt.
fn clock_before(log: &Log) -> ClockReceipt {
    ClockReceipt {
        wall_clock: WallClock {
            error_before_ns: log.wall_error_ns,
            ..WallClock::default()
        },
        ..ClockReceipt::default()
    }
}

fn report(
    guest: &Guest,
    errand: &Errand,
    log: &Log,
    outcome: Outcome,
    reason: Option<String>,
) -> SwapReport {
    let machine = &guest.machine;
    SwapReport {
        swap: errand.swap.clone(),
        vm: machine.spec().name.clone(),
        component: "vmm".into(),
        from: errand.from.clone(),
        to: errand.to.clone(),
        outcome,
        reason,
        started_at_unix_ns: errand.started_at_unix_ns,
        vcpus: u32::try_from(machine.vcpu_count()).unwrap_or(u32::MAX),
        memory_bytes: machine.ram().size(),
        state_format: log.format,
        state_bytes: log.state_bytes,
        budget: errand.budget,
        margin: log.margin,
        phases: log.phases.clone(),
        blackout: Blackout {
            host: log.blackout,
            guest_ns: Vec::new(),
        },
        clock: None,
        recovery: Vec::new(),
        warnings: Vec::new(),
    }
}

/// Brownout: the successor builds its machine while the guest runs here.
fn prepare(
    guest: &Guest,
    errand: &Errand,
    channel: &mut Channel,
    log: &mut Log,
    ended: &mut impl FnMut() -> bool,
) -> Result<(), KeptReason> {
    let failed = |source| KeptReason::Channel {
        what: "preparing the successor",
        source,
    };
    if errand.clock == Policy::Hold {
        hold::check(&guest.machine).map_err(KeptReason::Hold)?;
    }
    // Before there is anybody who would take a core of it.
    log.recovery = recovery::before(&guest.machine);
    let began = Instant::now();
    offer(guest, errand, channel, log)?;
    faults::reach(faults::Point::Offered).map_err(FreezeError::Injected)?;
    let deadline = began + errand.brownout;
    let adopted = loop {
        match channel.receive(deadline.min(Instant::now() + GLANCE)) {
            Ok((Body::Adopted(adopted), _)) => break adopted,
            Ok((other, _)) => return Err(failed(out_of_turn(&other))),
            Err(ChannelError::Frame(FrameError::TimedOut)) if Instant::now() < deadline => {}
            Err(error) => return Err(failed(error)),
        }
        if ended() {
            return Err(KeptReason::GuestEnded);
        }
    };
    if errand.clock == Policy::Hold && !adopted.hold {
        return Err(KeptReason::Hold(hold::NOT_KNOWN));
    }
    if !guest
        .machine
        .formats(errand.clock)
        .contains(&adopted.format)
    {
        let text = format!(
            "it asks for state format {}, which we don't write",
            adopted.format
        );
        return Err(failed(ChannelError::Refused(text)));
    }
    log.format = adopted.format;
    log.add("adopt", Side::Successor, false, began.elapsed());
    log.wall_error_ns = correct::ask_error(&guest.machine, &errand.dir);
    if adopted.ahead {
        send_ahead(guest, adopted.format, channel)?;
    }
    Ok(())
}

/// What makes the freeze shorter, right before it: memory at hand, and nobody at work for us.
fn calm_down(guest: &Guest, errand: &Errand) {
    make_room(&errand.state, guest.machine.vcpu_count());
    warm::up();
    std::thread::sleep(CALM);
}

/// What a rehearsal saw, for the successor to load ahead. Without one it loads all of it after the freeze.
fn send_ahead(guest: &Guest, format: u32, channel: &Channel) -> Result<(), KeptReason> {
    let Some(peeked) = guest
        .peeked
        .as_ref()
        .filter(|peeked| peeked.format == format)
    else {
        return Ok(());
    };
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let file = rustix::fs::memfd_create("stillpoint-ahead", flags).map_err(KeptReason::State)?;
    write_sealed(&file, &peeked.bytes).map_err(KeptReason::State)?;
    let state = State {
        len: peeked.bytes.len() as u64,
    };
    channel
        .send(Body::Ahead(state), &[file.as_fd()])
        .map_err(|source| KeptReason::Channel {
            what: "sending a state ahead",
            source,
        })
}

/// Has the kernel find the pages now that the saved state will be written to. Best effort: what is missing
/// is found then.
fn make_room(state: &OwnedFd, vcpus: usize) {
    let room = ROOM + ROOM_PER_VCPU * vcpus as u64;
    let _ = rustix::fs::fallocate(state, FallocateFlags::KEEP_SIZE, 0, room);
    // New pages wait in a list of their core. Sealed there, they would be fetched by a worker on each core of the
    // host (mm/memfd.c, `memfd_wait_for_pins`), which takes a sixth of a blackout. Any seal fetches those of this core.
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    if let Ok(empty) = rustix::fs::memfd_create("stillpoint-drain", flags) {
        let _ = rustix::fs::fcntl_add_seals(&empty, SealFlags::WRITE);
    }
}

fn offer(
    guest: &Guest,
    errand: &Errand,
    channel: &Channel,
    log: &mut Log,
) -> Result<(), KeptReason> {
    let machine = &guest.machine;
    let mut files = Lending::default();
    machine.lend(&mut files).map_err(FreezeError::Lend)?;
    let formats = machine.formats(errand.clock);
    let offer = Offer {
        swap: errand.swap.clone(),
        spec: serde_json::to_string(machine.spec()).unwrap_or_default(),
        epoch: guest.owner.epoch().next().0,
        cpuid: cpuid::to_bytes(machine.cpuid()),
        tsc_khz: machine.tsc_khz(),
        contents: machine.contents(&formats),
        formats,
        files: u32::try_from(files.count()).unwrap_or(u32::MAX),
        secret: errand.secret.clone(),
        swaps: errand.swaps,
        dir: errand.dir.clone(),
        tsc_offset: machine.tsc_offset(),
        hold: errand.clock == Policy::Hold,
    };
    let us = rustix::process::getpid();
    let pidfd = rustix::process::pidfd_open(us, rustix::process::PidfdFlags::empty())
        .map_err(|errno| KeptReason::Fds(errno.into()))?;
    let fds = [
        machine.ram().as_fd(),
        guest.ownership.as_fd(),
        errand.state.as_fd(),
        pidfd.as_fd(),
        errand.doors[0].as_fd(),
        errand.doors[1].as_fd(),
        errand.doors[2].as_fd(),
    ];
    channel
        .send(Body::Offer(offer), &fds)
        .map_err(|source| KeptReason::Channel {
            what: "offering the guest",
            source,
        })?;
    log.lending = files;
    send_files(&mut log.lending, channel)
}

/// Lends what the devices have opened since the last time.
fn lend(machine: &Machine, files: &mut Lending, channel: &Channel) -> Result<(), KeptReason> {
    machine.lend(files).map_err(FreezeError::Lend)?;
    send_files(files, channel)
}

fn send_files(files: &mut Lending, channel: &Channel) -> Result<(), KeptReason> {
    for part in files.take_waiting().chunks(MAX_FDS) {
        let names = part.iter().map(|(name, _)| name.clone()).collect();
        let fds: Vec<_> = part.iter().map(|(_, fd)| fd.as_fd()).collect();
        channel
            .send(Body::Files(Files { names }), &fds)
            .map_err(|source| KeptReason::Channel {
                what: "lending the devices' files",
                source,
            })?;
    }
    Ok(())
}

/// Freeze to retirement. Whatever fails before give-up lets the guest run on by leaving here.
fn blackout(
    guest: &mut Guest,
    errand: &Errand,
    channel: &mut Channel,
    log: &mut Log,
    ended: &mut impl FnMut() -> bool,
) -> Result<(), KeptReason> {
    let began = Instant::now();
    let frozen = match guest.freeze(errand.budget) {
        Ok(frozen) => frozen,
        Err(error) => {
            // At most this: a drain that came to nothing has frozen nobody.
            log.blackout = match error {
                FreezeError::Busy(_) => Duration::ZERO,
                _ => began.elapsed(),
            };
            return Err(error.into());
        }
    };
    let (kicked, deadline, kicked_tsc) = (frozen.kicked, frozen.deadline, frozen.kicked_tsc);
    log.add("drain", Side::Predecessor, false, frozen.drained);
    let result = frozen_to_given_up(frozen, errand, channel, log, ended);
    log.blackout = kicked.elapsed();
    let given_up = result?;
    let told = faults::reach(faults::Point::GivenUp).is_ok()
        && (channel.send(Body::GiveUp(GiveUp { kicked_tsc }), &[])).is_ok();
    // Given up and taken back, it stood still until now.
    await_running(given_up, channel, deadline, told)
        .inspect_err(|_| log.blackout = kicked.elapsed())
}

fn frozen_to_given_up<'g>(
    mut frozen: Frozen<'g>,
    errand: &Errand,
    channel: &mut Channel,
    log: &mut Log,
    ended: &mut impl FnMut() -> bool,
) -> Result<GivenUp<'g>, KeptReason> {
    let deadline = frozen.deadline;
    faults::reach(faults::Point::Frozen).map_err(FreezeError::Injected)?;
    let saved = save(&mut frozen, errand, channel, log);
    for (name, duration) in &frozen.timing.marks {
        log.add(name, Side::Predecessor, true, *duration);
    }
    saved?;
    if ended() {
        return Err(KeptReason::GuestEnded);
    }
    let sent = Instant::now();
    let failed = |source| KeptReason::Channel {
        what: "loading in the successor",
        source,
    };
    let loaded = match channel.receive(deadline).map_err(failed)? {
        (Body::Loaded(loaded), _) => loaded,
        (other, _) => return Err(failed(out_of_turn(&other))),
    };
    log.add("load", Side::Successor, true, sent.elapsed());
    let margin = Margin {
        reserve: reserve(&frozen, loaded, errand.budget),
        used: frozen.kicked.elapsed(),
    };
    log.margin = Some(margin);
    if !margin.is_within(errand.budget) {
        let Margin { used, reserve } = margin;
        let budget = errand.budget;
        return Err(KeptReason::Budget {
            budget,
            used,
            reserve,
        });
    }
    Ok(frozen.give_up()?)
}

/// What follows give-up (late MSRs, one entry) will cost, by what was measured: it has cost less than
/// the load on every host so far, and this guest's last entry is known.
fn reserve(frozen: &Frozen<'_>, loaded: Loaded, budget: Duration) -> Duration {
    let entry = frozen.machine().entry_cost().min(budget / ENTRY_SHARE);
    Duration::from_nanos(loaded.took_ns)
        .max(entry)
        .max(LEAST_RESERVE)
}

fn save(
    frozen: &mut Frozen<'_>,
    errand: &Errand,
    channel: &Channel,
    log: &mut Log,
) -> Result<(), KeptReason> {
    let bytes = frozen.save(log.format, errand.clock)?;
    log.state_bytes = bytes.len() as u64;
    write_sealed(&errand.state, &bytes).map_err(KeptReason::State)?;
    // Before the seal: a successor that finds us dead, and the state sealed, has them all.
    lend(frozen.machine(), &mut log.lending, channel)?;
    frozen.seal()?;
    let viewers = frozen.machine().viewers();
    let viewers: Vec<_> = viewers.iter().map(|viewer| viewer.as_fd()).collect();
    channel
        .send(
            Body::State(State {
                len: log.state_bytes,
            }),
            &viewers,
        )
        .map_err(|source| KeptReason::Channel {
            what: "sending the state",
            source,
        })?;
    frozen.timing.mark("seal");
    Ok(())
}

/// Writes the state and seals it: nobody can change it after this, ourselves included.
fn write_sealed(fd: &OwnedFd, bytes: &[u8]) -> Result<(), rustix::io::Errno> {
    let mut at = 0;
    while at < bytes.len() {
        at += rustix::io::pwrite(fd, &bytes[at..], at as u64)?;
    }
    let seals = SealFlags::WRITE | SealFlags::GROW | SealFlags::SHRINK | SealFlags::SEAL;
    rustix::fs::fcntl_add_seals(fd, seals)
}

/// The guest runs elsewhere. Clearing up here takes milliseconds of kernel time, which a busy
/// guest would miss in its first moments: so wait until the successor has taken its measurements
/// (it closes the channel then), and step behind everybody else.
pub fn retire(mut channel: Channel) {
    let deadline = Instant::now() + LINGER;
    while channel.receive(deadline).is_ok() {}
    placement::stand_back();
}

/// After give-up: the successor says that it runs the guest, or the guest is taken back.
fn await_running(
    mut given_up: GivenUp<'_>,
    channel: &mut Channel,
    deadline: Instant,
    told: bool,
) -> Result<(), KeptReason> {
    let mut patience = if told { deadline } else { Instant::now() };
    loop {
        match channel.receive(patience) {
            Ok((Body::Running(_), _)) => return Ok(()),
            Ok(_) => continue,
            Err(_) => {}
        }
        // Late, refused or dead. The word decides, and it decides once.
        match given_up.reclaim() {
            Ok(()) => return Err(KeptReason::NotTaken),
            Err(still) => given_up = still,
        }
        match given_up.owner() {
            Ok(Owner::Taken(_)) if Instant::now() > patience + TELL_PATIENCE => return Ok(()),
            Ok(Owner::Taken(_)) => {
                // It has the guest, and says so soon; if its end is closed, it said all it will.
                match channel.receive(Instant::now() + TELL_PATIENCE) {
                    Ok((Body::Running(_), _)) | Err(_) => return Ok(()),
                    Ok(_) => patience = Instant::now(),
                }
            }
            _ => return Ok(()),
        }
    }
}
