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
use stillpoint_carveout::layout::Extent;
use stillpoint_carveout::map::Device;
use stillpoint_carveout::record::{Label, Record};
use stillpoint_control::clock::Policy;
use stillpoint_control::message::Reply;
use stillpoint_control::report::{
    Blackout, ClockReceipt, Outcome, Phase, ReleaseName, Side, SwapReport, WallClock,
};
use stillpoint_control::spec::CarveOutSpec;

use super::Process;
use super::desk::Desk;
use super::refusal;
use super::standstill::Terms;
use crate::boot::cpuid;
use crate::machine::Machine;
use crate::machine::frozen::Frozen;
use crate::memory::GuestRam;

/// The place of a guest's record in what its RAM lies in.
pub(super) fn place_of(at: &CarveOutSpec, ram: &GuestRam) -> Result<Place, String> {
    let extent = Extent {
        start: at.record,
        len: at.record_len,
    };
    let fd = ram.as_fd().try_clone_to_owned();
    let device = Device::of(&at.path, fd.map_err(|e| e.to_string())?);
    Place::of(&device.map_err(|e| e.to_string())?, extent).map_err(|e| e.to_string())
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
        let formats = frozen.machine().formats(policy);
        let format = *formats
            .first()
            .ok_or("no format of state carries this machine")?;
        let state = frozen.save(format, policy).map_err(|e| e.to_string())?;
        let machine = frozen.machine();
        let report = report(frozen, terms, desk.release(), (format, state.len() as u64));
        let label = Label {
            nonce: nonce.to_owned(),
            swap: terms.swap.to_owned(),
            spec: serde_json::to_string(machine.spec()).unwrap_or_default(),
            release: desk.release().clone(),
            format,
            tsc_khz: machine.tsc_khz(),
            tsc_offset: machine.tsc_offset(),
            hold: policy == Policy::Hold,
            kicked_tsc: frozen.kicked_tsc,
            swaps: desk.swaps(),
            report,
        };
        let record = Record {
            label,
            cpuid: cpuid::to_bytes(machine.cpuid()),
            state,
        };
        if let Err(error) = place.store(&record) {
            // Whatever it came to: the guest runs on here.
            let cleared = place.clear();
            let also = cleared.err().map(|e| format!("; {e}")).unwrap_or_default();
            return Err(format!("cannot store the guest: {error}{also}"));
        }
        let at = machine.spec().memory.carve_out.as_ref();
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

/// The report as far as this side can tell it.
fn report(
    frozen: &Frozen<'_>,
    terms: &Terms<'_>,
    release: &ReleaseName,
    (state_format, state_bytes): (u32, u64),
) -> SwapReport {
    let machine: &Machine = frozen.machine();
    let phase = |name: &str, in_blackout, duration| Phase {
        name: name.to_owned(),
        side: Side::Predecessor,
        in_blackout,
        duration,
    };
    let marks = frozen.timing.marks.iter();
    let marks = marks.map(|(name, duration)| phase(name, true, *duration));
    let wall_clock = WallClock {
        error_before_ns: terms.wall_error_ns,
        ..WallClock::default()
    };
    SwapReport {
        swap: terms.swap.to_owned(),
        vm: machine.spec().name.clone(),
        component: "kernel".into(),
        from: release.clone(),
        to: release.clone(),
        outcome: Outcome::Moved,
        reason: None,
        started_at_unix_ns: terms.started_at_unix_ns,
        vcpus: u32::try_from(machine.vcpu_count()).unwrap_or(u32::MAX),
        memory_bytes: machine.ram().size(),
        state_format,
        state_bytes,
        budget: terms.ceiling,
        margin: None,
        phases: std::iter::once(phase("drain", false, frozen.drained))
            .chain(marks)
            .collect(),
        blackout: Blackout::default(),
        clock: Some(ClockReceipt {
            wall_clock,
            ..ClockReceipt::default()
        }),
        recovery: Vec::new(),
        warnings: Vec::new(),
    }
}
