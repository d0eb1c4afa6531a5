//! Pauses, and who listens to what is announced of them.

use rusqlite::params;

use super::rows::{from_json, from_word, json, signed, unsigned};
use super::{Store, StoreError};
use crate::metadata::board::{Board, Changes};

impl Store {
    /// The board, as it was written down last.
    pub async fn board(&self) -> Result<Board, StoreError> {
        self.call(|tx| {
            let mut query = tx.prepare("SELECT name, revision FROM event_groups")?;
            let groups = query.query_map([], |row| Ok((from_word(row, 0)?, unsigned(row, 1)?)))?;
            let groups = groups.collect::<rusqlite::Result<_>>()?;
            let mut query = tx.prepare("SELECT vm, listener_json FROM event_listeners")?;
            let heard = query.query_map([], |row| Ok((from_word(row, 0)?, from_json(row, 1)?)))?;
            let heard = heard.collect::<rusqlite::Result<_>>()?;
            let mut query = tx.prepare("SELECT pause_json FROM pauses")?;
            let pauses = query.query_map([], |row| from_json(row, 0))?;
            let pauses = pauses.collect::<rusqlite::Result<_>>()?;
            Ok(Board::from_parts(groups, heard, pauses))
        })
        .await
    }

    /// Writes down what changed on the board: all of it or nothing.
    pub async fn write_board(&self, changes: Changes) -> Result<(), StoreError> {
        self.call(move |tx| {
            for pause in &changes.pauses {
                let query = "INSERT OR REPLACE INTO pauses (id, pause_json) VALUES (?1, ?2)";
                tx.execute(query, params![pause.id.0, json(pause)?])?;
            }
            for id in &changes.forgotten {
                tx.execute("DELETE FROM pauses WHERE id = ?1", [&id.0])?;
            }
            for (group, revision) in &changes.groups {
                let query = "INSERT OR REPLACE INTO event_groups (name, revision) VALUES (?1, ?2)";
                tx.execute(query, params![group.as_str(), signed(*revision)])?;
            }
            for (vm, listener) in &changes.listeners {
                let query =
                    "INSERT OR REPLACE INTO event_listeners (vm, listener_json) VALUES (?1, ?2)";
                tx.execute(query, params![vm.as_str(), json(listener)?])?;
            }
            for vm in &changes.gone {
                tx.execute("DELETE FROM event_listeners WHERE vm = ?1", [vm.as_str()])?;
            }
            Ok(())
        })
        .await
    }
}
