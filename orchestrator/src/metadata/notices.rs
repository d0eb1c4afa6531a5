//! The board with its store: what is changed on it is on disk before anybody sees it.
//!
//! Before: nothing else writes the store's board. After a change that returned `Ok`, a daemon that
//! starts anew shows the same ids, states, approvals and incarnations.

use std::collections::HashMap;
use std::sync::{Arc, PoisonError};
use std::time::Instant;

use tokio::sync::{Mutex, broadcast, watch};

use super::board::Board;
use crate::execute::unix_ns;
use crate::model::{Event, Pause, VmName};
use crate::store::{Store, StoreError};

/// The board of this host. Clones are the same one.
#[derive(Clone, Debug)]
pub struct Notices(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    store: Store,
    board: Mutex<Board>,
    changes: watch::Sender<u64>,
    events: broadcast::Sender<Event>,
    looks: std::sync::Mutex<HashMap<VmName, Look>>,
}

/// When a VM looked last, and whether it looks right now.
#[derive(Debug, Default)]
struct Look {
    /// When it was answered last.
    answered: Option<Instant>,
    /// Requests of it that have what there is, and wait for something else.
    waiting: usize,
}

impl Notices {
    /// The board as it was written down last; `events` hears what changes on it.
    pub async fn open(store: &Store, events: broadcast::Sender<Event>) -> Result<Self, StoreError> {
        let board = store.board().await?;
        Ok(Self(Arc::new(Shared {
            store: store.clone(),
            board: Mutex::new(board),
            changes: watch::channel(0).0,
            events,
            looks: std::sync::Mutex::default(),
        })))
    }

    /// Looks at the board.
    pub async fn read<T>(&self, look: impl FnOnce(&Board) -> T) -> T {
        look(&*self.0.board.lock().await)
    }

    /// Changes the board; `act` is told the time. On `Err` nothing was changed.
    pub async fn change<T>(&self, act: impl FnOnce(&mut Board, u64) -> T) -> Result<T, StoreError> {
        let mut board = self.0.board.lock().await;
        let mut next = board.clone();
        let result = act(&mut next, unix_ns());
        let changes = next.take_changes();
        if changes == super::board::Changes::default() {
            return Ok(result);
        }
        let pauses = changes.pauses.clone();
        self.0.store.write_board(changes).await?;
        *board = next;
        drop(board);
        self.0.changes.send_modify(|count| *count += 1);
        for pause in &pauses {
            self.tell(pause);
        }
        Ok(result)
    }

    /// Changes with every change of the board.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.0.changes.subscribe()
    }

    /// Notes that a VM asks. What can't be written down is no reason not to answer.
    pub(super) async fn listen(&self, facts: &super::instance::Facts) {
        let (vm, group) = (facts.name.clone(), facts.group.clone());
        if self
            .read(|board| board.is_due(&vm, &group, unix_ns()))
            .await
            && let Err(error) = self
                .change(|board, now| board.listen(&vm, &group, now))
                .await
        {
            tracing::warn!(%vm, "that it listens for events was not recorded: {error}");
        }
    }

    /// Notes that a VM was answered.
    pub(super) fn answered(&self, vm: &VmName) {
        self.looks().entry(vm.clone()).or_default().answered = Some(Instant::now());
    }

    /// Notes, until it is dropped, that a VM has what there is and waits for something else.
    pub(super) fn waits(&self, vm: &VmName) -> Waits {
        self.looks().entry(vm.clone()).or_default().waiting += 1;
        let vm = vm.clone();
        Waits {
            notices: self.clone(),
            vm,
        }
    }

    /// Whether any of these VMs has seen what there is since then.
    pub fn was_seen(&self, by: &[VmName], since: Instant) -> bool {
        let looks = self.looks();
        by.iter()
            .filter_map(|vm| looks.get(vm))
            .any(|look| look.waiting > 0 || look.answered.is_some_and(|at| at >= since))
    }

    fn looks(&self) -> std::sync::MutexGuard<'_, HashMap<VmName, Look>> {
        self.0.looks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Forgets a VM that is no more.
    pub async fn forget(&self, vm: &VmName) -> Result<(), StoreError> {
        self.looks().remove(vm);
        self.change(|board, _| board.forget(vm)).await
    }

    fn tell(&self, pause: &Pause) {
        for notice in &pause.notices {
            for vm in &notice.vms {
                // Nobody may be listening.
                let _ = self.0.events.send(Event::Notice {
                    vm: vm.clone(),
                    notice: notice.event.clone(),
                    swap: pause.swap.clone(),
                    state: pause.state,
                    not_before_unix_s: pause.not_before_unix_s,
                    approved: notice.approval.is_some(),
                });
            }
        }
    }
}

/// A VM that waits for something else than it has.
#[derive(Debug)]
pub(super) struct Waits {
    notices: Notices,
    vm: VmName,
}

impl Drop for Waits {
    fn drop(&mut self) {
        if let Some(look) = self.notices.looks().get_mut(&self.vm) {
            look.waiting = look.waiting.saturating_sub(1);
        }
    }
}
