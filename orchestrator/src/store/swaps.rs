//! Swaps in the store.

use rusqlite::{OptionalExtension, Row, params};

use super::rows::{
    from_json, from_json_option, from_word, from_word_option, json, json_option, signed, unsigned,
    unsigned_option, word,
};
use super::vms::{Observed, write_observed};
use super::{Store, StoreError, journal};
use crate::model::{SwapId, SwapRecord, SwapState, VmName};

pub(super) const COLUMNS: &str = "SELECT id, vm, component, from_json, to_json, state, step, reason, \
     budget_ns, successor_json, epoch_before, asked_at_unix_ns, ended_at_unix_ns, report_json, \
     clock, notice_ns, no_notice, part_of, safeguards_json, rollout FROM swaps";
pub(super) const OPEN: &str = "state IN ('wanted', 'in_progress', 'in_doubt')";

pub(super) fn record(row: &Row<'_>) -> rusqlite::Result<SwapRecord> {
    Ok(SwapRecord {
        id: from_word(row, 0)?,
        vm: from_word(row, 1)?,
        component: row.get(2)?,
        from: from_json(row, 3)?,
        to: from_json(row, 4)?,
        state: from_word(row, 5)?,
        step: row.get(6)?,
        reason: row.get(7)?,
        budget_ns: unsigned_option(row, 8)?,
        successor: from_json_option(row, 9)?,
        epoch_before: unsigned_option(row, 10)?,
        asked_at_unix_ns: unsigned(row, 11)?,
        ended_at_unix_ns: unsigned_option(row, 12)?,
        report: from_json_option(row, 13)?,
        clock: from_word_option(row, 14)?,
        notice_ns: unsigned_option(row, 15)?,
        no_notice: row.get(16)?,
        part_of: from_word_option(row, 17)?,
        safeguards: from_json_option(row, 18)?.unwrap_or_default(),
        rollout: from_word_option(row, 19)?,
    })
}

pub(super) fn write(tx: &rusqlite::Transaction<'_>, swap: &SwapRecord) -> rusqlite::Result<()> {
    tx.execute(
        "INSERT OR REPLACE INTO swaps (id, vm, component, from_json, to_json, state, step, \
         reason, budget_ns, successor_json, epoch_before, asked_at_unix_ns, ended_at_unix_ns, \
         report_json, clock, notice_ns, no_notice, part_of, safeguards_json, rollout) \
         VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13, ?14, ?15, ?16, ?17, \
         ?18, ?19, ?20)",
        params![
            swap.id.0,
            swap.vm.as_str(),
            swap.component,
            json(&swap.from)?,
            json(&swap.to)?,
            word(&swap.state)?,
            swap.step,
            swap.reason,
            swap.budget_ns.map(signed),
            json_option(swap.successor.as_ref())?,
            swap.epoch_before.map(signed),
            signed(swap.asked_at_unix_ns),
            swap.ended_at_unix_ns.map(signed),
            json_option(swap.report.as_ref())?,
            swap.clock.as_ref().map(word).transpose()?,
            swap.notice_ns.map(signed),
            swap.no_notice,
            swap.part_of.as_ref().map(|id| id.0.as_str()),
            json(&swap.safeguards)?,
            swap.rollout.as_ref().map(|id| id.0.as_str()),
        ],
    )?;
    journal::got_on(tx, swap)
}

impl Store {
    /// Records a wanted swap. `false`: another of that VM isn't over, and nothing was changed.
    pub async fn add_swap(&self, swap: &SwapRecord) -> Result<bool, StoreError> {
        let swap = swap.clone();
        self.call(move |tx| {
            let query = format!("SELECT 1 FROM swaps WHERE vm = ?1 AND {OPEN}");
            let open = tx.query_row(&query, [swap.vm.as_str()], |_| Ok(()));
            if open.optional()?.is_some() {
                return Ok(false);
            }
            write(tx, &swap)?;
            Ok(true)
        })
        .await
    }

