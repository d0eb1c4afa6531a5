//! Carries out what a rollout asks of this host: each order once, whoever drives and whoever dies.
//!
//! ```text
//!   order ─▶ its epoch is not below the highest heard? ─▶ swap of that id recorded? ─▶ answer as it is
//!                      │ below: nothing is done                  │ no
//!                      ▼                                         ▼
//!                   (a warning)                  something else goes on: wait;  runs it already: there
//!                                                otherwise ask for it as `stillpoint swap vmm` does
//! ```
//!
//! An order says what is to run a VM, and its id is the swap's: a daemon that starts anew finds the swap in
//! its own store and begins nothing twice. A refusal is an answer, and stays one. Must never: act on an
//! order before its epoch is on disk.

mod host;

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use crate::api::{Desk, NewSwap};
use crate::fleet::look::Look;
use crate::fleet::record::{Answer, Far, Order};
use crate::fleet::{ANSWERS, ORDERS, keys};
use crate::model::{Code, Problem, SwapId, SwapRecord, SwapState, VMM, VmName, VmState};
use crate::plan::rollout::evidence::is_settled;
use crate::store::StoreError;
use crate::store::shared::{Change, Committed, Expect};

/// Between two looks when nothing is heard.
const TICK: Duration = Duration::from_secs(1);
/// Events and changes come in swarms.
const BREATH: Duration = Duration::from_millis(20);

/// Carries orders out until the daemon ends.
pub async fn obey(desk: Desk) {
    let mut obedient = Obedient {
        stale: BTreeSet::new(),
        said: BTreeMap::new(),
    };
    let mut events = desk.host.events.subscribe();
    let mut changes = desk.fleet.shared.changes();
    let mut quiet = false;
    loop {
        match obedient.look(&desk).await {
            Ok(()) => quiet = false,
            Err(problem) if !std::mem::replace(&mut quiet, true) => {
                tracing::warn!("no orders are carried out: {problem}");
            }
            Err(_) => {}
        }
        tokio::select! {
            _ = tokio::time::sleep(TICK) => {}
            _ = changes.changed() => tokio::time::sleep(BREATH).await,
            _ = events.recv() => tokio::time::sleep(BREATH).await,
        }
        events = events.resubscribe();
        changes.mark_unchanged();
    }
}

struct Obedient {
    /// Orders whose driver was replaced, and that were complained of.
    stale: BTreeSet<SwapId>,
    /// What was answered last.
    said: BTreeMap<String, Answer>,
}

impl Obedient {
    async fn look(&mut self, desk: &Desk) -> Result<(), Problem> {
        let fleet = &desk.fleet;
        // Orders under a name that is another's are not for this host.
        let Some(guard) = fleet.name_guard() else {
            return Ok(());
        };
        let prefix = format!("{ORDERS}{}/", fleet.me);
        let snapshot = fleet.shared.list(&prefix).await?;
        let look = Look::of(&snapshot);
        for problem in &look.malformed {
            tracing::warn!("an order is not carried out: {problem}");
        }
        let mut standing = BTreeSet::new();
        for ((_, vm), order) in &look.orders {
            let key = keys::of_unit(ANSWERS, &fleet.me, vm.as_ref());
            standing.insert(key.clone());
            if !self.counts(desk, &look.origin, order).await? {
                continue;
            }
            let answer = match vm {
                Some(vm) => self.answer(desk, vm, order, &key).await?,
                None => self.answer_of_host(desk, order, &key).await?,
            };
            if self.said.get(&key) == Some(&answer) {
                continue;
            }
            let value = serde_json::to_vec(&answer);
            let value = value.map_err(|e| Problem::new(Code::Failed, e.to_string()))?;
            let change = Change::put(key.clone(), Expect::Anything, value);
            if let Committed::Done(_) = fleet.shared.commit(vec![change], Some(&guard)).await? {
                self.said.insert(key, answer);
            }
        }
        self.said.retain(|key, _| standing.contains(key));
        Ok(())
    }

    /// Whether an order is of a driver whose word counts; from then on it does on this host.
    async fn counts(
        &mut self,
        desk: &Desk,
        origin: &str,
        order: &Order,
    ) -> Result<bool, StoreError> {
        match desk.host.store.hear_epoch(origin, order.epoch).await? {
            Ok(()) => Ok(true),
            Err(higher) => {
                if self.stale.insert(order.id.clone()) {
                    tracing::warn!(
                        order = %order.id, epoch = order.epoch, higher,
                        "an order of a driver that was replaced is not carried out"
                    );
                }
                Ok(false)
            }
        }
    }

