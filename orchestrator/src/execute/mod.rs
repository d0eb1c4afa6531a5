//! Carries out one step: start, stop, swap, settle. Records before it acts, and what came of it
//! afterwards.

mod adopt;
mod announce;
mod command;
mod health;
mod holds;
mod host;
mod kernel;
mod kernel_check;
mod lanes;
mod preflight;
mod rehearsal;
mod relieve;
mod settle;
mod start;
mod stop;
mod swap;

use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use stillpoint_control::message::ProcessId;
use tokio::sync::broadcast;

use crate::agent::binaries::Binaries;
use crate::agent::carve_out::CarveOut;
use crate::agent::find::Expected;
use crate::agent::places::VmDir;
use crate::agent::scope::Scopes;
use crate::metadata::notices::Notices;
use crate::metadata::ways::Ways;
use crate::model::{Event, HostSwap, SwapId, SwapRecord, VmName, VmRecord, VmState};
use crate::store::{Observed, Store, StoreError};

pub use adopt::{Verified, adopt_all, retry};
pub use announce::{Clearance, begin, clear_swap, forget, may_begin, settle_pauses};
pub use health::{Next, Watching, supersede, watch};
pub use holds::Holds;
pub use host::host_swap;
pub use kernel_check::{LookAtJump, checks as kernel_checks, rehearsals, rungs};
pub use lanes::{Hurry, Lane, Lanes};
pub use preflight::{preflight, updatable};
pub use settle::settle;
pub use start::start;
pub use stop::power_off;
pub use swap::{refuse, swap};

/// Between two tries to record something that must be recorded.
const RETRY: Duration = Duration::from_secs(2);

/// Nanoseconds since the Unix epoch.
pub fn unix_ns() -> u64 {
    SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .map_or(0, |since| {
            u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
        })
}

/// This host: what steps are carried out with.
#[derive(Clone, Debug)]
pub struct Host {
    /// What must not be forgotten.
    pub store: Store,
    /// Who listens hears it here.
    pub events: broadcast::Sender<Event>,
    /// Releases on disk.
    pub binaries: Binaries,
    /// Sockets and logs lie here.
    pub run_dir: PathBuf,
    /// Where guests' processes go.
    pub scopes: Scopes,
    /// What guests are told of their pauses.
    pub notices: Notices,
    /// The wires on which they ask.
    pub ways: Ways,
    /// Guests that stand still until they are let go.
    pub holds: Holds,
    /// Swaps side by side, as far as the cores go round.
    pub lanes: Lanes,
    /// Memory that outlives the kernel.
    pub carve_out: CarveOut,
    /// Where releases of KVM lie, each in a folder of its version.
    pub kvm_dir: PathBuf,
    /// Where kernels lie that the host may be swapped to.
    pub boot_dir: PathBuf,
}

impl Host {
    /// The directory of a VM.
    pub fn dir(&self, vm: &VmName) -> VmDir {
        VmDir::new(&self.run_dir, vm)
    }

    /// What proves the VMM of a VM.
    pub fn expected(&self, vm: &VmRecord) -> Expected {
        Expected {
            control: self.dir(&vm.name).control(),
            secret: vm.secret.clone(),
        }
    }

    /// Tells all who listen.
    pub fn tell(&self, event: Event) {
        // Nobody may be listening.
        let _ = self.events.send(event);
    }

    /// Records what a VM is, and tells.
    pub async fn observe(
        &self,
        vm: &VmName,
        state: VmState,
        reason: Option<String>,
        process: Option<ProcessId>,
    ) -> Result<(), StoreError> {
        let observed = Observed {
            state,
            reason: reason.clone(),
            process,
            at_unix_ns: unix_ns(),
        };
        self.store.observe(vm, observed).await?;
        let vm = vm.clone();
        self.tell(Event::Vm { vm, state, reason });
        Ok(())
    }

    /// As [`Host::observe`], tried until it succeeds: what happened has happened.
    pub async fn observe_surely(
        &self,
        vm: &VmName,
        state: VmState,
        reason: Option<String>,
        process: Option<ProcessId>,
    ) {
        while let Err(error) = self
            .observe(vm, state, reason.clone(), process.clone())
            .await
        {
            if matches!(error, StoreError::Closed) {
                return;
            }
            tracing::error!(%vm, %state, "not recorded, will be tried again: {error}");
            tokio::time::sleep(RETRY).await;
        }
    }

    /// Records how far a swap is, and tells.
    pub async fn record(&self, swap: &SwapRecord) -> Result<(), StoreError> {
        self.store.update_swap(swap).await?;
        self.tell_swap(swap);
        Ok(())
    }

    /// Records the end of a swap and what it made of the VM, tried until it succeeds: the swap is
    /// over, whatever the disk says. Then tells.
    async fn end_swap(&self, swap: &SwapRecord, vm: Option<(VmState, ProcessId)>) {
        let observed = vm.map(|(state, process)| Observed {
            state,
            reason: swap.reason.clone().filter(|_| state != VmState::Running),
            process: state.is_active().then_some(process),
            at_unix_ns: unix_ns(),
        });
        while let Err(error) = self.store.end_swap(swap, observed.clone()).await {
            if matches!(error, StoreError::Closed) {
                return;
            }
            tracing::error!(vm = %swap.vm, swap = %swap.id, "not recorded, will be tried again: {error}");
            tokio::time::sleep(RETRY).await;
        }
        tracing::info!(
            swap = %swap.id, vm = %swap.vm, rollout = swap.rollout.as_ref().map(tracing::field::display), outcome = %swap.state,
            reason = swap.reason, "the swap is over"
        );
        if let Some(Observed { state, reason, .. }) = observed {
            let vm = swap.vm.clone();
            self.tell(Event::Vm { vm, state, reason });
        }
        self.tell_swap(swap);
        if let Err(error) = health::note_way_back(self, swap).await {
            // The two records name each other all the same.
            tracing::error!(vm = %swap.vm, swap = %swap.id, "not noted with the swap before: {error}");
        }
        announce::end_pause(self, swap).await;
    }

    /// Where the commands of a swap of this host print to.
    pub fn host_swap_log(&self, swap: &SwapId) -> PathBuf {
        self.run_dir.join(format!("host-{swap}.log"))
    }

    fn tell_host_swap(&self, swap: &HostSwap) {
        self.tell(Event::HostSwap {
            swap: swap.id.clone(),
            state: swap.state,
            step: swap.step.clone(),
            reason: swap.reason.clone(),
        });
    }

    fn tell_swap(&self, swap: &SwapRecord) {
        self.tell(Event::Swap {
            swap: swap.id.clone(),
            vm: swap.vm.clone(),
            state: swap.state,
            step: swap.step.clone(),
            reason: swap.reason.clone(),
        });
    }
}