    /// Records how far it is.
    pub async fn update_swap(&self, swap: &SwapRecord) -> Result<(), StoreError> {
        let swap = swap.clone();
        self.call(move |tx| write(tx, &swap)).await
    }

    /// Records the end of a swap together with what it made of the VM: both or neither, so a
    /// daemon that dies in between finds the swap unfinished and settles it again.
    pub async fn end_swap(
        &self,
        swap: &SwapRecord,
        vm: Option<Observed>,
    ) -> Result<(), StoreError> {
        let swap = swap.clone();
        self.call(move |tx| {
            write(tx, &swap)?;
            if swap.state == SwapState::Moved {
                let query = "UPDATE vms SET release = ?2, swaps = swaps + 1 WHERE name = ?1";
                tx.execute(query, params![swap.vm.as_str(), swap.to.version])?;
            }
            vm.map_or(Ok(()), |observed| write_observed(tx, &swap.vm, &observed))
        })
        .await
    }

    /// Records that the way back of `first` is wanted: both or neither. `false`: another swap of that
    /// VM isn't over, and nothing was changed.
    pub async fn put_back(
        &self,
        first: &SwapRecord,
        back: &SwapRecord,
    ) -> Result<bool, StoreError> {
        let (first, back) = (first.clone(), back.clone());
        self.call(move |tx| {
            let query = format!("SELECT 1 FROM swaps WHERE vm = ?1 AND {OPEN}");
            let open = tx.query_row(&query, [back.vm.as_str()], |_| Ok(()));
            if open.optional()?.is_some() {
                return Ok(false);
            }
            write(tx, &first)?;
            write(tx, &back)?;
            Ok(true)
        })
        .await
    }

    /// The VM's swap after which it is still watched.
    pub async fn watched_swap(&self, vm: &VmName) -> Result<Option<SwapRecord>, StoreError> {
        let vm = vm.clone();
        self.call(move |tx| {
            let query = format!(
                "{COLUMNS} WHERE vm = ?1 AND state = 'moved' AND \
                 json_extract(safeguards_json, '$.health.state') IN ('watching', 'well_so_far') \
                 ORDER BY asked_at_unix_ns DESC LIMIT 1"
            );
            tx.query_row(&query, [vm.as_str()], record).optional()
        })
        .await
    }

    /// The one of that id.
    pub async fn swap(&self, id: &SwapId) -> Result<Option<SwapRecord>, StoreError> {
        let id = id.0.clone();
        self.call(move |tx| {
            tx.query_row(&format!("{COLUMNS} WHERE id = ?1"), [id], record)
                .optional()
        })
        .await
    }

    /// The VM's swap that isn't over.
    pub async fn open_swap(&self, vm: &VmName) -> Result<Option<SwapRecord>, StoreError> {
        let vm = vm.clone();
        self.call(move |tx| {
            let query = format!("{COLUMNS} WHERE vm = ?1 AND {OPEN}");
            tx.query_row(&query, [vm.as_str()], record).optional()
        })
        .await
    }

    /// Each VM's last swap.
    pub async fn last_swaps(&self) -> Result<Vec<SwapRecord>, StoreError> {
        self.call(move |tx| {
            let query = format!(
                "{COLUMNS} s WHERE NOT EXISTS (SELECT 1 FROM swaps later WHERE later.vm = s.vm AND \
                 (later.asked_at_unix_ns, later.rowid) > (s.asked_at_unix_ns, s.rowid))"
            );
            tx.prepare(&query)?.query_map([], record)?.collect()
        })
        .await
    }

    /// Swaps, of one VM or all, oldest first; with their reports.
    pub async fn swaps(&self, vm: Option<&VmName>) -> Result<Vec<SwapRecord>, StoreError> {
        let vm = vm.map(|name| name.as_str().to_owned());
        self.call(move |tx| {
            let query =
                format!("{COLUMNS} WHERE ?1 IS NULL OR vm = ?1 ORDER BY asked_at_unix_ns, rowid");
            tx.prepare(&query)?.query_map([vm], record)?.collect()
        })
        .await
    }
}