    /// What is to be said of an order, after what can be done for it was done.
    async fn answer(
        &mut self,
        desk: &Desk,
        vm: &VmName,
        order: &Order,
        key: &str,
    ) -> Result<Answer, Problem> {
        if let Some(swap) = desk.host.store.swap(&order.id).await? {
            return of_swap(desk, swap).await;
        }
        if let Some(refused) = self.refused(desk, order, key).await? {
            return Ok(refused);
        }
        let say = |far, reason| say(order, far, reason);
        let Some(record) = desk.host.store.vm(vm).await? else {
            let reason = format!("no VM on {} is called `{vm}`", desk.fleet.me);
            return Ok(say(Far::Refused, Some(reason)));
        };
        if let Some(open) = desk.host.store.open_swap(vm).await? {
            let reason = format!("swap {} of it has to end first", open.id);
            return Ok(say(Far::UnderWay, Some(reason)));
        }
        if record.release == order.to && record.state == VmState::Running {
            return Ok(say(Far::Settled, None));
        }
        let rollout = Some(order.rollout.clone());
        let asked = desk.ask_swap(vm.as_str(), wanted(order), order.id.clone(), rollout);
        Ok(asked_for(order, asked.await.map(drop)))
    }

    /// The same of the host with all its guests.
    async fn answer_of_host(
        &mut self,
        desk: &Desk,
        order: &Order,
        key: &str,
    ) -> Result<Answer, Problem> {
        if let Some(swap) = desk.host.store.host_swap(&order.id).await? {
            return host::of_swap(desk, order, &swap).await;
        }
        if let Some(refused) = self.refused(desk, order, key).await? {
            return Ok(refused);
        }
        host::begin(desk, order).await
    }

    /// The refusal of an order, if it was refused: by this daemon, or by one before it.
    async fn refused(
        &self,
        desk: &Desk,
        order: &Order,
        key: &str,
    ) -> Result<Option<Answer>, Problem> {
        let said = match self.said.get(key) {
            Some(said) => Some(said.clone()),
            None => {
                let entry = desk.fleet.shared.get(key).await?;
                entry.and_then(|entry| serde_json::from_slice(&entry.value).ok())
            }
        };
        Ok(said.filter(|said| said.order == order.id && said.far == Far::Refused))
    }
}

/// An answer to an order.
fn say(order: &Order, far: Far, reason: Option<String>) -> Answer {
    Answer {
        order: order.id.clone(),
        far,
        reason,
        swap: None,
        worst: None,
    }
}

/// The answer to an order whose swap was asked for.
fn asked_for(order: &Order, asked: Result<(), Problem>) -> Answer {
    match asked {
        Ok(()) => say(order, Far::UnderWay, None),
        Err(problem) if problem.code == Code::SwapInProgress => {
            say(order, Far::UnderWay, Some(problem.message))
        }
        // It may be well in a moment, and the rollout has a deadline.
        Err(problem) if matches!(problem.code, Code::StoreFailed | Code::StoreFull) => {
            say(order, Far::UnderWay, Some(problem.message))
        }
        Err(problem) => say(order, Far::Refused, Some(problem.message)),
    }
}

fn wanted(order: &Order) -> NewSwap {
    NewSwap {
        component: VMM.into(),
        to: order.to.clone(),
        budget_ns: None,
        clock: None,
        notice_ns: order.notice_ns,
        no_notice: order.no_notice.clone(),
        allow_downgrade: order.allow_downgrade,
        rehearse: None,
        watch_ns: None,
        way_back: Some(order.way_back),
    }
}

/// What is to be said of an order whose swap is recorded.
async fn of_swap(desk: &Desk, swap: SwapRecord) -> Result<Answer, Problem> {
    let back = match &swap.safeguards.put_back_by {
        Some(back) => desk.host.store.swap(back).await?,
        None => None,
    };
    let is_put_back = back.is_none_or(|back| back.state.is_over());
    let far = match swap.state {
        SwapState::Wanted | SwapState::InProgress | SwapState::InDoubt => Far::UnderWay,
        SwapState::Kept => Far::Kept,
        SwapState::Crashed => Far::Lost,
        SwapState::Moved | SwapState::Resumed if is_settled(&swap) && is_put_back => Far::Settled,
        SwapState::Moved | SwapState::Resumed => Far::There,
    };
    let is_over = swap.state.is_over();
    Ok(Answer {
        order: swap.id.clone(),
        far,
        reason: crate::fleet::driver::reason(&swap),
        swap: is_over.then_some(swap),
        worst: None,
    })
}
