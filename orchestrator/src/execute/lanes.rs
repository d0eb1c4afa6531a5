//! Swaps of one host, side by side only as far as its cores go round ([`crate::plan::lanes`]).
//!
//! Whoever asks first goes first. A way back goes before all that have not begun: its guest isn't well.

use std::sync::Arc;
use std::thread::available_parallelism;

use tokio::sync::{Mutex, OwnedSemaphorePermit, Semaphore};

use crate::plan::lanes::width;

/// The lanes of a host. Clones are the same ones.
#[derive(Clone, Debug)]
pub struct Lanes {
    cores: u32,
    free: Arc<Semaphore>,
    /// At most one ordinary swap stands before the semaphore, whose queue has no order but that of arrival: who
    /// is in a hurry has that one before it, and not fifty.
    queue: Arc<Mutex<()>>,
}

/// Cores that one swap has for itself, until this is dropped.
#[derive(Debug)]
pub struct Lane {
    _cores: OwnedSemaphorePermit,
}

/// Who goes before whom.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hurry {
    /// In the order in which they came.
    None,
    /// A guest that isn't well is put back.
    WayBack,
}

impl Lanes {
    /// Those of this host, as far as this process may use its cores.
    pub fn of_host() -> Self {
        Self::of(available_parallelism().map_or(1, |cores| cores.get()))
    }

    fn of(cores: usize) -> Self {
        let cores = u32::try_from(cores).unwrap_or(u32::MAX).min(1 << 16);
        Self {
            cores,
            free: Arc::new(Semaphore::new(cores as usize)),
            queue: Arc::default(),
        }
    }

    /// Waits until there is room for a guest with so many vCPUs.
    pub async fn enter(&self, vcpus: u8, hurry: Hurry) -> Lane {
        let _turn = match hurry {
            Hurry::None => Some(self.queue.lock().await),
            Hurry::WayBack => None,
        };
        let cores = Arc::clone(&self.free);
        let cores = cores.acquire_many_owned(width(self.cores, vcpus)).await;
        Lane {
            #[allow(clippy::expect_used)] // Nothing ever closes it.
            _cores: cores.expect("the semaphore is never closed"),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::time::timeout;

    use super::*;

    const SOON: Duration = Duration::from_millis(50);

    #[tokio::test]
    async fn as_many_as_cores_go_round() {
        let lanes = Lanes::of(4);
        let first = lanes.enter(1, Hurry::None).await;
        let _second = lanes.enter(1, Hurry::None).await;
        let third = lanes.enter(1, Hurry::None);
        tokio::pin!(third);
        timeout(SOON, &mut third).await.expect_err("no room");
        drop(first);
        timeout(SOON, third).await.expect("room again");
    }

    #[tokio::test]
    async fn a_wide_one_is_not_kept_waiting_by_narrow_ones_that_came_later() {
        let lanes = Lanes::of(4);
        let narrow = lanes.enter(1, Hurry::None).await;
        let wide = tokio::spawn({
            let lanes = lanes.clone();
            async move { lanes.enter(8, Hurry::None).await }
        });
        tokio::task::yield_now().await;
        let later = lanes.enter(1, Hurry::None);
        tokio::pin!(later);
        timeout(SOON, &mut later)
            .await
            .expect_err("behind the wide one");
        drop(narrow);
        let wide = timeout(SOON, wide).await.expect("all is free").expect("it");
        timeout(SOON, &mut later).await.expect_err("none is free");
        drop(wide);
        timeout(SOON, later).await.expect("its turn");
    }

    #[tokio::test]
    async fn a_way_back_has_one_before_it_and_not_all() {
        let lanes = Lanes::of(2);
        let going = lanes.enter(1, Hurry::None).await;
        let ended = Arc::new(Mutex::new(Vec::new()));
        let mut all = Vec::new();
        for name in ["first", "second", "third"] {
            let (lanes, ended) = (lanes.clone(), Arc::clone(&ended));
            all.push(tokio::spawn(async move {
                let lane = lanes.enter(1, Hurry::None).await;
                ended.lock().await.push(name);
                drop(lane);
            }));
            tokio::task::yield_now().await;
        }
        let (back, seen) = (lanes.clone(), Arc::clone(&ended));
        all.push(tokio::spawn(async move {
            let lane = back.enter(1, Hurry::WayBack).await;
            seen.lock().await.push("back");
            drop(lane);
        }));
        tokio::task::yield_now().await;
        drop(going);
        for task in all {
            task.await.expect("a task");
        }
        assert_eq!(*ended.lock().await, ["first", "back", "second", "third"]);
    }
}
