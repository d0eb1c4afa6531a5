//! VMs in the store.

use rusqlite::types::Type;
use rusqlite::{OptionalExtension, Row, params};
use stillpoint_control::message::ProcessId;
use stillpoint_control::secret::Secret;

use super::rows::{
    from_json, from_json_option, from_word, json, json_option, signed, unsigned, word,
};
use super::{Store, StoreError, journal};
use crate::model::{VmName, VmRecord, VmState, Wanted};

const COLUMNS: &str = "SELECT name, spec_json, release, wanted, state, reason, process_json, \
     secret, swaps, created_at_unix_ns, changed_at_unix_ns, profile_json FROM vms";

fn record(row: &Row<'_>) -> rusqlite::Result<VmRecord> {
    let secret: Vec<u8> = row.get(7)?;
    let secret = Secret::from_bytes(&secret).ok_or_else(|| {
        rusqlite::Error::InvalidColumnType(7, "secret of another length".into(), Type::Blob)
    })?;
    Ok(VmRecord {
        name: from_word(row, 0)?,
        spec: from_json(row, 1)?,
        release: row.get(2)?,
        wanted: from_word(row, 3)?,
        state: from_word(row, 4)?,
        reason: row.get(5)?,
        process: from_json_option(row, 6)?,
        secret,
        swaps: unsigned(row, 8)?,
        created_at_unix_ns: unsigned(row, 9)?,
        changed_at_unix_ns: unsigned(row, 10)?,
        profile: from_json(row, 11)?,
    })
}

/// What is now seen of a VM, to be recorded.
#[derive(Clone, Debug)]
pub struct Observed {
    /// What it is.
    pub state: VmState,
    /// Why.
    pub reason: Option<String>,
    /// Its process.
    pub process: Option<ProcessId>,
    /// When, nanoseconds since the Unix epoch.
    pub at_unix_ns: u64,
}

/// Writes what is seen of a VM.
pub(super) fn write_observed(
    tx: &rusqlite::Transaction<'_>,
    name: &VmName,
    observed: &Observed,
) -> rusqlite::Result<()> {
    tx.execute(
        "UPDATE vms SET state = ?2, reason = ?3, process_json = ?4, changed_at_unix_ns = ?5
         WHERE name = ?1",
        params![
            name.as_str(),
            word(&observed.state)?,
            observed.reason,
            json_option(observed.process.as_ref())?,
            signed(observed.at_unix_ns)
        ],
    )?;
    journal::observed(tx, name, observed)
}

impl Store {
    /// All, by name.
    pub async fn vms(&self) -> Result<Vec<VmRecord>, StoreError> {
        self.call(|tx| {
            let mut query = tx.prepare(&format!("{COLUMNS} ORDER BY name"))?;
            query.query_map([], record)?.collect()
        })
        .await
    }

    /// The one of that name.
    pub async fn vm(&self, name: &VmName) -> Result<Option<VmRecord>, StoreError> {
        let name = name.clone();
        self.call(move |tx| {
            let query = format!("{COLUMNS} WHERE name = ?1");
            tx.query_row(&query, [name.as_str()], record).optional()
        })
        .await
    }

    /// Records a new VM, or a new start of one that is over. `false`: one of that name is
    /// active, and nothing was changed.
    pub async fn put_vm(&self, vm: &VmRecord) -> Result<bool, StoreError> {
        let vm = vm.clone();
        self.call(move |tx| {
            let state: Option<VmState> = tx
                .query_row(
                    "SELECT state FROM vms WHERE name = ?1",
                    [vm.name.as_str()],
                    |row| from_word(row, 0),
                )
                .optional()?;
            if state.is_some_and(VmState::is_active) {
                return Ok(false);
            }
            tx.execute(
                "INSERT OR REPLACE INTO vms (name, spec_json, release, wanted, state, reason, \
                 process_json, secret, swaps, created_at_unix_ns, changed_at_unix_ns, profile_json)
                 VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12)",
                params![
                    vm.name.as_str(),
                    json(&vm.spec)?,
                    vm.release,
                    word(&vm.wanted)?,
                    word(&vm.state)?,
                    vm.reason,
                    json_option(vm.process.as_ref())?,
                    vm.secret.as_bytes().as_slice(),
                    signed(vm.swaps),
                    signed(vm.created_at_unix_ns),
                    signed(vm.changed_at_unix_ns),
                    json(&vm.profile)?
                ],
            )?;
            journal::wanted(tx, &vm)?;
            Ok(true)
        })
        .await
    }

    /// Records that it goes on in this release, after a swap that did not take it along.
    pub async fn revived_by(&self, name: &VmName, release: &str) -> Result<(), StoreError> {
        let (name, release) = (name.clone(), release.to_owned());
        self.call(move |tx| {
            let query = "UPDATE vms SET release = ?2, swaps = swaps + 1 WHERE name = ?1";
            tx.execute(query, params![name.as_str(), release])?;
            Ok(())
        })
        .await
    }

    /// Records what its owner wants.
    pub async fn want(&self, name: &VmName, wanted: Wanted) -> Result<(), StoreError> {
        let name = name.clone();
        self.call(move |tx| {
            let query = "UPDATE vms SET wanted = ?2 WHERE name = ?1";
            tx.execute(query, params![name.as_str(), word(&wanted)?])?;
            match wanted {
                Wanted::Stopped => journal::unwanted(tx, &name),
                Wanted::Running => Ok(()),
            }
        })
        .await
    }

    /// Records what it is.
    pub async fn observe(&self, name: &VmName, observed: Observed) -> Result<(), StoreError> {
        let name = name.clone();
        self.call(move |tx| write_observed(tx, &name, &observed))
            .await
    }

    /// Removes it, unless it is active (then `false`).
    pub async fn remove_vm(&self, name: &VmName) -> Result<bool, StoreError> {
        let name = name.clone();
        self.call(move |tx| {
            let query =
                "DELETE FROM vms WHERE name = ?1 AND state IN ('stopped', 'crashed', 'failed')";
            let was_over = tx.execute(query, [name.as_str()])? == 1;
            if was_over {
                journal::removed(tx, &name)?;
            }
            Ok(was_over)
        })
        .await
    }
}
