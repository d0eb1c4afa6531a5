//! The crash matrix: in every phase of a swap a fault of every kind on every side, and what became
//! of it, on a host with a real daemon and a guest whose devices are at work.
//!
//! A release for tests stops at a *point*, all threads of it (`vmm/src/faults.rs`). Just then
//! something is done to one of the three processes, from outside, and the stopped one goes on. What
//! must come of it is a table in SPECIFICATION.md, which is read, so that the two can't differ.

mod acts;
mod bare;
mod host;
pub mod pool;
mod random;
mod resident;
mod rounds;
mod table;
mod unattended;

pub use host::{GUEST, Host};
pub use random::{Tally, random};
pub use resident::{Boot, Resident};
pub use rounds::{Verdict, run};
pub use table::expected;
pub use unattended::unattended;

/// One of the three processes of a swap.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Whom {
    /// The VMM that has the guest.
    Predecessor,
    /// The VMM that is to have it.
    Successor,
    /// stillpointd.
    Daemon,
}

/// What is done to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Act {
    /// `kill -9`.
    Kill,
    /// It stands still until all is over, or for `acts::HANG`.
    Hang,
    /// It has an error at the point; only who is at the point can.
    Error,
    /// It stands still for 50 ms.
    Slow,
    /// It gets no more memory from the kernel.
    Memory,
    /// It gets no more file descriptors.
    Fds,
    /// The disk with run and state directory is full.
    Disk,
    /// `kill -9`, and of the daemon as well, which is started again when the two sides have settled it
    /// between themselves.
    Both,
}

/// Every fault.
pub const ACTS: [(&str, Act); 8] = [
    ("kill -9", Act::Kill),
    ("hang", Act::Hang),
    ("error", Act::Error),
    ("slow", Act::Slow),
    ("memory", Act::Memory),
    ("fds", Act::Fds),
    ("disk", Act::Disk),
    ("both", Act::Both),
];

/// Every phase, in their order in a swap, and who is at the point then.
pub const POINTS: [(&str, Whom); 12] = [
    ("offered", Whom::Predecessor),
    ("adopt", Whom::Successor),
    ("frozen", Whom::Predecessor),
    ("saved", Whom::Predecessor),
    ("sealed", Whom::Predecessor),
    ("load", Whom::Successor),
    ("loaded", Whom::Successor),
    ("given-up", Whom::Predecessor),
    ("take", Whom::Successor),
    ("taken", Whom::Successor),
    ("entered", Whom::Successor),
    ("retiring", Whom::Predecessor),
];

/// All sides.
pub const SIDES: [(&str, Whom); 3] = [
    ("predecessor", Whom::Predecessor),
    ("successor", Whom::Successor),
    ("daemon", Whom::Daemon),
];

/// One cell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cell {
    /// The point at which it happens.
    pub point: &'static str,
    /// Who is at the point.
    pub at: Whom,
    /// To whom.
    pub whom: Whom,
    /// What.
    pub act: Act,
}

impl Cell {
    /// All of them, row by row.
    pub fn all() -> impl Iterator<Item = Self> {
        POINTS.into_iter().flat_map(|(point, at)| {
            SIDES.into_iter().flat_map(move |(_, whom)| {
                let cell = move |(_, act)| Self {
                    point,
                    at,
                    whom,
                    act,
                };
                ACTS.into_iter().map(cell).filter(Self::exists)
            })
        })
    }

    /// An error is had by who is at the point; a disk is full for everybody; and the daemon has no other
    /// one beside it.
    fn exists(&self) -> bool {
        match self.act {
            Act::Error => self.whom == self.at,
            Act::Disk => self.whom == Whom::Daemon || self.whom == self.at,
            Act::Both => self.whom != Whom::Daemon,
            _ => true,
        }
    }
}

impl std::fmt::Display for Cell {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let side = SIDES.iter().find(|(_, whom)| *whom == self.whom);
        let act = ACTS.iter().find(|(_, act)| *act == self.act);
        let (side, act) = (side.map_or("", |s| s.0), act.map_or("", |a| a.0));
        write!(f, "{} / {side} / {act}", self.point)
    }
}
