//! The shared store of a host that is alone: in the file that the daemon has anyhow.
//!
//! All records are held in memory; those that must outlive the daemon are in the file before a commit is
//! answered. One daemon has the file, by its lock, so a lease lasts as long as the daemon: the next
//! one finds none.
//!
//! Revisions must rise from daemon to daemon, though most of them are never written: they begin with
//! the number of the era, which is raised on disk by the first commit of a daemon that is written.

use std::sync::Arc;

use rusqlite::{Transaction, params};
use tokio::sync::{Mutex, watch};

use super::super::rows::{signed, unsigned};
use super::mirror::Mirror;
use super::{Become, Change, Committed, Entry, Guard, Keep, Lease, Snapshot};
use crate::store::{Store, StoreError};

/// Bits of a revision that count commits within an era: one a microsecond for years.
const ERA_SHIFT: u32 = 40;

/// The store.
#[derive(Clone, Debug)]
pub struct Sqlite {
    store: Store,
    // Held over the write: commits come one after the other, in the file as in here.
    mirror: Arc<Mutex<Mirror>>,
    era: u64,
    revision: watch::Sender<u64>,
}

impl Sqlite {
    /// The records that are in `store`.
    pub async fn open(store: &Store) -> Result<Self, StoreError> {
        let (era, entries) = store
            .call(|tx| {
                let query = "SELECT era FROM shared_era";
                let era: u64 = tx.query_row(query, [], |row| unsigned(row, 0))?;
                let mut query = tx.prepare("SELECT key, value, version, created FROM shared")?;
                let entries = query.query_map([], |row| {
                    Ok(Entry {
                        key: row.get(0)?,
                        value: row.get(1)?,
                        version: unsigned(row, 2)?,
                        created: unsigned(row, 3)?,
                    })
                })?;
                let entries: Vec<Entry> = entries.collect::<rusqlite::Result<_>>()?;
                Ok((era + 1, entries))
            })
            .await?;
        let mut mirror = Mirror::at(era << ERA_SHIFT);
        for entry in entries {
            mirror.load(entry);
        }
        Ok(Self {
            store: store.clone(),
            revision: watch::Sender::new(mirror.revision()),
            mirror: Arc::new(Mutex::new(mirror)),
            era,
        })
    }

    pub(super) async fn list(&self, prefix: &str) -> Result<Snapshot, StoreError> {
        Ok(self.mirror.lock().await.list(prefix))
    }

    pub(super) async fn commit(
        &self,
        changes: Vec<Change>,
        guard: Option<&Guard>,
    ) -> Result<Committed, StoreError> {
        let (this, guard) = (self.clone(), guard.cloned());
        // Whoever asked may go in the middle: file and memory must not come apart for that.
        let made = tokio::spawn(async move { this.make(changes, guard.as_ref()).await });
        made.await.unwrap_or(Err(StoreError::Closed))
    }

    async fn make(
        &self,
        changes: Vec<Change>,
        guard: Option<&Guard>,
    ) -> Result<Committed, StoreError> {
        let mut mirror = self.mirror.lock().await;
        if !mirror.allows(&changes, guard) {
            return Ok(Committed::Refused);
        }
        let rows = changes.iter().filter_map(|change| Row::of(change, &mirror));
        let rows: Vec<Row> = rows.collect();
        // On disk first: what is not there has not been done.
        if !rows.is_empty() {
            let era = self.era;
            self.store.call(move |tx| write(tx, era, &rows)).await?;
        }
        let done = mirror.commit(&changes, guard);
        self.revision.send_replace(mirror.revision());
        Ok(done)
    }

    pub(super) async fn lease(&self) -> Result<Lease, StoreError> {
        Ok(self.mirror.lock().await.lease())
    }

    pub(super) async fn revoke(&self, lease: Lease) {
        let mut mirror = self.mirror.lock().await;
        mirror.revoke(lease);
        self.revision.send_replace(mirror.revision());
    }

    pub(super) fn changes(&self) -> watch::Receiver<u64> {
        self.revision.subscribe()
    }
}

/// A record's row in the file; no value if it goes.
struct Row {
    key: String,
    kept: Option<Entry>,
}

impl Row {
    /// What a change, made next, makes of the file; `None` for what is not kept there.
    fn of(change: &Change, before: &Mirror) -> Option<Self> {
        let key = change.key.clone();
        let version = before.revision() + 1;
        let kept = match &change.to {
            Become::Value(_, Keep::Retold | Keep::With(_)) => return None,
            Become::Gone => None,
            Become::Value(value, Keep::Always) => Some(Entry {
                key: key.clone(),
                value: value.clone(),
                version,
                created: before.created(&key).unwrap_or(version),
            }),
        };
        Some(Self { key, kept })
    }
}

fn write(tx: &Transaction<'_>, era: u64, rows: &[Row]) -> rusqlite::Result<()> {
    tx.execute(
        "UPDATE shared_era SET era = ?1 WHERE era < ?1",
        [signed(era)],
    )?;
    for row in rows {
        match &row.kept {
            None => tx.execute("DELETE FROM shared WHERE key = ?1", [&row.key])?,
            Some(entry) => tx.execute(
                "INSERT OR REPLACE INTO shared (key, value, version, created)
                 VALUES (?1, ?2, ?3, ?4)",
                params![
                    entry.key,
                    entry.value,
                    signed(entry.version),
                    signed(entry.created)
                ],
            )?,
        };
    }
    Ok(())
}
