//! A guest stored beside its RAM, for a jump of its host into another kernel.
//!
//! ```text
//!  freeze ─▶ save ─▶ store (mark: Stored) ─▶ stand still ─┬─▶ the jump: this process is no more
//!                                                         └─▶ withdraw (mark: Withdrawn) ─▶ run on
//! ```
//!
//! What must be true: while the mark says *stored* the guest stands still here; and before it runs on
//! here the mark says something else, by the same compare-and-swap by which the next kernel's VMM would
//! take it. If that is lost, the guest stays still, and this process ends.

use std::os::fd::AsFd;
use std::path::PathBuf;
use std::time::Duration;

use stillpoint_carveout::area::Place;
use stillpoint_carveout::map::Device;
use stillpoint_control::message::Reply;
use stillpoint_control::spec::CarveOutSpec;

use super::Process;
use super::desk::Desk;
use super::refusal;
use super::standstill::Terms;
use crate::handover::record::{self, Told};
use crate::machine::frozen::Frozen;
use crate::memory::GuestRam;

/// The place of a guest's record in what its RAM lies in.
pub(super) fn place_of(at: &CarveOutSpec, ram: &GuestRam) -> Result<Place, String> {
    let fd = ram.as_fd().try_clone_to_owned();
    let device = Device::of(&at.path, fd.map_err(|e| e.to_string())?);
    record::place_of(at, &device.map_err(|e| e.to_string())?).map_err(|e| e.to_string())
}

/// To who says that the jump comes, of a guest that runs.
pub(super) fn runs(swap: &str) -> Reply {
    let message = format!("this guest runs, and does not stand still for {swap}");
    refusal("bad_request", message)
}

impl Process {
    /// Where the guest's record goes; an error says why it has none.
    pub(super) fn record_place(&self) -> Result<Place, String> {
        let machine = &self.guest.machine;
        match &machine.spec().memory.carve_out {
            Some(at) => place_of(at, machine.ram()),
            None => Err(
                "this guest's RAM ends with the kernel: it was not started with `--survive kernel`"
                    .into(),
            ),
        }
    }
}

/// A guest that is stored.
#[derive(Debug)]
pub(super) struct Stored {
    place: Place,
    state_bytes: u64,
    path: PathBuf,
}

impl Stored {
    /// Saves the guest and stores it. On an error nothing of it can be run.
    pub(super) fn store(
        frozen: &mut Frozen<'_>,
        place: Place,
        nonce: &str,
        terms: &Terms<'_>,
        desk: &Desk,
    ) -> Result<Self, String> {
        let policy = frozen.machine().spec().clock.policy;
        let format = record::format_of(frozen.machine(), policy)
            .ok_or("no format of state carries this machine")?;
        let told = Told {
            nonce,
            swap: terms.swap,
            release: desk.release(),
            swaps: desk.swaps(),
            ceiling: terms.ceiling,
            wall_error_ns: terms.wall_error_ns,
            started_at_unix_ns: terms.started_at_unix_ns,
        };
        let record = record::save(frozen, format, policy, &told).map_err(|e| e.to_string())?;
        if let Err(error) = place.store(&record) {
            // Whatever it came to: the guest runs on here.
            let cleared = place.clear();
            let also = cleared.err().map(|e| format!("; {e}")).unwrap_or_default();
            return Err(format!("cannot store the guest: {error}{also}"));
        }
        let at = frozen.machine().spec().memory.carve_out.as_ref();
        let path = at.map(|at| at.path.clone()).unwrap_or_default();
        frozen.timing.mark("store");
        Ok(Self {
            place,
            state_bytes: record.state.len() as u64,
            path,
        })
    }

    /// What its caller hears.
    pub(super) fn told(&self, took: Duration) -> Reply {
        Reply::Stored {
            state_bytes: self.state_bytes,
            took,
        }
    }

    /// Nobody jumped: the guest is to run on here. An error means that it must not.
    pub(super) fn withdraw(self) -> Result<(), String> {
        let path = self.path.display();
        let failed = |error| format!("cannot withdraw the guest's record in {path}: {error}");
        self.place.withdraw().map_err(failed)
    }
}
