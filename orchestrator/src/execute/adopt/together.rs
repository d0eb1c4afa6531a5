//! Guests that are let go together: no VMM of them goes on until all stand at their gates. What the guest of the
//! first does when it runs would keep the processes of the others from getting that far, and they stand still.

use std::sync::Arc;
use std::thread::available_parallelism;
use std::time::Duration;

use tokio::sync::watch;

/// How long one waits for the others: one that hangs holds up nobody for longer.
const PATIENCE: Duration = Duration::from_secs(1);
/// So many for each core go together: of more, the first would wait for what others still have to do.
const PER_CORE: usize = 2;

/// The place of one among those who go together. Dropped, it is waited for no more.
#[derive(Debug)]
pub(in crate::execute) struct Turn {
    here: watch::Receiver<()>,
    all: Arc<watch::Sender<()>>,
}

impl Turn {
    /// Says that this one is there, and waits for the others.
    pub(in crate::execute) async fn come(self) {
        let Self { here, all } = self;
        drop(here);
        let _ = tokio::time::timeout(PATIENCE, all.closed()).await;
    }
}

/// A turn for each of these, in their order: those go together who have the same rank, as far as cores go round.
pub(super) fn turns<R: PartialEq>(ranks: &[R]) -> Vec<Turn> {
    let most = available_parallelism().map_or(1, |cores| cores.get()) * PER_CORE;
    let same = ranks.chunk_by(|one, next| one == next);
    let sets = same.flat_map(|same| same.chunks(most));
    sets.flat_map(|set| {
        let (all, here) = watch::channel(());
        let all = Arc::new(all);
        let turn = move |_: &R| Turn {
            here: here.clone(),
            all: all.clone(),
        };
        // The first handle ends with this closure, when each has its own.
        set.iter().map(turn).collect::<Vec<_>>()
    })
    .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn all_of_a_rank_go_when_the_last_is_there_and_nobody_waits_for_ever() {
        let mut turns = turns(&[1, 1, 0]);
        let (lower, second, first) = (turns.pop(), turns.pop(), turns.pop());
        let [lower, second, first] = [lower, second, first].map(|turn| turn.expect("one each"));
        // Of another rank: it waits for neither.
        let began = tokio::time::Instant::now();
        lower.come().await;
        assert!(began.elapsed() < PATIENCE);
        let waits = tokio::spawn(first.come());
        tokio::task::yield_now().await;
        assert!(!waits.is_finished());
        // One that could not be started is no more waited for.
        drop(second);
        waits.await.expect("it went");
        assert!(began.elapsed() < PATIENCE);
        let mut hung = super::turns(&[0, 0]);
        hung.pop().expect("one each").come().await;
        assert!(began.elapsed() >= PATIENCE);
    }
}
