//! The shared store in memory: as quick as it is forgetful.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;

use super::mirror::Mirror;
use super::{Change, Committed, Guard, Lease, Snapshot};

#[derive(Debug, Default)]
struct Inner {
    mirror: Mirror,
    /// When each lease ends, and how long it lasts.
    ends: BTreeMap<Lease, (Instant, Duration)>,
}

impl Inner {
    /// What is over by now is over for whoever looks next.
    fn expire(&mut self) {
        let now = Instant::now();
        let over: Vec<Lease> = self
            .ends
            .iter()
            .filter(|(_, (ends, _))| *ends <= now)
            .map(|(lease, _)| *lease)
            .collect();
        for lease in over {
            self.ends.remove(&lease);
            self.mirror.revoke(lease);
        }
    }
}

/// The store.
#[derive(Clone, Debug)]
pub struct Memory {
    inner: Arc<Mutex<Inner>>,
    revision: watch::Sender<u64>,
}

impl Default for Memory {
    fn default() -> Self {
        Self {
            inner: Arc::default(),
            revision: watch::Sender::new(0),
        }
    }
}

impl Memory {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        inner.expire();
        inner
    }

    fn tell(&self, inner: &Inner) {
        self.revision.send_replace(inner.mirror.revision());
    }

    pub(super) fn list(&self, prefix: &str) -> Snapshot {
        self.lock().mirror.list(prefix)
    }

    pub(super) fn commit(&self, changes: &[Change], guard: Option<&Guard>) -> Committed {
        let mut inner = self.lock();
        let done = inner.mirror.commit(changes, guard);
        self.tell(&inner);
        done
    }

    pub(super) fn lease(&self, lasts: Duration) -> Lease {
        let mut inner = self.lock();
        let lease = inner.mirror.lease();
        inner.ends.insert(lease, (Instant::now() + lasts, lasts));
        lease
    }

    pub(super) fn keep(&self, lease: Lease) -> bool {
        let mut inner = self.lock();
        let has = inner.mirror.has(lease);
        if let Some((ends, lasts)) = inner.ends.get_mut(&lease) {
            *ends = Instant::now() + *lasts;
        }
        has
    }

    pub(super) fn revoke(&self, lease: Lease) {
        let mut inner = self.lock();
        inner.ends.remove(&lease);
        inner.mirror.revoke(lease);
        self.tell(&inner);
    }

    pub(super) fn changes(&self) -> watch::Receiver<u64> {
        self.revision.subscribe()
    }
}
