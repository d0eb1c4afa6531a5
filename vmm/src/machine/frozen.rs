//! A guest and who may run it; the guard around a guest that stands still.
//!
//! ```text
//!  Guest ──freeze()──▶ Frozen ──save(), seal()──▶ Frozen ──give_up()──▶ GivenUp ──▶ (retire)
//!    ▲                    │                          │                     │
//!    └────────────────────┴──── drop ────────────────┘      reclaim() ─────┘
//! ```
//!
//! Dropping a [`Frozen`] lets the guest run on here: every error before the point of no return
//! ends that way by scope. [`Frozen::give_up`] consumes it. What it gives, [`GivenUp`], runs
//! nothing when dropped; the only way back is [`GivenUp::reclaim`], which needs the ownership
//! word, and the successor needs the very same word.

use std::time::{Duration, Instant};

use stillpoint_control::clock::Policy;
use stillpoint_control::ownership::{Epoch, Owner, Ownership, OwnershipError};

use super::{FreezeError, Machine, Timing};
use crate::handover::lend::Lending;
use crate::vcpu::hurry::Hurry;
use crate::vcpu::outside::Left;
use crate::vcpu::{Entered, VcpusError};
use crate::{clock, faults, release};

/// How long I/O that is under way may take to end before the freeze. The guest runs meanwhile, but
/// its new I/O waits.
const DRAIN_PATIENCE: Duration = Duration::from_secs(5);

/// A machine, and this process's claim to run it.
#[derive(Debug)]
pub struct Guest {
    /// The machine.
    pub machine: Machine,
    /// The word shared with successor and daemon.
    pub ownership: Ownership,
    /// What the word says while the guest is ours.
    pub owner: Owner,
    /// Its state as the last rehearsal saw it, for a successor to load ahead.
    pub peeked: Option<Peeked>,
}

/// A state that was saved while the guest was to run on: never the last word.
#[derive(Debug)]
pub struct Peeked {
    /// Its format.
    pub format: u32,
    /// It.
    pub bytes: Vec<u8>,
}

/// A guest standing still. Dropping it lets the guest run on.
#[must_use]
#[derive(Debug)]
pub struct Frozen<'g> {
    guest: &'g mut Guest,
    sealed: Option<Epoch>,
    given_up: bool,
    resumed: bool,
    /// Who runs before all others meanwhile.
    hurry: Hurry,
    /// Host TSC at the kick: the blackout began here.
    pub kicked_tsc: u64,
    /// When that was.
    pub kicked: Instant,
    /// When the blackout's budget ends.
    pub deadline: Instant,
    /// What the drain took before that.
    pub drained: Duration,
    /// Phases so far.
    pub timing: Timing,
    /// How each vCPU came to rest, once it is saved.
    pub left: Vec<Left>,
}

/// What is known of the pause of a guest whose machine is taken apart.
#[derive(Debug)]
pub struct Aside {
    /// Host TSC at the kick.
    pub kicked_tsc: u64,
    /// When the blackout's budget ends.
    pub deadline: Instant,
    /// Phases so far.
    pub timing: Timing,
}

/// A guest that this process may not run, unless it takes it back by the word.
#[derive(Debug)]
pub struct GivenUp<'g> {
    frozen: Frozen<'g>,
    epoch: Epoch,
}

impl Guest {
    /// A guest that is ours, by this word.
    pub fn new(machine: Machine, ownership: Ownership, owner: Owner) -> Self {
        Self {
            machine,
            ownership,
            owner,
            peeked: None,
        }
    }

    /// Whether the word still says that the guest is this process's.
    pub fn is_ours(&self) -> bool {
        self.ownership.read().is_ok_and(|now| now == self.owner)
    }

    /// Brings the guest to rest, for no longer than `budget`. On an error it runs on.
    pub fn freeze(&mut self, budget: Duration) -> Result<Frozen<'_>, FreezeError> {
        self.freeze_after(budget, || false)
    }

    /// The same, after `announce`, when nothing but the freeze is left to be done. It tells whether there is anybody to
    /// hear it.
    pub fn freeze_after(
        &mut self,
        budget: Duration,
        announce: impl FnOnce() -> bool,
    ) -> Result<Frozen<'_>, FreezeError> {
        let began = Instant::now();
        // The guard stands before the drain and the first kick: leaving here by `?` runs its drop.
        let mut frozen = Frozen {
            guest: self,
            sealed: None,
            given_up: false,
            resumed: false,
            hurry: Hurry::default(),
            kicked_tsc: 0,
            kicked: began,
            deadline: began,
            drained: Duration::ZERO,
            timing: Timing::start(),
            left: Vec::new(),
        };
        frozen.guest.machine.drain(began + DRAIN_PATIENCE)?;
        frozen.hurry = frozen.guest.machine.hurry();
        frozen.hurry.take_effect();
        // Who hears it stays awake from now on, as an equal of the vCPUs: not before each of them has the core that it wants.
        if announce() {
            frozen.hurry.let_be_heard();
        }
        frozen.kicked_tsc = clock::host_tsc();
        frozen.kicked = Instant::now();
        frozen.deadline = frozen.kicked + budget;
        frozen.drained = frozen.kicked - began;
        frozen.timing = Timing::start();
        let machine = &frozen.guest.machine;
        machine.stand_still(&frozen.hurry, frozen.deadline, &mut frozen.timing)?;
        Ok(frozen)
    }

    /// Has the guest stand still while `save` saves its state for a rehearsal, and lets it run on: for no
    /// longer than `budget`, and nothing is sealed. Gives what was saved, and what the pause was.
    pub fn peek<T>(
        &mut self,
        budget: Duration,
        save: impl FnOnce(&mut Frozen<'_>) -> Result<T, FreezeError>,
        to: &mut Lending,
    ) -> Result<(T, Duration), (FreezeError, Duration)> {
        let mut frozen = match self.freeze(budget) {
            Ok(frozen) => frozen,
            // At most this: a drain that came to nothing has frozen nobody.
            Err(error @ FreezeError::Busy(_)) => return Err((error, Duration::ZERO)),
            Err(error) => return Err((error, budget)),
        };
        let kicked = frozen.kicked;
        let saved = save(&mut frozen).and_then(|saved| {
            // What was opened meanwhile is in the state.
            frozen.machine().lend(to).map_err(FreezeError::Lend)?;
            Ok(saved)
        });
        drop(frozen);
        let stood = kicked.elapsed();
        saved
            .map(|saved| (saved, stood))
            .map_err(|error| (error, stood))
    }
}

