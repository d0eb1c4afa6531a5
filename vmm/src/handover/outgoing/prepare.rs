//! While the guest runs here: it is offered, the successor builds its machine, and what makes the freeze shorter is done.

use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::fs::{FallocateFlags, MemfdFlags, SealFlags};
use stillpoint_control::clock::Policy;
use stillpoint_control::frame::{FrameError, MAX_FDS};
use stillpoint_control::report::Side;

use super::{Errand, KeptReason, Log, write_sealed};
use crate::boot::cpuid;
use crate::faults;
use crate::handover::lend::Lending;
use crate::handover::{
    Body, Channel, ChannelError, Files, Offer, State, correct, hold, out_of_turn, recovery,
};
use crate::machine::frozen::Guest;
use crate::machine::{FreezeError, Machine};
use crate::warm;

/// Between the last of the preparation and the freeze. Until the successor had adopted, it may have held a
/// core that a vCPU was waiting for, for a slice of the scheduler (some 3 ms); frozen at that moment, the
/// guest would see both as one pause.
const CALM: Duration = Duration::from_millis(5);
/// Bytes that a saved state has room for before the freeze: the machine's, and each vCPU's.
const ROOM: u64 = 16 << 10;
const ROOM_PER_VCPU: u64 = 12 << 10;
/// How often the wait for the successor looks whether the guest still wants to be swapped.
const GLANCE: Duration = Duration::from_millis(10);

/// Brownout: the successor builds its machine while the guest runs here.
pub(super) fn prepare(
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
    log.awake = adopted.awake;
    log.add("adopt", Side::Successor, false, began.elapsed());
    log.wall_error_ns = correct::ask_error(&guest.machine, &errand.dir);
    if adopted.ahead {
        send_ahead(guest, adopted.format, channel)?;
    }
    Ok(())
}

/// What makes the freeze shorter, right before it: memory at hand, and nobody at work for us.
pub(super) fn calm_down(guest: &Guest, errand: &Errand) {
    let vcpus = guest.machine.vcpu_count();
    make_room(&errand.state, vcpus);
    warm::up_for(vcpus);
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
pub(super) fn lend(
    machine: &Machine,
    files: &mut Lending,
    channel: &Channel,
) -> Result<(), KeptReason> {
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
