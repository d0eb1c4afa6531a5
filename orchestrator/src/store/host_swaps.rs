//! Swaps of the host in the store.

use rusqlite::{OptionalExtension, params};

use super::rows::{from_json, json};
use super::swaps::{COLUMNS, OPEN, record, write as write_part};
use super::{Store, StoreError};
use crate::model::{HostSwap, SwapId, SwapRecord};

/// What stands in the way of a swap of the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Busy {
    /// Another one, which isn't over.
    Host(SwapId),
    /// A swap of this VM, which isn't over.
    Vm(String),
}

fn write(tx: &rusqlite::Transaction<'_>, swap: &HostSwap) -> rusqlite::Result<()> {
    tx.execute(
        "INSERT OR REPLACE INTO host_swaps (id, open, swap_json) VALUES (?1, ?2, ?3)",
        params![swap.id.0, !swap.state.is_over(), json(swap)?],
    )
    .map(drop)
}

impl Store {
    /// Records a wanted swap of the host and each guest's part, all or nothing.
    pub async fn add_host_swap(
        &self,
        swap: &HostSwap,
        parts: &[SwapRecord],
    ) -> Result<Result<(), Busy>, StoreError> {
        let (swap, parts) = (swap.clone(), parts.to_vec());
        self.call(move |tx| {
            let query = "SELECT id FROM host_swaps WHERE open = 1";
            let open = tx.query_row(query, [], |row| row.get(0)).optional()?;
            if let Some(id) = open {
                return Ok(Err(Busy::Host(SwapId(id))));
            }
            let query = format!("SELECT 1 FROM swaps WHERE vm = ?1 AND {OPEN}");
            for part in &parts {
                let open = tx.query_row(&query, [part.vm.as_str()], |_| Ok(()));
                if open.optional()?.is_some() {
                    return Ok(Err(Busy::Vm(part.vm.to_string())));
                }
            }
            write(tx, &swap)?;
            parts.iter().try_for_each(|part| write_part(tx, part))?;
            Ok(Ok(()))
        })
        .await
    }

    /// Records how far it is, and its parts.
    pub async fn update_host_swap(
        &self,
        swap: &HostSwap,
        parts: &[SwapRecord],
    ) -> Result<(), StoreError> {
        let (swap, parts) = (swap.clone(), parts.to_vec());
        self.call(move |tx| {
            write(tx, &swap)?;
            parts.iter().try_for_each(|part| write_part(tx, part))
        })
        .await
    }

    /// The one of that id.
    pub async fn host_swap(&self, id: &SwapId) -> Result<Option<HostSwap>, StoreError> {
        let id = id.0.clone();
        self.call(move |tx| {
            let query = "SELECT swap_json FROM host_swaps WHERE id = ?1";
            tx.query_row(query, [id], |row| from_json(row, 0))
                .optional()
        })
        .await
    }

    /// All of them, oldest first.
    pub async fn host_swaps(&self) -> Result<Vec<HostSwap>, StoreError> {
        self.call(|tx| {
            let mut query = tx.prepare("SELECT swap_json FROM host_swaps ORDER BY id")?;
            query.query_map([], |row| from_json(row, 0))?.collect()
        })
        .await
    }

    /// The guests' parts of one.
    pub async fn parts(&self, of: &SwapId) -> Result<Vec<SwapRecord>, StoreError> {
        let of = of.0.clone();
        self.call(move |tx| {
            let query = format!("{COLUMNS} WHERE part_of = ?1 ORDER BY vm");
            tx.prepare(&query)?.query_map([of], record)?.collect()
        })
        .await
    }

    /// The guests' parts of one, that are not over.
    pub async fn open_parts(&self, of: &SwapId) -> Result<Vec<SwapRecord>, StoreError> {
        let mut parts = self.parts(of).await?;
        parts.retain(|swap| !swap.state.is_over());
        Ok(parts)
    }
}
