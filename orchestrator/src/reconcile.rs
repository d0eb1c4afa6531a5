//! Per VM, one task: look, plan, execute, record; then rest until something changes.
//!
//! ```text
//!        ┌──────────────────────────────────────────────────┐
//!        ▼                                                  │
//!   look (hold the process, or find it) ─▶ plan::vm::next ─▶ execute ─▶ record
//!        ▲                                    │
//!        └── woken, or its process ended ◀────┘ rest
//! ```
//!
//! A supervisor owns the tasks; everyone else only has a [`Waker`]. Nothing in here is needed for
//! a guest to run: a daemon that starts anew looks at everything afresh.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use stillpoint_control::message::ProcessId;
use tokio::sync::{Notify, mpsc, watch};

use crate::agent::custody;
use crate::agent::find::{FindError, Held};
use crate::agent::process::{Exit, Process};
use crate::agent::spawn::log_tail;
use crate::execute::{self, Clearance, Host, Hurry, Lane, Next, Watching};
use crate::model::{Event, HOST, SwapRecord, VmName, VmRecord, VmState, Wanted};
use crate::plan;
use crate::plan::vm::{Ending, Planned, Seen, Step};
use crate::store::StoreError;

/// Between two looks at a VM that can't be spoken to.
const LOOK_AGAIN: Duration = Duration::from_secs(1);

/// Tells the supervisor that something is to be done for a VM.
#[derive(Clone, Debug)]
pub struct Waker(mpsc::UnboundedSender<VmName>);

impl Waker {
    /// Something changed in what is wanted of that VM.
    pub fn wake(&self, vm: &VmName) {
        // The supervisor only ends when the daemon does.
        let _ = self.0.send(vm.clone());
    }
}

/// Starts the supervisor, and a task for every VM that is recorded.
pub async fn start(host: Host) -> Result<Waker, StoreError> {
    let (sender, mut wakes) = mpsc::unbounded_channel();
    let waker = Waker(sender);
    let vms = host.store.vms().await?;
    for vm in vms.iter().filter(|vm| vm.state.is_active()) {
        host.ways.take_over(vm);
    }
    for vm in &vms {
        waker.wake(&vm.name);
    }
    tokio::spawn(async move {
        let mut tasks: HashMap<VmName, (Arc<Notify>, tokio::task::JoinHandle<()>)> = HashMap::new();
        while let Some(vm) = wakes.recv().await {
            if let Some((woken, task)) = tasks.get(&vm)
                && !task.is_finished()
            {
                woken.notify_one();
                continue;
            }
            let woken = Arc::new(Notify::new());
            let task = tokio::spawn(keep(host.clone(), vm.clone(), woken.clone()));
            tasks.insert(vm, (woken, task));
        }
    });
    Ok(waker)
}

/// Keeps a VM to its end. A bug in a turn must not leave its guest to itself, and a swap on record as one in
/// progress: another keeper looks at everything afresh, as after a start of the daemon.
async fn keep(host: Host, name: VmName, woken: Arc<Notify>) {
    loop {
        let keeper = Keeper {
            host: host.clone(),
            name: name.clone(),
            held: None,
            watching: None,
            woken: woken.clone(),
            said: None,
        };
        match tokio::spawn(keeper.keep()).await {
            Err(error) if error.is_panic() => {
                tracing::error!(vm = %name, "its keeper panicked, which is a bug; another takes over");
                tokio::time::sleep(LOOK_AGAIN).await;
            }
            _ => return,
        }
    }
}

/// The task of one VM.
struct Keeper {
    host: Host,
    name: VmName,
    held: Option<Held>,
    /// The watch over the guest after its swap.
    watching: Option<Watching>,
    woken: Arc<Notify>,
    /// What the log says last: a swap that waits for its time is looked at often, and told once.
    said: Option<Planned>,
}

impl Keeper {
    async fn keep(mut self) {
        loop {
            match self.turn().await {
                Ok(true) => {}
                Ok(false) | Err(StoreError::Closed) => return,
                Err(error) => {
                    tracing::error!(vm = %self.name, "{error}");
                    tokio::time::sleep(LOOK_AGAIN).await;
                }
            }
        }
    }

