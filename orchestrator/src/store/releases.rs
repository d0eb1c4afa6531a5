//! Releases in the store.

use rusqlite::{OptionalExtension, Row, params};

use super::rows::{from_json, json, signed, unsigned};
use super::{Store, StoreError, journal};
use crate::model::{Manifest, Release, VMM};

fn release(row: &Row<'_>) -> rusqlite::Result<Release> {
    let manifest: Manifest = from_json(row, 0)?;
    Ok(Release {
        manifest: Manifest {
            // The column is what the digest of a binary is compared with.
            sha256: row.get(1)?,
            ..manifest
        },
        added_at_unix_ns: unsigned(row, 2)?,
    })
}

const COLUMNS: &str = "SELECT manifest_json, sha256, added_at_unix_ns FROM releases";

impl Store {
    /// All, oldest first.
    pub async fn releases(&self) -> Result<Vec<Release>, StoreError> {
        self.call(|tx| {
            let mut query = tx.prepare(&format!("{COLUMNS} ORDER BY added_at_unix_ns, rowid"))?;
            query.query_map([], release)?.collect()
        })
        .await
    }

    /// The VMM's release of that version.
    pub async fn release(&self, version: &str) -> Result<Option<Release>, StoreError> {
        let version = version.to_owned();
        self.call(move |tx| {
            let query = format!("{COLUMNS} WHERE component = ?1 AND version = ?2");
            tx.query_row(&query, params![VMM, version], release)
                .optional()
        })
        .await
    }

    /// Records a new one.
    pub async fn add_release(&self, added: &Release) -> Result<(), StoreError> {
        let added = added.clone();
        self.call(move |tx| {
            let manifest = &added.manifest;
            tx.execute(
                "INSERT INTO releases (component, version, sha256, manifest_json, added_at_unix_ns)
                 VALUES (?1, ?2, ?3, ?4, ?5)",
                params![
                    manifest.component,
                    manifest.version,
                    manifest.sha256,
                    json(manifest)?,
                    signed(added.added_at_unix_ns)
                ],
            )?;
            journal::added(tx, &added)
        })
        .await
    }
}
