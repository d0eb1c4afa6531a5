//! What can be told about the guest without asking the machine thread.

use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use stillpoint_control::message::{Description, GuestState, PROTOCOL, ProcessId, Reply};
use stillpoint_control::ownership::Epoch;
use stillpoint_control::recovery::Recovery;
use stillpoint_control::report::{ReleaseName, SwapReport};
use stillpoint_control::secret::Secret;
use stillpoint_control::spec::MachineSpec;

use crate::machine::frozen::Guest;
use crate::release;

#[derive(Debug)]
struct Notes {
    description: Description,
    report: Option<SwapReport>,
}

/// See the module.
#[derive(Debug)]
pub struct Desk {
    notes: Mutex<Notes>,
    release: ReleaseName,
    secret: Option<Secret>,
    swaps: u64,
    dir: PathBuf,
    process: ProcessId,
    ram: OwnedFd,
    ownership: OwnedFd,
    /// Callers are let in. Closed while the guest is handed over: those who knock meanwhile wait
    /// in the socket's backlog, for the successor or for us.
    open: AtomicBool,
}

impl Desk {
    /// About this guest, in this process.
    pub fn new(
        spec: MachineSpec,
        name: ReleaseName,
        secret: Option<Secret>,
        swaps: u64,
        (guest, dir): (&Guest, &Path),
    ) -> anyhow::Result<Arc<Self>> {
        let pid = std::process::id();
        let process = ProcessId::of(pid)
            .ok_or_else(|| anyhow::anyhow!("cannot read /proc/{pid}/stat; is /proc mounted?"))?;
        let description = Description {
            spec,
            release: name.clone(),
            state: GuestState::Running,
            epoch: guest.owner.epoch(),
            swaps,
            reads: release::FORMATS.to_vec(),
            writes: release::FORMATS.to_vec(),
            last_swap: None,
        };
        Ok(Arc::new(Self {
            notes: Mutex::new(Notes {
                description,
                report: None,
            }),
            release: name,
            secret,
            swaps,
            dir: dir.to_owned(),
            process,
            ram: guest.machine.ram().as_fd().try_clone_to_owned()?,
            ownership: guest.ownership.as_fd().try_clone_to_owned()?,
            open: AtomicBool::new(true),
        }))
    }

    fn notes(&self) -> MutexGuard<'_, Notes> {
        self.notes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// This process's release.
    pub fn release(&self) -> &ReleaseName {
        &self.release
    }

    /// The VM's secret, empty if it has none.
    pub fn secret_bytes(&self) -> Vec<u8> {
        self.secret
            .as_ref()
            .map(|s| s.as_bytes().to_vec())
            .unwrap_or_default()
    }

    /// The guest's directory, if an agent can be asked by way of it.
    pub(super) fn asks_agent(&self) -> Option<PathBuf> {
        let has_vsock = self.notes().description.spec.vsock.is_some();
        has_vsock.then(|| self.dir.clone())
    }

    /// Swaps lived through.
    pub fn swaps(&self) -> u64 {
        self.swaps
    }

    /// What the guest does now.
    pub fn state(&self) -> GuestState {
        self.notes().description.state
    }

    pub(super) fn set_state(&self, state: GuestState) {
        self.notes().description.state = state;
    }

    pub(super) fn set_epoch(&self, epoch: Epoch) {
        self.notes().description.epoch = epoch;
    }

    pub(super) fn set_last_swap(&self, swap: &str) {
        self.notes().description.last_swap = Some(swap.to_owned());
    }

    pub(super) fn set_report(&self, report: SwapReport) {
        self.notes().report = Some(report);
    }

    /// What became known after the report of `swap` was made.
    pub(super) fn set_recovery(&self, swap: &str, recovery: Vec<Recovery>) {
        let mut notes = self.notes();
        if let Some(report) = notes.report.as_mut().filter(|report| report.swap == swap) {
            report.recovery = recovery;
        }
    }

    /// How soon the guest was as fast again after its last swap; empty until all of that is known.
    pub(super) fn recovery(&self) -> Vec<Recovery> {
        let notes = self.notes();
        let recovery = notes.report.iter().flat_map(|report| &report.recovery);
        match recovery.clone().all(Recovery::is_known) {
            true => recovery.cloned().collect(),
            false => Vec::new(),
        }
    }

    pub(super) fn close(&self) {
        self.open.store(false, Ordering::SeqCst);
    }

    pub(super) fn reopen(&self) {
        self.open.store(true, Ordering::SeqCst);
    }

    pub(super) fn is_open(&self) -> bool {
        self.open.load(Ordering::SeqCst)
    }

    pub(super) fn identity(&self, nonce: &str) -> Reply {
        Reply::Identity {
            protocol: PROTOCOL,
            name: self.notes().description.spec.name.clone(),
            process: self.process.clone(),
            proof: self
                .secret
                .as_ref()
                .map(|s| s.prove(nonce))
                .unwrap_or_default(),
        }
    }

    pub(super) fn describe(&self) -> Reply {
        Reply::Description(Box::new(self.notes().description.clone()))
    }

    pub(super) fn last_report(&self) -> Reply {
        Reply::Report {
            report: self.notes().report.clone().map(Box::new),
        }
    }

    /// To who asks a guest to run on that does: the report of the pause it means.
    pub(super) fn resumed(&self, swap: &str) -> Reply {
        let report = self.notes().report.clone();
        match report.filter(|report| report.swap == swap) {
            Some(report) => Reply::Resumed {
                report: Box::new(report),
            },
            None => Reply::Error {
                code: "bad_request".into(),
                message: format!("this guest runs, and has not stood still for {swap}"),
            },
        }
    }

    pub(super) fn lent(&self) -> [std::os::fd::BorrowedFd<'_>; 2] {
        [self.ram.as_fd(), self.ownership.as_fd()]
    }
}