    /// One turn. `false`: the VM is no more.
    async fn turn(&mut self) -> Result<bool, StoreError> {
        let Some(vm) = self.host.store.vm(&self.name).await? else {
            return Ok(false);
        };
        let swap = self.host.store.open_swap(&self.name).await?;
        let seen = self.look(&vm, swap.as_ref()).await;
        let planned = plan::vm::next(&vm, swap.as_ref(), &seen);
        if self.said.as_ref() != Some(&planned) {
            if !matches!(planned.step, Step::Rest | Step::LookAgain) {
                tracing::info!(vm = %vm.name, step = ?planned.step, "{}", planned.why);
            }
            self.said = Some(planned.clone());
        }
        let watched = self.host.store.watched_swap(&self.name).await?;
        let stands_still = swap.as_ref().is_some_and(|swap| swap.component == HOST);
        if let Some(watched) = watched {
            match (&planned.step, &seen) {
                (Step::Rest, Seen::Alive) if stands_still => {
                    // It gives no signs of life now, and is watched anew when it does.
                    self.watching = None;
                    tokio::time::sleep(LOOK_AGAIN).await;
                    return Ok(true);
                }
                (Step::Rest, Seen::Alive) => {
                    self.watch(&vm, watched).await?;
                    return Ok(true);
                }
                (step, _) if ends_watch(step) => {
                    execute::supersede(&self.host, watched, &planned.why).await?;
                }
                _ => {}
            }
        }
        self.execute(&vm, swap, planned).await?;
        Ok(true)
    }

    /// One look at a guest that was swapped; then waits until the next is due, or something changes.
    async fn watch(&mut self, vm: &VmRecord, swap: SwapRecord) -> Result<(), StoreError> {
        match execute::watch(&self.host, vm, swap, &mut self.watching).await? {
            Next::Over => self.watching = None,
            Next::Look(after) => {
                let _ = tokio::time::timeout(after, self.rest()).await;
            }
        }
        Ok(())
    }

    async fn look(&mut self, vm: &VmRecord, swap: Option<&SwapRecord>) -> Seen {
        if let Some(held) = &self.held {
            if held.process.is_alive() {
                self.host.ways.open(vm, &self.host.dir(&vm.name));
                return Seen::Alive;
            }
            let exit = held.process.exit();
            self.held = None;
            custody::release(&vm.name);
            return Seen::Ended(self.ending(vm, &exit));
        }
        // One that was never started has no process; whatever is at its socket is not its own.
        let never_started = vm.state == VmState::Starting && vm.process.is_none();
        if !vm.state.is_active() || never_started {
            self.host.ways.close(vm);
            return Seen::Nothing;
        }
        match self.host.expected(vm).find().await {
            Ok(held) => {
                custody::keep(&vm.name, &held.memory, &*held.ownership);
                self.host.ways.open(vm, &self.host.dir(&vm.name));
                self.held = Some(held);
                Seen::Alive
            }
            Err(error) => self.not_found(vm, swap, error),
        }
    }

    /// Nobody is found at the control socket; whether that is the end is for the recorded
    /// processes to say.
    fn not_found(&self, vm: &VmRecord, swap: Option<&SwapRecord>, error: FindError) -> Seen {
        let successor = swap.and_then(|swap| swap.successor.as_ref());
        let alive = [vm.process.as_ref(), successor]
            .into_iter()
            .flatten()
            .find(|id| Process::open(id).is_ok());
        match (alive, error) {
            (Some(id), error) => {
                Seen::Unreachable(format!("process {} lives, but {error}", id.pid))
            }
            (None, FindError::Nobody(_)) => {
                // Looked at before the sockets go: they tell how it ended.
                let ending = self.ending(vm, &Exit::Unknown);
                self.host.dir(&vm.name).remove_stale_sockets();
                custody::release(&vm.name);
                match ending {
                    // Only ever at its gate: it never ran.
                    Ending::PoweredOff if vm.state == VmState::Starting => Seen::Nothing,
                    ending => Seen::Ended(ending),
                }
            }
            (None, error) => {
                custody::release(&vm.name);
                Seen::Ended(Ending::Failed(format!("its process is gone; {error}")))
            }
        }
    }

