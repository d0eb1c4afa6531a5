//! Mode `hostile`: one malformed thing after another, and what the device makes of each.
//!
//! ```text
//! reset, set up ─▶ attack ─▶ does it work, or say NEEDS_RESET? ─▶ reset, set up ─▶ does it work?
//! ```
//!
//! A device may do what it likes with nonsense, but for four things: hang so that neither is true
//! (`stuck`), not end a reset, not work after one (`dead`), and write where it has no right to
//! (`scribbled`). That the VMM and the guest live on shows in everything else that pulse counts.
//!
//! Nothing here has the device write to memory that pulse needs: whatever is in RAM and may be
//! written lies in the *pit*, a part of the arena that nothing else uses.

mod bench;
mod blk;
mod descriptors;
mod indirect;
mod net;
mod registers;
mod rings;
mod setup;
mod verdict;
mod vsock;

use stillpoint_guest_abi::attack::NAMES;
use stillpoint_guest_abi::pulse::Report;
use stillpoint_guest_abi::virtio::{Hostile as Counts, SLOTS};
use stillpoint_guest_virtio::registers::kind;

use crate::gaps::Gaps;
use crate::options;
use crate::pages::{self, place};
use bench::Bench;
use verdict::Verdict;

/// What may come after an attack.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Then {
    /// The device works, or says that it needs a reset.
    Judge,
    /// Or it says nothing at all until it is reset: it was never set up as it should be.
    MayBeSilent,
    /// The attack has reset it.
    Reset,
    /// It was not made: the device or the guest lacks something for it.
    Skipped,
}

type Attack = fn(&mut Bench) -> Then;

/// By number; the names are in `stillpoint_guest_abi::attack`.
const ATTACKS: &[&[Attack]] = &[
    descriptors::ATTACKS,
    indirect::ATTACKS,
    rings::ATTACKS,
    setup::ATTACKS,
    registers::ATTACKS,
    blk::ATTACKS,
    net::ATTACKS,
    vsock::ATTACKS,
];

const fn count(lists: usize) -> usize {
    let (mut list, mut sum) = (0, 0);
    while list < lists {
        sum += ATTACKS[list].len();
        list += 1;
    }
    sum
}

const _: () = assert!(
    count(ATTACKS.len()) == NAMES.len(),
    "each attack has a name"
);
/// Where the attacks begin that are for one kind of device.
const ON_BLK: usize = count(5);
const ON_NET: usize = count(6);
const ON_VSOCK: usize = count(7);

fn attack(number: usize) -> Option<Attack> {
    ATTACKS.iter().flat_map(|list| *list).nth(number).copied()
}

/// The kind that an attack is for; any if none.
fn victim(number: usize) -> Option<u32> {
    match number {
        ..ON_BLK => None,
        ON_BLK..ON_NET => Some(kind::BLK),
        ON_NET..ON_VSOCK => Some(kind::NET),
        _ => Some(kind::VSOCK),
    }
}

/// The attacks of one vCPU.
pub(super) struct Hostile {
    vcpu: usize,
    report: *mut Report,
    counts: Counts,
    slot: usize,
    number: usize,
    round: u64,
}

impl Hostile {
    /// At the first attack on the first device.
    pub(super) fn start(vcpu: usize) -> Self {
        let report = pages::report(vcpu);
        Self {
            vcpu,
            report,
            counts: pages::shown(place!(report.hostile)),
            slot: 0,
            number: 0,
            round: 0,
        }
    }

    /// The next attack on the next device that is there, free, and of the kind wanted.
    pub(super) fn turn(&mut self, gaps: &mut Gaps) {
        let options = options::get();
        self.slot += 1;
        if self.slot >= SLOTS {
            self.slot = 0;
            self.round += 1;
            self.number = options.attack.unwrap_or((self.number + 1) % NAMES.len());
        }
        if options.slots[self.vcpu].is_some_and(|slot| slot != self.slot) {
            return;
        }
        let seed = options.seed ^ self.round << 16 ^ (self.slot as u64) << 8 ^ self.vcpu as u64;
        let kind = options.victim.unwrap_or(0);
        let Some(mut bench) = Bench::find(self.vcpu, self.slot, kind, seed) else {
            return;
        };
        if victim(self.number).is_none_or(|kind| kind == bench.kind()) {
            gaps.tick();
            self.make(&mut bench);
        }
    }

    fn make(&mut self, bench: &mut Bench) {
        let Some(attack) = attack(self.number) else {
            return;
        };
        // Told beforehand: if the VMM does not live to see the end, this is what killed it.
        self.counts.current = self.number as u64 + 1;
        self.show();
        if let Some(verdict) = bench.judge(attack) {
            self.count(verdict);
        }
        self.counts.current = 0;
        self.show();
    }

    fn count(&mut self, verdict: Verdict) {
        let counts = &mut self.counts;
        let tally = &mut counts.each[self.number];
        let counter = match verdict {
            Verdict::Worked => &mut counts.worked,
            Verdict::NeedsReset => &mut counts.needs_reset,
            Verdict::Silent => &mut counts.silent,
            Verdict::Stuck => &mut counts.stuck,
            Verdict::ResetStuck => &mut counts.reset_stuck,
            Verdict::Dead => &mut counts.dead,
            Verdict::Scribbled => &mut counts.scribbled,
        };
        *counter += 1;
        tally.made += 1;
        let well = matches!(
            verdict,
            Verdict::Worked | Verdict::NeedsReset | Verdict::Silent
        );
        tally.succeeded += u32::from(!well);
    }

    fn show(&self) {
        let report = self.report;
        pages::show(place!(report.hostile), &self.counts);
    }
}
