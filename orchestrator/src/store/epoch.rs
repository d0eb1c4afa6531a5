//! The highest epoch of a driver whose word this host has acted on.

use rusqlite::{OptionalExtension, params};

use super::rows::{signed, unsigned};
use super::{Store, StoreError};

impl Store {
    /// Takes note of the epoch of a driver that speaks by the shared store `origin`. `Err(higher)`:
    /// another was heard since, so its word counts for nothing any more.
    pub async fn hear_epoch(
        &self,
        origin: &str,
        epoch: u64,
    ) -> Result<Result<(), u64>, StoreError> {
        let origin = origin.to_owned();
        self.call(move |tx| {
            let query = "SELECT epoch FROM driver_epochs WHERE origin = ?1";
            let known = tx.query_row(query, [&origin], |row| unsigned(row, 0));
            let known = known.optional()?.unwrap_or(0);
            if epoch < known {
                return Ok(Err(known));
            }
            if epoch > known {
                tx.execute(
                    "INSERT OR REPLACE INTO driver_epochs (origin, epoch) VALUES (?1, ?2)",
                    params![origin, signed(epoch)],
                )?;
            }
            Ok(Ok(()))
        })
        .await
    }
}