    /// How a process ended. One that was not our child has no exit status for us; but a VMM whose
    /// guest powered off removes its control socket, and one that died can't.
    fn ending(&self, vm: &VmRecord, exit: &Exit) -> Ending {
        let dir = self.host.dir(&vm.name);
        match exit {
            Exit::Code(0) => Ending::PoweredOff,
            Exit::Unknown if is_of_another_boot(vm) || !dir.path().exists() => {
                Ending::Failed("the host was restarted while it ran, or lost its power".into())
            }
            Exit::Unknown if !dir.control().exists() => Ending::PoweredOff,
            _ => {
                let log = log_tail(&dir.log());
                Ending::Failed(format!("the VMM {exit}; the last it logged:\n{log}"))
            }
        }
    }

    async fn execute(
        &mut self,
        vm: &VmRecord,
        swap: Option<SwapRecord>,
        planned: Planned,
    ) -> Result<(), StoreError> {
        let Planned { step, why } = planned;
        match step {
            Step::Rest => self.rest().await,
            Step::LookAgain => self.look_again(vm, why).await?,
            Step::Start => self.start(vm).await,
            Step::PowerOff => {
                if let Some(held) = &self.held {
                    execute::power_off(&self.host, vm, held).await;
                }
            }
            Step::Record(state) => self.record(vm, state, why).await,
            Step::Swap(_) => self.swap_in_time(vm, swap).await?,
            Step::Refuse(_) => {
                if let Some(swap) = swap {
                    execute::refuse(&self.host, swap, why).await;
                }
            }
            Step::Settle(_) => {
                if let Some(swap) = swap {
                    let held = self.held.take();
                    self.held = execute::settle(&self.host, vm, swap, held).await;
                }
            }
        }
        Ok(())
    }

    async fn rest(&self) {
        match &self.held {
            Some(held) => tokio::select! {
                () = self.woken.notified() => {}
                () = held.process.ended() => {}
            },
            None => self.woken.notified().await,
        }
    }

    async fn look_again(&self, vm: &VmRecord, why: String) -> Result<(), StoreError> {
        if vm.state != VmState::Lost {
            let process = vm.process.clone();
            self.host
                .observe(&vm.name, VmState::Lost, Some(why), process)
                .await?;
        }
        let _ = tokio::time::timeout(LOOK_AGAIN, self.woken.notified()).await;
        Ok(())
    }

    async fn start(&mut self, vm: &VmRecord) {
        let host = &self.host;
        match execute::start(host, vm).await {
            Ok(held) => {
                custody::keep(&vm.name, &held.memory, &*held.ownership);
                let process = Some(held.process.id().clone());
                host.observe_surely(&vm.name, VmState::Running, None, process)
                    .await;
                self.held = Some(held);
            }
            Err(reason) => {
                tracing::warn!(vm = %vm.name, "did not start: {reason}");
                host.ways.unfence(vm);
                host.dir(&vm.name).remove_stale_sockets();
                host.observe_surely(&vm.name, VmState::Failed, Some(reason), None)
                    .await;
            }
        }
    }

    /// Swaps it if its guest has had its notice and the host has room; otherwise waits until something
    /// changes.
    async fn swap_in_time(
        &mut self,
        vm: &VmRecord,
        swap: Option<SwapRecord>,
    ) -> Result<(), StoreError> {
        let Some(mut swap) = swap else {
            return Ok(());
        };
        // Before the look at the board: what changes after it is not missed.
        let mut changes = self.host.notices.changes();
        match execute::clear_swap(&self.host, vm, &mut swap).await? {
            Clearance::Go => match self.lane(vm, &swap, changes).await? {
                Some(lane) => self.begin(vm, swap, lane).await,
                None => Ok(()),
            },
            Clearance::Withdrawn(why) => {
                execute::refuse(&self.host, swap, why).await;
                Ok(())
            }
            Clearance::Wait(longest) => {
                tokio::select! {
                    () = self.rest() => {}
                    _ = changes.changed() => {}
                    () = tokio::time::sleep(longest) => {}
                }
                Ok(())
            }
        }
    }

