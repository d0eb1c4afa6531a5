//! Freeze, save, give up; and what the successor says then. Nothing between freeze and give-up logs, allocates much, or
//! waits without a deadline.

use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use stillpoint_control::ownership::Owner;
use stillpoint_control::report::{Margin, Side};

use super::prepare::lend;
use super::{Errand, KeptReason, Log, write_sealed};
use crate::faults;
use crate::handover::{Body, Channel, GiveUp, LONG_SPIN, Loaded, Soon, State, out_of_turn};
use crate::machine::FreezeError;
use crate::machine::frozen::{Frozen, GivenUp, Guest};
use crate::vcpu::placement;

/// What follows give-up costs at least this much, however quick loading was.
const LEAST_RESERVE: Duration = Duration::from_millis(1);
/// The part of the budget that an entry measured earlier may claim: one that met a busy moment must not
/// keep its guest from every swap.
const ENTRY_SHARE: u32 = 4;
/// The longest a predecessor stays when it has nothing left to do.
const LINGER: Duration = Duration::from_secs(1);
/// How long a successor that has the guest may take to say so.
const TELL_PATIENCE: Duration = Duration::from_secs(2);

/// Freeze to retirement. Whatever fails before give-up lets the guest run on by leaving here.
pub(super) fn blackout(
    guest: &mut Guest,
    errand: &Errand,
    channel: &mut Channel,
    log: &mut Log,
    ended: &mut impl FnMut() -> bool,
) -> Result<(), KeptReason> {
    let began = Instant::now();
    // Nothing hangs on it: one that doesn't hear it waits asleep, and one that is gone is noticed by what follows.
    let announce = || log.awake && channel.send(Body::Soon(Soon {}), &[]).is_ok();
    let frozen = match guest.freeze_after(errand.budget, announce) {
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
    let spin = match log.awake {
        true => LONG_SPIN,
        false => Duration::ZERO,
    };
    let loaded = match channel.receive_awake(spin, deadline).map_err(failed)? {
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
    log.left = std::mem::take(&mut frozen.left);
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
