//! Releases in the store, and the least versions that may be run.

use rusqlite::{OptionalExtension, Row, params};

use super::rows::{from_json, from_json_option, json, json_option, signed, unsigned};
use super::{Store, StoreError, journal};
use crate::model::{Manifest, Pin, Release, VMM};

fn release(row: &Row<'_>) -> rusqlite::Result<Release> {
    let manifest: Manifest = from_json(row, 0)?;
    Ok(Release {
        manifest: Manifest {
            // The column is what the digest of a binary is compared with.
            sha256: row.get(1)?,
            ..manifest
        },
        added_at_unix_ns: unsigned(row, 2)?,
        signed_by: from_json_option(row, 3)?,
    })
}

fn pin(row: &Row<'_>) -> rusqlite::Result<Pin> {
    Ok(Pin {
        component: row.get(0)?,
        minimum: row.get(1)?,
        pinned_at_unix_ns: unsigned(row, 2)?,
    })
}

const COLUMNS: &str = "SELECT manifest_json, sha256, added_at_unix_ns, signed_json FROM releases";
/// Who is run by a release, or on the way from or to it.
const IN_USE: &str = "SELECT name FROM vms
     WHERE release = ?1 AND state NOT IN ('stopped', 'crashed', 'failed')
     UNION SELECT vm FROM swaps WHERE state IN ('wanted', 'in_progress', 'in_doubt')
     AND ?1 IN (json_extract(from_json, '$.version'), json_extract(to_json, '$.version'))";

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
                "INSERT INTO releases (component, version, sha256, manifest_json,
                                       added_at_unix_ns, signed_json)
                 VALUES (?1, ?2, ?3, ?4, ?5, ?6)",
                params![
                    manifest.component,
                    manifest.version,
                    manifest.sha256,
                    json(manifest)?,
                    signed(added.added_at_unix_ns),
                    json_option(added.signed_by.as_ref())?
                ],
            )?;
            journal::added(tx, &added)
        })
        .await
    }

    /// Forgets one that no guest needs. Otherwise it stays: the names of those that do.
    pub async fn remove_release(&self, version: &str) -> Result<Vec<String>, StoreError> {
        let version = version.to_owned();
        self.call(move |tx| {
            let mut query = tx.prepare(IN_USE)?;
            let names = query.query_map([&version], |row| row.get(0))?;
            let users: Vec<String> = names.collect::<rusqlite::Result<_>>()?;
            if users.is_empty() {
                let delete = "DELETE FROM releases WHERE component = ?1 AND version = ?2";
                tx.execute(delete, params![VMM, version])?;
            }
            Ok(users)
        })
        .await
    }

    /// All pins.
    pub async fn pins(&self) -> Result<Vec<Pin>, StoreError> {
        self.call(|tx| {
            let mut query = tx.prepare("SELECT component, minimum, pinned_at_unix_ns FROM pins")?;
            query.query_map([], pin)?.collect()
        })
        .await
    }

    /// Sets the pin of a component.
    pub async fn set_pin(&self, new: &Pin) -> Result<(), StoreError> {
        let new = new.clone();
        self.call(move |tx| {
            tx.execute(
                "INSERT OR REPLACE INTO pins (component, minimum, pinned_at_unix_ns)
                 VALUES (?1, ?2, ?3)",
                params![new.component, new.minimum, signed(new.pinned_at_unix_ns)],
            )
            .map(drop)
        })
        .await
    }

    /// Takes the pin of a component away.
    pub async fn remove_pin(&self, component: &str) -> Result<(), StoreError> {
        let component = component.to_owned();
        self.call(move |tx| {
            tx.execute("DELETE FROM pins WHERE component = ?1", [component])
                .map(drop)
        })
        .await
    }
}
