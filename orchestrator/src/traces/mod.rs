//! Spans of swaps and rollouts, for a collector of OpenTelemetry (OTLP by HTTP, protobuf).
//!
//! ```text
//!   a swap is over ──▶ hear ──(its record)──▶ swaps ──┐
//!                                                     ├─▶ queue, bounded ──▶ send ──POST /v1/traces──▶ collector
//!   a step of a rollout is committed ──▶ fleet::driver ┘      └ full: dropped, and counted
//! ```
//!
//! Spans are made from records once they are written, so they tell nothing that the records don't. Their ids are
//! made from the records' ids: daemons that know nothing of each other's spans agree on what is part of what, and a
//! rollout over many hosts is one trace. Must never: have a swap or a rollout wait. Who tells of spans puts them into
//! the queue or drops them.

mod hear;
pub(crate) mod ids;
mod send;
mod span;
mod swaps;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

pub(crate) use opentelemetry_proto::tonic::trace::v1::Span;
use tokio::sync::mpsc;

pub use hear::hear;
pub use send::{Collector, NoCollector};
pub(crate) use span::Draft;

/// The most spans that wait to be sent.
const QUEUE: usize = 8192;
/// Between two looks whether all is sent.
const GLANCE: Duration = Duration::from_millis(20);

/// Where spans are told. Clones are the same; the default is nowhere.
#[derive(Clone, Debug, Default)]
pub struct Traces(Option<Arc<Queue>>);

#[derive(Debug)]
struct Queue {
    to: mpsc::Sender<Span>,
    counts: Arc<Counts>,
}

/// What became of spans.
#[derive(Debug, Default)]
struct Counts {
    told: AtomicU64,
    sent: AtomicU64,
    dropped: AtomicU64,
}

/// How many spans there were, for metrics.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SpanCounts {
    /// Taken by the collector.
    pub sent: u64,
    /// Taken by nobody.
    pub dropped: u64,
}

impl Traces {
    /// Spans go to that collector from now on, in the name of that host.
    pub fn to(collector: Collector, host: &str) -> Self {
        let counts = Arc::new(Counts::default());
        let (to, from) = mpsc::channel(QUEUE);
        tokio::spawn(send::send(
            collector,
            send::resource(host),
            from,
            counts.clone(),
        ));
        Self(Some(Arc::new(Queue { to, counts })))
    }

    /// Whether spans go anywhere.
    pub fn is_on(&self) -> bool {
        self.0.is_some()
    }

    /// Tells of spans; waits for nothing.
    pub(crate) fn tell(&self, spans: Vec<Span>) {
        let Some(queue) = &self.0 else {
            return;
        };
        for span in spans {
            queue.counts.told.fetch_add(1, Ordering::Relaxed);
            if queue.to.try_send(span).is_err() {
                queue.counts.dropped.fetch_add(1, Ordering::Relaxed);
            }
        }
    }

    /// So many could not even be made.
    fn missed(&self, spans: u64) {
        if let Some(Queue { counts, .. }) = self.0.as_deref() {
            counts.told.fetch_add(spans, Ordering::Relaxed);
            counts.dropped.fetch_add(spans, Ordering::Relaxed);
        }
    }

    /// What became of them up to now.
    pub fn counts(&self) -> SpanCounts {
        let Some(Queue { counts, .. }) = self.0.as_deref() else {
            return SpanCounts::default();
        };
        SpanCounts {
            sent: counts.sent.load(Ordering::Relaxed),
            dropped: counts.dropped.load(Ordering::Relaxed),
        }
    }

    /// Waits until all that was told is sent or dropped, and no longer than that.
    pub async fn flush(&self, longest: Duration) {
        let Some(Queue { counts, .. }) = self.0.as_deref() else {
            return;
        };
        let all = async {
            loop {
                let SpanCounts { sent, dropped } = self.counts();
                if sent + dropped >= counts.told.load(Ordering::Relaxed) {
                    return;
                }
                tokio::time::sleep(GLANCE).await;
            }
        };
        // What a collector does not take in that time is lost with the daemon.
        let _ = tokio::time::timeout(longest, all).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_collector_that_never_answers_costs_spans_and_no_time() {
        // Takes connections into its backlog, and says nothing.
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("bind");
        let at = listener.local_addr().expect("address");
        let traces = Traces::to(format!("http://{at}").parse().expect("an address"), "h1");
        let spans = 3 * QUEUE;
        let began = std::time::Instant::now();
        traces.tell(vec![Span::default(); spans]);
        assert!(began.elapsed() < Duration::from_secs(1), "it waited");
        let SpanCounts { sent, dropped } = traces.counts();
        assert_eq!(sent, 0);
        let full = u64::try_from(spans - QUEUE).expect("few");
        assert_eq!(dropped, full, "all beyond the queue");
        traces.flush(Duration::from_millis(50)).await;
        Traces::default().tell(vec![Span::default()]);
        assert_eq!(Traces::default().counts(), SpanCounts::default());
    }
}
