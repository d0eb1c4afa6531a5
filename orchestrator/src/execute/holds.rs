//! Guests that stand still until an operator lets them go.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;
use tokio::time::Instant;

use crate::model::SwapId;

/// What waits to be let go. Clones are the same one.
#[derive(Clone, Debug, Default)]
pub struct Holds(Arc<Mutex<HashMap<SwapId, Arc<Notify>>>>);

impl Holds {
    fn waiting(&self) -> MutexGuard<'_, HashMap<SwapId, Arc<Notify>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until it is let go; `false`: nobody did before the deadline.
    pub(super) async fn wait(&self, swap: &SwapId, deadline: Instant) -> bool {
        let let_go = Arc::new(Notify::new());
        self.waiting().insert(swap.clone(), Arc::clone(&let_go));
        let ended = tokio::time::timeout_at(deadline, let_go.notified()).await;
        self.waiting().remove(swap);
        ended.is_ok()
    }

    /// Lets it go; `false`: nothing of that id waits.
    pub fn let_go(&self, swap: &SwapId) -> bool {
        let waiting = self.waiting();
        let found = waiting.get(swap);
        if let Some(found) = found {
            found.notify_one();
        }
        found.is_some()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[tokio::test]
    async fn one_is_let_go_and_the_other_is_not() {
        let holds = Holds::default();
        let (a, b) = (SwapId("a".into()), SwapId("b".into()));
        assert!(!holds.let_go(&a), "nothing waits yet");
        let far = Instant::now() + Duration::from_secs(60);
        let (waiting, of) = (holds.clone(), a.clone());
        let waiter = tokio::spawn(async move { waiting.wait(&of, far).await });
        while !holds.let_go(&a) {
            assert!(!holds.let_go(&b));
            tokio::task::yield_now().await;
        }
        assert!(waiter.await.expect("a waiter"));
        assert!(!holds.wait(&b, Instant::now()).await);
        assert!(!holds.let_go(&b), "it waits no more");
    }
}