impl<'g> Frozen<'g> {
    /// The machine that stands still.
    pub fn machine(&self) -> &Machine {
        &self.guest.machine
    }

    /// Saves the guest's state in `format`; its clocks make of the pause what `policy` says.
    pub fn save(&mut self, format: u32, policy: Policy) -> Result<Vec<u8>, FreezeError> {
        let machine = &self.guest.machine;
        let (saved, left) = machine.save(format, policy, self.deadline)?;
        self.left = left;
        let epoch = self.guest.owner.epoch().next();
        let bytes = saved.finish(format, release::VERSION, &machine.spec().name, epoch.0);
        self.timing.mark("save");
        Ok(bytes)
    }

    /// Ends a pause in place: the guest runs on here, and knows of it. `stolen` of it counts as such.
    /// A vCPU that does not come in says so by itself ([`crate::event::Event::VcpuOver`]).
    pub fn resume(mut self, stolen: Duration, patience: Duration) -> Result<Entered, VcpusError> {
        // Nothing is left to undo: what could go wrong from here on, another try would not mend.
        self.resumed = true;
        let hurry = std::mem::take(&mut self.hurry);
        self.guest.machine.resume(stolen, hurry, patience)
    }

    /// Ends the guard of a guest whose saved state is all there will be of it: the caller is about to
    /// take its machine apart, and owes it another one. Nothing of this can fail.
    pub fn set_aside(mut self) -> Aside {
        self.resumed = true;
        Aside {
            kicked_tsc: self.kicked_tsc,
            deadline: self.deadline,
            timing: self.timing.clone(),
        }
    }

    /// The guest may be run from its record in the carve-out: it stays still here for good.
    pub fn stay_still(mut self) {
        self.given_up = true;
    }

    /// Says that the saved state is complete and lies where the others can reach it.
    pub fn seal(&mut self) -> Result<Epoch, FreezeError> {
        faults::reach(faults::Point::Saved).map_err(FreezeError::Injected)?;
        let epoch = self.guest.ownership.seal(self.guest.owner)?;
        self.sealed = Some(epoch);
        faults::reach(faults::Point::Sealed).map_err(FreezeError::Injected)?;
        Ok(epoch)
    }

    /// Lets the guest run on here. Whoever would end the hurry later might not get a core beside vCPUs that run in it.
    fn run_on(&mut self) {
        drop(std::mem::take(&mut self.hurry));
        self.guest.machine.run_on();
    }

    /// The point of no return. On an error the guest runs on here, or, if the word was lost to
    /// somebody, stays still for good.
    pub fn give_up(mut self) -> Result<GivenUp<'g>, FreezeError> {
        let epoch = match self.sealed {
            Some(epoch) => epoch,
            None => self.seal()?,
        };
        self.guest.ownership.give_up(epoch)?;
        self.given_up = true;
        if faults::is_spoilt(faults::Spoilt::Ownership) {
            self.run_on();
        }
        Ok(GivenUp {
            frozen: self,
            epoch,
        })
    }
}

impl Drop for Frozen<'_> {
    fn drop(&mut self) {
        if self.given_up || self.resumed {
            return;
        }
        if let Some(epoch) = self.sealed {
            match self.guest.ownership.unseal(epoch) {
                Ok(owner) => self.guest.owner = owner,
                // Somebody took the guest for ours being dead: it must not run twice.
                Err(error) => {
                    tracing::error!(%error, "the guest is not ours any more; it stays still here");
                    return;
                }
            }
        }
        self.run_on();
    }
}

impl<'g> GivenUp<'g> {
    /// The attempt it was given up in.
    pub fn epoch(&self) -> Epoch {
        self.epoch
    }

    /// What the ownership word says now.
    pub fn owner(&self) -> Result<Owner, OwnershipError> {
        self.frozen.guest.ownership.read()
    }

    /// Takes the guest back, if the successor has not taken it; it runs on here then.
    #[expect(
        clippy::result_large_err,
        reason = "the guest stands still: it is handed back as it is, without an allocation"
    )]
    pub fn reclaim(mut self) -> Result<(), Self> {
        match self.frozen.guest.ownership.reclaim(self.epoch) {
            Ok(owner) => {
                self.frozen.guest.owner = owner;
                self.frozen.sealed = None;
                self.frozen.given_up = false;
                drop(self.frozen);
                Ok(())
            }
            Err(_) => Err(self),
        }
    }
}
