//! What Prometheus is told, at `/metrics` (text format 1.0 of OpenMetrics, by the crate `prometheus-client`).
//!
//! Everything is counted anew from the store at each scrape: what is told is what is on record, and a daemon
//! that starts anew goes on where the last one was. Figures are of finished swaps, by what their reports say.
//!
//! | module | what it holds |
//! |---|---|
//! | [`families`] | the metrics, and how a record counts |
//! | [`serve`] | the listener, which answers this one question and no other |

mod families;
pub mod serve;

use crate::metadata::board::Board;
use crate::metadata::notices::Notices;
use crate::store::{Store, StoreError};

pub use families::{Records, render};

/// What the scrape at this moment is told.
pub async fn scrape(store: &Store, notices: &Notices) -> Result<String, StoreError> {
    let all = |board: &Board| board.all().into_iter().cloned().collect();
    let records = Records {
        vms: store.vms().await?,
        swaps: store.swaps(None).await?,
        host_swaps: store.host_swaps().await?,
        pauses: notices.read(all).await,
    };
    Ok(render(&records))
}