    /// The cores for it; `None` when something changed that concerns it while it waited for them.
    async fn lane(
        &self,
        vm: &VmRecord,
        swap: &SwapRecord,
        mut changes: watch::Receiver<u64>,
    ) -> Result<Option<Lane>, StoreError> {
        let (host, vcpus) = (&self.host, vm.spec.cpus);
        let hurry = match swap.safeguards.way_back_of {
            Some(_) => Hurry::WayBack,
            None => Hurry::None,
        };
        let lane = host.lanes.enter(vcpus, hurry);
        tokio::pin!(lane);
        // In the queue first: who only looked would miss those who look at the same moment.
        tokio::select! {
            biased;
            lane = &mut lane => return Ok(Some(lane)),
            () = std::future::ready(()) => {}
        }
        let mut waiting = swap.clone();
        waiting.step = "wait for its turn".into();
        host.record(&waiting).await?;
        // What changes for others must not cost it its place.
        while execute::may_begin(host, &swap.id).await {
            tokio::select! {
                lane = &mut lane => return Ok(Some(lane)),
                () = self.rest() => break,
                _ = changes.changed() => {}
            }
        }
        Ok(None)
    }

    /// The guest hears that its pause starts only when it does.
    async fn begin(
        &mut self,
        vm: &VmRecord,
        swap: SwapRecord,
        lane: Lane,
    ) -> Result<(), StoreError> {
        match execute::begin(&self.host, &swap.id).await? {
            Clearance::Go => {
                let done = self.swap(vm, swap).await;
                drop(lane);
                done
            }
            // Cancelled while it waited for its turn: the next look says so.
            Clearance::Withdrawn(_) | Clearance::Wait(_) => Ok(()),
        }
    }

    async fn swap(&mut self, vm: &VmRecord, swap: SwapRecord) -> Result<(), StoreError> {
        let Some(held) = self.held.take() else {
            return Ok(());
        };
        match execute::swap(&self.host, vm, swap, held).await {
            Ok(held) => {
                self.held = held;
                Ok(())
            }
            Err((error, held)) => {
                self.held = Some(held);
                Err(error)
            }
        }
    }

    async fn record(&self, vm: &VmRecord, state: VmState, why: String) {
        let process = self.held.as_ref().map(|held| held.process.id().clone());
        let as_wanted = match vm.wanted {
            Wanted::Running => state == VmState::Running,
            Wanted::Stopped => state == VmState::Stopped,
        };
        let reason = (!as_wanted).then_some(why);
        self.host
            .observe_surely(&vm.name, state, reason, process)
            .await;
        if !state.is_active() {
            self.host.dir(&vm.name).remove_stale_sockets();
        }
    }
}

/// Whether its process ran before the host was started last.
fn is_of_another_boot(vm: &VmRecord) -> bool {
    let now = ProcessId::of(std::process::id());
    matches!((&vm.process, now), (Some(then), Some(now)) if then.boot_id != now.boot_id)
}

/// Whether a guest that is watched after its swap is no longer what was swapped.
fn ends_watch(step: &Step) -> bool {
    match step {
        Step::Swap(_) | Step::PowerOff | Step::Start => true,
        Step::Record(state) => !state.is_active(),
        // It can't be spoken to just now, which says nothing yet; and so with all the others.
        Step::LookAgain | Step::Rest | Step::Refuse(_) | Step::Settle(_) => false,
    }
}

/// Tells that a VM's record is gone.
pub fn removed(host: &Host, vm: &VmName) {
    host.tell(Event::Removed { vm: vm.clone() });
}
