//! What is added up for a monitoring system, without reading whole reports.

use std::time::Duration;

use super::rows::{from_word, unsigned_option};
use super::{Store, StoreError};
use crate::metrics::SwapFigures;

impl Store {
    /// All swaps that are over.
    pub async fn swap_figures(&self) -> Result<Vec<SwapFigures>, StoreError> {
        self.call(|tx| {
            let mut query = tx.prepare(
                "SELECT component, state, json_extract(report_json, '$.blackout.host_ns'),
                    (SELECT sum(json_extract(phase.value, '$.duration_ns'))
                     FROM json_each(report_json, '$.phases') AS phase
                     WHERE NOT json_extract(phase.value, '$.in_blackout')),
                    abs(json_extract(report_json, '$.clock.kvmclock_error_ns'))
                 FROM swaps WHERE state IN ('moved', 'kept', 'resumed', 'crashed')",
            )?;
            let rows = query.query_map([], |row| {
                let time = |column| -> rusqlite::Result<_> {
                    Ok(unsigned_option(row, column)?.map(Duration::from_nanos))
                };
                Ok(SwapFigures {
                    component: row.get(0)?,
                    state: from_word(row, 1)?,
                    blackout: time(2)?,
                    brownout: time(3)?,
                    clock_error: time(4)?,
                })
            })?;
            rows.collect()
        })
        .await
    }
}
