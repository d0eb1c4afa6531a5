//! Hears of swaps of this host that are over, and tells their spans.

use std::collections::VecDeque;

use tokio::sync::broadcast::Receiver;
use tokio::sync::broadcast::error::RecvError;

use super::{Traces, swaps};
use crate::execute::unix_ns;
use crate::model::{Event, SwapId};
use crate::store::{Store, StoreError};

/// So many are remembered: that a swap is over is told more than once.
const REMEMBERED: usize = 1024;

/// What was told of a swap.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Told {
    /// Itself.
    Swap,
    /// The watch after it.
    Watch,
}

/// Tells of swaps of this host until the daemon ends.
pub async fn hear(store: Store, mut events: Receiver<Event>, traces: Traces) {
    let mut hearer = Hearer {
        store,
        traces,
        began: unix_ns(),
        told: VecDeque::new(),
    };
    loop {
        let heard = match events.recv().await {
            Ok(Event::Swap { swap, state, .. }) if state.is_over() => hearer.swap(swap).await,
            Ok(Event::HostSwap { swap, state, .. }) if state.is_over() => hearer.host(swap).await,
            Ok(_) => Ok(()),
            // What they were about is not known; one span each is as near as can be.
            Err(RecvError::Lagged(events)) => {
                hearer.traces.missed(events);
                Ok(())
            }
            Err(RecvError::Closed) => return,
        };
        if let Err(error) = heard {
            tracing::warn!("no spans of a swap: {error}");
            hearer.traces.missed(1);
        }
    }
}

struct Hearer {
    store: Store,
    traces: Traces,
    /// What ended before was told by the daemon before this one.
    began: u64,
    told: VecDeque<(SwapId, Told)>,
}

impl Hearer {
    async fn swap(&mut self, id: SwapId) -> Result<(), StoreError> {
        let Some(swap) = self.store.swap(&id).await? else {
            return Ok(());
        };
        if swap.ended_at_unix_ns.is_some_and(|at| at >= self.began) && self.is_new(&id, Told::Swap)
        {
            self.traces.tell(swaps::of_swap(&swap));
        }
        let watch = swaps::of_watch(&swap).filter(|watch| watch.end_time_unix_nano >= self.began);
        if let Some(watch) = watch
            && self.is_new(&id, Told::Watch)
        {
            self.traces.tell(vec![watch]);
        }
        Ok(())
    }

    async fn host(&mut self, id: SwapId) -> Result<(), StoreError> {
        let swap = self.store.host_swap(&id).await?;
        if let Some(swap) = swap
            && self.is_new(&id, Told::Swap)
        {
            self.traces.tell(swaps::of_host_swap(&swap));
        }
        Ok(())
    }

    fn is_new(&mut self, id: &SwapId, what: Told) -> bool {
        if self.told.iter().any(|(told, of)| told == id && *of == what) {
            return false;
        }
        self.told.push_back((id.clone(), what));
        if self.told.len() > REMEMBERED {
            self.told.pop_front();
        }
        true
    }
}
